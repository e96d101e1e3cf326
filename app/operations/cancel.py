"""`run.cancel`: end a run. One that has ended is answered as it is; the first reason is kept."""

from app import changes
from app.batch import Shown
from app.operations.scene import Scene, Turn, parse_run_id, show
from schemas.operations import Cancel


async def cancel(scene: Scene, turn: Turn) -> Shown:
    request: Cancel = turn.request
    change = changes.once(changes.cancel(request.reason, turn.now), turn.id)
    return show(await scene.runs.change(turn.tenancy, parse_run_id(request.run_id), change, turn.now))

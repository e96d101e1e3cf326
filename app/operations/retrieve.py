"""`run.retrieve`: a run as it is, wherever it is."""

from app.batch import Shown
from app.operations.scene import Scene, Turn, parse_run_id, show
from schemas.operations import Retrieve


async def retrieve(scene: Scene, turn: Turn) -> Shown:
    request: Retrieve = turn.request
    return show(await scene.runs.find(turn.tenancy, parse_run_id(request.run_id), turn.now))

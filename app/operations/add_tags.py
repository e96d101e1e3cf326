"""`run.add_tags`: tags behind those that a run has."""

from app import changes
from app.batch import Shown
from app.operations.scene import Scene, Turn, parse_run_id, show
from schemas.operations import AddTags


async def add_tags(scene: Scene, turn: Turn) -> Shown:
    request: AddTags = turn.request
    change = changes.once(changes.add_tags(request.tags, scene.settings.max_tags), turn.id)
    return show(await scene.runs.change(turn.tenancy, parse_run_id(request.run_id), change, turn.now))

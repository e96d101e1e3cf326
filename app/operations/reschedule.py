"""`run.reschedule`: delay a delayed run until another time, counted from the operation's own."""

from app import changes
from app.batch import Shown
from app.durations import parse_delay
from app.errors import InvalidRequest
from app.operations.scene import Scene, Turn, parse_run_id, show
from schemas.operations import Reschedule


async def reschedule(scene: Scene, turn: Turn) -> Shown:
    request: Reschedule = turn.request
    run_id = parse_run_id(request.run_id)
    try:
        delay_until = parse_delay(request.delay, turn.asked_at)
    except ValueError as error:
        raise InvalidRequest(f"delay: {error}") from None
    change = changes.once(changes.reschedule(delay_until, turn.now), turn.id)
    return show(await scene.runs.change(turn.tenancy, run_id, change, turn.now))

"""A process that was silent for too long may have been taken for dead: it lets go of what it had."""

from collections.abc import Callable

from app.batch import Batch
from app.telemetry import Telemetry


class Fence:
    """Suspends the items of an earlier life. Others have them by now, and may have answered otherwise.

    It narrows the window to the step that follows; within that, the run id makes both write the same run.
    """

    def __init__(self, life: Callable[[], int], telemetry: Telemetry) -> None:
        self._life = life
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        life = self._life()
        stale = [item for item in batch.items if item.life != life and not item.suspended]
        for item in stale:
            item.suspended = True
        if stale:
            self._telemetry.trouble("heartbeat.lapsed", entries=len(stale))

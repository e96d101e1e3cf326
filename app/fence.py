"""A process that was silent for too long may have been taken for dead: it lets go of what it had."""

from typing import Protocol

from app.batch import Batch
from app.telemetry import Telemetry


class Heart(Protocol):
    """What a fence asks of `app/heartbeat.py`."""

    def life(self) -> int: ...
    async def renew(self) -> None: ...


class Fence:
    """Suspends the items of an earlier life. Others have them by now, and may have answered otherwise.

    Half of a life is left to the step that follows. Should that take longer while no beat gets through,
    others do the same at the same time; the run id makes both write the same run.
    """

    def __init__(self, heart: Heart, telemetry: Telemetry) -> None:
        self._heart = heart
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        """Let only those pass that are still ours.

        Raises:
            Unreachable: Redis went silent, so nobody knows.
        """
        await self._heart.renew()
        life = self._heart.life()
        stale = [item for item in batch.items if item.entry.life != life and not item.suspended]
        for item in stale:
            item.suspended = True
        if stale:
            self._telemetry.trouble("heartbeat.lapsed", entries=len(stale))

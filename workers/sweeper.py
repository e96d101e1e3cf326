"""The sweeper: looks after the buffer as a whole. Of any number one works, and the others stand by."""

import time
from collections.abc import Sequence

from faststream.redis import RedisBroker

from app.errors import Unreachable
from app.wiring import World
from workers.process import Loop, Process, run

_LOOK_EVERY_S = 1.0
_PASS_WITHIN_S = 120.0
"""A pass is a few dozen round trips, none of which may take longer than five seconds."""


class Sweeper(Process):
    """Makes a pass every STALE_SWEEP_INTERVAL_S while it has the lease; looks every second whether it has."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._lease = world.lease()
        self._sweep = world.sweep()
        self._is_active = False
        self._next_pass = 0.0
        self._broker = RedisBroker(world.settings.redis_url, apply_types=False)

    def broker(self) -> RedisBroker:
        return self._broker

    def loops(self) -> Sequence[Loop]:
        return (self._sweep_in_turn,)

    async def _sweep_in_turn(self) -> None:
        while not self.stopping.is_set():
            self.world.health.progress("sweep", _PASS_WITHIN_S)
            try:
                await self._look()
            except Unreachable as error:
                self.world.telemetry.unreachable("sweep", error)
            await self.pause(_LOOK_EVERY_S)

    async def _look(self) -> None:
        if await self._has_lease() and time.monotonic() >= self._next_pass:
            self._next_pass = 0.0
            await self._sweep.make_pass()
            self._next_pass = time.monotonic() + self.world.settings.stale_sweep_interval_s

    async def _has_lease(self) -> bool:
        """Whether it is ours to make passes. While it is not known to be, no figures are known either."""
        is_ours = False
        try:
            if not self._is_active:
                await self.world.heartbeat.beat()  # else another would take us for dead
            is_ours = await self._lease.hold()
        finally:
            self._become(is_ours)
        return is_ours

    def _become(self, is_active: bool) -> None:
        if is_active and not self._is_active:
            self.world.telemetry.event("sweeper.active", consumer=self.world.consumer)
        if not is_active:
            self.world.telemetry.figures_unknown()
            self._next_pass = 0.0
        self._is_active = is_active
        self.world.telemetry.sweeping(is_active)

    async def finish(self) -> None:
        await self._lease.let_go()


if __name__ == "__main__":
    run(Sweeper)

"""The drainer: materialises the buffer turn by turn, and sleeps until there is something in it."""

from collections.abc import Sequence

from faststream.redis import RedisBroker

from app.backoff import Backoff
from app.errors import StoreUnavailable, Unreachable
from app.wiring import World
from workers.process import Loop, Process, run

_IDLE_S = 1.0
_FORGET_EVERY_S = 1.0
_FIRST_RETRY_S = 0.1
_LONGEST_RETRY_S = 5.0


class Drainer(Process):
    """One of any number of drainers."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._turns = world.turns()
        self._wake = world.wake()
        self._drain = world.drain(self._turns)
        self._broker = RedisBroker(world.settings.redis_url, apply_types=False)

    def broker(self) -> RedisBroker:
        return self._broker

    def loops(self) -> Sequence[Loop]:
        return (self._take_turns, self._forget_old)

    async def _take_turns(self) -> None:
        telemetry = self.world.telemetry
        backoff = Backoff(_FIRST_RETRY_S, _LONGEST_RETRY_S)
        while not self.stopping.is_set():
            self.world.health.progress("drain")
            try:
                count = await self._drain.turn()
            except StoreUnavailable as error:
                telemetry.trouble("store.unavailable", error=repr(error.__cause__))
                await self.pause(backoff.delay_s())
            except Unreachable as error:
                telemetry.unreachable("drain", error)
                await self.pause(backoff.delay_s())
            else:
                backoff.reset()
                if count:
                    telemetry.batch("drain", count)
                else:
                    await self._wake.wait(_IDLE_S)

    async def _forget_old(self) -> None:
        while not self.stopping.is_set():
            self.world.health.progress("forget")
            try:
                while await self._turns.forget():
                    pass
            except Unreachable as error:
                self.world.telemetry.unreachable("forget", error)
            await self.pause(_FORGET_EVERY_S)

    async def close(self) -> None:
        await self._wake.close()
        await super().close()


if __name__ == "__main__":
    run(Drainer)

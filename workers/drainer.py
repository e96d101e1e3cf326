"""The drainer: materialises the buffer batch by batch, and sleeps until there is something in it."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from faststream.redis import RedisBroker

from app.backoff import Backoff
from app.errors import StatementTimedOut, StoreUnavailable, Unreachable
from app.ports import Taken
from app.wiring import World
from workers.process import Loop, Process, run

LANES = 4
"""Batches under way at once: while a statement hangs, other environments go on."""

GATHER_S = 0.025
"""While little comes in, what comes within so much time is committed at once: a commit for every few rows
would delay those that pass through, in a storm most of all.
"""

_LISTEN_S = 1.0
_FORGET_EVERY_S = 1.0
_KEEP_WEIGHTS_EVERY_S = 1.0
_STAND_STILL_S = 0.2
_FIRST_RETRY_S = 0.1
_LONGEST_RETRY_S = 5.0


class Drainer(Process):
    """One of any number of drainers."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._turns = world.turns()
        self._wake = world.wake()
        self._drain = world.drain(self._turns)
        self._backoff = Backoff(_FIRST_RETRY_S, _LONGEST_RETRY_S)
        self._trouble_s = 0.0
        self._free = asyncio.Semaphore(LANES)
        self._moved = asyncio.Event()
        self._has_plenty = False
        self._lanes: set[asyncio.Task[None]] = set()
        self._broker = RedisBroker(world.settings.redis_url, apply_types=False)

    def broker(self) -> RedisBroker:
        return self._broker

    def loops(self) -> Sequence[Loop]:
        return (self._take_turns, self._listen, self._forget_old, self._keep_weights)

    async def _take_turns(self) -> None:
        """Hand batches to free lanes, as long as there are any."""
        while not self.stopping.is_set():
            self.world.health.progress("drain")
            if not self._may_drain() or self._trouble_s:
                await self._stand_still()
                continue
            self._turns.schedule.rate = self.world.switches().drain_rate
            await self._free.acquire()
            self._moved.clear()
            taken = await self._take()
            if taken:
                lane = asyncio.create_task(self._handle(taken))
                self._lanes.add(lane)
                lane.add_done_callback(self._lanes.discard)
            else:
                self._free.release()
                await self._idle()

    def _may_drain(self) -> bool:
        """Whether the drain is not paused. Before that is known nothing may be drained."""
        return self.world.switchboard.is_known and not self.world.switches().decided.drain_paused

    async def _take(self) -> Sequence[Taken]:
        try:
            return await self._drain.take()
        except Unreachable as error:
            self.world.telemetry.unreachable("drain", error)
        except Exception as error:
            self.world.telemetry.failed("batch.failed", error)
        self._trouble_s = self._backoff.delay_s()
        return ()

    async def _handle(self, taken: Sequence[Taken]) -> None:
        try:
            self.world.telemetry.batch("drain", await self._drain.handle(taken))
            self._backoff.reset()
        except StatementTimedOut as error:
            # What hung is tried again on its own; the others need not wait.
            self.world.telemetry.trouble("drain.timed_out", error=repr(error.__cause__))
        except StoreUnavailable as error:
            self.world.telemetry.trouble("store.unavailable", error=repr(error.__cause__))
            self._trouble_s = self._backoff.delay_s()
        except Unreachable as error:
            self.world.telemetry.unreachable("drain", error)
            self._trouble_s = self._backoff.delay_s()
        except Exception as error:
            self.world.telemetry.failed("batch.failed", error, environments=len(taken))
            self._trouble_s = self._backoff.delay_s()
        finally:
            self._free.release()
            self._has_plenty |= 2 * sum(len(one.entries) for one in taken) >= self._drain.batch_size
            self._moved.set()

    async def _idle(self) -> None:
        """Wait until something has become ready, or a lane has given its environments back; and, unless that
        one had its hands full, for what comes next.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._turns.schedule.wait_s):
                await self._moved.wait()
            if not self._has_plenty:
                await self.pause(GATHER_S)
        self._has_plenty = False

    async def _listen(self) -> None:
        while not self.stopping.is_set():
            self.world.health.progress("listen")
            if await self._wake.wait(_LISTEN_S):
                self._turns.schedule.stir()
                self._moved.set()

    async def _stand_still(self) -> None:
        """Leave the environments to others, and wait until the trouble may be over."""
        trouble_s, self._trouble_s = self._trouble_s, 0.0
        try:
            await self._turns.schedule.flush()
        except Unreachable as error:
            self.world.telemetry.unreachable("drain", error)
        await self.pause(trouble_s or _STAND_STILL_S)

    async def _forget_old(self) -> None:
        while not self.stopping.is_set():
            self.world.health.progress("forget")
            try:
                while await self._turns.forget():
                    pass
            except Unreachable as error:
                self.world.telemetry.unreachable("forget", error)
            await self.pause(_FORGET_EVERY_S)

    async def _keep_weights(self) -> None:
        """See to it that the schedule has the weights of organizations, also after Redis lost them."""
        while not self.stopping.is_set():
            self.world.health.progress("weights")
            try:
                if self.world.switchboard.is_known:
                    await self._turns.schedule.set_weights(self.world.switches().decided.weights)
            except Unreachable as error:
                self.world.telemetry.unreachable("weights", error)
            await self.pause(_KEEP_WEIGHTS_EVERY_S)

    async def finish(self) -> None:
        if self._lanes:
            await asyncio.wait(self._lanes)
        await self._turns.schedule.flush()

    async def close(self) -> None:
        await self._wake.close()
        await super().close()


if __name__ == "__main__":
    run(Drainer)

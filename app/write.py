"""Step 7: both writes at once, the pass-through half to Postgres, the mollified half to the buffer.

Once the gate has said mollify, nothing turns into a Postgres write (G8). The other way round is
allowed: what Postgres cannot take now may be diverted into the buffer, under the same run id.
"""

import asyncio
import time
from collections.abc import Sequence

from msgspec.structs import replace

from app.batch import Answer, Batch, Decision, Item, Outcome
from app.errors import BufferUnavailable, QueueLimitExceeded, RequestError, StoreUnavailable, Unreachable
from app.ports import Buffer, Store
from app.settings import Settings
from app.store_health import StoreHealth
from app.telemetry import Telemetry
from schemas.snapshot import Snapshot


class Write:
    """Gives every open item its outcome, or suspends it when Redis did not say what happened."""

    def __init__(
        self, buffer: Buffer, store: Store, health: StoreHealth, settings: Settings, telemetry: Telemetry
    ) -> None:
        self._buffer = buffer
        self._store = store
        self._health = health
        self._clock = time.perf_counter
        self._divert = settings.divert_on_store_failure
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        passing: list[Item] = []
        mollified: list[Item] = []
        for item in batch.open():
            assert item.decision is not None
            (mollified if item.decision.mollified else passing).append(item)
        await asyncio.gather(self._pass_through(passing, batch), self._mollify(mollified, batch))
        self._telemetry.decided([*passing, *mollified])

    async def _pass_through(self, items: Sequence[Item], batch: Batch) -> None:
        if not items:
            return
        try:
            started = self._clock()
            _settle(items, await self._store.insert(_runs(items), batch.now))
            self._health.wrote(self._clock() - started)
        except StoreUnavailable as error:
            self._health.failed()
            self._telemetry.trouble("store.unavailable", error=repr(error.__cause__))
            diverted = []
            for item in items:
                if self._divert and item.decision is not None and item.decision.divertible:
                    item.decision = Decision(Outcome.MOLLIFY, error.code, enrolled=True)
                    diverted.append(item)
                else:
                    item.outcome = error
            await self._mollify(diverted, batch)
            if error.may_be_done:
                for item in diverted:
                    if isinstance(item.outcome, BufferUnavailable | QueueLimitExceeded):
                        item.outcome = error  # "nothing was accepted" is more than anybody knows

    async def _mollify(self, items: Sequence[Item], batch: Batch) -> None:
        if not items:
            return
        runs = [replace(run, buffered_at=batch.now) for run in _runs(items)]
        try:
            _settle(items, await self._buffer.accept(runs, [item.claim for item in items]))
        except BufferUnavailable as error:
            for item in items:
                item.outcome = error
        except Unreachable as error:
            self._telemetry.unreachable("accept", error)
            for item in items:
                item.suspended = True


def _runs(items: Sequence[Item]) -> list[Snapshot]:
    return [item.run for item in items if item.run is not None]


def _settle(items: Sequence[Item], outcomes: Sequence[Answer | RequestError]) -> None:
    for item, outcome in zip(items, outcomes, strict=True):
        item.outcome = outcome

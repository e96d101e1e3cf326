"""Requests whose idempotency key another request holds: polled together until it is free or taken."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

from app.batch import Item, Key
from app.errors import Unreachable
from app.ports import Claims
from app.settings import Settings
from app.switches import Switches
from app.telemetry import Telemetry

Resume = Callable[[Sequence[Item]], Awaitable[None]]


class WaitingRoom:
    """Holds requests by key. One round trip a tick, however many wait; `resume` takes them on from there."""

    def __init__(
        self,
        claims: Claims,
        resume: Resume,
        settings: Settings,
        telemetry: Telemetry,
        switches: Callable[[], Switches],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._claims = claims
        self._resume = resume
        self._wait_s = settings.claim_wait_ms / 1000
        self._poll_s = settings.claim_poll_ms / 1000
        self._most = settings.trigger_batch_size
        self._telemetry = telemetry
        self._switches = switches
        self._clock = clock
        self._waiting: dict[Key, list[Item]] = {}
        self._occupied = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.held: set[str] = set()

    def admit(self, items: Sequence[Item]) -> None:
        """Let items wait. Their time runs from the first time that they do.

        Each leaves its batch for good, and goes on as a new item: its batch may still be under way when
        its key comes free.
        """
        for item in items:
            item.suspended = item.waits = True
            since = self._clock() if item.waiting_since is None else item.waiting_since
            waiting = Item(
                item.entry,
                item.reply_to,
                item.correlation_id,
                item.request,
                run=item.run,
                waiting_since=since,
            )
            assert item.key is not None
            self._waiting.setdefault(item.key, []).append(waiting)
            self.held.add(item.entry.id)
        if items:
            self._occupied.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Look at the claims every CLAIM_POLL_MS while somebody waits."""
        while True:
            if self._waiting:
                await self.tick()
                await asyncio.sleep(self._poll_s)
            elif not stopping.is_set():
                self._occupied.clear()
                await _first(self._occupied, stopping)
            elif self._tasks:
                await self.settled()
            else:
                return

    async def settled(self) -> None:
        """Wait for those who have left the room to come to their end."""
        await asyncio.gather(*self._tasks)

    async def tick(self) -> None:
        """Try each key once, on behalf of the one who has waited longest. Switched off, nobody waits (G5)."""
        if not self._switches().enabled:
            self._leave([item for items in self._waiting.values() for item in items])
            self._waiting.clear()
            return
        fronts = {key: items[0] for key, items in self._waiting.items()}
        runs = [item.run for item in fronts.values() if item.run is not None]
        try:
            claims = await self._claims.claim(runs, datetime.now(UTC))
        except Unreachable as error:
            self._telemetry.unreachable("claims", error)
            return
        leaving: list[Item] = []
        for (key, front), claim in zip(fronts.items(), claims, strict=True):
            if claim.state == "pending":
                leaving += self._timed_out(key)
            else:
                # Whoever is claimed for leads; what is taken is found out again by the step that answers.
                front.claim = claim if claim.state == "claimed" else None
                leaving += self._waiting.pop(key)
        self._leave(leaving)

    def _timed_out(self, key: Key) -> list[Item]:
        """Let go of those who have waited for a key long enough."""
        now = self._clock()
        late: list[Item] = []
        rest: list[Item] = []
        for item in self._waiting.pop(key):
            since = now if item.waiting_since is None else item.waiting_since
            (late if now - since >= self._wait_s else rest).append(item)
        if rest:
            self._waiting[key] = rest
        for item in late:
            item.is_late = True
        return late

    def _leave(self, items: Sequence[Item]) -> None:
        """Take items on from here, in batches, beside each other."""
        for start in range(0, len(items), self._most):
            task = asyncio.create_task(self._take_on(items[start : start + self._most]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take_on(self, items: Sequence[Item]) -> None:
        try:
            await self._resume(items)
        except Unreachable as error:
            self._telemetry.unreachable("batch", error)
        except Exception as error:
            self._telemetry.failed("batch.failed", error, entries=len(items))
        finally:
            self.held.difference_update(item.entry.id for item in items if not item.waits)


async def _first(*events: asyncio.Event) -> None:
    """Return when one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()

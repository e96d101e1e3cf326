"""The way of a trigger, from a stream entry to a reply: one column of steps. DESIGN section 5.

The order is the correctness argument. The id comes first, so that a request which is handed out
again finds its run; the write before the reply, so that what is promised is kept; the reply
before the acknowledgement, so that no request goes unanswered. A step settles an item by giving
it an outcome, and settled items pass later steps by. What leaves unsettled comes back.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

from app.batch import Batch, Entry, Item
from app.decide import Decide
from app.decode import Decode
from app.deduplicate import Deduplicate
from app.fence import Fence, Heart
from app.ports import Buffer, Claims, Desk, RateGate, Reservations, Store
from app.recall import Recall
from app.relate import Relate
from app.respond import Respond
from app.settings import Settings
from app.settle import Settle
from app.store_health import StoreHealth
from app.switches import Switches
from app.telemetry import Telemetry
from app.validate import Validate
from app.waiting import WaitingRoom
from app.write import Write

Step = Callable[[Batch], Awaitable[None]]

_BEFORE_WAITING = frozenset(("decode", "validate", "relate"))
"""Steps whose work an item keeps while it waits for its key."""


class Pipeline:
    """Handles batches of trigger requests; several may be under way at once."""

    def __init__(
        self,
        *,
        gate: RateGate,
        buffer: Buffer,
        reservations: Reservations,
        claims: Claims,
        store: Store,
        desk: Desk,
        health: StoreHealth,
        settings: Settings,
        telemetry: Telemetry,
        heart: Heart,
        switches: Callable[[], Switches] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        by_settings = Switches.of(settings)
        self._switches = switches or (lambda: by_settings)
        self.waiting_room = WaitingRoom(claims, self.resume, settings, telemetry, self._switches)
        wait, fence = self.waiting_room.admit, Fence(heart, telemetry)
        self._steps: Sequence[tuple[str, Step]] = (
            ("decode", Decode(settings)),
            ("validate", Validate(settings)),
            ("recall", Recall(buffer, store, settings, telemetry)),
            ("relate", Relate(buffer, store)),
            ("deduplicate", Deduplicate(claims, store, wait, telemetry)),
            ("decide", Decide(gate, health, settings, telemetry)),
            ("fence", fence),
            ("write", Write(buffer, store, health, settings, telemetry)),
            ("settle", Settle(claims, wait, telemetry)),
            ("fence", fence),
            ("respond", Respond(reservations, desk, telemetry)),
        )
        self._steps_after_waiting = [step for step in self._steps if step[0] not in _BEFORE_WAITING]
        self._telemetry = telemetry
        self._clock = clock

    async def handle(self, entries: Sequence[Entry]) -> None:
        """Take requests to their replies, whatever they hold.

        Raises:
            Unreachable: Redis went silent. What had no outcome, or no reply yet, is still pending.
        """
        await self._run(self._steps, [Item(entry) for entry in entries])

    async def resume(self, items: Sequence[Item]) -> None:
        """Take requests on that waited for their idempotency keys; they may come to wait again.

        First of all their runs are looked for: another worker may have handled them meanwhile.
        """
        await self._run(self._steps_after_waiting, items)

    async def _run(self, steps: Sequence[tuple[str, Step]], items: Sequence[Item]) -> None:
        batch = Batch(items, self._clock(), self._switches())
        for name, step in steps:
            with self._telemetry.stage(name):
                await step(batch)

"""The way of an operation, from a stream entry to a reply. Each of a batch goes on its own, side by side.

An operation that is handed out again is performed again; changes remember which operations made them.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from app.batch import Answer, Batch, DeadLetter, Entry, Item
from app.decode import Decode, read_operation
from app.errors import InternalError, RequestError, Unreachable
from app.fence import Fence, Heart
from app.operations.scene import Perform, Scene, Turn, tenancy_of
from app.ports import Desk, Reservations
from app.respond import Respond
from app.settings import Settings
from app.switches import Switches
from app.telemetry import Telemetry
from app.validate import entry_time

_AT_ONCE = 32


class Operate:
    """Handles batches of operations."""

    def __init__(
        self,
        *,
        table: Mapping[type, Perform],
        scene: Scene,
        reservations: Reservations,
        desk: Desk,
        settings: Settings,
        telemetry: Telemetry,
        heart: Heart,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._table = table
        self._scene = scene
        self._decode = Decode(settings, read_operation)
        self._respond = Respond(reservations, desk, telemetry)
        self._fence = Fence(heart, telemetry)
        self._switches = Switches.of(settings)  # of no consequence: operations look everywhere
        self._most_deliveries = settings.max_deliveries
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._telemetry = telemetry
        self._clock = clock

    async def handle(self, entries: Sequence[Entry]) -> None:
        """Take operations to their replies, whatever they hold.

        Raises:
            Unreachable: Redis went silent. What had no outcome, or no reply yet, is still pending.
        """
        items = [Item(entry) for entry in entries]
        batch = Batch(items, self._clock(), self._switches)
        with self._telemetry.stage("decode"):
            await self._decode(batch)
        with self._telemetry.stage("perform"):
            await asyncio.gather(*(self._perform(item) for item in batch.open()))
        await self._fence(batch)
        with self._telemetry.stage("respond"):
            await self._respond(batch)

    async def _perform(self, item: Item) -> None:
        if item.entry.deliveries > self._most_deliveries:
            item.dead_letter = DeadLetter(
                "deliveries", "it was handed out too often without ever being finished"
            )
            item.outcome = InternalError()
            return
        operation = item.operation
        assert operation is not None
        async with self._room:
            turn = Turn(item, operation, tenancy_of(operation), entry_time(item.entry.ms), self._clock())
            try:
                answer = await self._table[type(operation)](self._scene, turn)
            except RequestError as error:
                item.outcome = error
            except Unreachable as error:
                self._telemetry.unreachable("operation", error)
                item.suspended = True
            except Exception as error:
                self._telemetry.failed("operation.failed", error, type=type(operation).__name__)
                item.outcome = InternalError()
            else:
                if isinstance(answer, Answer):
                    item.outcome = answer
                else:
                    item.shown = answer

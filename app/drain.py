"""The way of a buffered run, from the buffer to its row, one batch at a time. DESIGN section 9.

The order is the correctness argument. Entries are settled only after Postgres has committed them
(or a dead letter has), so a crash anywhere repeats work and never loses it; rows that are there
already are ignored, so repeating is harmless. One drainer holds an environment, so its order holds.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from msgspec.structs import replace

from app import run_ids
from app.batch_size import BatchSize
from app.errors import StatementTimedOut, StoreUnavailable, Unreachable
from app.ports import Graveyard, Letter, Materialiser, Reservations, Taken, Turns
from app.rows import Materialised, Row, Status, row_at
from app.settings import Settings
from app.telemetry import Telemetry
from schemas.overlay import decode_overlay
from schemas.snapshot import Snapshot, decode_snapshot


@dataclass(slots=True, eq=False)
class Load:
    """One entry on its way; without `run` and `row` if it cannot be read. `trouble` is why it has no row."""

    environment_id: str
    entry_id: str
    snapshot: bytes
    overlay: bytes | None
    run: Snapshot | None = None
    row: Row | None = None
    result: Materialised | None = None
    trouble: str = ""


class Drain:
    """Materialises the buffer in turns; several drains, in any processes, share the work."""

    def __init__(
        self,
        *,
        turns: Turns,
        materialiser: Materialiser,
        graveyard: Graveyard,
        reservations: Reservations,
        settings: Settings,
        telemetry: Telemetry,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._turns = turns
        self._materialiser = materialiser
        self._graveyard = graveyard
        self._reservations = reservations
        self._telemetry = telemetry
        self._clock = clock
        self._size = BatchSize(
            settings.drain_batch_size, settings.drain_target_latency_ms / 1000, telemetry.drain_batch_size
        )

    @property
    def batch_size(self) -> int:
        """The most entries that a batch has now."""
        return self._size.current

    async def turn(self) -> int:
        """Take one batch and materialise it; how many entries it held, 0 when there are none.

        Raises:
            StoreUnavailable, Unreachable: see `take` and `handle`.
        """
        taken = await self.take()
        return await self.handle(taken) if taken else 0

    async def take(self) -> Sequence[Taken]:
        """The entries whose turn it is, held for `handle`.

        Raises:
            Unreachable: the buffer cannot be reached.
        """
        taken = await self._turns.take(self._size.current)
        taken_over = sum(len(one.entries) for one in taken if one.is_taken_over)
        if taken_over:
            self._telemetry.recovered("holder_gone", taken_over)
        return taken

    async def handle(self, taken: Sequence[Taken]) -> int:
        """Materialise entries that were taken; how many.

        Raises:
            StoreUnavailable: Postgres cannot be written; the entries are back in their place.
            Unreachable: Redis went silent; the entries are taken again in time.
        """
        try:
            return await self._handle(taken)
        except StoreUnavailable as error:
            is_hung = isinstance(error, StatementTimedOut)
            if is_hung:
                self._size.observe(math.inf)
            why = "timed_out" if is_hung else "store_unavailable"
            await self._put_back(taken, why, apart=is_hung, may_be_done=error.may_be_done)
            raise
        except Unreachable:
            await self._put_back(taken, "unreachable", apart=False, may_be_done=True)
            raise
        except Exception:
            # Nobody expected it, so nobody knows whose fault it was.
            await self._put_back(taken, "failed", apart=True, may_be_done=True)
            raise

    async def _handle(self, taken: Sequence[Taken]) -> int:
        now = self._clock()
        loads = unpack(taken, now)
        await self._write([load for load in loads if load.row is not None], now)
        await self._write_failures([load for load in loads if load.trouble and load.row is not None], now)
        written_at = self._clock()
        await self._bury([load for load in loads if load.trouble])
        runs = [load.run for load in loads if load.run is not None]
        await self._turns.settle(taken, runs)
        await self._reservations.release([run for run in runs if run_ids.needs_reservation(run.id)])
        self._telemetry.drained([(load.run, _result(load)) for load in loads], now, written_at)
        return len(loads)

    async def _put_back(self, taken: Sequence[Taken], why: str, *, apart: bool, may_be_done: bool) -> None:
        self._telemetry.put_back(why, sum(len(one.entries) for one in taken))
        await self._turns.put_back(taken, apart=apart, may_be_done=may_be_done)

    async def _write(self, loads: Sequence[Load], now: datetime) -> None:
        rows = [load.row for load in loads if load.row is not None]
        if not rows:
            return
        started = time.perf_counter()
        results = await self._materialiser.materialise(rows, now)
        took_s = time.perf_counter() - started
        self._telemetry.committed(took_s)
        if not any(result.error for result in results):
            self._size.observe(took_s)  # a batch that was taken apart says nothing of others
        for load, result in zip(loads, results, strict=True):
            load.result = result
            load.trouble = result.error or ""

    async def _write_failures(self, loads: Sequence[Load], now: datetime) -> None:
        """Give a run that Postgres refuses a row that says so (G12): its identity and links alone."""
        for load in loads:
            assert load.row is not None
            load.row = failure_row(load.row, load.trouble)
        await self._write(loads, now)

    async def _bury(self, loads: Sequence[Load]) -> None:
        if not loads:
            return
        letters = [
            Letter(
                load.environment_id,
                load.entry_id,
                load.snapshot,
                load.overlay,
                "refused" if load.row else "undecodable",
                load.trouble,
            )
            for load in loads
        ]
        await self._graveyard.bury(letters)
        for letter in letters:
            self._telemetry.dead_letter(letter.reason, letter.entry_id, letter.detail)


def unpack(taken: Sequence[Taken], now: datetime) -> list[Load]:
    """The rows that entries become, with what was changed since; an entry that cannot be read has none."""
    loads = []
    for one in taken:
        for entry_id, snapshot in one.entries:
            load = Load(one.environment_id, entry_id, snapshot, one.overlays.get(entry_id))
            try:
                load.run = decode_snapshot(snapshot)
                overlay = None if load.overlay is None else decode_overlay(load.overlay)
                load.row = row_at(load.run, overlay, now)
            except Exception as error:  # whatever it holds, it is this entry's trouble alone
                load.trouble = f"the snapshot cannot be read: {error!r}"
            loads.append(load)
    return loads


def _result(load: Load) -> str:
    """What is counted: `system_failure` for a row that only says why there is no other."""
    if load.result is None:
        return "dead"
    is_failure = load.result.result == "inserted" and load.row is not None and load.row.error is not None
    return "system_failure" if is_failure else load.result.result


def failure_row(row: Row, reason: str) -> Row:
    """What is written for a row that cannot be as it is. A cancelled run stays cancelled (G10)."""
    bare = replace(
        row.run,
        payload=None,
        metadata=None,
        tags=(),
        idempotency_key=None,
        idempotency_key_expires_at=None,
        idempotency_key_options=None,
        debounce_key=None,
        one_time_use_token=None,
        trace_context=None,
    )
    error = msgspec.json.encode({"code": "materialisation_failed", "message": reason}).decode()
    status: Status = "CANCELED" if row.status == "CANCELED" else "SYSTEM_FAILURE"
    return row._replace(run=bare, status=status, error=error)

"""Reads of runs and changes to them, across Postgres and buffer. Guarantees G7, G10, G11.

A run only ever moves from the buffer to Postgres. So it is looked for in Postgres, in the buffer, and in
Postgres again: one that is being handed over is never missing. A change is made where the run is, by
comparing and setting; one that meets a run being materialised waits for the row.
"""

import asyncio
import random
import time
from collections.abc import Callable
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

from app.changes import Change
from app.errors import BufferUnavailable, RunBusy, RunNotFound, StoreUnavailable, Unreachable
from app.rows import Row

_FIRST_POLL_S, _LONGEST_POLL_S, _LONGER = 0.01, 0.25, 1.7


class Tenancy(NamedTuple):
    """Whose run: no run is looked for without it."""

    organization_id: str
    environment_id: str


class StoredRun(NamedTuple):
    """A row."""

    row: Row
    materialised_at: datetime
    updated_at: datetime


State = Literal["QUEUED", "DRAINING", "MATERIALISED"]


class BufferedRun(NamedTuple):
    """An entry of the buffer, with its overlay as it is stored (None: unchanged).

    `MATERIALISED`: it is a row by now, and only remembered for a while.
    """

    row: Row
    state: State
    updated_at: datetime
    overlay: bytes | None


Found = StoredRun | BufferedRun


class StoredRuns(Protocol):
    async def find(self, tenancy: Tenancy, run_id: str) -> StoredRun | None:
        """The row with an id, or that the id is an alias of.

        Raises:
            StoreUnavailable: Postgres cannot be read.
        """
        ...

    async def change(self, before: StoredRun, after: Row) -> StoredRun | None:
        """Change a row in one guarded statement; None if it is no longer as it was `before`.

        Raises:
            StoreUnavailable: Postgres cannot be written.
        """
        ...


class BufferedRuns(Protocol):
    async def find(self, tenancy: Tenancy, run_id: str, now: datetime) -> BufferedRun | None:
        """The entry of a run as it is at a time.

        Raises:
            Unreachable: the buffer cannot be read.
        """
        ...

    async def change(self, before: BufferedRun, after: Row, now: datetime) -> BufferedRun | None:
        """Change a queued entry; None if it is not queued any more, or was changed since `before`.

        Raises:
            BufferUnavailable: Redis refuses to write.
            Unreachable: it is not known whether it was changed.
        """
        ...


class Runs:
    """Finds and changes runs of one tenant at a time."""

    def __init__(
        self,
        store: StoredRuns,
        buffer: BufferedRuns,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._buffer = buffer
        self._wait_s = wait_s
        self._clock = clock

    async def find(self, tenancy: Tenancy, run_id: str, now: datetime) -> Found:
        """A run, wherever it is.

        Raises:
            RunNotFound: this environment has none with this id.
            StoreUnavailable, BufferUnavailable: it could not be looked for everywhere.
        """
        try:
            stored = await self._store.find(tenancy, run_id)
        except StoreUnavailable:
            buffered = await self._in_buffer(tenancy, run_id, now)
            if buffered is None or buffered.state == "MATERIALISED":
                raise
            return buffered
        if stored is not None:
            return stored
        buffered = await self._in_buffer(tenancy, run_id, now)
        if buffered is not None and buffered.state != "MATERIALISED":
            return buffered
        stored = await self._store.find(tenancy, run_id)
        if stored is None:
            raise RunNotFound
        return stored

    async def _in_buffer(self, tenancy: Tenancy, run_id: str, now: datetime) -> BufferedRun | None:
        try:
            return await self._buffer.find(tenancy, run_id, now)
        except Unreachable as error:
            raise BufferUnavailable from error

    async def change(self, tenancy: Tenancy, run_id: str, change: Change, now: datetime) -> Found:
        """Change a run, wherever it is; the run as it is then.

        Raises:
            RunBusy: it was being materialised, or changed by others, for longer than MUTATE_WAIT_MS.
            RunNotFound, StoreUnavailable, BufferUnavailable: see `find`.
            Unreachable: it is not known whether the change was made.
            RequestError: what `change` raises.
        """
        deadline = self._clock() + self._wait_s
        pause_s = _FIRST_POLL_S
        while True:
            before = await self.find(tenancy, run_id, now)
            if isinstance(before, BufferedRun) and before.state == "DRAINING":
                await self._until_it_moves(tenancy, run_id, now, deadline)
                continue
            after = change(before.row)
            if after is before.row:
                return before
            changed: Found | None
            if isinstance(before, StoredRun):
                changed = await self._change_row(before, after)
            else:
                changed = await self._buffer.change(before, after, now)
            if changed is not None:
                return changed
            pause_s = await self._pause(pause_s, deadline)

    async def _change_row(self, before: StoredRun, after: Row) -> StoredRun | None:
        try:
            return await self._store.change(before, after)
        except StoreUnavailable as error:
            if not error.may_be_done:
                raise
            # Nobody knows whether it was changed. The operation comes again, and finds out.
            raise Unreachable(f"Postgres: {error}") from error

    async def _until_it_moves(self, tenancy: Tenancy, run_id: str, now: datetime, deadline: float) -> None:
        """Wait until an entry is no longer being drained, looking at Redis only."""
        pause_s = _FIRST_POLL_S
        while True:
            pause_s = await self._pause(pause_s, deadline)
            buffered = await self._in_buffer(tenancy, run_id, now)
            if buffered is None or buffered.state != "DRAINING":
                return

    async def _pause(self, pause_s: float, deadline: float) -> float:
        """Wait a little, never in step with others; how long to wait the next time."""
        if self._clock() + pause_s > deadline:
            raise RunBusy
        await asyncio.sleep(random.uniform(pause_s / 2, pause_s))
        return min(_LONGEST_POLL_S, pause_s * _LONGER)

"""Batches under way: a bounded number at once, and which entries they hold."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from app.batch import Entry
from app.errors import Unreachable
from app.telemetry import Telemetry

Handle = Callable[[Sequence[Entry]], Awaitable[None]]


class Intake:
    """Runs batches side by side. What a batch leaves undone is still pending in Redis."""

    def __init__(self, handle: Handle, batches: int, telemetry: Telemetry, kind: str) -> None:
        self._handle = handle
        self._room = asyncio.Semaphore(batches)
        self._tasks: set[asyncio.Task[None]] = set()
        self._telemetry = telemetry
        self._kind = kind
        self.held: set[str] = set()

    async def receive(self, entries: Sequence[Entry]) -> None:
        """Start a batch as soon as there is room, and return: the next one can be read meanwhile."""
        if not entries:
            return
        self.held.update(entry.id for entry in entries)
        await self._room.acquire()
        task = asyncio.create_task(self._run(entries))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, entries: Sequence[Entry]) -> None:
        try:
            self._telemetry.received(self._kind, entries)
            await self._handle(entries)
        except Unreachable as error:
            self._telemetry.unreachable("batch", error)
        except Exception as error:
            self._telemetry.failed("batch.failed", error, entries=len(entries))
        finally:
            self.held.difference_update(entry.id for entry in entries)
            self._room.release()

    async def finish(self) -> None:
        """Wait for the batches under way."""
        await asyncio.gather(*self._tasks)

"""What processes that consume a request stream share: reading it, recovery, and an orderly end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from faststream import AckPolicy
from faststream.message import StreamMessage
from faststream.redis import RedisBroker, StreamSub

from app.batch import Entry
from app.errors import Unreachable
from app.intake import Intake
from app.redis_client import PatientRetry
from app.wiring import World
from workers.process import Loop, Process

_BLOCK_MS = 1000
_RECOVER_EVERY_S = 0.5
_SUPERVISE_EVERY_S = 1.0


class Consumer(Process):
    """Consumes one stream as one member of the group. Subclasses say how batches are handled."""

    def __init__(
        self, world: World, stream: str, handle: Callable[[Sequence[Entry]], Awaitable[None]], kind: str
    ) -> None:
        super().__init__(world)
        settings = world.settings
        self._name = stream
        self._stream = world.request_stream(stream)
        self._intake = Intake(handle, settings.trigger_inflight_batches, world.telemetry, kind)
        self._life = 0
        self.retry = PatientRetry(self._before_reading, self._read_failed)
        self._broker = RedisBroker(
            settings.redis_url,
            retry=self.retry,
            apply_types=False,
            logger=logging.getLogger("mollifier.read"),
        )
        self._subscriber = self._broker.subscriber(
            stream=StreamSub(
                stream,
                group=world.keys.group,
                consumer=world.consumer,
                batch=True,
                max_records=settings.trigger_batch_size,
                polling_interval=_BLOCK_MS,
            ),
            parser=_parse,
            decoder=self._entries,
            ack_policy=AckPolicy.MANUAL,
            no_reply=True,
        )
        # FastStream creates a missing group at `last_id`, and reads from `read_id`, which stays at ">": so
        # what was queued before there was a group is read too.
        self._subscriber.last_id = "0"
        self._subscriber(self._receive)

    def broker(self) -> RedisBroker:
        return self._broker

    def loops(self) -> Sequence[Loop]:
        return (self._supervise, self._recover)

    def held(self) -> Collection[str]:
        """The ids of the entries that this process is working on."""
        return self._intake.held

    async def _receive(self, entries: list[Entry]) -> None:
        await self._intake.receive(entries)

    async def _before_reading(self) -> None:
        """Be alive for others before entries are handed out here, else they take them over."""
        self.world.health.progress("read")
        await self.world.heartbeat.renew()
        self._life = self.world.heartbeat.life()

    async def _entries(self, message: StreamMessage[Any]) -> list[Entry]:
        raw = message.raw_message
        return [
            Entry(entry_id.decode(), fields, life=self._life)
            for entry_id, fields in zip(raw["message_ids"], raw["data"], strict=True)
        ]

    def _read_failed(self, error: Exception) -> None:
        self.world.telemetry.trouble("read.failed", error=str(error))

    async def _supervise(self) -> None:
        """Keep the group there and the reader reading, whatever happens to Redis."""
        while not self.stopping.is_set():
            try:
                if await self._stream.ensure_group():
                    self.world.telemetry.event("group.created", stream=self._name)
            except Unreachable as error:
                self.world.telemetry.unreachable("group", error)
            self.world.health.progress("supervise")
            await self.pause(_SUPERVISE_EVERY_S)

    async def _recover(self) -> None:
        """Take over what nobody is working on, all the time."""
        most = self.world.settings.trigger_batch_size
        while not self.stopping.is_set():
            found = 0
            try:
                await self.world.heartbeat.renew()
                why, batches = await self._stream.recover(self.held(), most, self.world.heartbeat.life())
                found = sum(len(batch) for batch in batches)
                if found:
                    self.world.telemetry.recovered(why, found)
                for batch in batches:
                    await self._intake.receive(batch)
            except Unreachable as error:
                self.world.telemetry.unreachable("recover", error)
            self.world.health.progress("recover", within_s=60)
            if found < most:
                await self.pause(_RECOVER_EVERY_S)

    async def finish(self) -> None:
        self.retry.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * _BLOCK_MS / 1000):
                await self.retry.closed.wait()
        await self._intake.finish()
        await self._stream.leave()


async def _parse(message: Any) -> StreamMessage[Any]:
    """One batch as it was read: nothing is decoded here, so that a bad entry disturbs no other."""
    return StreamMessage(raw_message=message, body=b"")

"""A request stream's consumer group: creating it, and taking over what dead consumers held."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from app.batch import Entry
from app.errors import BufferUnavailable, Unreachable
from app.keys import Keys
from app.redis_client import Call, Scripts
from app.redis_connection import LOST

_ORPHANED_MS = 1000
"""How long an entry of our own may be pending without being held before it counts as lost on the way here."""

_QUARANTINE = 3
"""From this delivery on an entry is handled alone: it may be what its batch died of."""


class _Pending(NamedTuple):
    """An entry that was handed out, and to whom."""

    entry_id: str
    consumer: bytes


class RequestStream:
    """One stream as one consumer sees it; implements `scene.FrontDoor`."""

    def __init__(self, redis: Redis, keys: Keys, stream: str, consumer: str, reclaim_idle_ms: int) -> None:
        self._redis = redis
        self._scripts = Scripts(redis)
        self._keys = keys
        self._stream = stream
        self._group = keys.group
        self._consumer = consumer
        self._reclaim_idle_ms = reclaim_idle_ms

    async def trigger(self, body: bytes, reply_to: str | None, correlation_id: str | None) -> None:
        """See `scene.FrontDoor.trigger`."""
        fields: dict[Any, Any] = {"body": body}
        fields |= {"reply_to": reply_to} if reply_to else {}
        fields |= {"correlation_id": correlation_id} if correlation_id else {}
        try:
            await self._redis.xadd(self._stream, fields)
        except LOST as error:
            raise Unreachable(f"Redis: {error}") from error
        except ResponseError as error:
            raise BufferUnavailable from error

    async def ensure_group(self) -> bool:
        """Create the group at the stream's beginning if it is not there; whether it had to be.

        This consumer becomes one of its: Redis 7.0 would list it only once it has read something.

        Raises:
            Unreachable: Redis cannot be reached, or refuses.
        """
        is_new = True
        try:
            try:
                await self._redis.xgroup_create(self._stream, self._group, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
                is_new = False
            await self._redis.xgroup_createconsumer(self._stream, self._group, self._consumer)
        except (*LOST, ResponseError) as error:
            raise Unreachable(f"Redis: {error}") from error
        return is_new

    async def recover(self, held: Collection[str], most: int, life: int = 0) -> tuple[str, list[list[Entry]]]:
        """Take over up to `most` entries that nobody is working on; why, and the batches to handle them in.

        `held` are the ids this process is working on, `life` that which it is in. In turn: what consumers
        without a heartbeat had, what this one was given and never saw, what was idle for RECLAIM_IDLE_MS.

        Raises:
            Unreachable: Redis cannot be reached, or refuses.
        """
        try:
            for why, pending in await self._abandoned(held, most):
                entries = await self._take_over(pending, life)
                if entries:
                    return why, _batches(entries)
        except (RedisError, OSError) as error:
            if not _is_missing(error):
                raise Unreachable(f"Redis: {error}") from error
        return "", []

    async def leave(self) -> None:
        """Remove this consumer from the group, unless it has entries that others are to take over."""
        try:
            if not await self._pending(1, self._consumer):
                await self._redis.xgroup_delconsumer(self._stream, self._group, self._consumer)
        except (RedisError, OSError) as error:
            raise Unreachable(f"Redis: {error}") from error

    async def _abandoned(self, held: Collection[str], most: int) -> list[tuple[str, list[_Pending]]]:
        """Pending entries that can be taken over, by reason."""
        consumers: Any = await self._redis.xinfo_consumers(self._stream, self._group)
        names = [one["name"].decode() for one in consumers if one["pending"] > 0]
        others = [name for name in names if name != self._consumer]
        found: list[tuple[str, list[_Pending]]] = []
        if others:
            silent = await self._silent(others)
            theirs = {name: await self._pending(most, name) for name in silent}
            # One that came back in between got its entries after that, perhaps, and works on them.
            found += [("holder_gone", theirs[name]) for name in await self._silent(silent)]
        if self._consumer in names:
            own = await self._pending(most + len(held), self._consumer, _ORPHANED_MS)
            found.append(("lost_on_the_way", [one for one in own if one.entry_id not in held]))
        if others:
            found.append(("idle", await self._pending(most, None, self._reclaim_idle_ms)))
        return [
            (why, [one for one in pending if one.entry_id not in held]) for why, pending in found if pending
        ]

    async def _silent(self, consumers: Sequence[str]) -> list[str]:
        """Those that have no heartbeat."""
        if not consumers:
            return []
        beats = await self._redis.mget([self._keys.heartbeat(name) for name in consumers])
        return [name for name, beat in zip(consumers, beats, strict=True) if beat is None]

    async def _pending(self, most: int, consumer: str | None, idle_ms: int | None = None) -> list[_Pending]:
        pending: Any = await self._redis.xpending_range(
            self._stream, self._group, "-", "+", most, consumername=consumer, idle=idle_ms
        )
        return [_Pending(one["message_id"].decode(), one["consumer"]) for one in pending]

    async def _take_over(self, pending: Sequence[_Pending], life: int = 0) -> list[Entry]:
        """Take entries over; those that another consumer was quicker to take stay with it."""
        if not pending:
            return []
        arguments = [self._group, self._consumer, *(part for one in pending for part in one)]
        (taken,) = await self._scripts.demand([Call("take_over", [self._stream], arguments)])
        return [
            Entry(entry_id.decode(), dict(zip(fields[::2], fields[1::2], strict=True)), deliveries, life)
            for entry_id, fields, deliveries in taken
        ]


def _is_missing(error: Exception) -> bool:
    """Whether an error only says that the stream or its group is not there (yet): nothing is pending then."""
    return isinstance(error, ResponseError) and ("NOGROUP" in str(error) or "no such key" in str(error))


def _batches(entries: Sequence[Entry]) -> list[list[Entry]]:
    together = [entry for entry in entries if entry.deliveries < _QUARANTINE]
    alone = [[entry] for entry in entries if entry.deliveries >= _QUARANTINE]
    return [together, *alone] if together else alone

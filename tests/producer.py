"""A producer that knows the wire and nothing else: XADD in both envelopes, replies over Pub/Sub.

Every reply is kept, so that a test can tell one answer from two.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from struct import pack
from typing import Any, Literal
from uuid import uuid4

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.waiting import eventually

Fields = dict[str, str | bytes]
Reply = dict[str, Any]

TRIGGERS = "mollifier:triggers"

_numbers = count(1)


def new_environment(label: str = "env") -> str:
    """An environment id that no other test has."""
    return f"{label}_{uuid4().hex[:12]}"


def request(environment: str, enrolled: bool | None = None, **fields: Any) -> dict[str, Any]:
    """The body of a trigger request: a task in an environment, and what the test adds to it."""
    flags = {} if enrolled is None else {"feature_flags": {"mollifier_enabled": enrolled}}
    return {
        "task": "send-email",
        "environment": {
            "id": environment,
            "organization_id": f"org_of_{environment}",
            "project_id": f"proj_of_{environment}",
            **flags,
        },
        **fields,
    }


def operation(kind: str, environment: str, organization: str | None = None, **fields: Any) -> dict[str, Any]:
    """The body of an operation of a tenant, who is that of `request` if no organization is given."""
    tenant = {"id": environment, "organization_id": organization or f"org_of_{environment}"}
    return {"type": kind, "environment": tenant, **fields}


def plain(body: bytes, reply_to: str | None, correlation_id: str | None) -> Fields:
    """The envelope for any Redis client."""
    fields: Fields = {"body": body}
    if reply_to is not None:
        fields["reply_to"] = reply_to
    if correlation_id is not None:
        fields["correlation_id"] = correlation_id
    return fields


def faststream(body: bytes, reply_to: str | None, correlation_id: str | None) -> Fields:
    """FastStream's envelope, version 1, written from its description."""
    headers = {"content-type": "application/json", "reply_to": reply_to, "correlation_id": correlation_id}
    given = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
    head = pack(">H", len(given))
    for name, value in given:
        head += pack(">H", len(name)) + name + pack(">H", len(value)) + value
    identity = b"\x89BIN\r\n\x1a\n"
    start = len(identity) + 2 + 4 + 4
    return {"__data__": identity + pack(">HII", 1, start, start + len(head)) + head + body}


ENVELOPES = {"plain": plain, "faststream": faststream}


class Producer:
    """One connection that sends, one that listens to all of this producer's reply channels."""

    def __init__(self, redis_url: str, namespace: str = "mollifier") -> None:
        self.redis: Any = Redis.from_url(redis_url, protocol=2)
        self.group = namespace
        self.stream = f"{namespace}:triggers"
        self.entry_ids: dict[str, str] = {}
        self.replies: defaultdict[str, list[Reply]] = defaultdict(list)
        self._channels = f"{namespace}:reply:{uuid4().hex}:"
        self._pubsub = self.redis.pubsub()
        self._arrived = asyncio.Condition()
        self._listening: asyncio.Task[None] | None = None

    def channel(self, correlation_id: str) -> str:
        """The channel on which this producer listens for one reply."""
        return self._channels + correlation_id

    async def send(
        self,
        body: object,
        *,
        envelope: Literal["plain", "faststream"] = "plain",
        correlation_id: str | None = None,
        reply: bool = True,
    ) -> str:
        """Append one request; `body` is JSON already when it is bytes. Returns its correlation id."""
        (sent,) = await self.send_all(
            [body], envelope=envelope, correlation_ids=[correlation_id], reply=reply
        )
        return sent

    async def send_all(
        self,
        bodies: Sequence[object],
        *,
        envelope: Literal["plain", "faststream"] = "plain",
        correlation_ids: Sequence[str | None] | None = None,
        reply: bool = True,
        at_once: bool = True,
        stream: str | None = None,
    ) -> list[str]:
        """Append requests in one round trip; `at_once`: in one transaction, so that they are one batch."""
        names = [name or f"c{next(_numbers)}" for name in correlation_ids or [None] * len(bodies)]
        encode = ENVELOPES[envelope]
        async with self.redis.pipeline(transaction=at_once) as pipeline:
            for name, body in zip(names, bodies, strict=True):
                text = body if isinstance(body, bytes) else json.dumps(body).encode()
                pipeline.xadd(
                    stream or self.stream, encode(text, self.channel(name) if reply else None, name)
                )
            ids = await pipeline.execute()
        self.entry_ids.update(zip(names, (one.decode() for one in ids), strict=True))
        return names

    async def append(self, fields: Mapping[str, str | bytes]) -> str:
        """Append an entry whose fields are up to the test; its id."""
        entry_id: bytes = await self.redis.xadd(self.stream, dict(fields))
        return entry_id.decode()

    async def reply(self, correlation_id: str, within: float = 10) -> Reply:
        """The first reply to a request; AssertionError when none comes `within` seconds."""
        return (await self.all_replies([correlation_id], within))[0]

    async def all_replies(self, correlation_ids: Sequence[str], within: float = 10) -> list[Reply]:
        """The first replies to some requests, in their order."""

        def missing() -> list[str]:
            return [name for name in correlation_ids if not self.replies.get(name)]

        try:
            async with asyncio.timeout(within), self._arrived:
                await self._arrived.wait_for(lambda: not missing())
        except TimeoutError:
            raise AssertionError(
                f"{len(missing())} of {len(correlation_ids)} requests had no reply within {within} s"
            ) from None
        return [self.replies[name][0] for name in correlation_ids]

    async def ask(self, body: object, within: float = 10) -> Reply:
        """Send one request and wait for its reply."""
        return await self.reply(await self.send(body), within)

    async def operate(self, kind: str, environment: str, within: float = 10, **fields: Any) -> Reply:
        """Send one operation and wait for its reply."""
        (reply,) = await self.operate_all([operation(kind, environment, **fields)], within)
        return reply

    async def operate_all(self, bodies: Sequence[object], within: float = 10) -> list[Reply]:
        """Send operations as one batch and wait for their replies, in order."""
        names = await self.send_all(bodies, stream=f"{self.group}:operations")
        return await self.all_replies(names, within)

    async def ask_all(self, bodies: Sequence[object], within: float = 10) -> list[Reply]:
        """Send requests as one batch and wait for their replies, in order."""
        return await self.all_replies(await self.send_all(bodies), within)

    async def trip(self, environment: str) -> list[Reply]:
        """Have an environment mollified for the hold time, where two triggers are over the threshold.

        Returns the replies to the three triggers that it takes; their task is `trip`.
        """
        replies = await self.ask_all([request(environment, enrolled=True, task="trip")] * 3)
        assert [reply.get("is_mollified") for reply in replies] == [False, True, True], replies
        return replies

    async def dead_letter(self, entry_id: str, within: float = 10) -> dict[str, bytes]:
        """The dead letter of an entry, once there is one."""

        async def found() -> dict[str, bytes]:
            letters = [
                {name.decode(): value for name, value in fields.items()}
                for _, fields in await self.redis.xrange(f"{self.group}:dead-letters")
                if fields[b"id"] == entry_id.encode()
            ]
            assert len(letters) == 1, f"{len(letters)} dead letters for {entry_id}"
            return letters[0]

        return await eventually(found, within)

    async def settled(self, within: float = 10) -> None:
        """Wait until the stream holds no request at all, waiting or handed out."""

        async def is_empty() -> None:
            assert await self.redis.xlen(self.stream) == 0
            assert (await self.redis.xpending(self.stream, self.group))["pending"] == 0

        await eventually(is_empty, within)

    async def start(self) -> None:
        """Listen; returns once the subscription stands."""
        await self._pubsub.psubscribe(f"{self._channels}*")
        confirmed = await self._pubsub.get_message(timeout=5)
        assert confirmed is not None
        self._listening = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """Stop listening and leave."""
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]
        await self.redis.aclose()

    async def _listen(self) -> None:
        while True:
            try:
                message = await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=1)
            except (RedisError, OSError):
                await asyncio.sleep(0.02)  # Redis is away; the subscription comes back with it
                continue
            if message is not None:
                await self._keep(message["channel"].decode(), message["data"])

    async def _keep(self, channel: str, data: bytes) -> None:
        async with self._arrived:
            self.replies[channel.removeprefix(self._channels)].append(json.loads(data))
            self._arrived.notify_all()


@asynccontextmanager
async def producing(redis_url: str, namespace: str = "mollifier") -> AsyncIterator[Producer]:
    """A producer that listens for as long as the block runs."""
    producer = Producer(redis_url, namespace)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()

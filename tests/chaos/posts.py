"""How producers send and listen: with a plain Redis client, or with FastStream. Neither repeats by itself."""

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from faststream.redis import RedisBroker
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MaxConnectionsError, RedisError, ResponseError

from tests.chaos.journal import Attempt, Journal, Reply
from tests.producer import plain

_ANSWER_S = 3.0
_AT_ONCE = 30


class Post(Protocol):
    """Takes an attempt to Redis and hears what is said about it; writes both into the journal."""

    makes_up_channels: bool

    async def send(self, attempt: Attempt) -> None: ...

    async def reply(self, attempt: str, within_s: float) -> Reply | None:
        """The first reply to an attempt, or None when there is none in time."""
        ...

    async def close(self) -> None: ...


class PlainPost:
    """XADD, and one subscription for all replies of this producer."""

    makes_up_channels = False

    def __init__(self, redis_url: str, producer: str, journal: Journal) -> None:
        self._redis: Any = Redis.from_url(
            redis_url,
            protocol=2,
            max_connections=200,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=_ANSWER_S,
            socket_connect_timeout=_ANSWER_S,
        )
        self._producer = producer
        self._channels = f"mollifier:reply:{producer}:"
        self._journal = journal
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._hearing = asyncio.Event()
        self._journal.deaf(producer)
        self._listening = asyncio.create_task(self._listen())

    async def send(self, attempt: Attempt) -> None:
        """See `Post.send`. Nothing is sent while no reply can be heard."""
        await self._hearing.wait()
        self._waiting[attempt.name] = asyncio.get_running_loop().create_future()
        body = attempt.body if isinstance(attempt.body, str) else json.dumps(attempt.body)
        fields = plain(body.encode(), attempt.reply_to, attempt.name)
        await _journaled(
            self._journal, attempt, lambda: self._redis.xadd(f"mollifier:{attempt.stream}", fields)
        )

    async def reply(self, attempt: str, within_s: float) -> Reply | None:
        """See `Post.reply`."""
        future = self._waiting[attempt]
        try:
            async with asyncio.timeout(within_s):
                return await asyncio.shield(future)
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(attempt, None)

    async def close(self) -> None:
        self._listening.cancel()
        with suppress(asyncio.CancelledError):
            await self._listening
        await self._redis.aclose()

    async def _listen(self) -> None:
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.psubscribe(f"{self._channels}*")
                await self._hear(pubsub)
            except Exception as error:  # a client whose connection breaks complains in many ways
                logging.getLogger("post").info("listening: %r", error)
            finally:
                if self._hearing.is_set():
                    self._journal.deaf(self._producer)
                self._hearing.clear()
                with suppress(Exception):
                    await pubsub.aclose()
            await asyncio.sleep(0.1)

    async def _hear(self, pubsub: Any) -> None:
        """Hear replies until the subscription breaks: a ping that is not answered shows that it has."""
        clock = asyncio.get_running_loop().time
        heard = clock()
        while clock() - heard < _ANSWER_S:
            message = await pubsub.get_message(timeout=1)
            if message is None:
                await pubsub.ping()
                continue
            heard = clock()
            if message["type"] == "psubscribe":
                self._journal.hearing(self._producer)
                self._hearing.set()
            elif message["type"] == "pmessage":
                self._take(message["channel"].decode().removeprefix(self._channels), message["data"])

    def _take(self, attempt: str, data: bytes) -> None:
        reply = json.loads(data)
        self._journal.told(attempt, reply)
        future = self._waiting.get(attempt)
        if future is not None and not future.done():
            future.set_result(reply)


class FastStreamPost:
    """`await broker.request(...)`: FastStream makes up the reply channel, and says less about failures."""

    makes_up_channels = True

    def __init__(self, redis_url: str, producer: str, journal: Journal) -> None:
        self._redis_url = redis_url
        self._broker = self._new_broker()
        self._journal = journal
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._replies: dict[str, Reply] = {}

    async def send(self, attempt: Attempt) -> None:
        """See `Post.send`: the reply is waited for here."""
        async with self._room:
            await self._connect()

            async def request() -> None:
                broker = self._broker
                try:
                    message = await broker.request(
                        attempt.body,
                        stream=f"mollifier:{attempt.stream}",
                        correlation_id=attempt.name,
                        timeout=_ANSWER_S,
                    )
                except MaxConnectionsError:
                    # A request that breaks keeps its connection, until there are none left.
                    if broker is self._broker:
                        self._broker = self._new_broker()
                        await broker.stop()
                    raise
                reply = await message.decode()
                assert isinstance(reply, dict), reply
                self._journal.told(attempt.name, reply)
                self._replies[attempt.name] = reply

            await _journaled(self._journal, attempt, request)

    async def reply(self, attempt: str, within_s: float) -> Reply | None:
        """See `Post.reply`."""
        return self._replies.pop(attempt, None)

    async def close(self) -> None:
        await self._broker.stop()

    def _new_broker(self) -> RedisBroker:
        return RedisBroker(
            self._redis_url,
            apply_types=False,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=_ANSWER_S,
            socket_connect_timeout=_ANSWER_S,
            logger=logging.getLogger("post"),
        )

    async def _connect(self) -> None:
        while True:
            with suppress(RedisError, OSError, TimeoutError):
                await self._broker.connect()
                return
            await asyncio.sleep(0.1)


async def _journaled(journal: Journal, attempt: Attempt, send: Callable[[], Any]) -> None:
    """Send, and write down before and after. A refusal is Redis' own word; silence is not."""
    journal.sending(attempt)
    try:
        entry = await send()
    except ResponseError as error:
        journal.refused(attempt.name, str(error))
    except Exception as error:  # a client whose connection breaks complains in many ways
        journal.unsure(attempt.name, repr(error))
    else:
        journal.sent(attempt.name, entry.decode() if isinstance(entry, bytes) else None)

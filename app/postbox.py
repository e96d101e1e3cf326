"""The post of one producer: requests go out in batches, replies come in on one subscription."""

import asyncio
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Generic

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.backoff import Backoff
from app.errors import BufferUnavailable, RequestError
from app.read_reply import Success, correlation_id, read_reply
from app.redis_connection import Exchanging, connect, connection_of

_FIRST_RECONNECT_S, _LONGEST_RECONNECT_S = 0.05, 1.0
_SILENCE_S = 5.0
_SENT_AT_ONCE = 500
_CANCEL_AGAIN_S = 0.05


@dataclass(slots=True, eq=False)
class Posted(Generic[Success]):
    """A request that waits for its reply, which will be there, or a `RequestError`: the reply is an error, is
    not of the `expected` kind, or Redis refused the request.

    `repeatable`: handled twice, it does what it does once. `doubt` says why the reply may never come.
    """

    correlation_id: str
    stream: str
    body: bytes
    expected: type[Success]
    repeatable: bool
    reply: "asyncio.Future[Success]"
    doubt: str = ""


class Postbox:
    """Two connections, made in the background and made again whenever Redis was away.

    A request is appended once, and again only if it is repeatable: when the connection broke while it was
    sent, or replies may have been missed. One that is not is waited for instead; it may have been appended.

    All replies come on one channel, told apart by their correlation ids. The user's name is part of it, so
    that an ACL can keep users from hearing one another; it cannot where they subscribe to patterns.
    """

    def __init__(self, redis_url: str, namespace: str) -> None:
        self._redis = connect(redis_url)
        self._redis.set_retry(Retry(NoBackoff(), 0))  # an append that is repeated unseen makes two runs
        user = self._redis.connection_pool.connection_kwargs.get("username")
        self._channel = f"{namespace}:reply:{f'{user}:' if user else ''}{secrets.token_hex(8)}"
        self._waiting: dict[str, Posted[Any]] = {}
        self._outbox: dict[str, Posted[Any]] = {}
        self._numbers = count(1)
        self._has_mail = asyncio.Event()
        self._listening = asyncio.Event()
        self._trouble = "not connected to Redis yet"
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Start to connect, in the running event loop."""
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._send())]

    async def close(self) -> None:
        """Let go of the connections; who still waits is cancelled."""
        for task in self._tasks:
            while not task.done():  # redis-py swallows a cancellation that meets the end of a read
                task.cancel()
                await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)
        for posted in self._waiting.values():
            posted.reply.cancel()
        await self._redis.aclose()

    def __len__(self) -> int:
        """How many requests wait for their reply, sent or not."""
        return len(self._waiting)

    def trouble(self, posted: Posted[Any]) -> str:
        """Why the reply to a request does not come; empty: nothing is wrong here."""
        return posted.doubt or ("" if self._listening.is_set() else self._trouble)

    def post(self, stream: str, body: bytes, expected: type[Success], *, repeatable: bool) -> Posted[Success]:
        """Put a request into the outbox. The caller forgets it in the end."""
        reply: asyncio.Future[Success] = asyncio.get_running_loop().create_future()
        posted = Posted(str(next(self._numbers)), stream, body, expected, repeatable, reply)
        self._waiting[posted.correlation_id] = posted
        self._put_out(posted)
        return posted

    def forget(self, posted: Posted[Any]) -> None:
        """Nobody waits for this request any more. If it is still in the outbox, it is not sent."""
        self._waiting.pop(posted.correlation_id, None)
        self._outbox.pop(posted.correlation_id, None)

    def _put_out(self, posted: Posted[Any]) -> None:
        self._outbox[posted.correlation_id] = posted
        self._has_mail.set()

    def _doubt(self, requests: Iterable[Posted[Any]], why: str) -> None:
        """Replies to what was sent may have been missed: ask once more, where that does no harm."""
        for posted in requests:
            is_sent = posted.correlation_id in self._waiting and posted.correlation_id not in self._outbox
            if is_sent and not posted.reply.done():
                posted.doubt = why
                if posted.repeatable:
                    self._put_out(posted)

    async def _send(self) -> None:
        """Append what is in the outbox, as much at once as there is, but only while replies can be heard."""
        backoff = Backoff(_FIRST_RECONNECT_S, _LONGEST_RECONNECT_S)
        while True:
            await self._has_mail.wait()
            await self._listening.wait()
            taken = list(islice(self._outbox.values(), _SENT_AT_ONCE))
            for posted in taken:
                del self._outbox[posted.correlation_id]
            if not self._outbox:
                self._has_mail.clear()
            try:
                await self._append(taken)
            except (RedisError, OSError) as error:
                self._doubt(taken, f"the connection broke while the request was sent ({_words(error)})")
                await asyncio.sleep(backoff.delay_s())
            else:
                backoff.reset()

    async def _append(self, requests: Sequence[Posted[Any]]) -> None:
        address = ("reply_to", self._channel, "correlation_id")
        appends = [
            ("XADD", posted.stream, "*", "body", posted.body, *address, posted.correlation_id)
            for posted in requests
        ]
        async with connection_of(self._redis) as connection:
            answers = await connection.exchange(appends)
        for posted, answer in zip(requests, answers, strict=True):
            if not isinstance(answer, Exception):
                posted.doubt = ""
            elif not posted.reply.done():
                refusal = BufferUnavailable(f"Redis refused the request: {_words(answer)}")
                posted.reply.set_exception(refusal)

    async def _listen(self) -> None:
        """Hear replies for ever; whenever the connection is lost, subscribe again."""
        backoff = Backoff(_FIRST_RECONNECT_S, _LONGEST_RECONNECT_S)
        while True:
            try:
                async with connection_of(self._redis) as connection:
                    try:
                        await self._hear(connection, backoff)
                    finally:
                        self._listening.clear()
                        await connection.disconnect(nowait=True)  # nobody else has a use for a subscriber
            except Exception as error:
                self._trouble = f"Redis: {_words(error)}"
            await asyncio.sleep(backoff.delay_s())

    async def _hear(self, connection: Exchanging, backoff: Backoff) -> None:
        """Take replies until the connection is lost, or has been silent although it was asked."""
        (subscribed,) = await connection.exchange([("SUBSCRIBE", self._channel)])
        if isinstance(subscribed, Exception):
            raise subscribed
        await self._redis.ping()  # a Redis that still loads its data takes subscriptions, nothing else
        self._doubt(self._waiting.values(), "the connection was lost, and with it perhaps the reply")
        self._listening.set()
        is_asked = False
        while True:
            heard = await connection.hear(_SILENCE_S)
            if heard:
                backoff.reset()  # not before: a reply that breaks the connection would break it at once again
            elif is_asked:
                raise RedisTimeoutError("it does not answer")
            else:
                await connection.send_command("PING")
            is_asked = not heard
            for kind, *_, content in heard:
                if kind == b"message":
                    self._take(content)

    def _take(self, message: bytes) -> None:
        posted = self._waiting.get(correlation_id(message) or "")
        if posted is None or posted.reply.done():
            return
        try:
            posted.reply.set_result(read_reply(message, posted.expected))
        except RequestError as error:
            posted.reply.set_exception(error)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__

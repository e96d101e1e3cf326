"""The post of one producer: requests go out in batches, replies come in on one subscription."""

import asyncio
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple

import msgspec
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.backoff import Backoff
from app.errors import BufferUnavailable, InternalError, InvalidRequest, RequestError
from app.redis_client import connect
from schemas.replies import ErrorDetail, Reply, RunReply

_FIRST_RECONNECT_S, _LONGEST_RECONNECT_S = 0.05, 1.0
_SILENCE_S = 5.0
_SENT_AT_ONCE = 500
_CANCEL_AGAIN_S = 0.05

_decode = msgspec.json.Decoder(Reply).decode


class _Waiting(NamedTuple):
    """A request whose reply has not come."""

    future: asyncio.Future[RunReply]
    body: bytes
    repeatable: bool


class Postbox:
    """Two connections, made in the background and made again whenever Redis was away."""

    def __init__(self, redis_url: str, namespace: str) -> None:
        self._redis = connect(redis_url)
        self._redis.set_retry(Retry(NoBackoff(), 0))  # an append that is repeated unseen makes two runs
        self._stream = f"{namespace}:triggers"
        self._channels = f"{namespace}:reply:{secrets.token_hex(8)}:"
        self._waiting: dict[int, _Waiting] = {}
        self._outbox: deque[int] = deque()
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
        for waiting in self._waiting.values():
            waiting.future.cancel()
        await self._redis.aclose()

    @property
    def trouble(self) -> str:
        """Why no reply can be heard just now; empty: they can."""
        return "" if self._listening.is_set() else self._trouble

    def __len__(self) -> int:
        """How many requests wait for their reply."""
        return len(self._waiting)

    def forget(self, number: int) -> None:
        """Nobody waits for this request any more. One that is still in the outbox is not sent."""
        self._waiting.pop(number, None)

    def post(self, body: bytes, *, repeatable: bool) -> tuple[int, asyncio.Future[RunReply]]:
        """Put a request into the outbox; its number and what will hold the reply, or a `RequestError`.

        `repeatable`: appending it twice cannot make a second run. The caller forgets the number in the end.
        """
        number = next(self._numbers)
        future: asyncio.Future[RunReply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = _Waiting(future, body, repeatable)
        self._outbox.append(number)
        self._has_mail.set()
        return number, future

    async def _send(self) -> None:
        """Append what is in the outbox, as much at once as there is, but only while replies can be heard."""
        while True:
            await self._has_mail.wait()
            await self._listening.wait()
            numbers = [self._outbox.popleft() for _ in range(min(len(self._outbox), _SENT_AT_ONCE))]
            if not self._outbox:
                self._has_mail.clear()
            await self._append([number for number in numbers if number in self._waiting])

    async def _append(self, numbers: Sequence[int]) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for number in numbers:
                    fields: list[Any] = ["body", self._waiting[number].body]
                    fields += ["reply_to", f"{self._channels}{number}", "correlation_id", number]
                    pipeline.execute_command("XADD", self._stream, "*", *fields)
                answers = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            # What was appended all the same is found again by its run id.
            for number in numbers:
                self._fail(number, f"Redis: {_words(error)}; the request may have been accepted")
            return
        for number, answer in zip(numbers, answers, strict=True):
            if isinstance(answer, Exception):
                self._fail(number, f"Redis refused the request: {_words(answer)}")

    async def _listen(self) -> None:
        """Hear replies for ever; whenever the connection is lost, subscribe again."""
        backoff = Backoff(_FIRST_RECONNECT_S, _LONGEST_RECONNECT_S)
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.psubscribe(self._channels + "*")
                await self._hear(pubsub, backoff)
            except Exception as error:
                self._trouble = f"Redis: {_words(error)}"
            finally:
                self._listening.clear()
                await pubsub.aclose()  # type: ignore[no-untyped-call]
            await asyncio.sleep(backoff.delay_s())

    async def _hear(self, pubsub: PubSub, backoff: Backoff) -> None:
        """Take replies until the connection is lost, or has been silent although it was asked."""
        is_asked = False
        while True:
            message = await pubsub.get_message(timeout=_SILENCE_S)
            if message is None:
                if is_asked:
                    raise RedisTimeoutError("it does not answer")
                await pubsub.ping()
            is_asked = message is None
            if message is not None and message["type"] == "psubscribe":
                backoff.reset()
                self._resend_unheard()
                self._listening.set()
            elif message is not None and message["type"] == "pmessage":
                self._take(int(message["channel"].rpartition(b":")[2]), message["data"])

    def _resend_unheard(self) -> None:
        """Replies may have been missed while nobody listened: ask again for those that can be."""
        in_outbox = set(self._outbox)
        for number, waiting in self._waiting.items():
            if waiting.repeatable and number not in in_outbox and not waiting.future.done():
                self._outbox.append(number)
                self._has_mail.set()

    def _take(self, number: int, message: bytes) -> None:
        waiting = self._waiting.get(number)
        if waiting is None or waiting.future.done():
            return
        try:
            reply = _decode(message)
        except msgspec.MsgspecError as error:
            waiting.future.set_exception(InternalError(f"the reply cannot be read: {error}"))
            return
        if isinstance(reply, RunReply):
            waiting.future.set_result(reply)
        else:
            waiting.future.set_exception(error_of(reply.error))

    def _fail(self, number: int, why: str) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(BufferUnavailable(why))


def error_of(detail: ErrorDetail) -> RequestError:
    """The error that a reply speaks of. A code from a newer service keeps its being retryable or not."""
    known = _CLASSES.get(detail.code)
    if known is not None:
        return known(detail.message)
    unknown = InternalError if detail.retryable else InvalidRequest
    return unknown(f"{detail.code}: {detail.message}")


def _subclasses(root: type[RequestError]) -> Iterable[type[RequestError]]:
    for one in root.__subclasses__():
        yield one
        yield from _subclasses(one)


_CLASSES = {one.code: one for one in _subclasses(RequestError) if "code" in vars(one)}


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__

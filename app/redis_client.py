"""Scripts run in as few round trips as there can be; and patience for who only reads a stream.

Errors are translated here, once: a server that answers with an error refused; one that does not
answer is `Unreachable`, and what it did is not known.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ResponseError

from app.backoff import Backoff
from app.errors import Unreachable
from app.redis_connection import LOST, connection_of

_WAITING = ("WAIT", "WAITAOF")
_READ_AGAIN_S = 0.05
_READ_AGAIN_LONGEST_S = 1.0


class Call(NamedTuple):
    """One script with its keys and arguments; or, with `keys` None, the plain command `name`."""

    name: str
    keys: Sequence[str] | None
    arguments: Sequence[str | bytes | int]


class Scripts:
    """Runs the scripts of `app/lua`. Every one of them is safe to run twice."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def run(self, calls: Sequence[Call]) -> list[Any]:
        """Run calls in one round trip; per call, in order, its answer or the server's `ResponseError`: it has
        refused that one, and done nothing for it.

        Raises:
            Unreachable: the server did not answer; or it refused, asked again, what it may have done before.
        """
        if not calls:
            return []
        answers = await self._send(calls)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            # What was done is not done again: it might be refused this time. But what waits, waits for all.
            again = [
                position
                for position, (call, answer) in enumerate(zip(calls, answers, strict=True))
                if isinstance(answer, NoScriptError) or call.name in _WAITING
            ]
            await self._load({calls[one].name for one in again if calls[one].keys is not None})
            for position, answer in zip(again, await self._send([calls[one] for one in again]), strict=True):
                answers[position] = answer
        return answers

    async def demand(self, calls: Sequence[Call]) -> list[Any]:
        """Run calls none of which a healthy server refuses.

        Raises:
            Unreachable: the server did not answer, or refused one.
        """
        answers = await self.run(calls)
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise Unreachable(f"Redis: {answer}") from answer
        return answers

    async def _send(self, calls: Sequence[Call]) -> list[Any]:
        failed: list[Exception] = []

        async def note(error: Exception) -> None:
            failed.append(error)

        retry = self._redis.get_retry()
        assert retry is not None
        try:
            answers: list[Any] = await retry.call_with_retry(lambda: self._exchange(calls), note)
        except LOST as error:
            raise Unreachable(f"Redis: {error}") from error
        for answer in answers if failed else ():
            if isinstance(answer, ResponseError):
                raise Unreachable(f"Redis: {answer}, asked again after: {failed[0]}") from answer
        return answers

    async def _exchange(self, calls: Sequence[Call]) -> list[Any]:
        async with connection_of(self._redis) as connection:
            answers = await connection.exchange([_command(call) for call in calls])
        for position, (call, answer) in enumerate(zip(calls, answers, strict=True)):
            if isinstance(answer, LOST):
                raise answer
            if call.keys is None and not isinstance(answer, ResponseError):
                answers[position] = self._as_usual(call.name, answer)
        return answers

    def _as_usual(self, name: str, answer: Any) -> Any:
        """The answer to a plain command, in the form that redis-py gives it."""
        callback = self._redis.response_callbacks.get(name)
        return answer if callback is None else callback(answer)

    async def _load(self, names: set[str]) -> None:
        try:
            for name in names:
                await self._redis.script_load(_script(name)[0])
        except LOST as error:
            raise Unreachable(f"Redis: {error}") from error


def _command(call: Call) -> tuple[Any, ...]:
    if call.keys is None:
        return (call.name, *call.arguments)
    return ("EVALSHA", _script(call.name)[1], len(call.keys), *call.keys, *call.arguments)


@cache
def _script(name: str) -> tuple[str, str]:
    """Text and digest of `app/lua/<name>.lua`."""
    text = files("app").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    return text, sha1(text.encode(), usedforsecurity=False).hexdigest()


def consumers_in(answer: Any) -> list[dict[bytes, Any]]:
    """What XINFO CONSUMERS says; none when the stream or its group is not there.

    Raises:
        Unreachable: the server refused.
    """
    if not isinstance(answer, ResponseError):
        return [dict(zip(fields[::2], fields[1::2], strict=True)) for fields in answer]
    if "NOGROUP" in str(answer) or "no such key" in str(answer):
        return []
    raise Unreachable(f"Redis: {answer}") from answer


class PatientRetry(Retry):
    """For a client that only reads a stream: whatever Redis says, wait with jitter and read again.

    FastStream's own answer to an error is to stop for good (NOGROUP), to spin (READONLY, MISCONF)
    or to sleep a fixed 5 s. Every try begins with `before`, and has failed if that finds Redis `Unreachable`.

    After `close` no further command is sent: the loop comes to stand where nothing is under way, and
    `closed` is set. A read that is cut off instead would leave what it was given pending.
    """

    def __init__(self, before: Callable[[], Awaitable[None]], failed: Callable[[Exception], None]) -> None:
        super().__init__(NoBackoff(), -1)
        self._before = before
        self._failed = failed
        self._closing = False
        self.closed = asyncio.Event()

    def close(self) -> None:
        """Send nothing more."""
        self._closing = True

    def __deepcopy__(self, memo: object) -> "PatientRetry":
        """Every connection of a pool shares it."""
        return self

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[Any]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> Any:
        """See `redis.asyncio.retry.Retry`; only BUSYGROUP, which is no failure, is let through."""
        backoff = Backoff(_READ_AGAIN_S, _READ_AGAIN_LONGEST_S)
        failures = 0
        while True:
            if self._closing:
                self.closed.set()
                await asyncio.Event().wait()
            try:
                await self._before()
            except Unreachable as error:
                self._failed(error)
                await asyncio.sleep(backoff.delay_s())
                continue
            try:
                return await do()
            except (*LOST, ResponseError) as error:
                if "BUSYGROUP" in str(error):
                    raise
                if str(error).startswith("OOM"):
                    # Of what this client sends only XGROUP CREATE needs memory. Reading goes on without it.
                    raise ResponseError(f"the group already exists, or will: {error}") from error
                failures += 1
                self._failed(error)
                await (fail(error, failures) if with_failure_count else fail(error))
                await asyncio.sleep(backoff.delay_s())

"""Connections to Redis, and scripts run in as few round trips as there can be.

Errors are translated here, once: a server that answers with an error refused; one that does not
answer is `Unreachable`, and what it did is not known.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from hiredis import pack_command
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.backoff import Backoff
from app.errors import ConfigurationError, Unreachable

LOST = (RedisConnectionError, RedisTimeoutError, OSError)

CONNECTIONS = 32
_CONNECT_S = 2.0
_ANSWER_S = 5.0
_READ_AGAIN_S = 0.05
_READ_AGAIN_LONGEST_S = 1.0


def connect(url: str) -> Redis:
    """A client for commands that do not block. Connects lazily; a cut connection is tried once more.

    Every parameter of the URL is an option of redis-py's connections: `rediss://...?ssl_ca_certs=FILE`.

    Raises:
        ConfigurationError: there is no such option.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            protocol=2,
            timeout=_ANSWER_S,
            socket_connect_timeout=_CONNECT_S,
            socket_timeout=_ANSWER_S,
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )
        pool.connection_class = type("Connection", (_Exchanging, pool.connection_class), {})
        pool.make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, RedisError) as error:
        raise ConfigurationError(f"REDIS_URL: {_complaint(error)}") from None
    return Redis.from_pool(pool)


def _complaint(error: Exception) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return f"{unknown[1]}: there is no such parameter" if unknown else str(error)


class _Exchanging:
    """A connection that makes many commands of a batch one exchange: packed in C, as redis-py does by itself
    for blocking connections only, written at once, and all answers read with one deadline, not one each.

    Most of what a batch costs this process would otherwise be its arguments and the reading of answers.
    """

    if TYPE_CHECKING:  # what redis-py's connection has
        socket_timeout: float
        _writer: asyncio.StreamWriter
        _parser: Any

        async def disconnect(self, nowait: bool = False) -> None: ...

    async def exchange(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers to commands, in order; what the server refuses is a `ResponseError` among them.

        Raises:
            RedisConnectionError, RedisTimeoutError: the server did not answer.
        """
        packed = self.pack_commands(commands)
        try:
            async with asyncio.timeout(self.socket_timeout):
                self._writer.writelines(packed)
                await self._writer.drain()
                read = self._parser.read_response
                return [await read() for _ in commands]
        except BaseException as error:
            await self.disconnect(nowait=True)  # what it would answer next belongs to nobody
            if isinstance(error, TimeoutError):
                raise RedisTimeoutError("it does not answer in time") from error
            if isinstance(error, OSError) and not isinstance(error, LOST):
                raise RedisConnectionError(str(error)) from error
            raise

    def pack_command(self, *command: Any) -> list[bytes]:
        return self.pack_commands([command])

    def pack_commands(self, commands: Iterable[Sequence[Any]]) -> list[bytes]:
        return [b"".join(pack_command((*name.split(), *arguments)) for name, *arguments in commands)]


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
        """Run calls in one round trip; per call, in order, its answer or the server's `ResponseError`.

        Raises:
            Unreachable: the server did not answer.
        """
        if not calls:
            return []
        answers = await self._send(calls)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self._load({call.name for call in calls if call.keys is not None})
            answers = await self._send(calls)
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
        try:
            try:
                return await self._exchange(calls)
            except RedisConnectionError:
                return await self._exchange(calls)
        except LOST as error:
            raise Unreachable(f"Redis: {error}") from error
        except RuntimeError as error:  # uvloop's word for a connection that was closed under a write
            raise Unreachable(f"Redis: {error}") from error

    async def _exchange(self, calls: Sequence[Call]) -> list[Any]:
        pool = self._redis.connection_pool
        connection: Any = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            answers: list[Any] = await connection.exchange([_command(call) for call in calls])
        finally:
            await pool.release(connection)
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
    or to sleep a fixed 5 s. `moved` is called at every try, which shows that the loop is alive.

    After `close` no further command is sent: the loop comes to stand where nothing is under way, and
    `closed` is set. A read that is cut off instead would leave what it was given pending.
    """

    def __init__(self, moved: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        super().__init__(NoBackoff(), -1)
        self._moved = moved
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
            self._moved()
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

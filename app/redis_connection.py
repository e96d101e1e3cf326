"""Connections to Redis: made, lent, and used for many commands at once."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from hiredis import pack_command
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.errors import ConfigurationError

LOST = (RedisConnectionError, RedisTimeoutError, OSError)

CONNECTIONS = 32
_CONNECT_S = 2.0
_ANSWER_S = 5.0


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
        pool.connection_class = type("Connection", (Exchanging, pool.connection_class), {})
        pool.make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, RedisError) as error:
        raise ConfigurationError(f"REDIS_URL: {_complaint(error)}") from None
    return Redis.from_pool(pool)


def _complaint(error: Exception) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return f"{unknown[1]}: there is no such parameter" if unknown else str(error)


class Exchanging:
    """A connection that makes many commands of a batch one exchange: packed in C, as redis-py does by itself
    for blocking connections only, written at once, and all answers read with one deadline, not one each.

    Most of what a batch costs this process would otherwise be its arguments and the reading of answers.
    """

    if TYPE_CHECKING:  # what redis-py's connection has
        socket_timeout: float
        _writer: asyncio.StreamWriter
        _parser: Any

        async def disconnect(self, nowait: bool = False) -> None: ...
        async def send_command(self, *command: Any) -> None: ...

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
            if isinstance(error, OSError | RuntimeError):  # uvloop's word for a connection that was closed
                raise RedisConnectionError(str(error)) from error
            raise

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except RuntimeError as error:
            raise RedisConnectionError(str(error)) from error

    async def hear(self, within_s: float) -> list[Any]:
        """What the server says to a subscriber, as much as is there; nothing if nothing comes in that time.

        Raises:
            RedisConnectionError, OSError: the connection is lost.
        """
        heard: list[Any] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                heard.append(await self._parser.read_response())
                while self._parser._reader.has_data():
                    heard.append(await self._parser.read_response())
        return heard

    def pack_command(self, *command: Any) -> list[bytes]:
        return self.pack_commands([command])

    def pack_commands(self, commands: Iterable[Sequence[Any]]) -> list[bytes]:
        return [b"".join(pack_command((*name.split(), *arguments)) for name, *arguments in commands)]


@asynccontextmanager
async def connection_of(redis: Redis) -> AsyncIterator[Exchanging]:
    """A connection of a client that `connect` made, for a while.

    Raises:
        RedisConnectionError, RedisTimeoutError: there is none.
    """
    connection = await redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    try:
        yield connection
    finally:
        await redis.connection_pool.release(connection)

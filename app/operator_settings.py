"""What operators have decided, read from Postgres as it changes.

A process hears of a change at once (LISTEN). Where that does not get through, as behind pgbouncer in
transaction mode, it finds out by looking at the revision: one indexed row, on the same connection.
"""

import asyncio
from contextlib import suppress
from typing import Any

import asyncpg
import msgspec

from app.errors import StoreUnavailable
from app.postgres import Connection, connect, is_unavailable, statement
from app.settings import Settings
from app.switches import OperatorSettings

CHANNEL = "mollifier_settings"

_decode = msgspec.json.Decoder(OperatorSettings).decode


class OperatorNews:
    """A connection of its own, made when it is needed, again and again."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.database_url
        self._timeout_s = settings.store_timeout_ms / 1000
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._heard = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Return as soon as it is heard that something has changed, and else after some time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._heard.wait()

    async def read(self, known: int | None) -> OperatorSettings | None:
        """What operators have decided; None if it is still that of the revision `known`.

        Raises:
            StoreUnavailable: it cannot be read; the last known values hold.
        """
        self._heard.clear()
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connected()
                if await connection.fetchval(statement("look_up_revision")) == known:
                    return None
                return await load(connection)
        except BaseException as error:
            self.close()
            if isinstance(error, Exception) and is_unavailable(error):
                raise StoreUnavailable from error
            raise

    async def _connected(self) -> "asyncpg.Connection[asyncpg.Record]":
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._url, self._timeout_s)
            await self._connection.add_listener(CHANNEL, self._hear)
        return self._connection

    def _hear(self, *_: Any) -> None:
        self._heard.set()

    def close(self) -> None:
        """Let the connection go at once."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


async def load(connection: Connection) -> OperatorSettings:
    """What operators have decided, in one statement.

    Raises:
        StoreUnavailable: a newer version has decided something that this one does not know.
    """
    try:
        return _decode(await connection.fetchval(statement("look_up_settings")))
    except msgspec.ValidationError as error:
        raise StoreUnavailable from error

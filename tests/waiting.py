"""Looking until it is so: polling an assertion, and the rows that assertions are about."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg
from redis.exceptions import RedisError

Result = TypeVar("Result")

NOT_YET = (AssertionError, OSError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError)
"""What may still come right: the assertion itself, and servers that are on their way."""


async def eventually(
    assertion: Callable[[], Awaitable[Result]], within_s: float = 10, every_s: float = 0.02
) -> Result:
    """Call `assertion` until it raises none of `NOT_YET`, and return what it returned.

    Raises:
        What it last raised, once `within_s` have passed.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await assertion()
        except NOT_YET:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(every_s)


async def stays_so(assertion: Callable[[], Awaitable[object]], for_s: float, every_s: float = 0.05) -> None:
    """Call `assertion` again and again for a time in which something must not happen."""
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        await assertion()
        await asyncio.sleep(every_s)


async def fetch(database_url: str, query: str, *arguments: object) -> list[asyncpg.Record]:
    """The records of one statement, on a connection of its own: servers come and go in these tests."""
    connection = await asyncpg.connect(database_url, timeout=5)
    try:
        return await connection.fetch(query, *arguments, timeout=10)
    finally:
        await connection.close()


async def runs_of(database_url: str, *environments: str) -> list[dict[str, Any]]:
    """The rows of some environments, by id."""
    query = "SELECT * FROM mollifier.runs WHERE environment_id = ANY ($1::text[]) ORDER BY id"
    return [dict(record) for record in await fetch(database_url, query, list(environments))]

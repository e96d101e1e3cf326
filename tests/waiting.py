"""Looking until it is so: polling an assertion, and the rows that assertions are about."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import asyncpg
from redis.exceptions import RedisError

Result = TypeVar("Result")

NOT_YET = (AssertionError, OSError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError)
"""What may still come right: the assertion itself, and servers that are on their way."""


async def eventually(
    assertion: Callable[[], Result | Awaitable[Result]], within_s: float = 10, every_s: float = 0.02
) -> Result:
    """Call `assertion` until it raises none of `NOT_YET`, and return what it returned.

    Raises:
        What it last raised, once `within_s` have passed.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            result = assertion()
            return cast("Result", await result if inspect.isawaitable(result) else result)
        except NOT_YET:
            if time.monotonic() > deadline:
                raise
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


async def eventually_runs(
    database_url: str, *environments: str, count: int, within_s: float = 10
) -> list[dict[str, Any]]:
    """The rows of some environments, once there are `count` of them."""

    async def all_there() -> list[dict[str, Any]]:
        rows = await runs_of(database_url, *environments)
        assert len(rows) == count, f"{len(rows)} rows of {environments}, not {count}"
        return rows

    return await eventually(all_there, within_s, every_s=0.05)

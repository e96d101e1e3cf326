"""Connections to Postgres, the statements of `app/sql`, and what its errors mean. DESIGN section 8."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from app.errors import (
    ConfigurationError,
    InternalError,
    InvalidRequest,
    RequestError,
    StatementTimedOut,
    StoreUnavailable,
)

Connection = Any
"""An asyncpg connection, pooled or not."""

POOL_SIZE = 8
_BY_INDEX = "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off"
_UNAVAILABLE_CLASSES = frozenset({"08", "25", "28", "3D", "40", "42", "53", "55", "57", "58", "XX"})
_REFUSED_CLASSES = frozenset({"22", "23"})


async def create_pool(url: str, timeout_s: float, size: int = POOL_SIZE) -> "asyncpg.Pool[asyncpg.Record]":
    """A pool that connects when it is first used, so a process can start while Postgres is away.

    `?statement_cache_size=0` in the URL switches prepared statements off, for pgbouncer in
    transaction mode; every other parameter is Postgres' own.
    """
    dsn, options = split_url(url)
    is_prepared = options.get("statement_cache_size") != 0
    return await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        timeout=timeout_s,
        command_timeout=timeout_s,
        init=_plan_for_growth if is_prepared else None,
        reset=_keep,
        **options,
    )


async def _plan_for_growth(connection: Connection) -> None:
    """Have statements look rows up by their indexes.

    A prepared statement keeps the plan it got at first, until the table is analysed. Of an empty table that
    is to read all of it, which in a storm takes a hundred times too long a minute later.
    """
    await connection.execute(_BY_INDEX)


async def _keep(connection: Connection) -> None:
    """Give a connection back as it is. asyncpg would reset what nobody here sets, at a round trip each time;
    it ends a transaction that is left open all the same.
    """


async def connect(
    url: str, timeout_s: float, statement_timeout_s: float | None = None
) -> "asyncpg.Connection[asyncpg.Record]":
    """One connection of its own; the caller closes it."""
    dsn, options = split_url(url)
    return await asyncpg.connect(dsn, timeout=timeout_s, command_timeout=statement_timeout_s, **options)


def split_url(url: str) -> tuple[str, dict[str, Any]]:
    """The URL for Postgres, and the options in it that are asyncpg's.

    Raises:
        ConfigurationError: one of these is wrong.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    cache_size = query.pop("statement_cache_size", None)
    dsn = urlunsplit(parts._replace(query=urlencode(query)))
    if cache_size is None:
        return dsn, {}
    if not cache_size.isdecimal():
        raise ConfigurationError("DATABASE_URL: statement_cache_size: must be a number")
    return dsn, {"statement_cache_size": int(cache_size)}


@asynccontextmanager
async def acquire(pool: "asyncpg.Pool[asyncpg.Record]", timeout_s: float) -> AsyncIterator[Connection]:
    """A connection from the pool.

    Raises:
        StoreUnavailable: none could be had in time, or Postgres failed while it was used.
        StatementTimedOut: a statement took longer than the pool's limit.
    """
    is_acquired = False
    try:
        async with pool.acquire(timeout=timeout_s) as connection:
            is_acquired = True
            yield connection
    except Exception as error:
        if not is_unavailable(error):
            raise
        is_hung = is_acquired and isinstance(error, TimeoutError | asyncpg.QueryCanceledError)
        failure = StatementTimedOut() if is_hung else StoreUnavailable()
        failure.may_be_done = is_acquired and not _is_answer(error)
        raise failure from error


def _is_answer(error: Exception) -> bool:
    """Whether an error came from the server, which then has done nothing."""
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "08")[:2] != "08"


def is_unavailable(error: Exception) -> bool:
    """Whether an error speaks of Postgres (away, busy, not migrated), not of a row: trying later can help."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "XX")[:2] in _UNAVAILABLE_CLASSES
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, ValueError) or isinstance(error, asyncpg.ClientConfigurationError)
    return isinstance(error, OSError | TimeoutError | asyncpg.InternalClientError)


def is_final(error: Exception) -> bool:
    """Whether the fault is the row's own: trying again cannot help."""
    state = getattr(error, "sqlstate", None) or ""
    return isinstance(error, ValueError) or state[:2] in _REFUSED_CLASSES


def refusal(error: Exception) -> RequestError:
    """What a request whose row Postgres refuses is told."""
    if is_final(error):
        return InvalidRequest(
            f"The run cannot be stored (SQLSTATE {getattr(error, 'sqlstate', None) or '22000'})."
        )
    return InternalError()


@cache
def statement(name: str) -> str:
    """The text of `app/sql/<name>.sql`."""
    return files("app").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")

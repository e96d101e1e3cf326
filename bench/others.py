"""Other ways to enqueue, at their best. A queue is a context that gives one call per job, with dedup on."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import orjson
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.queries import Queries
from procrastinate import App, PsycopgConnector
from streaq import Worker

from app.rows import COLUMNS, Row
from bench.buffered import snapshots
from bench.findings import Reading
from bench.stage import Stage
from bench.triggers import PAYLOAD

CONCURRENCY = 100
CONNECTIONS = 20
"""Of each pool: as good as any of 5 to 90 for all of them."""
WARM_UP = 1_000
"""Calls before those that are timed."""

Enqueue = Callable[[int], Awaitable[object]]
"""Enqueues one job; its number makes its key."""


@asynccontextmanager
async def inserting(
    stage: Stage, rows: Sequence[tuple[Any, ...]], connections: int = CONNECTIONS
) -> AsyncIterator[Enqueue]:
    """One INSERT per request into our own table, by a pool of asyncpg: what is there without any queue."""
    places = ", ".join(f"${number + 1}" for number in range(len(COLUMNS)))
    statement = f"INSERT INTO mollifier.runs ({', '.join(COLUMNS)}) VALUES ({places})"
    async with asyncpg.create_pool(stage.postgres.url, min_size=connections, max_size=connections) as pool:
        yield lambda number: pool.execute(statement, *rows[number])


@asynccontextmanager
async def procrastinate(stage: Stage, connections: int = CONNECTIONS) -> AsyncIterator[Enqueue]:
    """procrastinate: `defer_async` with a queueing lock."""
    connector = PsycopgConnector(conninfo=stage.postgres.url, min_size=connections, max_size=connections)
    app = App(connector=connector)

    @app.task(name="send-email")
    async def send_email(text: str) -> None: ...

    async with app.open_async():
        if await stage.sql.fetchval("SELECT to_regclass('procrastinate_jobs')") is None:
            await app.schema_manager.apply_schema_async()
        await stage.sql.execute("TRUNCATE procrastinate_jobs CASCADE")
        yield lambda number: send_email.configure(queueing_lock=f"key-{number}").defer_async(**PAYLOAD)


@asynccontextmanager
async def pgqueuer(stage: Stage, connections: int = CONNECTIONS) -> AsyncIterator[Enqueue]:
    """pgqueuer: `enqueue` with a dedupe key."""
    payload = orjson.dumps(PAYLOAD)
    async with asyncpg.create_pool(stage.postgres.url, min_size=connections, max_size=connections) as pool:
        queries = Queries(AsyncpgPoolDriver(pool))
        if await stage.sql.fetchval("SELECT to_regclass('pgqueuer')") is None:
            await queries.install()
        await stage.sql.execute("TRUNCATE pgqueuer CASCADE")
        yield lambda number: queries.enqueue("send-email", payload, dedupe_key=f"key-{number}")


@asynccontextmanager
async def streaq(stage: Stage) -> AsyncIterator[Enqueue]:
    """streaq: `enqueue` with an id of the caller's, which it takes once."""
    worker = Worker(redis_url=stage.valkey.url)

    @worker.task(name="send-email")
    async def send_email(text: str) -> None: ...

    async def enqueue(number: int) -> None:
        job = send_email.enqueue(**PAYLOAD)
        job.id = f"key-{number}"
        await job

    async with worker:
        yield enqueue


async def copied(stage: Stage, count: int, environments: int) -> Reading:
    """Rows into our table by one COPY from one connection."""
    rows = [Row(run, "QUEUED").values() for run in snapshots(count, environments)]
    started, used_s = time.perf_counter(), time.process_time()
    await stage.sql.copy_records_to_table(
        "runs", schema_name="mollifier", columns=list(COLUMNS), records=rows
    )
    return Reading(count, time.perf_counter() - started, time.process_time() - used_s)


async def timed(enqueue: Enqueue, count: int) -> Reading:
    """So many calls, 100 at once."""
    numbers = iter(range(WARM_UP + count))
    await _all(enqueue, numbers, WARM_UP)
    started, used_s = time.perf_counter(), time.process_time()
    await _all(enqueue, numbers, count)
    return Reading(count, time.perf_counter() - started, time.process_time() - used_s)


async def _all(enqueue: Enqueue, numbers: Iterator[int], count: int) -> None:
    left = count

    async def caller() -> None:
        nonlocal left
        while left:
            left -= 1
            await enqueue(next(numbers))

    async with asyncio.TaskGroup() as callers:
        for _ in range(CONCURRENCY):
            callers.create_task(caller())

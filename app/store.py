"""Runs in Postgres: inserting them in bulk, and finding what stands in their way."""

import time
from collections.abc import Sequence
from datetime import datetime

import asyncpg

from app.batch import Answer
from app.errors import InternalError, OneTimeUseTokenUsed, RequestError, RunIdConflict
from app.ports import Materialised
from app.postgres import Connection, acquire, is_unavailable, refusal, statement
from app.rows import Row, status_at
from app.settings import Settings
from schemas.snapshot import Snapshot

_TRIES = 5

Hindrance = asyncpg.Record | Exception | None
"""What became of a row: None inserted, a record of `look_up_runs` what stands in its way, or its refusal."""


class PostgresStore:
    """Implements `ports.Store` and `ports.Materialiser`."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", settings: Settings) -> None:
        self._pool = pool
        self._timeout_s = settings.store_timeout_ms / 1000

    async def insert(self, runs: Sequence[Snapshot], now: datetime) -> Sequence[Answer | RequestError]:
        """See `ports.Store.insert`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            hindrances = await _insert(connection, [Row(run, status_at(run, now)) for run in runs])
        return [_answer(run, hindrance) for run, hindrance in zip(runs, hindrances, strict=True)]

    async def recall(self, runs: Sequence[Snapshot]) -> Sequence[Answer | RequestError | None]:
        """See `ports.Store.recall`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            found = await _look_up(connection, runs)
        return [_own(run, record) for run, record in zip(runs, found, strict=True)]

    async def materialise(self, rows: Sequence[Row]) -> Sequence[Materialised]:
        """See `ports.Materialiser.materialise`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            results = [
                _materialised(row, hindrance)
                for row, hindrance in zip(rows, await _insert(connection, rows), strict=True)
            ]
            aliases = [
                (row.run.id, result.winner_id, row.run.environment_id)
                for row, result in zip(rows, results, strict=True)
                if result.winner_id is not None
            ]
            if aliases:
                await connection.execute(statement("insert_aliases"), *zip(*aliases, strict=True))
        return results

    async def ping(self) -> float:
        """Seconds that Postgres takes to answer.

        Raises:
            StoreUnavailable: it does not.
        """
        started = time.perf_counter()
        async with acquire(self._pool, self._timeout_s) as connection:
            await connection.fetchval("SELECT 1", timeout=self._timeout_s)
        return time.perf_counter() - started


async def _insert(connection: Connection, rows: Sequence[Row], tries: int = _TRIES) -> list[Hindrance]:
    """Insert rows in one statement. One that fails is found by halving, so the others never know of it."""
    try:
        records = await connection.fetch(statement("insert_runs"), [row.values() for row in rows])
    except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
        if tries <= 1:
            raise
        return await _insert(connection, rows, tries - 1)
    except Exception as error:
        if is_unavailable(error):
            raise
        if len(rows) == 1:
            return [error]
        half = len(rows) // 2
        return [*await _insert(connection, rows[:half]), *await _insert(connection, rows[half:])]
    if len(records) == len(rows):
        return [None] * len(rows)
    return await _explain(connection, rows, {record["id"] for record in records}, tries)


async def _explain(
    connection: Connection, rows: Sequence[Row], inserted: set[str], tries: int
) -> list[Hindrance]:
    """Say for each row whether it was inserted or what was in its way; what no longer is, is tried again."""
    hindrances: list[Hindrance] = [None] * len(rows)
    left_out = []
    for position, row in enumerate(rows):
        if row.run.id in inserted:
            inserted.discard(row.run.id)
        else:
            left_out.append(position)
    again = []
    found = await _look_up(connection, [rows[position].run for position in left_out])
    for position, record in zip(left_out, found, strict=True):
        hindrances[position] = record
        if not (record["own_environment_id"] or record["winner_id"] or record["token_is_used"]):
            again.append(position)
    if again and tries > 1:
        retried = await _insert(connection, [rows[position] for position in again], tries - 1)
        for position, hindrance in zip(again, retried, strict=True):
            hindrances[position] = hindrance
    return hindrances


async def _look_up(connection: Connection, runs: Sequence[Snapshot]) -> list[asyncpg.Record]:
    columns = zip(
        *(
            (
                run.id,
                run.environment_id,
                run.task,
                run.idempotency_key,
                run.one_time_use_token,
                run.debounce_key,
            )
            for run in runs
        ),
        strict=True,
    )
    records: list[asyncpg.Record] = await connection.fetch(statement("look_up_runs"), *columns)
    return records


def _own(run: Snapshot, record: asyncpg.Record) -> Answer | RequestError | None:
    """The answer if the id itself is known."""
    if record["own_environment_id"] is None:
        return None
    if (record["own_environment_id"], record["own_organization_id"]) != (run.environment_id, run.organization_id):
        return RunIdConflict()
    return Answer(run.id, run.span_id, record["own_delay_until"], record["own_is_buffered"])


def _answer(run: Snapshot, hindrance: Hindrance) -> Answer | RequestError:
    if hindrance is None:
        return Answer(run.id, run.span_id, run.delay_until, is_mollified=run.buffered_at is not None)
    if isinstance(hindrance, Exception):
        return refusal(hindrance)
    own = _own(run, hindrance)
    if own is not None:
        return own
    if hindrance["token_is_used"]:
        return OneTimeUseTokenUsed()
    if hindrance["winner_id"] is None:
        return InternalError()
    return Answer(
        hindrance["winner_id"],
        hindrance["winner_span_id"],
        hindrance["winner_delay_until"],
        is_mollified=False,
        is_cached=True,
    )


def _materialised(row: Row, hindrance: Hindrance) -> Materialised:
    if hindrance is None:
        return Materialised("inserted")
    if isinstance(hindrance, Exception):
        return Materialised("refused", error=str(refusal(hindrance)))
    own = _own(row.run, hindrance)
    if isinstance(own, Answer):
        return Materialised("present")
    if own is None and hindrance["winner_id"] is not None:
        return Materialised("alias", winner_id=hindrance["winner_id"])
    return Materialised("refused", error="its id or token belongs to another run")

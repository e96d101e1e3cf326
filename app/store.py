"""Runs in Postgres: inserting them in bulk, and finding what stands in their way."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import asyncpg

from app.batch import Answer, Parent
from app.errors import InternalError, OneTimeUseTokenUsed, RequestError, RunIdConflict
from app.ports import KeyHolder
from app.postgres import Connection, acquire, is_unavailable, refusal, statement
from app.rows import Materialised, Row, status_at
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
            if not any(run.resume_parent_on_completion for run in runs):
                return await _insert_runs(connection, runs, now)
            async with connection.transaction():
                answers = await _insert_runs(connection, runs, now)
                await _let_parents_wait(connection, runs, answers)
                return answers

    async def find_parents(self, children: Sequence[Snapshot]) -> Sequence[Parent | None]:
        """See `ports.Store.find_parents`."""
        columns = zip(
            *((run.organization_id, run.environment_id, run.parent_run_id) for run in children), strict=True
        )
        async with acquire(self._pool, self._timeout_s) as connection:
            records = await connection.fetch(statement("look_up_parents"), *columns)
        return [None if record["id"] is None else Parent(*record) for record in records]

    async def look_up_keys(self, runs: Sequence[Snapshot], now: datetime) -> Sequence[KeyHolder | None]:
        """See `ports.Store.look_up_keys`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            records = await connection.fetch(statement("look_up_keys"), *_keys(runs), now)
        return [None if record["id"] is None else KeyHolder(*record) for record in records]

    async def recall(self, runs: Sequence[Snapshot]) -> Sequence[Answer | RequestError | None]:
        """See `ports.Store.recall`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            found = await _look_up(connection, runs, datetime.now(UTC))
        return [_own(run, record) for run, record in zip(runs, found, strict=True)]

    async def materialise(self, rows: Sequence[Row], now: datetime) -> Sequence[Materialised]:
        """See `ports.Materialiser.materialise`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            results = [
                _materialised(row, hindrance)
                for row, hindrance in zip(rows, await _insert(connection, rows, now), strict=True)
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


async def _insert_runs(
    connection: Connection, runs: Sequence[Snapshot], now: datetime
) -> Sequence[Answer | RequestError]:
    hindrances = await _insert(connection, [Row(run, status_at(run, now)) for run in runs], now)
    return [_answer(run, hindrance) for run, hindrance in zip(runs, hindrances, strict=True)]


async def _let_parents_wait(
    connection: Connection, runs: Sequence[Snapshot], answers: Sequence[Answer | RequestError]
) -> None:
    waitpoints = [
        (answer.run_id, run.parent_run_id, run.environment_id)
        for run, answer in zip(runs, answers, strict=True)
        if run.resume_parent_on_completion and run.parent_run_id is not None and isinstance(answer, Answer)
    ]
    if waitpoints:
        await connection.execute(statement("insert_waitpoints"), *zip(*waitpoints, strict=True))


async def _try(connection: Connection, rows: Sequence[Row]) -> list[asyncpg.Record]:
    """Insert rows in one statement; within a transaction, a failure undoes only this.

    Batches that race for the same keys insert them in the same order, so they wait for one another and do
    not deadlock.
    """
    ordered = sorted(rows, key=lambda row: row.run.idempotency_key or "")
    arguments = (statement("insert_runs"), [row.values() for row in ordered])
    if not connection.is_in_transaction():
        return list(await connection.fetch(*arguments))
    async with connection.transaction():
        return list(await connection.fetch(*arguments))


async def _insert(
    connection: Connection, rows: Sequence[Row], now: datetime, tries: int = _TRIES
) -> list[Hindrance]:
    """Insert rows in one statement. One that fails is found by halving, so the others never know of it."""
    try:
        records = await _try(connection, rows)
    except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
        if tries <= 1:
            raise
        return await _insert(connection, rows, now, tries - 1)
    except Exception as error:
        if is_unavailable(error):
            raise
        if len(rows) == 1:
            return [error]
        half = len(rows) // 2
        return [*await _insert(connection, rows[:half], now), *await _insert(connection, rows[half:], now)]
    if len(records) == len(rows):
        return [None] * len(rows)
    return await _explain(connection, rows, {record["id"] for record in records}, now, tries)


async def _explain(
    connection: Connection, rows: Sequence[Row], inserted: set[str], now: datetime, tries: int
) -> list[Hindrance]:
    """Say for each row whether it was inserted or what was in its way.

    A key that has become free is freed, and what no longer has anything in its way is tried again.
    """
    hindrances: list[Hindrance] = [None] * len(rows)
    left_out = []
    for position, row in enumerate(rows):
        if row.run.id in inserted:
            inserted.discard(row.run.id)
        else:
            left_out.append(position)
    found = await _look_up(connection, [rows[position].run for position in left_out], now)
    again = []
    for position, record in zip(left_out, found, strict=True):
        hindrances[position] = record
        is_free = record["winner_id"] is None or record["winner_key_is_free"]
        if record["own_environment_id"] is None and is_free and not record["token_is_used"]:
            again.append(position)
    if again and tries > 1:
        await connection.execute(
            statement("free_keys"), *_keys([rows[position].run for position in again]), now
        )
        retried = await _insert(connection, [rows[position] for position in again], now, tries - 1)
        for position, hindrance in zip(again, retried, strict=True):
            hindrances[position] = hindrance
    return hindrances


def _keys(runs: Sequence[Snapshot]) -> tuple[list[str], list[str], list[str | None]]:
    return (
        [run.environment_id for run in runs],
        [run.task for run in runs],
        [run.idempotency_key for run in runs],
    )


async def _look_up(connection: Connection, runs: Sequence[Snapshot], now: datetime) -> list[asyncpg.Record]:
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
    records: list[asyncpg.Record] = await connection.fetch(statement("look_up_runs"), *columns, now)
    return records


def _own(run: Snapshot, record: asyncpg.Record) -> Answer | RequestError | None:
    """The answer if the id itself is known."""
    if record["own_environment_id"] is None:
        return None
    if (record["own_environment_id"], record["own_organization_id"]) != (
        run.environment_id,
        run.organization_id,
    ):
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

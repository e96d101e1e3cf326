"""Inserting runs in bulk, and finding what stands in the way of those that were left out."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg

from app.batch import Answer
from app.errors import InternalError, OneTimeUseTokenUsed, RequestError, RunIdConflict
from app.postgres import Connection, is_final, is_unavailable, refusal, statement
from app.rows import COLUMNS, Row
from schemas.snapshot import Snapshot

TRIES = 5

_TRY_AGAIN_S = (0.02, 0.1)
_PATIENCE_S = 0.5
"""How long a batch waits, in all, between its tries of rows; further ones follow at once."""

Hindrance = asyncpg.Record | Exception | None
"""What became of a row: None inserted, a record of `look_up_runs` what stands in its way, or its refusal."""


async def copy_rows(connection: Connection, rows: Sequence[Row]) -> bool:
    """Insert rows by COPY, the fastest way: all of them, or none if anything is in the way of one."""
    try:
        await connection.copy_records_to_table(
            "runs", schema_name="mollifier", columns=COLUMNS, records=[row.values() for row in rows]
        )
    except Exception as error:
        if is_unavailable(error):
            raise
        return False
    return True


async def insert_rows(
    connection: Connection, rows: Sequence[Row], now: datetime, *, attempts: int = 1, tries: int = TRIES
) -> list[Hindrance]:
    """Insert rows in one statement, in order. One that fails is found by halving, for itself alone.

    It is tried `attempts` times, where another try can help. Those after it in its environment wait for that,
    those of other environments do not.
    """
    insertion = _Insertion(connection, rows, now, attempts, tries)
    patience_s = _PATIENCE_S
    waiting: Sequence[int] = range(len(rows))
    while waiting:
        waiting = await insertion.round(waiting)
        if waiting and patience_s > 0:
            pause_s = random.uniform(*_TRY_AGAIN_S)
            patience_s -= pause_s
            await asyncio.sleep(pause_s)
    return insertion.hindrances


class _Insertion:
    """Rows on their way, by their positions."""

    def __init__(
        self, connection: Connection, rows: Sequence[Row], now: datetime, attempts: int, tries: int
    ) -> None:
        self._connection = connection
        self._rows = rows
        self._now = now
        self._attempts = attempts
        self._tries = tries
        self._failures: Counter[int] = Counter()
        self._held_up: set[str] = set()
        self.hindrances: list[Hindrance] = [None] * len(rows)

    async def round(self, positions: Sequence[int]) -> Sequence[int]:
        """Try rows once; those that are to be tried again."""
        self._held_up.clear()
        return sorted(await self._insert(positions, self._tries))

    async def _insert(self, positions: Sequence[int], tries: int) -> list[int]:
        later: list[int] = []
        if self._held_up:
            later = [position for position in positions if self._environment(position) in self._held_up]
            positions = sorted(set(positions).difference(later))
        rows = [self._rows[position] for position in positions]
        if not rows:
            return later
        try:
            values = [row.values() for row in rows]
            records = await fetch_apart(self._connection, statement("insert_runs"), values)
        except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
            if tries <= 1:
                raise
            return [*later, *await self._insert(positions, tries - 1)]
        except Exception as error:
            if is_unavailable(error):
                raise
            if len(rows) == 1:
                return [*later, *self._failed(positions[0], error)]
            half = len(rows) // 2
            first = await self._insert(positions[:half], self._tries)
            return [*later, *first, *await self._insert(positions[half:], self._tries)]
        if len(records) < len(rows):
            inserted = {tuple(record) for record in records}
            hindrances = await _explain(self._connection, rows, inserted, self._now, self._attempts, tries)
            for position, hindrance in zip(positions, hindrances, strict=True):
                self.hindrances[position] = hindrance
        return later

    def _failed(self, position: int, error: Exception) -> Sequence[int]:
        self._failures[position] += 1
        if self._failures[position] < self._attempts and not is_final(error):
            self._held_up.add(self._environment(position))
            return [position]
        self.hindrances[position] = error
        return []

    def _environment(self, position: int) -> str:
        return self._rows[position].run.environment_id


async def fetch_apart(connection: Connection, query: str, *arguments: Any) -> list[asyncpg.Record]:
    """The records of a statement. Within a transaction, its failure undoes only itself."""
    if not connection.is_in_transaction():
        return list(await connection.fetch(query, *arguments))
    async with connection.transaction():
        return list(await connection.fetch(query, *arguments))


async def _explain(
    connection: Connection,
    rows: Sequence[Row],
    inserted: set[tuple[str, ...]],
    now: datetime,
    attempts: int,
    tries: int,
) -> list[Hindrance]:
    """Say for each row whether it was inserted or what was in its way.

    A key that has become free is freed, and what no longer has anything in its way is tried again.
    """
    hindrances: list[Hindrance] = [None] * len(rows)
    left_out = []
    for position, row in enumerate(rows):
        name = (row.run.id, row.run.organization_id, row.run.environment_id)
        if name in inserted:
            inserted.discard(name)
        else:
            left_out.append(position)
    found = await look_up(connection, [rows[position].run for position in left_out], now)
    again = []
    for position, record in zip(left_out, found, strict=True):
        hindrances[position] = record
        if not is_hindered(record):
            again.append(position)
    if again and tries > 1:
        await free_keys(connection, [rows[position].run for position in again], now)
        retried = await insert_rows(
            connection, [rows[position] for position in again], now, attempts=attempts, tries=tries - 1
        )
        for position, hindrance in zip(again, retried, strict=True):
            hindrances[position] = hindrance
    return hindrances


async def look_up(connection: Connection, runs: Sequence[Snapshot], now: datetime) -> list[asyncpg.Record]:
    """Per run, in order, the record of `look_up_runs`: what knows its id, or has its key or token."""
    columns = zip(
        *(
            (
                run.id,
                run.organization_id,
                run.environment_id,
                run.task,
                run.idempotency_key,
                run.one_time_use_token,
                run.buffered_at or now,
            )
            for run in runs
        ),
        strict=True,
    )
    records: list[asyncpg.Record] = await connection.fetch(statement("look_up_runs"), *columns)
    return records


async def free_keys(connection: Connection, runs: Sequence[Snapshot], now: datetime) -> None:
    """Free the keys of runs from rows that failed, or had outlived them when these runs were accepted."""
    accepted = [run.buffered_at or now for run in runs]
    await connection.execute(statement("free_keys"), *key_columns(runs), accepted)


def key_columns(runs: Sequence[Snapshot]) -> tuple[list[str], list[str], list[str], list[str | None]]:
    """Organizations, environments, tasks and idempotency keys: the arguments of the statements about keys."""
    return (
        [run.organization_id for run in runs],
        [run.environment_id for run in runs],
        [run.task for run in runs],
        [run.idempotency_key for run in runs],
    )


def is_hindered(record: asyncpg.Record) -> bool:
    """Whether anything stands in a run's way, but for a key that is free."""
    is_free = record["winner_id"] is None or record["winner_key_is_free"]
    return record["own_environment_id"] is not None or record["token_is_used"] or not is_free


def own_answer(run: Snapshot, record: asyncpg.Record) -> Answer | RequestError | None:
    """The answer if the id itself is known."""
    if record["own_environment_id"] is None:
        return None
    if (record["own_environment_id"], record["own_organization_id"]) != (
        run.environment_id,
        run.organization_id,
    ):
        return RunIdConflict()
    if run.debounce_key is not None and record["own_run_id"] != run.id:
        return Answer(
            record["own_run_id"], record["own_span_id"], record["own_delay_until"], False, is_cached=True
        )
    return Answer(run.id, run.span_id, record["own_delay_until"], record["own_is_buffered"])


def answer(run: Snapshot, hindrance: Hindrance) -> Answer | RequestError:
    """What a request is told about its row."""
    if hindrance is None:
        return Answer(run.id, run.span_id, run.delay_until, is_mollified=run.buffered_at is not None)
    if isinstance(hindrance, Exception):
        return refusal(hindrance)
    own = own_answer(run, hindrance)
    if own is not None:
        return own
    if hindrance["token_is_used"]:
        return OneTimeUseTokenUsed()
    if hindrance["winner_id"] is None or hindrance["winner_key_is_free"]:
        return InternalError()
    return Answer(
        hindrance["winner_id"],
        hindrance["winner_span_id"],
        hindrance["winner_delay_until"],
        is_mollified=False,
        is_cached=True,
    )

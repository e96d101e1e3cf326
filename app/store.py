"""Runs in Postgres: inserting them in bulk, and finding what stands in their way."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import itemgetter

import asyncpg

from app.batch import Answer, Parent
from app.debounce import debounce
from app.errors import RequestError
from app.inserts import Hindrance, answer, copy_rows, free_keys, insert_rows, look_up, own_answer
from app.lost_keys import has_outlived_its_key, let_go_of_keys, without_key, without_lost_keys
from app.ports import KeyHolder
from app.postgres import Connection, acquire, refusal, statement
from app.rows import Materialised, Row, key_digest, status_at
from app.settings import Settings
from schemas.snapshot import Snapshot

_INSERTED = Materialised("inserted")

_WORTH_A_COPY = 20
"""Rows; with fewer a statement takes as long."""


class PostgresStore:
    """Implements `ports.Store` and `ports.Materialiser`."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", settings: Settings) -> None:
        self._pool = pool
        self._timeout_s = settings.store_timeout_ms / 1000
        self._drain_attempts = settings.drain_max_attempts

    async def insert(self, runs: Sequence[Snapshot], now: datetime) -> Sequence[Answer | RequestError]:
        """See `ports.Store.insert`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            if not any(run.resume_parent_on_completion for run in runs):
                return await _insert_runs(connection, runs, now)
            async with connection.transaction():
                answers = await _insert_runs(connection, runs, now)
                await _let_parents_wait(connection, runs, answers)
                return answers

    async def let_parents_wait(
        self, runs: Sequence[Snapshot], answers: Sequence[Answer | RequestError]
    ) -> None:
        """See `ports.Store.let_parents_wait`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            await _let_parents_wait(connection, runs, answers)

    async def find_parents(self, children: Sequence[Snapshot]) -> Sequence[Parent | None]:
        """See `ports.Store.find_parents`."""
        columns = zip(
            *((run.organization_id, run.environment_id, run.parent_run_id) for run in children), strict=True
        )
        async with acquire(self._pool, self._timeout_s) as connection:
            records = await connection.fetch(statement("look_up_parents"), *columns)
        return [None if record["id"] is None else Parent(*record) for record in records]

    async def look_up_keys(
        self, runs: Sequence[Snapshot], now: datetime, sought: Sequence[str] = ()
    ) -> Sequence[KeyHolder | None]:
        """See `ports.Store.look_up_keys`."""
        digests = list(map(key_digest, runs))
        async with acquire(self._pool, self._timeout_s) as connection:
            records = await connection.fetch(statement("look_up_keys"), digests, now, sought)
        holders: list[KeyHolder | None] = [None] * len(runs)
        own: dict[str, KeyHolder] = {}
        for position, *holder in records:
            found = KeyHolder(*holder)
            if position is None:
                own[found.run_id] = found
            else:
                holders[position - 1] = found
        if own:
            return [own.get(run.id, holder) for run, holder in zip(runs, holders, strict=True)]
        return holders

    async def recall(self, runs: Sequence[Snapshot]) -> Sequence[Answer | RequestError | None]:
        """See `ports.Store.recall`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            found = await look_up(connection, runs, datetime.now(UTC))
        return [own_answer(run, record) for run, record in zip(runs, found, strict=True)]

    async def materialise(self, rows: Sequence[Row], now: datetime) -> Sequence[Materialised]:
        """See `ports.Materialiser.materialise`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            outlived = [position for position, row in enumerate(rows) if has_outlived_its_key(row, now)]
            if outlived:
                rows, winners = await let_go_of_keys(connection, rows, outlived)
            else:
                winners = {}
            writing = [row for position, row in enumerate(rows) if position not in winners]
            is_copied = not writing or await copy_rows(connection, writing)
            results: Sequence[Materialised] = (
                [_INSERTED] * len(writing) if is_copied else await self._insert(connection, writing, now)
            )
            if winners:
                rest = iter(results)
                results = [
                    Materialised("alias", winners[position]) if position in winners else next(rest)
                    for position in range(len(rows))
                ]
            if winners or not is_copied:
                await _reconcile(connection, rows, results)
            done = zip(rows, results, strict=True)
            ended = [row.run.id for row, result in done if row.is_final and result.result != "refused"]
            if ended:
                await connection.execute(statement("complete_waitpoints"), ended)
        return results

    async def _insert(
        self, connection: Connection, rows: Sequence[Row], now: datetime
    ) -> Sequence[Materialised]:
        """Insert rows that something may be in the way of. Keys that are free by now are freed first, so that
        none of them needs a second statement, in which it would come after its neighbours.
        """
        keyed = [row.run for row in rows if row.run.idempotency_key is not None]
        if keyed:
            await free_keys(connection, keyed, now)
        rows = await without_lost_keys(connection, rows, now)
        hindrances = await insert_rows(connection, rows, now, attempts=self._drain_attempts)
        results = [_materialised(row, hindrance) for row, hindrance in zip(rows, hindrances, strict=True)]
        for position, (row, result) in enumerate(zip(rows, results, strict=True)):
            if result.result == "alias" and row.status == "CANCELED":  # it lost its key just now
                (hindrance,) = await insert_rows(connection, [without_key(row)], now)
                results[position] = _materialised(row, hindrance)
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
    """Insert runs, and debounce those that are to be: at most one delayed run has their key."""
    rows = [Row(run, status_at(run, now)) for run in runs]
    if not any(run.debounce_key is not None for run in runs):
        return await _insert_new(connection, rows, now)
    new: list[int] = []
    debounced: list[int] = []
    for position, row in enumerate(rows):
        (new if row.run.debounce_key is None or row.status == "EXPIRED" else debounced).append(position)
    answers = [
        *zip(new, await _insert_new(connection, [rows[position] for position in new], now), strict=True),
        *zip(
            debounced,
            await debounce(connection, [runs[position] for position in debounced], now),
            strict=True,
        ),
    ]
    return [answer for _, answer in sorted(answers, key=itemgetter(0))]


async def _insert_new(
    connection: Connection, rows: Sequence[Row], now: datetime
) -> Sequence[Answer | RequestError]:
    """Insert rows in the order of their keys: batches that race for the same ones then wait for one another,
    and do not deadlock.
    """
    if not rows:
        return []
    order = sorted(range(len(rows)), key=lambda position: rows[position].run.idempotency_key or "")
    in_order = [rows[position] for position in order]
    hindrances: Sequence[Hindrance] = [None] * len(rows)
    if not (_may_be_copied(connection, rows) and await copy_rows(connection, in_order)):
        hindrances = await insert_rows(connection, in_order, now)
    answers = {
        position: answer(rows[position].run, hindrance)
        for position, hindrance in zip(order, hindrances, strict=True)
    }
    return [answers[position] for position in range(len(rows))]


def _may_be_copied(connection: Connection, rows: Sequence[Row]) -> bool:
    """Whether COPY is worth a try, and does what an insert does: it does not look at the tokens of aliases,
    and what is in its way would end a transaction.
    """
    return (
        len(rows) >= _WORTH_A_COPY
        and not connection.is_in_transaction()
        and all(row.run.one_time_use_token is None for row in rows)
    )


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


async def _reconcile(connection: Connection, rows: Sequence[Row], results: Sequence[Materialised]) -> None:
    """Write down which rows are aliases, and that what was changed on them is their winner's; and amend those
    that were there without their last changes.
    """
    materialised = list(zip(rows, results, strict=True))
    aliases = [
        (row.run.id, result.winner_id, row.run.environment_id)
        for row, result in materialised
        if result.winner_id is not None
    ]
    merged = [
        (row.run.id, result.winner_id, row.run.tags, (row.run.metadata or b"null").decode())
        for row, result in materialised
        if result.winner_id is not None and row.revision
    ]
    for change in merged:
        await connection.execute(statement("merge_into_winner"), *change)
    if aliases:  # last: once it is one, a run counts as done
        await connection.execute(statement("insert_aliases"), *zip(*aliases, strict=True))
    changed = [row.values() for row, result in materialised if result.result == "present" and row.revision]
    if changed:
        await connection.execute(statement("amend_runs"), changed)
        await connection.execute(statement("merge_runs"), changed)


def _materialised(row: Row, hindrance: Hindrance) -> Materialised:
    if hindrance is None:
        return _INSERTED
    if isinstance(hindrance, Exception):
        return Materialised("refused", error=str(refusal(hindrance)))
    own = own_answer(row.run, hindrance)
    if isinstance(own, Answer):
        return Materialised("present")
    if own is None and hindrance["winner_id"] is not None:
        return Materialised("alias", winner_id=hindrance["winner_id"])
    return Materialised("refused", error="its id or token belongs to another run")

"""Runs in Postgres, read and changed one at a time, and listed."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg
from msgspec.structs import replace

from app.operations.scene import Filter
from app.postgres import acquire, statement
from app.rows import FROM_SNAPSHOT, JSON_FROM_SNAPSHOT, Row
from app.runs import Found, StoredRun, Tenancy
from app.settings import Settings
from schemas.snapshot import SCHEMA_VERSION, Snapshot


class PostgresStoredRuns:
    """Implements `runs.StoredRuns`, `scene.Listing` and `scene.StoredKeys`."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", settings: Settings) -> None:
        self._pool = pool
        self._timeout_s = settings.store_timeout_ms / 1000

    async def find(self, tenancy: Tenancy, run_id: str) -> StoredRun | None:
        """See `runs.StoredRuns.find`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            record = await connection.fetchrow(statement("read_run"), run_id, *tenancy)
        return None if record is None else stored_run(record)

    async def change(self, before: StoredRun, after: Row) -> StoredRun | None:
        """See `runs.StoredRuns.change`."""
        old, new = before.row, after.run
        async with acquire(self._pool, self._timeout_s) as connection:
            record = await connection.fetchrow(
                statement("change_run"),
                new.id,
                new.organization_id,
                new.environment_id,
                old.revision,
                old.status,
                old.metadata_version,
                after.status,
                new.delay_until,
                list(new.tags),
                None if new.metadata is None else new.metadata.decode(),
                after.metadata_version,
                after.cancelled_at,
                after.cancel_reason,
                new.idempotency_key,
                new.idempotency_key_expires_at,
                after.revision,
                list(after.applied),
                old.run.delay_until,
                old.run.idempotency_key,
            )
        return None if record is None else stored_run(record)

    async def newest(self, tenancy: Tenancy, wanted: Filter, now: datetime) -> Sequence[Found]:
        """See `scene.Listing.newest`."""
        limit, before, *conditions = wanted
        async with acquire(self._pool, self._timeout_s) as connection:
            records = await connection.fetch(
                statement("list_runs"), *tenancy, *(before or (None, None)), *conditions, limit
            )
        return [stored_run(record) for record in records]

    async def reset_key(self, tenancy: Tenancy, task: str, key: str, until: datetime | None) -> str | None:
        """See `scene.StoredKeys.reset_key`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            run_id: str | None = await connection.fetchval(statement("reset_key"), *tenancy, task, key, until)
        return run_id


def stored_run(record: asyncpg.Record) -> StoredRun:
    """A record of `mollifier.runs`."""
    values: dict[str, Any] = {name: record[name] for name in FROM_SNAPSHOT}
    values |= {name: _bytes(record[name]) for name in JSON_FROM_SNAPSHOT}
    run = Snapshot(schema_version=SCHEMA_VERSION, **values)
    row = Row(
        replace(run, tags=tuple(run.tags)),
        record["status"],
        record["cancelled_at"],
        record["cancel_reason"],
        record["error"],
        record["metadata_version"],
        record["revision"],
        tuple(record["applied"]),
    )
    return StoredRun(row, record["materialised_at"], record["updated_at"])


def _bytes(json: str | None) -> bytes | None:
    return None if json is None else json.encode()

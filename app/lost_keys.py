"""Buffered runs that have lost their idempotency keys by the time they become rows. G4, DESIGN section 8."""

from collections.abc import Sequence
from datetime import datetime

from msgspec.structs import replace

from app.inserts import key_columns, look_up
from app.postgres import Connection, statement
from app.rows import Row


def has_outlived_its_key(row: Row, now: datetime) -> bool:
    run = row.run
    return (
        run.idempotency_key is not None
        and run.idempotency_key_expires_at is not None
        and run.idempotency_key_expires_at <= now
    )


async def let_go_of_keys(
    connection: Connection, rows: Sequence[Row], outlived: Sequence[int]
) -> tuple[Sequence[Row], dict[int, str]]:
    """Rows without the keys that they outlived; and by position, the run whose alias one is all the same: it
    has the key, and had it while that still counted.
    """
    runs = [rows[position].run for position in outlived]
    records = await connection.fetch(
        statement("look_up_outlived_keys"),
        *key_columns(runs),
        [run.id for run in runs],
        [run.buffered_at or run.created_at for run in runs],
        [run.idempotency_key_expires_at for run in runs],
    )
    bare = list(rows)
    winners = {}
    for position, record in zip(outlived, records, strict=True):
        bare[position] = without_key(rows[position])
        if record["id"] is not None and rows[position].status != "CANCELED":
            winners[position] = record["id"]
    return bare, winners


async def without_lost_keys(connection: Connection, rows: Sequence[Row], now: datetime) -> Sequence[Row]:
    """Rows, the cancelled ones without a key that another has: they stay cancelled, on their own (G10)."""
    cancelled = [
        position
        for position, row in enumerate(rows)
        if row.status == "CANCELED" and row.run.idempotency_key is not None
    ]
    if not cancelled:
        return rows
    kept = list(rows)
    found = await look_up(connection, [rows[position].run for position in cancelled], now)
    for position, record in zip(cancelled, found, strict=True):
        if record["winner_id"] not in (None, rows[position].run.id):
            kept[position] = without_key(rows[position])
    return kept


def without_key(row: Row) -> Row:
    return row._replace(run=replace(row.run, idempotency_key=None, idempotency_key_expires_at=None))

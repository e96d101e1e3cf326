"""What operators decide while the fleet runs. It lives in Postgres; processes hold what they last read."""

from collections.abc import Mapping
from typing import NamedTuple

import asyncpg
import orjson

from app.postgres import acquire, statement

DRAIN_PAUSED = "drain.paused"


class OperatorSettings(NamedTuple):
    """`weights` are those of organizations whose share of the drain is not 1."""

    drain_paused: bool = False
    weights: Mapping[str, int] = {}


async def load(pool: "asyncpg.Pool[asyncpg.Record]", timeout_s: float) -> OperatorSettings:
    """Read them.

    Raises:
        StoreUnavailable: Postgres cannot be read; the last known values hold.
    """
    async with acquire(pool, timeout_s) as connection:
        settings = dict(await connection.fetch(statement("look_up_settings")))
        weights = dict(await connection.fetch(statement("look_up_weights")))
    return OperatorSettings(orjson.loads(settings.get(DRAIN_PAUSED, "false")) is True, weights)


async def decide(connection: "asyncpg.Connection[asyncpg.Record]", name: str, value: object) -> None:
    """Store one decision; every process has it within two seconds."""
    await connection.execute(statement("set_setting"), name, orjson.dumps(value).decode())

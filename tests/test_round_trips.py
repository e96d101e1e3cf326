"""A batch costs a bounded number of round trips to Redis, whatever its size and its environments."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.asyncio import Redis

from app.buffer import RedisBuffer
from app.claims import RedisClaims
from app.gate import RedisGate
from app.keys import Keys
from app.pipeline import Pipeline
from app.redis_client import Call, Scripts
from app.replies import RedisDesk
from app.settings import Settings
from app.store import PostgresStore
from app.store_health import StoreHealth
from app.telemetry import Telemetry
from tests.adapters import Pool
from tests.builders import body, entry
from tests.fakes import FakeHeart

MOST_TRIPS = 7
"""recall, claim, gate, accept, settle, respond, release: with keys and chosen ids, all that there is."""


class CountingScripts(Scripts):
    """Counts what travels to Redis and back."""

    trips = 0

    async def _send(self, calls: Sequence[Call]) -> list[Any]:
        self.trips += 1
        return await super()._send(calls)


@pytest.mark.parametrize("threshold", [1, 1_000_000], ids=["mollified", "passed through"])
async def test_a_batch_costs_as_many_round_trips_as_one_request(
    client: Redis, pool: Pool, threshold: int
) -> None:
    settings = Settings.model_validate({"trip_threshold": threshold, "global_trip_threshold": 1_000_000})
    keys, scripts = Keys("mollifier", 16), CountingScripts(client)
    buffer = RedisBuffer(scripts, keys, settings)
    pipeline = Pipeline(
        gate=RedisGate(scripts, keys, settings),
        buffer=buffer,
        reservations=buffer,
        claims=RedisClaims(scripts, keys, settings),
        store=PostgresStore(pool, settings),
        desk=RedisDesk(scripts, keys, keys.triggers),
        health=StoreHealth(settings),
        settings=settings,
        telemetry=Telemetry("test"),
        heart=FakeHeart(),
        clock=lambda: datetime.now(UTC),
    )

    async def cost(requests: int) -> int:
        options = [
            {"idempotency_key": f"{requests}-{n}", "run_id": f"run_{requests}-{n}"} for n in range(requests)
        ]
        entries = [entry(body(f"env_{n % 50}", options=options[n])) for n in range(requests)]
        scripts.trips = 0
        await pipeline.handle(entries)
        return scripts.trips

    await cost(150)  # loads the scripts
    assert max([await cost(requests) for requests in (1, 60, 500)]) <= MOST_TRIPS

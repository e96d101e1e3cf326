"""A storm in one environment, and what Postgres and the other environments notice of it."""

import asyncio
from typing import Any

from app.client import Mollifier, request
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Measured, Reading, in_turn
from bench.load import offered, poured
from bench.stage import Stage
from bench.triggers import PAYLOAD, tenant, trigger

WINDOW_MS, THRESHOLD, STORM = 200, 10, 100
"""The storm is so many times the threshold in every window."""
OTHERS, RATE = 20, 400.0
"""The other environments, and their requests a second, all together: well below the threshold."""
SECONDS = 4.0

_INSERTS = Bound(name="rows of the storm that passed through, to the threshold", most=1)
_REPLIES = Bound(name="99th percentile of the others' replies, in the storm to calm", most=1.5)
_STORMY = 0


async def measure(stage: Stage, scale: Scale) -> Measured:
    passed: list[float] = []
    storm_rate = STORM * THRESHOLD * 1000 / WINDOW_MS

    def others(number: int) -> dict[str, Any]:
        environment = tenant(1 + number % OTHERS, OTHERS + 1)
        return request("send-email", PAYLOAD, environment=environment, idempotency_key=f"key-{number}")

    async def replies(is_stormy: bool) -> Reading:
        await stage.clear()
        settings = {"trip_window_ms": WINDOW_MS, "trip_threshold": THRESHOLD}
        async with (
            stage.processes("workers.triggers", "workers.drainer", **settings),
            Mollifier(stage.valkey.url) as client,
            asyncio.TaskGroup() as both,
        ):
            await offered(client, others, RATE, 0.5)
            seconds = SECONDS * scale.share
            if is_stormy:
                storm = trigger(_STORMY, environments=OTHERS + 1)
                both.create_task(poured(stage.valkey.url, storm, storm_rate, seconds))
            return await offered(client, lambda number: others(number + 10_000), RATE, seconds)

    async def calm() -> Reading:
        return await replies(False)

    async def stormy() -> Reading:
        reading = await replies(True)
        rows = await stage.sql.fetchval(
            "SELECT count(*) FROM mollifier.runs WHERE environment_id = $1 AND buffered_at IS NULL",
            tenant(_STORMY)["id"],
        )
        passed.append(rows / THRESHOLD)
        return reading

    rounds = await in_turn({"in the storm": stormy, "calm": calm}, scale.pairs)
    return Measured(
        {
            _INSERTS.name: tuple(passed),
            _REPLIES.name: rounds.ratios("p99_ms", "in the storm", "calm"),
        },
        rounds.figures(),
    )


COMPARISON = Comparison(
    name="protection",
    title="Protection",
    how=f"""
        One trigger worker and one drainer, a threshold of {THRESHOLD} triggers in {WINDOW_MS} ms. {OTHERS}
        environments send {RATE:.0f} requests a second together and pass through; in the storm another one
        sends {STORM} times the threshold in every window, for {SECONDS:g} s.
    """,
    bounds=(_INSERTS, _REPLIES),
    measure=measure,
)

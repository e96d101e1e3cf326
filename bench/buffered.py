"""A buffer that was filled before, and timing the drainers that empty it."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import count as count_up

import orjson

from app.batch import Answer
from app.operator_changes import OperatorChanges
from app.run_ids import derive, span_id, trace_id
from app.settings import Settings
from app.telemetry import Telemetry
from app.wiring import World
from bench.findings import Reading
from bench.process import Process, until
from bench.stage import Stage
from bench.triggers import ORGANIZATIONS, PAYLOAD, used_by
from schemas.snapshot import SCHEMA_VERSION, Snapshot

_BATCH = 2000
_sequence = count_up()
_KEY_LIVES = timedelta(days=30)


def snapshots(count: int, environments: int) -> list[Snapshot]:
    """Runs as a trigger with an idempotency key makes them, buffered now. No two have the same key, ever."""
    now = datetime.now(UTC)
    milliseconds = int(now.timestamp() * 1000)
    payload = orjson.dumps(PAYLOAD)
    made = []
    for number in range(count):
        environment = number % environments
        run_id = derive("bench", f"{milliseconds}-{next(_sequence)}", str(environment))
        made.append(
            Snapshot(
                schema_version=SCHEMA_VERSION,
                id=run_id,
                organization_id=f"org_{environment % ORGANIZATIONS}",
                project_id="proj_1",
                environment_id=f"env_{environment}",
                task="send-email",
                payload=payload,
                idempotency_key=f"key-of-{run_id}",
                idempotency_key_expires_at=now + _KEY_LIVES,
                trace_id=trace_id(run_id),
                span_id=span_id(run_id),
                created_at=now,
                buffered_at=now,
            )
        )
    return made


@asynccontextmanager
async def buffer(stage: Stage, namespace: str = "mollifier") -> AsyncIterator["Filling"]:
    """The buffer of a namespace, to be filled from here."""
    settings = Settings.model_validate(
        {"redis_url": stage.valkey.url, "database_url": stage.postgres.url, "namespace": namespace}
    )
    world = await World.open(settings, Telemetry("bench"))
    try:
        yield Filling(world)
    finally:
        await world.close()


class Filling:
    """Fills a buffer as trigger workers do, by its front, and knows how full it is."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def accept(self, runs: Sequence[Snapshot]) -> None:
        """Have runs buffered."""
        for start in range(0, len(runs), _BATCH):
            batch = runs[start : start + _BATCH]
            for answer in await self._world.buffer.accept(batch, [None] * len(batch)):
                assert isinstance(answer, Answer), answer
                assert not answer.is_cached, "its key was taken"

    async def depth(self) -> int:
        """How many entries are in it, queued or draining."""
        keys = self._world.keys
        async with self._world.redis.pipeline(transaction=False) as pipeline:
            for partition in range(keys.partitions):
                pipeline.hget(keys.totals(partition), "queued")
            return sum(int(queued or 0) for queued in await pipeline.execute())


async def pause(stage: Stage, is_paused: bool) -> None:
    """Have all drainers wait, or go on within a second."""
    await OperatorChanges(stage.sql, "bench").set("drain.paused", is_paused)


async def drained(stage: Stage, filling: Filling, drainers: Sequence[Process], count: int) -> Reading:
    """Time idle drainers, from the first entries that are settled until `count` are.

    By then others are half done: processor time is that of all, in proportion.
    """
    full = await filling.depth()
    idle_s, redis_s = used_by(drainers), stage.redis_cpu_s

    async def has_begun() -> bool:
        return await filling.depth() < full

    async def is_done() -> bool:
        for drainer in drainers:
            drainer.check()
        return await filling.depth() <= full - count

    await until(has_begun, "the first batch of the drain")
    first, started = full - await filling.depth(), time.perf_counter()
    await until(is_done, f"{count} entries to be drained", every_s=0.01)
    last, seconds = full - await filling.depth(), time.perf_counter() - started
    share = (last - first) / last
    return Reading(
        last - first,
        seconds,
        (used_by(drainers) - idle_s) * share,
        (stage.redis_cpu_s - redis_s) * share,
    )

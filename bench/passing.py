"""Passing through beside one statement per request, two queues on Postgres, and COPY."""

from app.rows import Row
from bench import others
from bench.buffered import snapshots
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Measured, Reading, in_turn
from bench.stage import Stage
from bench.triggers import ENVIRONMENTS, PASSES, triggers, work_off

TRIGGERS = 40_000
COPIED = 100_000
CALLS = 5_000
WARM_UP = 2_000

_BOUNDS = {
    other: Bound(name=f"triggers a second, ours to {other}", least=least)
    for other, least in (("INSERT", 8), ("procrastinate", 8), ("pgqueuer", 8), ("COPY", 0.6))
}


async def measure(stage: Stage, scale: Scale) -> Measured:
    count, calls = scale.of(TRIGGERS), scale.of(CALLS)

    async def ours() -> Reading:
        await stage.clear()
        async with stage.processes("workers.triggers", **PASSES) as workers:
            await work_off(stage, workers, triggers(WARM_UP, keys="warm-up"))
            reading = await work_off(stage, workers, triggers(count, keys="counted"))
        assert await stage.sql.fetchval("SELECT count(*) FROM mollifier.runs") == WARM_UP + count
        return reading

    async def inserts() -> Reading:
        await stage.clear()
        rows = [Row(run, "QUEUED").values() for run in snapshots(others.WARM_UP + calls, ENVIRONMENTS)]
        async with others.inserting(stage, rows) as enqueue:
            return await others.timed(enqueue, calls)

    async def procrastinate() -> Reading:
        await stage.clear()
        async with others.procrastinate(stage) as enqueue:
            return await others.timed(enqueue, calls)

    async def pgqueuer() -> Reading:
        await stage.clear()
        async with others.pgqueuer(stage) as enqueue:
            return await others.timed(enqueue, calls)

    async def copy() -> Reading:
        await stage.clear()
        return await others.copied(stage, scale.of(COPIED), ENVIRONMENTS)

    sides = {"INSERT": inserts, "procrastinate": procrastinate, "pgqueuer": pgqueuer, "COPY": copy}
    rounds = await in_turn({"ours": ours, **sides}, scale.pairs)
    return Measured(
        {bound.name: rounds.ratios("rate", "ours", other) for other, bound in _BOUNDS.items()},
        rounds.figures(),
    )


COMPARISON = Comparison(
    name="passing",
    title="Passing through, one statement per request, two queues on Postgres, and COPY",
    how=f"""
        A trigger with an idempotency key and a payload of 400 bytes. Ours: one trigger worker on a stream
        that was filled before, its gate asked and letting everything pass. The others:
        {others.CONCURRENCY} calls at once of `INSERT` with the same columns by a pool of asyncpg, of
        procrastinate's `defer_async` with a queueing lock, and of pgqueuer's `enqueue` with a dedupe key,
        with {others.CONNECTIONS} connections each. COPY: the same rows, as values of Python, in one
        statement from one connection.
    """,
    bounds=tuple(_BOUNDS.values()),
    measure=measure,
)

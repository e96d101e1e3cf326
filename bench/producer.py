"""A producer in Python: our client, its reply awaited, beside three queues' own way to enqueue."""

from app.client import Mollifier
from bench import others
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Figure, Measured, Reading, in_turn
from bench.stage import Stage
from bench.triggers import PAYLOAD, tenant

CALLS = 10_000

_BOUNDS = {
    other: Bound(name=f"calls a second, ours to {other}", least=least)
    for other, least in (("procrastinate", 5), ("pgqueuer", 5), ("streaq", 2))
}


async def measure(stage: Stage, scale: Scale) -> Measured:
    count = scale.of(CALLS)
    mollified: list[float] = []

    async def ours() -> Reading:
        await stage.clear()
        async with stage.processes("workers.triggers") as workers, Mollifier(stage.valkey.url) as client:

            async def trigger(number: int) -> None:
                await client.trigger(
                    "send-email", PAYLOAD, environment=tenant(number), idempotency_key=f"key-{number}"
                )

            reading = await others.timed(trigger, count)
            into_the_buffer = await workers[0].metric("mollifier_decisions_total", outcome="mollify")
            mollified.append(100 * into_the_buffer / (others.WARM_UP + count))
            return reading

    async def procrastinate() -> Reading:
        await stage.clear()
        async with others.procrastinate(stage) as enqueue:
            return await others.timed(enqueue, count // 2)

    async def pgqueuer() -> Reading:
        await stage.clear()
        async with others.pgqueuer(stage) as enqueue:
            return await others.timed(enqueue, count // 2)

    async def streaq() -> Reading:
        await stage.clear()
        async with others.streaq(stage) as enqueue:
            return await others.timed(enqueue, count)

    sides = {"ours": ours, "procrastinate": procrastinate, "pgqueuer": pgqueuer, "streaq": streaq}
    rounds = await in_turn(sides, scale.pairs)
    return Measured(
        {bound.name: rounds.ratios("rate", "ours", other) for other, bound in _BOUNDS.items()},
        (*rounds.figures(), Figure("ours, mollified", "%", tuple(mollified))),
    )


COMPARISON = Comparison(
    name="producer",
    title="A producer in Python, end to end",
    how=f"""
        {others.CONCURRENCY} calls at once, each with an idempotency key and a payload of 400 bytes. Ours:
        `Mollifier.trigger`, which returns with the worker's reply; one trigger worker with the default
        settings, so the gate decides. The others: procrastinate's `defer_async` with a queueing lock,
        pgqueuer's `enqueue` with a dedupe key, streaq's `enqueue` with an id. Processor time is that of
        the producer.
    """,
    bounds=tuple(_BOUNDS.values()),
    measure=measure,
)

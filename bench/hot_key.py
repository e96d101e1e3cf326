"""One hot key beside no keys at all."""

from bench.comparison import Comparison, Scale
from bench.findings import Bound, Measured, Reading, in_turn
from bench.stage import Stage
from bench.triggers import MOLLIFIES, trigger, triggers, work_off

REQUESTS = 20_000
WARM_UP = 2_000

_CPU = Bound(name="processor time of a request, one hot key to no keys", most=1.5)
_TIME = Bound(name="requests a second, one hot key to no keys", least=1 / 1.5)


async def measure(stage: Stage, scale: Scale) -> Measured:
    count = scale.of(REQUESTS)

    async def worked_off(bodies: list[bytes]) -> Reading:
        await stage.clear()
        async with stage.processes("workers.triggers", "workers.triggers", **MOLLIFIES) as workers:
            await work_off(stage, workers, triggers(WARM_UP, environments=1))
            return await work_off(stage, workers, bodies)

    async def hot() -> Reading:
        return await worked_off([trigger(0, key="hot")] * count)

    async def unkeyed() -> Reading:
        return await worked_off([trigger(0)] * count)

    rounds = await in_turn({"one hot key": hot, "no keys": unkeyed}, scale.pairs)
    return Measured(
        {
            _CPU.name: rounds.ratios("cpu_us", "one hot key", "no keys"),
            _TIME.name: rounds.ratios("rate", "one hot key", "no keys"),
        },
        rounds.figures(),
    )


COMPARISON = Comparison(
    name="hot-key",
    title="One hot key",
    how=f"""
        {REQUESTS:,} requests of one environment that is mollified, there at once, worked off by two
        trigger workers: all with the same idempotency key, so that one makes a run and the others are
        answered with it, or all without a key, so that each makes a run.
    """,
    bounds=(_CPU, _TIME),
    measure=measure,
)

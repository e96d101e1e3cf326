"""More trigger workers: what each costs, and what is used up first."""

from statistics import median

from bench.comparison import Comparison, Scale
from bench.findings import Bound, Figure, Measured, Reading, in_turn
from bench.stage import Stage
from bench.triggers import MOLLIFIES, triggers, work_off

TRIGGERS = 40_000
WARM_UP = 4_000

_FLAT = Bound(name="processor time of a trigger, four workers to one", most=1.15)
_USED_UP = Bound(name="busier of Redis' core and all cores, four workers", unit="%", least=90)


async def measure(stage: Stage, scale: Scale) -> Measured:
    async def by(workers: int) -> Reading:
        await stage.clear()
        async with stage.processes(*["workers.triggers"] * workers, **MOLLIFIES) as processes:
            await work_off(stage, processes, triggers(WARM_UP, keys="warm-up"))
            return await work_off(stage, processes, triggers(scale.of(TRIGGERS), keys="counted"))

    async def one() -> Reading:
        return await by(1)

    async def two() -> Reading:
        return await by(2)

    async def four() -> Reading:
        return await by(4)

    rounds = await in_turn({"1 worker": one, "2 workers": two, "4 workers": four}, scale.pairs)
    redis = {side: rounds.values(side, "redis_percent") for side in rounds.readings}
    machine = {side: rounds.values(side, "machine_percent") for side in rounds.readings}
    return Measured(
        {
            _FLAT.name: rounds.ratios("cpu_us", "4 workers", "1 worker"),
            _USED_UP.name: tuple(map(max, redis["4 workers"], machine["4 workers"])),
        },
        (
            *rounds.figures(),
            *(Figure(f"{side}, Redis' core in use", "%", values) for side, values in redis.items()),
            *(Figure(f"{side}, all cores in use", "%", values) for side, values in machine.items()),
        ),
        (_what_is_used_up(median(redis["4 workers"]), median(machine["4 workers"])),),
    )


def _what_is_used_up(redis: float, machine: float) -> str:
    used = f"With four workers Redis uses {redis:.0f}% of its core, all together {machine:.0f}% of all cores"
    limit = _USED_UP.least or 0
    if max(redis, machine) < limit:
        return f"{used}: neither is used up."
    return f"{used}: the limit is {'Redis' if redis > machine else 'the cores'}."


COMPARISON = Comparison(
    name="scaling",
    title="Scaling",
    how=f"""
        {TRIGGERS:,} triggers with keys, mollified, on a stream that was filled before, worked off by one,
        two and four trigger workers.
    """,
    bounds=(_FLAT, _USED_UP),
    measure=measure,
)

"""Drainers beside COPY of the same rows."""

from bench.buffered import buffer, drained, pause, snapshots
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Measured, Reading, in_turn
from bench.others import copied
from bench.stage import Stage

ROWS = 60_000
ENVIRONMENTS = 100

_NEAR_COPY = Bound(name="rows a second, one drainer to COPY", least=0.6, guard=0.3)
_TWO = Bound(name="rows a second, two drainers to one", least=1, guard=0.95)


async def measure(stage: Stage, scale: Scale) -> Measured:
    count = scale.of(ROWS)

    async def drain(drainers: int) -> Reading:
        await stage.clear()
        await pause(stage, True)
        async with buffer(stage) as filling, stage.processes(*["workers.drainer"] * drainers) as processes:
            await filling.accept(snapshots(count, ENVIRONMENTS))
            await pause(stage, False)
            return await drained(stage, filling, processes, count)

    async def one() -> Reading:
        return await drain(1)

    async def two() -> Reading:
        return await drain(2)

    async def copy() -> Reading:
        await stage.clear()
        return await copied(stage, count, ENVIRONMENTS)

    rounds = await in_turn({"one drainer": one, "COPY": copy, "two drainers": two}, scale.pairs)
    return Measured(
        {
            _NEAR_COPY.name: rounds.ratios("rate", "one drainer", "COPY"),
            _TWO.name: rounds.ratios("rate", "two drainers", "one drainer"),
        },
        rounds.figures(),
    )


COMPARISON = Comparison(
    name="drain",
    title="The drain and COPY",
    how=f"""
        Runs with an idempotency key and a payload of 400 bytes, buffered in {ENVIRONMENTS} environments.
        Ours: one drainer, then two, from the first entry that leaves the buffer to the last; it also
        reads and settles the buffer. COPY: the same rows, as values of Python, into the same table in one
        statement from one connection.
    """,
    bounds=(_NEAR_COPY, _TWO),
    measure=measure,
)

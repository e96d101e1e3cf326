"""What a trigger and a drained row cost as there are more environments, and more entries in the buffer."""

from msgspec.structs import replace

from bench.buffered import Filling, buffer, drained, pause, snapshots
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Measured, Reading, Rounds, in_turn
from bench.stage import Stage
from bench.triggers import MOLLIFIES, triggers, work_off
from schemas.snapshot import Snapshot, encode_snapshot

FEW, MANY = 1, 10_000
"""Environments."""
SHORT, LONG = 10_000, 1_000_000
"""Buffered entries."""

_FEW, _MANY = f"{FEW} environment", f"{MANY:,} environments"
_SHORT, _LONG = f"{SHORT:,} buffered", f"{LONG:,} buffered"

_TRIGGERS = 20_000
_WARM_UP = 2_000
_DRAIN_ENVIRONMENTS = 100
_AT_ONCE = 50_000
_GRACE_S = 3600
"""What was drained is forgotten after that, so not meanwhile."""
_RUNS = 10_000
_KILOBYTE = b'"' + b"x" * 1022 + b'"'

_TRIGGER = Bound(name=f"cost of a trigger, {MANY:,} environments to {FEW}", least=0.85, most=1.15)
_ROW = Bound(name=f"cost of a drained row, {LONG:,} buffered entries to {SHORT:,}", least=0.85, most=1.15)
_MEMORY = Bound(name="memory of a buffered run with 1 KB of payload, to its snapshot", most=1.6)


async def measure(stage: Stage, scale: Scale) -> Measured:
    triggered = await _triggered(stage, scale)
    memory = await _memory(stage, scale)
    drained = await _drained(stage, scale)
    return Measured(
        {
            _TRIGGER.name: triggered.ratios("cost_us", _MANY, _FEW),
            _ROW.name: drained.ratios("cost_us", _LONG, _SHORT),
            _MEMORY.name: memory,
        },
        (*triggered.figures(), *drained.figures()),
    )


async def _triggered(stage: Stage, scale: Scale) -> Rounds:
    async def at(environments: int) -> Reading:
        await stage.clear()
        async with stage.processes("workers.triggers", **MOLLIFIES) as workers:
            await work_off(stage, workers, triggers(_WARM_UP + 2 * environments, environments=environments))
            return await work_off(stage, workers, triggers(scale.of(_TRIGGERS), environments=environments))

    return await in_turn({_FEW: lambda: at(FEW), _MANY: lambda: at(MANY)}, scale.pairs)


async def _drained(stage: Stage, scale: Scale) -> Rounds:
    """The long buffer is filled once, and every round takes some off it: it stays close to its length."""
    await stage.clear()

    async def drain(filling: Filling, namespace: str, refill: int) -> Reading:
        await pause(stage, True)
        settings = {"namespace": namespace, "ack_grace_ttl_s": _GRACE_S}
        async with stage.processes("workers.drainer", **settings) as (drainer,):
            await filling.accept(snapshots(refill, _DRAIN_ENVIRONMENTS))
            await pause(stage, False)
            reading = await drained(stage, filling, [drainer], SHORT)
            await drainer.leave()
            return reading

    async with buffer(stage, "short") as short, buffer(stage, "long") as long:
        for _ in range(0, scale.of(LONG), _AT_ONCE):
            await long.accept(snapshots(_AT_ONCE, _DRAIN_ENVIRONMENTS))
        sides = {_SHORT: lambda: drain(short, "short", SHORT), _LONG: lambda: drain(long, "long", 0)}
        return await in_turn(sides, scale.pairs)


async def _memory(stage: Stage, scale: Scale) -> tuple[float, ...]:
    """Bytes of Redis for each byte of snapshot, once a round."""
    found = []
    for _ in range(scale.pairs):
        await stage.clear()
        async with buffer(stage) as filling:
            await filling.accept(snapshots(1, 1))  # scripts are loaded then, and not counted
            before = await _used_bytes(stage)
            runs = [_without_key(run) for run in snapshots(_RUNS, 1)]
            await filling.accept(runs)
            assert await filling.depth() == 1 + _RUNS
            used = await _used_bytes(stage) - before
        found.append(used / sum(len(encode_snapshot(run)) for run in runs))
    return tuple(found)


def _without_key(run: Snapshot) -> Snapshot:
    return replace(run, payload=_KILOBYTE, idempotency_key=None, idempotency_key_expires_at=None)


async def _used_bytes(stage: Stage) -> int:
    return int((await stage.redis.info("memory"))["used_memory"])


COMPARISON = Comparison(
    name="growth",
    title="Growth",
    how=f"""
        Cost is the processor time of our process and of Redis together. Triggers are mollified by one
        trigger worker, {_TRIGGERS:,} of them in {FEW} environment or in {MANY:,}. Rows are drained by one
        drainer from {_DRAIN_ENVIRONMENTS} environments, {SHORT:,} of them, out of as many buffered entries
        or out of {LONG:,}. Memory is what Redis uses more for {_RUNS:,} buffered runs without a key.
    """,
    bounds=(_TRIGGER, _ROW, _MEMORY),
    measure=measure,
)

"""What counting and timing cost a trigger worker."""

import time
from datetime import UTC, datetime

from app.batch import Answer, Decision, Entry, Item, Outcome
from app.decode import decode_trigger
from app.settings import Settings
from app.telemetry import Telemetry
from app.validate import build_run
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Figure, Measured
from bench.stage import Stage
from bench.triggers import ENVIRONMENTS, MOLLIFIES, triggers, work_off

TRIGGERS = 20_000
WARM_UP = 2_000
BATCH = 500

_STEPS = 11
_TRIES = 100
_SHARE = Bound(name="processor time of telemetry, to that of a trigger", most=0.02)


async def measure(stage: Stage, scale: Scale) -> Measured:
    tell = _Telling()
    shares, told_us = [], []
    for number in range(scale.pairs):
        await stage.clear()
        async with stage.processes("workers.triggers", **MOLLIFIES) as workers:
            await work_off(stage, workers, triggers(WARM_UP, keys=f"warm-up-{number}"))
            reading = await work_off(stage, workers, triggers(scale.of(TRIGGERS), keys=f"counted-{number}"))
        told_us.append(min(tell() for _ in range(_TRIES)) / BATCH * 1e6)
        shares.append(told_us[-1] / reading.cpu_us)
    return Measured({_SHARE.name: tuple(shares)}, (Figure("telemetry of each", "µs", tuple(told_us)),))


class _Telling:
    """All that is counted and timed of one batch, in this process; a call is the seconds that it took."""

    def __init__(self) -> None:
        self._telemetry, settings = Telemetry("bench"), Settings.model_construct()
        ms = time.time_ns() // 1_000_000
        self._items = []
        for place, body in enumerate(triggers(BATCH, keys="told")):
            item = Item(Entry(f"{ms}-{place}", {b"body": body}), "mollifier:reply:bench:1")
            item.request = decode_trigger(body, len(body))
            item.run = build_run(item.entry, item.request, settings)
            item.decision = Decision(Outcome.MOLLIFY, "per_env_rate", enrolled=True)
            item.outcome = Answer(item.run.id, item.run.span_id, datetime.now(UTC), is_mollified=True)
            self._items.append(item)
        self._entries = [item.entry for item in self._items]

    def __call__(self) -> float:
        started = time.process_time()
        self._telemetry.received("triggers", self._entries)
        self._telemetry.claimed({"claimed": BATCH})
        self._telemetry.decided(self._items)
        self._telemetry.responded(self._items)
        for step in range(_STEPS):
            with self._telemetry.stage(f"step {step}"):
                pass
        return time.process_time() - started


COMPARISON = Comparison(
    name="telemetry",
    title="What telemetry costs",
    how=f"""
        What is counted and timed of a batch of {BATCH} triggers with idempotency keys, in
        {ENVIRONMENTS} environments: the least of {_TRIES} tries in this process, beside the processor time
        that a trigger worker has for as many of {TRIGGERS:,} triggers that are mollified.
    """,
    bounds=(_SHARE,),
    measure=measure,
)

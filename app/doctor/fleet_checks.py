"""Whether the fleet is there and keeps up, and whether its clocks agree."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ResponseError

from app.doctor.examination import POSTGRES, REDIS, Check, Patient, Verdict
from app.fleet import server_ms
from app.redis_client import Call, Scripts
from schemas.diagnosis import Level

_LATE_S = 10
_SKEWED_S, _WRONG_S = 1.0, 30.0
_LOOKS = 3


async def _groups(patient: Patient) -> Verdict:
    keys, seen = patient.keys, []
    for stream in (keys.triggers, keys.operations):
        answer = await patient.ask("XINFO GROUPS", stream)
        groups: list[dict[str, Any]] = [] if isinstance(answer, ResponseError) else answer
        ours = [one for one in groups if one["name"] == keys.group.encode()]
        if not ours:
            return Verdict("warning", f"{stream} has no group {keys.group}")
        seen.append(f"{stream}: {ours[0]['consumers']} consumers, {ours[0]['pending']} pending")
    return Verdict("ok", "; ".join(seen))


Look = Callable[[Patient], Awaitable[Verdict]]


def _staffed(kind: str, waiting: Callable[[Patient], Awaitable[int]]) -> Look:
    """The check that processes of a kind live: a failure while something waits for them."""

    async def look(patient: Patient) -> Verdict:
        alive = sum(one.kind == kind for one in await patient.processes())
        if alive:
            return Verdict("ok", f"{alive} alive")
        count = await waiting(patient)
        waits = f"{count:,} wait for one" if count else "nothing waits for one"
        return Verdict("failure" if count else "warning", f"none is alive, and {waits}")

    return look


async def _triggers(patient: Patient) -> int:
    return int(await patient.told("XLEN", patient.keys.triggers))


async def _operations(patient: Patient) -> int:
    return int(await patient.told("XLEN", patient.keys.operations))


async def _entries(patient: Patient) -> int:
    keys = patient.keys
    calls = [Call("HGET", None, [keys.totals(one), "queued"]) for one in range(keys.partitions)]
    return sum(int(answer or 0) for answer in await Scripts(patient.redis).demand(calls))


async def _nothing(patient: Patient) -> int:
    return 0


async def _backlog(patient: Patient) -> Verdict:
    now_ms = server_ms(await patient.told("TIME"))
    late = []
    for stream in (patient.keys.triggers, patient.keys.operations):
        oldest = await patient.told("XRANGE", stream, "-", "+", "COUNT", 1)
        waits_s = (now_ms - int(oldest[0][0].partition(b"-")[0])) / 1000 if oldest else 0
        if waits_s > _LATE_S:
            late.append(f"{stream}: the oldest request waits for {waits_s:,.0f} s")
    return Verdict("warning", "; ".join(late)) if late else Verdict("ok", "no request waits for long")


async def _clock_of_redis(patient: Patient) -> Verdict:
    async def ask() -> float:
        return server_ms(await patient.told("TIME")) / 1000

    return await _compared(patient, ask)


async def _clock_of_postgres(patient: Patient) -> Verdict:
    async def look(connection: Any) -> Verdict:
        return await _compared(
            patient, lambda: connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        )

    verdict: Verdict = await patient.query(look)
    return verdict


async def _compared(patient: Patient, ask: Callable[[], Awaitable[float]]) -> Verdict:
    """How far a server's clock is from this machine's; half of the quickest round trip is taken off."""
    looks = []
    for _ in range(_LOOKS):
        started, sent = time.perf_counter(), patient.clock()
        told = await ask()
        took = time.perf_counter() - started
        looks.append((took, told - sent - took / 2))
    took, ahead = min(looks)
    level: Level = "failure" if abs(ahead) > _WRONG_S else "warning" if abs(ahead) > _SKEWED_S else "ok"
    way = "ahead of" if ahead >= 0 else "behind"
    return Verdict(level, f"{abs(ahead):.3f} s {way} this machine (±{took / 2:.3f} s)")


CLOCKS = "Let an NTP client keep the clocks of this machine, of Redis and of Postgres."
CHECKS = (
    Check(
        "fleet.groups",
        [REDIS],
        "Both request streams have their consumer group",
        "Run `mollifier migrate`, or start the workers, which make it too.",
        _groups,
    ),
    Check(
        "fleet.triggers",
        [REDIS],
        "A trigger worker lives; failure while requests wait",
        "Start `python -m workers.triggers`, and read in its log why the last one ended.",
        _staffed("triggers", _triggers),
    ),
    Check(
        "fleet.operations",
        [REDIS],
        "An operations worker lives; failure while requests wait",
        "Start `python -m workers.operations`, and read in its log why the last one ended.",
        _staffed("operations", _operations),
    ),
    Check(
        "fleet.drainers",
        [REDIS],
        "A drainer lives; failure while entries wait",
        "Start `python -m workers.drainer`, and read in its log why the last one ended.",
        _staffed("drainer", _entries),
    ),
    Check(
        "fleet.sweepers",
        [REDIS],
        "A sweeper lives",
        "Start `python -m workers.sweeper`, and read in its log why the last one ended.",
        _staffed("sweeper", _nothing),
    ),
    Check(
        "fleet.backlog",
        [REDIS],
        "No request waits for over 10 s",
        "Add trigger workers or operations workers; `mollifier top` shows whether they keep up.",
        _backlog,
    ),
    Check(
        "clock.redis",
        [REDIS],
        "Its clock is within 1 s of this machine's, failure over 30 s",
        CLOCKS,
        _clock_of_redis,
    ),
    Check(
        "clock.postgres",
        [POSTGRES],
        "Its clock is within 1 s of this machine's, failure over 30 s",
        CLOCKS,
        _clock_of_postgres,
    ),
)

"""What `mollifier doctor` looks at, and the part of it that every process looks at when it starts.

The checks are a table, each with its remedy. docs/operations.md has the same, and a test compares the two.
"""

from collections.abc import Sequence

import asyncpg
from redis.asyncio import Redis

from app.doctor import fleet_checks, postgres_checks, redis_checks, redis_data, settings_checks
from app.doctor.examination import LIMIT_S, POSTGRES, REDIS, Check, Patient, examine
from app.keys import Keys
from app.postgres import create_pool
from app.redis_connection import connect
from app.settings import Settings
from schemas.diagnosis import Diagnosis, Finding, Level

CHECKS: Sequence[Check] = (
    *redis_checks.CHECKS,
    *redis_data.CHECKS,
    *postgres_checks.CHECKS,
    *fleet_checks.CHECKS,
    *settings_checks.CHECKS,
)
"""All checks, in the order in which they are made and shown."""

REFUSED: Sequence[Check] = (redis_checks.VERSION, redis_data.WAIT_AOF)
"""With a failure of these no process starts: it would be ready, and never answer what it takes."""

ESSENTIAL: dict[str, Sequence[Check]] = {
    REDIS: (*REFUSED, redis_checks.CLUSTER, redis_data.EVICTION, redis_data.APPEND_ONLY),
    POSTGRES: (postgres_checks.SCHEMA, postgres_checks.PROGRAM),
}
"""What each process looks at when it starts, by server."""

_LEVELS: Sequence[Level] = ("ok", "warning", "failure")


async def diagnose(settings: Settings) -> Diagnosis:
    """Make all checks, within half a minute whatever is away; raises nothing."""
    redis = connect(settings.redis_url)
    pool = await create_pool(settings.database_url, LIMIT_S, size=1)
    try:
        patient = Patient(settings, Keys(settings.namespace, settings.partitions), redis, pool)
        findings = await examine(CHECKS, patient)
    finally:
        pool.terminate()
        await redis.aclose()
    return Diagnosis(level=max((one.level for one in findings), key=_LEVELS.index), findings=findings)


async def look_at_start(
    server: str, settings: Settings, keys: Keys, redis: Redis, pool: "asyncpg.Pool[asyncpg.Record]"
) -> list[Finding] | None:
    """What is wrong with a server, of what is essential; None while it does not answer."""
    patient = Patient(settings, keys, redis, pool)
    findings = await examine(ESSENTIAL[server], patient)
    return None if patient.away else [one for one in findings if one.level != "ok"]


def refusal(finding: Finding) -> str | None:
    """Why a process must not start with what was found, in a sentence; None: it may."""
    if finding.level != "failure" or finding.check not in {check.name for check in REFUSED}:
        return None
    return f"{finding.seen}. {finding.remedy}"

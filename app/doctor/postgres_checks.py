"""What Postgres must be and have."""

import time

import asyncpg

from app.doctor.examination import POSTGRES, REDIS, Check, Patient, Verdict
from app.migrate import migrations, unknown_migrations
from app.migrate import missing_migrations as missing
from app.postgres import POOL_SIZE
from schemas.diagnosis import Level

OLDEST, TESTED = 12, 16
"""Generated columns came with Postgres 12; the tests run on 18, and were run on 16."""

_SLOW_S = 0.02
_MOSTLY = 0.8
_CONNECTIONS_OF_A_PROCESS = POOL_SIZE + 1
"""Its pool, and the one on which it hears of what operators decide."""


async def _reachable(patient: Patient) -> Verdict:
    best = float("inf")
    for _ in range(3):
        best = min(best, await patient.query(_time_of_a_round_trip))
    level: Level = "warning" if best > _SLOW_S else "ok"
    return Verdict(level, f"answers in {best * 1000:.1f} ms")


async def _time_of_a_round_trip(connection: "asyncpg.Connection[asyncpg.Record]") -> float:
    started = time.perf_counter()
    await connection.fetchval("SELECT 1")
    return time.perf_counter() - started


async def _version(patient: Patient) -> Verdict:
    facts = await patient.facts()
    return of_version(facts["version_number"] // 10_000, facts["version"])


def of_version(major: int, shown: str) -> Verdict:
    """What there is to say about a major version of Postgres."""
    if major < OLDEST:
        return Verdict("failure", f"Postgres {shown}: its tables cannot be made there")
    if major < TESTED:
        return Verdict("warning", f"Postgres {shown} is older than those it was tested with")
    return Verdict("ok", f"Postgres {shown}")


async def _schema(patient: Patient) -> Verdict:
    lacking = await patient.query(missing)
    if not lacking:
        return Verdict("ok", f"as new as the program: {migrations()[-1]}")
    return Verdict("failure", f"older than the program, it lacks {', '.join(lacking)}")


async def _program(patient: Patient) -> Verdict:
    unknown = await patient.query(unknown_migrations)
    if not unknown:
        return Verdict("ok", "as new as the schema")
    return Verdict("failure", f"older than the schema, it does not know {', '.join(unknown)}")


async def _writable(patient: Patient) -> Verdict:
    facts = await patient.facts()
    if facts["is_standby"]:
        return Verdict("failure", "it is a standby, in recovery")
    if facts["is_read_only"]:
        return Verdict("failure", "default_transaction_read_only is on")
    return Verdict("ok", "it takes writes")


async def _rights(patient: Patient) -> Verdict:
    lacking = [record["lacking"] for record in await patient.fetch("find_lacking_rights")]
    if lacking:
        return Verdict("failure", f"the user lacks {', '.join(lacking)}")
    return Verdict("ok", "the user has all that is needed")


async def _durability(patient: Patient) -> Verdict:
    facts = await patient.facts()
    wrong = [
        *(["fsync is off"] if not facts["syncs"] else []),
        *(["full_page_writes is off"] if not facts["writes_full_pages"] else []),
        *(["synchronous_commit is off"] if facts["synchronous_commit"] == "off" else []),
    ]
    if wrong:
        return Verdict("failure", f"{', '.join(wrong)}: a crash drops rows whose entries are gone from Redis")
    return Verdict("ok", f"fsync is on, synchronous_commit is {facts['synchronous_commit']}")


async def _connections(patient: Patient) -> Verdict:
    facts = await patient.facts()
    limits = (
        facts["max_connections"] - facts["reserved"],
        facts["limit_of_user"],
        facts["limit_of_database"],
    )
    most = min(limit for limit in limits if limit is not None)
    processes = len(await patient.processes())
    wanted, in_use = processes * _CONNECTIONS_OF_A_PROCESS, facts["in_use"]
    seen = f"{processes} processes may need {wanted} of {most} connections, {in_use} are in use"
    if wanted > most:
        return Verdict("failure", seen)
    return Verdict("warning" if max(wanted, in_use) > _MOSTLY * most else "ok", seen)


SCHEMA = Check(
    "postgres.schema",
    [POSTGRES],
    "The schema is as new as the program",
    "Run `mollifier migrate`; the processes may go on meanwhile.",
    _schema,
)
PROGRAM = Check(
    "postgres.program",
    [POSTGRES],
    "The program is as new as the schema",
    "Run the version that the schema was made by, or a newer one.",
    _program,
)
CHECKS = (
    Check(
        "postgres.reachable",
        [POSTGRES],
        "Postgres answers, within 20 ms",
        "Look at DATABASE_URL, the network, and whether the server runs and lets the user in.",
        _reachable,
    ),
    Check(
        "postgres.version",
        [POSTGRES],
        "Postgres 16 or newer, failure under 12",
        "Run a newer server.",
        _version,
    ),
    SCHEMA,
    PROGRAM,
    Check(
        "postgres.writable",
        [POSTGRES],
        "It takes writes",
        "Point DATABASE_URL at the primary; switch default_transaction_read_only off where it is set.",
        _writable,
    ),
    Check(
        "postgres.rights",
        [POSTGRES],
        "The user has the rights on the tables that it needs",
        "GRANT what is named, as the owner of the schema.",
        _rights,
    ),
    Check(
        "postgres.durability",
        [POSTGRES],
        "What is committed is kept: `fsync`, `full_page_writes` and `synchronous_commit` are on",
        "ALTER SYSTEM SET what is named to on, then SELECT pg_reload_conf().",
        _durability,
    ),
    Check(
        "postgres.connections",
        [POSTGRES, REDIS],
        "The pools of all processes fit into `max_connections` and other limits, with 20 % free",
        "Raise max_connections and restart it, run fewer processes, or put pgbouncer between.",
        _connections,
    ),
)

"""What kind of server Redis is, and whether it can be used: as a primary, fully, by every process."""

import time

from app.doctor.examination import REDIS, Check, Patient, Unreadable, Verdict
from app.doctor.redis_data import size
from app.doctor.redis_rights import commands, writable
from app.fleet import CONNECTIONS_OF_A_PROCESS
from schemas.diagnosis import Level

OLDEST = (7, 0)
"""Scripts that may write while memory is full (`flags=allow-oom`) came with Redis 7.0."""

_SLOW_S = 0.02
_MOSTLY = 0.9
_REPLIES_AT_ONCE = 8
_SAMPLE = 10
_MOST_PARTITIONS = 1024


async def _reachable(patient: Patient) -> Verdict:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        await patient.told("PING")
        best = min(best, time.perf_counter() - started)
    level: Level = "warning" if best > _SLOW_S else "ok"
    return Verdict(level, f"answers in {best * 1000:.1f} ms, and a batch takes about ten round trips")


async def _version(patient: Patient) -> Verdict:
    info = await patient.info()
    speaks = str(info["redis_version"])
    return of_version(speaks, f"Valkey {info['valkey_version']}" if "valkey_version" in info else "Redis")


def of_version(speaks: str, name: str) -> Verdict:
    """What there is to say about a server that speaks as this version of Redis does."""
    is_old = tuple(int(part) for part in speaks.split(".")[:2]) < OLDEST
    return Verdict("failure" if is_old else "ok", f"{name}, which speaks Redis {speaks}")


async def _role(patient: Patient) -> Verdict:
    role = str((await patient.info()).get("role", "no data node"))
    known = {"master": "a primary", "slave": "a replica"}.get(role, role)
    return Verdict("ok" if role == "master" else "failure", f"it is {known}")


async def _cluster(patient: Patient) -> Verdict:
    if (await patient.info()).get("cluster_enabled"):
        return Verdict("failure", "it is a node of a cluster, and the client speaks to single nodes only")
    return Verdict("ok", "it is a single node")


async def _output_buffers(patient: Patient) -> Verdict:
    limits = (await patient.config("client-output-buffer-limit")).split()
    if "pubsub" not in limits:
        raise Unreadable("CONFIG GET client-output-buffer-limit: no limit is told")
    hard = int(limits[limits.index("pubsub") + 1])
    settings = patient.settings
    wanted = _REPLIES_AT_ONCE * (settings.max_payload_bytes + settings.max_metadata_bytes)
    seen = f"a producer is cut off when {size(hard)} of replies wait for it" if hard else "no limit"
    return Verdict("warning" if 0 < hard < wanted else "ok", seen)


async def _clients(patient: Patient) -> Verdict:
    info = await patient.info()
    most, connected = int(info["maxclients"]), int(info["connected_clients"])
    processes = len(await patient.processes())
    wanted = processes * CONNECTIONS_OF_A_PROCESS
    seen = f"{connected} of {most} connected; {processes} processes may need {wanted}"
    is_short = wanted > most or connected > _MOSTLY * most
    return Verdict("warning" if is_short else "ok", seen)


async def _partitions(patient: Patient) -> Verdict:
    """Look for what a process with this number of partitions would never find."""
    keys = patient.keys
    beyond = [keys.ready(partition) for partition in range(keys.partitions, _MOST_PARTITIONS)]
    if beyond and await patient.told("EXISTS", *beyond):
        return Verdict("failure", f"there are runs in partitions beyond {keys.partitions}")
    for partition in range(keys.partitions):
        for environment in await patient.told("ZRANGE", keys.ready(partition), 0, _SAMPLE - 1):
            if keys.partition(environment.decode()) != partition:
                return Verdict("failure", f"partition {partition} has runs that belong into another one")
    return Verdict("ok", f"{keys.partitions}, as what is buffered has it")


VERSION = Check(
    "redis.version",
    [REDIS],
    "Redis 7.0 or newer, or Valkey",
    "Run a newer server: its scripts need Redis 7.0.",
    _version,
)
CLUSTER = Check(
    "redis.cluster",
    [REDIS],
    "A single node, no cluster",
    "Point REDIS_URL at a server that runs with cluster-enabled no; replicas are fine.",
    _cluster,
)
CHECKS = (
    Check(
        "redis.reachable",
        [REDIS],
        "Redis answers, within 20 ms",
        "Look at REDIS_URL, the network, and whether the server runs and is not busy with something large.",
        _reachable,
    ),
    VERSION,
    Check(
        "redis.role",
        [REDIS],
        "It is a primary",
        "Point REDIS_URL at the primary; after a failover, at the new one.",
        _role,
    ),
    CLUSTER,
    Check(
        "redis.commands",
        [REDIS],
        "It has every command that is needed, and the user may use it on keys and channels of the namespace",
        "ACL SETUSER the user so that it may use what is named on ~NAMESPACE:* and &NAMESPACE:*.",
        commands,
    ),
    Check(
        "redis.writable",
        [REDIS],
        "It takes writes: not read-only, not out of memory, not without replicas or disk that it insists on",
        "Do what the refusal says; the drain goes on while memory is full, and makes room.",
        writable,
    ),
    Check(
        "redis.output_buffers",
        [REDIS],
        "Eight of the longest replies fit into what may wait for one subscriber",
        "CONFIG SET client-output-buffer-limit 'pubsub 32mb 8mb 60', and the same in its configuration file.",
        _output_buffers,
    ),
    Check(
        "redis.clients",
        [REDIS],
        "All processes may have as many connections as they can need, and 10 % are free",
        "CONFIG SET maxclients higher, or run fewer processes.",
        _clients,
    ),
    Check(
        "redis.partitions",
        [REDIS],
        "What is buffered was spread over as many partitions as `MOLLIFIER_PARTITIONS`",
        "Set MOLLIFIER_PARTITIONS, in every process, to what it was when the runs were buffered.",
        _partitions,
    ),
)

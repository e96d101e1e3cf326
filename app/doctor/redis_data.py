"""Whether Redis keeps what it was given: eviction, memory, the append-only file, disk and replicas.

All of it but the policy of fsync is in INFO, which also those may read who may not read settings.
"""

from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from app.doctor.examination import REDIS, Check, Patient, Verdict
from schemas.diagnosis import Level

_FULL, _NEARLY_FULL = 0.9, 0.75
_LAGGING_S = 10


async def _eviction(patient: Patient) -> Verdict:
    policy = str((await patient.info())["maxmemory_policy"])
    seen = f"maxmemory-policy is {policy}"
    if policy == "noeviction":
        return Verdict("ok", seen)
    return Verdict("failure", f"{seen}: when memory is full, runs that were accepted are dropped")


async def _memory(patient: Patient) -> Verdict:
    info = await patient.info()
    used, limit = info["used_memory"], info["maxmemory"]
    whose = "maxmemory" if limit else "the machine's memory; maxmemory is not set"
    limit = limit or info.get("total_system_memory", 0)
    if not limit:
        return Verdict("ok", f"{size(used)} used; there is no limit")
    share = used / limit
    level: Level = "failure" if share > _FULL else "warning" if share > _NEARLY_FULL else "ok"
    return Verdict(level, f"{size(used)} used of {size(limit)} ({share:.0%}), {whose}")


async def _append_only(patient: Patient) -> Verdict:
    if (await patient.info()).get("aof_enabled"):
        return Verdict("ok", "appendonly is on")
    seen = "appendonly is off: a restart drops the runs that were accepted"
    return Verdict("warning" if patient.settings.buffer_wait_replicas else "failure", seen)


async def _fsync(patient: Patient) -> Verdict:
    policy = await patient.config("appendfsync")
    if policy == "no":
        return Verdict("warning", "appendfsync is no: when the machine dies, up to half a minute is lost")
    cost = {"everysec": "a second is lost", "always": "nothing is lost"}.get(policy, "some is lost")
    return Verdict("ok", f"appendfsync is {policy}: when the machine dies, {cost}")


async def _disk(patient: Patient) -> Verdict:
    info = await patient.info()
    watched = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
    failed = [name for name in watched if info.get(name, "ok") != "ok"]
    if not failed:
        return Verdict("ok", "what it last wrote to disk is written")
    return Verdict("failure" if watched[0] in failed else "warning", f"not ok: {', '.join(failed)}")


async def _replicas(patient: Patient) -> Verdict:
    info = await patient.info()
    wanted = patient.settings.buffer_wait_replicas
    there = [info[f"slave{number}"] for number in range(info["connected_slaves"])]
    online: list[dict[str, Any]] = [one for one in there if one.get("state") == "online"]
    seen = f"{len(online)} in step, {wanted} waited for"
    if len(online) < wanted:
        return Verdict("failure", f"{seen}: what is mollified goes unanswered")
    lag_s = max((int(one.get("lag", 0)) for one in online), default=0)
    return Verdict("warning" if lag_s > _LAGGING_S else "ok", f"{seen}, lag {lag_s} s" if online else seen)


async def _wait_aof(patient: Patient) -> Verdict:
    if not patient.settings.buffer_wait_aof:
        return Verdict("ok", "MOLLIFIER_BUFFER_WAIT_AOF=0: not needed")
    answer = await patient.ask("WAITAOF", 1, 0, 1)
    if not isinstance(answer, ResponseError):
        return Verdict("ok", "WAITAOF answers")
    is_final = isinstance(answer, NoPermissionError) or any(
        sign in str(answer) for sign in ("unknown command", "appendonly is disabled")
    )
    why = str(answer).strip().rstrip(".")
    seen = f"MOLLIFIER_BUFFER_WAIT_AOF=1, and what is mollified goes unanswered: {why}"
    return Verdict("failure" if is_final else "warning", seen)


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GB"


EVICTION = Check(
    "redis.eviction",
    [REDIS],
    "Nothing is evicted: `maxmemory-policy noeviction`",
    "CONFIG SET maxmemory-policy noeviction, and the same in the server's configuration file.",
    _eviction,
)
APPEND_ONLY = Check(
    "redis.append_only",
    [REDIS],
    "What is buffered survives a restart: `appendonly yes`; only a warning where replicas are waited for",
    "CONFIG SET appendonly yes, and the same in the server's configuration file.",
    _append_only,
)
WAIT_AOF = Check(
    "redis.wait_aof",
    [REDIS],
    "`MOLLIFIER_BUFFER_WAIT_AOF=1` needs a server that has WAITAOF, and `appendonly yes`",
    "Set MOLLIFIER_BUFFER_WAIT_AOF=0; or run Valkey or Redis 7.2 or newer, with appendonly yes.",
    _wait_aof,
)
CHECKS = (
    EVICTION,
    Check(
        "redis.memory",
        [REDIS],
        "Up to 75 % of its memory is used, failure over 90 %",
        "Give it more memory (CONFIG SET maxmemory); `mollifier status` shows whether it drains.",
        _memory,
    ),
    APPEND_ONLY,
    Check(
        "redis.fsync",
        [REDIS],
        "What is appended reaches the disk: `appendfsync everysec` or `always`",
        "CONFIG SET appendfsync everysec, and the same in the server's configuration file.",
        _fsync,
    ),
    Check(
        "redis.disk",
        [REDIS],
        "Its last writes to disk went well",
        "Look for a full or broken disk; the server's own log says which write failed.",
        _disk,
    ),
    Check(
        "redis.replicas",
        [REDIS],
        "There are as many replicas as `MOLLIFIER_BUFFER_WAIT_REPLICAS`, and none lags over 10 s",
        "Bring the replicas back, or set MOLLIFIER_BUFFER_WAIT_REPLICAS to what there is.",
        _replicas,
    ),
    WAIT_AOF,
)

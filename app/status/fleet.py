"""The processes, the streams of requests and the dead letters as a look sees them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from redis.exceptions import ResponseError

from app.errors import Unreachable
from app.fleet import Member, members, roll_call
from app.keys import Keys
from app.redis_client import Call, Scripts
from schemas.status import Consumer, DeadLetters, Stream

_MOST_CONSUMERS = 200

Held = Mapping[str, Mapping[str, int]]
"""By drainer and environment, the entries that it was handed."""


async def held(scripts: Scripts, keys: Keys) -> Held:
    """What drainers hold.

    Raises:
        Unreachable: Redis did not answer. So do all functions here.
    """
    (takers,) = await scripts.demand([Call("SMEMBERS", None, [f"{keys.turns}:takers"])])
    names = sorted(taker.decode() for taker in takers)
    answers = await scripts.demand([Call("HGETALL", None, [f"{keys.turns}:held:{name}"]) for name in names])
    return {
        # `<entries>`, or `<entries> apart`
        name: {environment.decode(): int(entries.split()[0]) for environment, entries in answer.items()}
        for name, answer in zip(names, answers, strict=True)
    }


async def streams(scripts: Scripts, keys: Keys, now_ms: int) -> list[Stream]:
    """The streams of triggers and of operations."""
    found = []
    for stream in (keys.triggers, keys.operations):
        calls = [Call("XLEN", None, [stream]), Call("XRANGE", None, [stream, "-", "+", "COUNT", 1])]
        length, oldest = await scripts.demand(calls)
        groups = await _listed(scripts, Call("XINFO GROUPS", None, [stream]))
        group = next((one for one in groups if one["name"] == keys.group.encode()), {})
        since_ms = int(oldest[0][0].partition(b"-")[0]) if oldest else now_ms
        found.append(
            Stream(
                stream=stream,
                length=length,
                pending=group.get("pending", 0),
                lag=group.get("lag"),
                oldest_s=max(0, now_ms - since_ms) / 1000,
            )
        )
    return found


async def consumers(scripts: Scripts, keys: Keys, holding: Held, now_ms: int) -> list[Consumer]:
    """The processes: those first that are dead and hold something, then the dead, then the busiest."""
    (listed,) = await scripts.demand([roll_call(keys)])
    known = {one.consumer: one for one in members(listed, now_ms)}
    kinds = {name: one.kind for name, one in known.items()}
    pending: defaultdict[str, int] = defaultdict(int)
    for stream, kind in ((keys.triggers, "triggers"), (keys.operations, "operations")):
        for one in await _listed(scripts, Call("XINFO CONSUMERS", None, [stream, keys.group])):
            name = one["name"].decode()
            kinds.setdefault(name, kind)
            pending[name] += one["pending"]
    for name, environments in holding.items():
        kinds.setdefault(name, "drainer")
        pending[name] += sum(environments.values())
    names = sorted(kinds, key=lambda name: (name in known, -pending[name], kinds[name], name))[
        :_MOST_CONSUMERS
    ]
    beats = await scripts.demand([Call("EXISTS", None, [keys.heartbeat(name)]) for name in names])
    found = [
        Consumer(
            kind=kinds[name],
            consumer=name,
            alive=bool(beat),
            heartbeat_s=_silent_s(known.get(name)),
            pending=pending[name],
        )
        for name, beat in zip(names, beats, strict=True)
    ]
    return sorted(found, key=lambda one: (one.alive, -one.pending, one.kind, one.consumer))


async def dead_letters(scripts: Scripts, keys: Keys, now_ms: int) -> DeadLetters:
    """How many there are, and what the newest says."""
    calls = [
        Call("XLEN", None, [keys.dead_letters]),
        Call("XREVRANGE", None, [keys.dead_letters, "+", "-", "COUNT", 1]),
    ]
    count, newest = await scripts.demand(calls)
    if not newest:
        return DeadLetters(count=count, newest_reason=None, newest_s=None)
    ((entry_id, fields),) = newest
    at_ms = int(entry_id.partition(b"-")[0])
    return DeadLetters(
        count=count,
        newest_reason=fields.get(b"reason", b"?").decode(errors="replace"),
        newest_s=max(0, now_ms - at_ms) / 1000,
    )


async def _listed(scripts: Scripts, call: Call) -> Sequence[Mapping[str, Any]]:
    """What XINFO lists; nothing when the stream or its group is not there."""
    (answer,) = await scripts.run([call])
    if not isinstance(answer, ResponseError):
        listed: Sequence[Mapping[str, Any]] = answer
        return listed
    if "NOGROUP" in str(answer) or "no such key" in str(answer):
        return []
    raise Unreachable(f"Redis: {answer}") from answer


def _silent_s(member: Member | None) -> float | None:
    return None if member is None else member.silent_ms / 1000

"""The buffer and its schedule as Redis has them, all read in one instant."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from redis.asyncio import Redis

from app.keys import Keys
from app.schedule import Arrival
from schemas.snapshot import Snapshot, decode_snapshot

_READ = """
local answers, at = {}, 1
while at <= #ARGV do
  answers[#answers + 1] = redis.call(unpack(ARGV, at + 1, at + ARGV[at]))
  at = at + 1 + ARGV[at]
end
return answers
"""

decoded = lru_cache(maxsize=10_000)(decode_snapshot)


def position(entry_id: str) -> tuple[int, int]:
    ms, _, sequence = entry_id.partition("-")
    return int(ms), int(sequence)


NOWHERE = (0, 0)


@dataclass
class Environment:
    """The buffer of one environment, as Redis has it."""

    entries: list[tuple[str, Snapshot]]
    drain: dict[str, str]
    index: dict[str, str]
    overlays: dict[str, bytes]

    @property
    def hold(self) -> tuple[str, int] | None:
        return (self.drain["holder"], int(self.drain["hold"])) if "holder" in self.drain else None

    def mark(self, name: str) -> tuple[int, int]:
        return position(self.drain.get(name, "0-0"))

    def past(self, mark: str) -> list[tuple[str, Snapshot]]:
        return [entry for entry in self.entries if position(entry[0]) > self.mark(mark)]

    @property
    def queued(self) -> list[tuple[str, Snapshot]]:
        return self.past("done")

    def marks(self) -> dict[str, str]:
        """Where the drainers are in it."""
        names = ("done", "taken", "uncertain", "holder", "hold")
        return {name: self.drain[name] for name in names if name in self.drain}

    def state_of(self, run_id: str) -> str | None:
        """What readers are to see of a run."""
        at = [position(entry_id) for entry_id, one in self.entries if one.id == run_id]
        if not at:
            return None
        if at[0] <= self.mark("done"):
            return "MATERIALISED"
        return "DRAINING" if at[0] <= max(self.mark("taken"), self.mark("uncertain")) else "QUEUED"


@dataclass
class Schedule:
    """Whose turn it is, as Redis has it. Of organizations and environments their times."""

    states: set[str]
    organizations: dict[str, float]
    choosable: dict[str, float]
    environments: dict[str, dict[str, float]]
    resting: dict[str, float]
    apart: list[str]
    takers: set[str]
    held: dict[str, dict[str, str]]

    def waiting(self) -> set[str]:
        """Environments that can be chosen."""
        return {
            environment
            for some in self.environments.values()
            for environment, at in some.items()
            if at < math.inf
        }


@dataclass
class Look:
    """All that is there."""

    environments: dict[str, Environment]
    ready: dict[str, int]
    arrivals: set[str]
    totals: list[int]
    grace: set[str]
    schedule: Schedule


async def look(
    redis: "Redis", keys: Keys, organizations: Mapping[str, str], consumers: Sequence[str]
) -> Look:
    """What is there of some environments (and whose they are) and drainers."""
    partitions, turns = range(keys.partitions), keys.turns
    names = sorted({*organizations.values()})
    commands: list[tuple[Any, ...]] = []
    for one in map(keys.environment, organizations):
        commands.append(("XRANGE", one.entries, "-", "+"))
        commands += [("HGETALL", key) for key in (one.drain, one.index, one.overlays)]
    ranges = [key(one) for key in (keys.ready, keys.arrivals, keys.grace) for one in partitions]
    ranges += [f"{turns}:{name}" for name in ("organizations", "choosable", "resting")]
    ranges += [f"{turns}:environments:{name}" for name in names]
    commands += [("ZRANGE", key, 0, -1, "WITHSCORES") for key in ranges]
    commands += [("HGETALL", f"{turns}:held:{consumer}") for consumer in consumers]
    commands += [("HKEYS", f"{turns}:states"), ("LRANGE", f"{turns}:apart", 0, -1)]
    commands.append(("SMEMBERS", f"{turns}:takers"))
    commands += [("HGET", keys.totals(one), "queued") for one in partitions]
    words = [word for command in commands for word in (len(command), *command)]
    answers = iter(await redis.eval(_READ, 0, *words))
    environments = {
        environment: Environment(
            [(entry_id.decode(), decoded(fields[3])) for entry_id, fields in next(answers)],
            _texts(next(answers)),
            _texts(next(answers)),
            {run_id.decode(): overlay for run_id, overlay in _pairs(next(answers))},
        )
        for environment in organizations
    }
    ready, arrivals, grace = ([_scores(next(answers)) for _ in partitions] for _ in range(3))
    schedule = Schedule(
        organizations=_scores(next(answers)),
        choosable=_scores(next(answers)),
        resting=_scores(next(answers)),
        environments={name: _scores(next(answers)) for name in names},
        held={consumer: _texts(next(answers)) for consumer in consumers},
        states={one.decode() for one in next(answers)},
        apart=[one.decode() for one in next(answers)],
        takers={one.decode() for one in next(answers)},
    )
    return Look(
        environments=environments,
        ready={environment: int(at) for some in ready for environment, at in some.items()},
        arrivals={Arrival.read(0, one.encode()).environment.decode() for some in arrivals for one in some},
        totals=[int(next(answers) or 0) for _ in partitions],
        grace={element for some in grace for element in some},
        schedule=schedule,
    )


def _pairs(found: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    return zip(found[::2], found[1::2], strict=True)


def _texts(found: Sequence[bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in _pairs(found)}


def _scores(found: Sequence[bytes]) -> dict[str, float]:
    return {member.decode(): float(score) for member, score in _pairs(found)}

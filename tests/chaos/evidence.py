"""What a storm leaves to the checker: the record of the producers, and what was in the servers at the end."""

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
from redis.asyncio import Redis

from tests.chaos.journal import Attempt, Record

Row = dict[str, Any]


class Alias(NamedTuple):
    """An id that stands for another run."""

    id: str
    run_id: str
    environment_id: str


@dataclass(slots=True)
class End:
    """What is in the servers, once all is over and every process has left."""

    rows: list[Row] = field(default_factory=list)
    aliases: list[Alias] = field(default_factory=list)
    waitpoints: list[Row] = field(default_factory=list)
    dead_letters: list[dict[str, str]] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)


class Happened(NamedTuple):
    """A fault that was injected. Times are seconds since 1970.

    Between `begun_at` and `injected_at` it was on its way. `healed_at` is `injected_at` where others go on
    without any healing.
    """

    kind: str
    target: str
    begun_at: float
    injected_at: float
    healed_at: float
    over_at: float


class Violation(NamedTuple):
    """Something that must not be: which rule, about what, and how."""

    rule: str
    subject: str
    detail: str


@dataclass
class Story:
    """The whole of it, with what the rules look up again and again."""

    record: Record
    end: End
    faults: Sequence[Happened] = ()

    @property
    def attempts(self) -> Iterable[Attempt]:
        return self.record.attempts.values()

    @cached_property
    def by_request(self) -> dict[str, list[Attempt]]:
        found: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            found[attempt.request].append(attempt)
        return dict(found)

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row["id"]: row for row in self.end.rows}

    @cached_property
    def aliases(self) -> dict[str, Alias]:
        return {alias.id: alias for alias in self.end.aliases}

    @cached_property
    def rows_of(self) -> dict[str, list[Row]]:
        """The rows that each request made."""
        found: defaultdict[str, list[Row]] = defaultdict(list)
        for row in self.end.rows:
            found[marker(row) or ""].append(row)
        return dict(found)

    @cached_property
    def told_first(self) -> dict[str, list[tuple[Attempt, float]]]:
        """By run, the attempts that were told that it is theirs, and when."""
        found: defaultdict[str, list[tuple[Attempt, float]]] = defaultdict(list)
        for attempt in self.attempts:
            for told in attempt.told("run"):
                if not told.reply["is_cached"]:
                    found[told.reply["run"]["id"]].append((attempt, told.at))
        return dict(found)

    def resolve(self, run_id: str) -> Row | None:
        """The row of an id, or the row that it stands for."""
        alias = self.aliases.get(run_id)
        return self.rows.get(run_id if alias is None else alias.run_id)

    def jumped(self, start: float, end: float) -> bool:
        """Whether some process' clock was wrong at any time between two others."""
        return self._was("clock jump", start, end)

    def was_off(self, start: float, end: float) -> bool:
        """Whether some trigger worker was switched off at any time between two others."""
        return self._was("master switch", start, end)

    def _was(self, kind: str, start: float, end: float) -> bool:
        return any(
            kind in fault.kind and fault.begun_at - 1 <= end and start <= fault.over_at + 1
            for fault in self.faults
        )


def marker(row: Row) -> str | None:
    """The request that a row's payload names."""
    try:
        payload = json.loads(row["payload"])
    except (TypeError, ValueError):
        return None
    return payload.get("request") if isinstance(payload, dict) else None


def seconds(at: datetime) -> float:
    return at.timestamp()


async def read_end(redis_url: str, database_url: str, exits: dict[str, int]) -> End:
    """Read the servers."""
    end = End(exits=exits)
    connection = await asyncpg.connect(database_url, timeout=30)
    try:
        end.rows = [dict(one) for one in await connection.fetch("SELECT * FROM mollifier.runs")]
        query = "SELECT id, run_id, environment_id FROM mollifier.run_aliases"
        end.aliases = [Alias(*one) for one in await connection.fetch(query)]
        end.waitpoints = [dict(one) for one in await connection.fetch("SELECT * FROM mollifier.waitpoints")]
    finally:
        await connection.close()
    redis: Any
    async with Redis.from_url(redis_url) as redis:
        for _, fields in await redis.xrange("mollifier:dead-letters"):
            letter = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
            end.dead_letters.append(letter)
        async for key in redis.scan_iter():
            end.keys[key.decode()] = (await redis.type(key)).decode()
        for stream in ("mollifier:triggers", "mollifier:operations"):
            end.pending[f"{stream} entries"] = await redis.xlen(stream)
            for group in await redis.xinfo_groups(stream):
                end.pending[f"{stream} pending"] = group["pending"]
                end.pending[f"{stream} consumers"] = group["consumers"]
    return end


def save(story: Story, folder: Path) -> None:
    """Keep what is not in the journals."""
    (folder / "end.pickle").write_bytes(pickle.dumps((story.end, list(story.faults))))


def load(folder: Path, record: Record) -> Story:
    """The story that was saved in a folder."""
    end, faults = pickle.loads((folder / "end.pickle").read_bytes())
    return Story(record, end, faults)

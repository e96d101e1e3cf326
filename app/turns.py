"""Whose turn it is to be drained: organizations by weighted virtual time, then the environments of one.

The schedule (`lua/schedule.lua`) is one for all drainers and all partitions. It hands environments out, so
a drainer has each of its own to itself until it reports what it did. Beside it, a drainer writes its name
into the drain hash of every environment that it takes from: that is the truth about who holds it. Both
holds last while the drainer's heartbeat does, so they need no renewal of their own.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from redis.asyncio import Redis

from app.keys import Keys
from app.ports import Taken
from app.redis_client import LOST, Call, Scripts
from app.settings import Settings
from schemas.snapshot import Snapshot

_QUANTA = 25
"""Parts of a batch: while others wait, an environment gets one at a time, times its organization's weight."""

_ARRIVALS = 64
_FORGET_AT_ONCE = 64
_LOOK_FOR_DEAD_EVERY_S = 0.5


class Arrival(NamedTuple):
    """An environment that became ready. `member` is how the partition's set has it."""

    partition: int
    member: bytes
    environment: bytes
    generation: bytes
    entries: bytes
    organization: bytes

    @classmethod
    def read(cls, partition: int, member: bytes) -> "Arrival":
        """From `<generation> <entries> <length of organization> <organization><environment>`."""
        generation, entries, length, names = member.split(b" ", 3)
        end = int(length)
        return cls(partition, member, names[end:], generation, entries, names[:end])


class Report(NamedTuple):
    """What a drainer did with an environment; `left` is None when it does not know what is still queued."""

    taken: int
    left: int | None
    generation: int
    outcome: str


class RedisTurns:
    """Implements `ports.Turns` with `lua/schedule.lua`, `take.lua`, `settle.lua` and `forget.lua`."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings, consumer: str) -> None:
        self._scripts = scripts
        self._keys = keys
        self._consumer = consumer
        self._rate = settings.drain_max_rate
        self._grace_ms = settings.ack_grace_ttl_s * 1000
        self._reports: dict[str, Report] = {}
        self._looked_for_dead = float("-inf")
        self.wait_s = 0.0
        """After a take that found nothing: how long that may stay so if nothing arrives."""

    async def take(self, most: int) -> Sequence[Taken]:
        """See `ports.Turns.take`."""
        arrivals = await self._arrivals()
        shares = await self._schedule(most, arrivals)
        if not shares or time.monotonic() - self._looked_for_dead > _LOOK_FOR_DEAD_EVERY_S:
            returned = await self._return_of_the_dead()
            if returned and not shares:
                shares = await self._schedule(most, ())
        taken, held = await self._take(dict.fromkeys(shares, ""), shares, arrivals)
        if held:
            abandoned = await self._abandoned(held)
            more, _ = await self._take(abandoned, shares, ())
            taken += more
            self._reports |= {
                environment: Report(0, None, 0, "busy") for environment in held.keys() - abandoned.keys()
            }
        return taken

    async def _arrivals(self) -> list[Arrival]:
        """Environments that have become ready and may not be in the schedule yet."""
        partitions = range(self._keys.partitions)
        calls = [
            Call("ZRANGE", None, [self._keys.arrivals(partition), 0, _ARRIVALS - 1])
            for partition in partitions
        ]
        return [
            Arrival.read(partition, member)
            for partition, members in zip(partitions, await self._scripts.demand(calls), strict=True)
            for member in members
        ]

    async def _schedule(self, most: int, arrivals: Sequence[Arrival]) -> dict[str, int]:
        """Report, announce arrivals, and be handed environments: how many entries to take of each."""
        reports, self._reports = self._reports, {}
        head = (self._consumer, "0", most, max(1, most // _QUANTA), self._rate, len(reports))
        arguments: list[str | bytes | int] = [*head]
        for environment, (taken, left, generation, outcome) in reports.items():
            arguments += (environment, taken, "" if left is None else left, generation, outcome)
        for arrival in arrivals:
            arguments += (arrival.environment, arrival.generation, arrival.entries, arrival.organization)
        try:
            ((wait_ms, *shares),) = await self._scripts.demand(
                [Call("schedule", [self._keys.turns], arguments)]
            )
        except BaseException:
            self._reports = reports | self._reports
            raise
        self.wait_s = wait_ms / 1000
        return {
            environment.decode(): entries
            for environment, entries in zip(shares[::2], shares[1::2], strict=True)
        }

    async def _return_of_the_dead(self) -> int:
        """Return to the others what drainers hold whose heartbeat is gone; how many those were."""
        self._looked_for_dead = time.monotonic()
        (members,) = await self._scripts.demand([Call("SMEMBERS", None, [f"{self._keys.turns}:takers"])])
        others = sorted({member.decode() for member in members} - {self._consumer})
        dead = await self._without_heartbeat(others)
        calls = [Call("schedule", [self._keys.turns], [taker, "1", 0, 1, 0, 0]) for taker in dead]
        await self._scripts.demand(calls)
        return len(dead)

    async def _take(
        self, expected: Mapping[str, str], shares: Mapping[str, int], arrivals: Sequence[Arrival]
    ) -> tuple[list[Taken], dict[str, str]]:
        """Take from environments that are held as expected; what was taken, and who holds the others.

        With it go the arrivals that the schedule has by now.
        """
        groups = self._by_partition(list(expected))
        calls = []
        for partition, environments in groups.items():
            keys, arguments = [self._keys.ready(partition)], [self._consumer]
            for environment in environments:
                names = self._keys.environment(environment)
                keys += (names.entries, names.drain, names.overlays)
                arguments += (environment, expected[environment], str(shares[environment]))
            calls.append(Call("take", keys, arguments))
        try:
            answers = await self._scripts.demand([*calls, *self._noted(arrivals)])
        except BaseException:
            self._forget_hold(expected)
            raise
        taken: list[Taken] = []
        held: dict[str, str] = {}
        for environments, answer in zip(groups.values(), answers, strict=False):
            for environment, result in zip(environments, answer, strict=True):
                if isinstance(result, bytes):
                    held[environment] = result.decode()
                elif len(result) > 1:
                    entries = [(entry.decode(), snapshot) for entry, snapshot, _ in result[1:]]
                    overlays = {entry.decode(): overlay for entry, _, overlay in result[1:] if overlay}
                    taken.append(Taken(environment, entries, overlays))
                else:
                    self._reports[environment] = Report(0, 0, int(result[0]), "done")
        return taken, held

    def _noted(self, arrivals: Sequence[Arrival]) -> list[Call]:
        by_partition: defaultdict[int, list[bytes]] = defaultdict(list)
        for arrival in arrivals:
            by_partition[arrival.partition].append(arrival.member)
        return [
            Call("ZREM", None, [self._keys.arrivals(partition), *members])
            for partition, members in by_partition.items()
        ]

    async def _abandoned(self, held: Mapping[str, str]) -> dict[str, str]:
        """Of environments and their holders, those whose holder's heartbeat is gone."""
        dead = await self._without_heartbeat(sorted(set(held.values())))
        return {environment: holder for environment, holder in held.items() if holder in dead}

    async def _without_heartbeat(self, consumers: Sequence[str]) -> list[str]:
        calls = [Call("EXISTS", None, [self._keys.heartbeat(consumer)]) for consumer in consumers]
        answers = await self._scripts.demand(calls)
        return [consumer for consumer, exists in zip(consumers, answers, strict=True) if not exists]

    async def settle(self, taken: Sequence[Taken], runs: Sequence[Snapshot]) -> None:
        """See `ports.Turns.settle`."""
        claims: defaultdict[str, list[Snapshot]] = defaultdict(list)
        for run in runs:
            if run.idempotency_key is not None:
                claims[run.environment_id].append(run)
        marks = {one.environment_id: (one.entries[-1][0], len(one.entries)) for one in taken}
        await self._settle(marks, claims, "done")

    async def put_back(self, taken: Sequence[Taken], *, apart: bool) -> None:
        """See `ports.Turns.put_back`."""
        marks = {one.environment_id: ("", 0) for one in taken}
        await self._settle(marks, {}, "failed" if apart else "done")

    async def _settle(
        self, marks: Mapping[str, tuple[str, int]], claims: Mapping[str, Sequence[Snapshot]], outcome: str
    ) -> None:
        groups = self._by_partition(list(marks))
        calls = []
        for partition, environments in groups.items():
            keys = [self._keys.ready(partition), self._keys.grace(partition), self._keys.totals(partition)]
            arguments: list[str | bytes | int] = [self._consumer, self._grace_ms]
            for environment in environments:
                names = self._keys.environment(environment)
                runs = claims.get(environment, ())
                keys += (names.entries, names.drain, *(self._keys.claim(run) for run in runs))
                arguments += (environment, *marks[environment], len(runs), *(run.id for run in runs))
            calls.append(Call("settle", keys, arguments))
        try:
            answers = await self._scripts.demand(calls)
        except BaseException:
            self._forget_hold(marks)
            raise
        for environments, answer in zip(groups.values(), answers, strict=True):
            for environment, result in zip(environments, answer, strict=True):
                settled = marks[environment][1]
                left, generation = (None, 0) if result is None else (int(result[0]), int(result[1]))
                self._reports[environment] = Report(settled, left, generation, outcome)

    def _forget_hold(self, environments: Mapping[str, object]) -> None:
        """Report environments of which it is not known what was done; they are taken again."""
        self._reports |= {environment: Report(0, None, 0, "done") for environment in environments}

    async def report(self) -> None:
        """Report what was done now, not with the next turn: there may be none for a while.

        Raises:
            Unreachable: the schedule cannot be reached; the reports are kept.
        """
        if self._reports:
            await self._schedule(0, ())

    async def set_weights(self, weights: Mapping[str, int]) -> None:
        """Set the weights of organizations, for all drainers; those that are left out have 1.

        Raises:
            Unreachable: the schedule cannot be reached.
        """
        key = f"{self._keys.turns}:weights"
        pairs = [part for organization, weight in weights.items() for part in (organization, weight)]
        calls = [Call("MULTI", None, []), Call("DEL", None, [key]), Call("EXEC", None, [])]
        if pairs:
            calls.insert(2, Call("HSET", None, [key, *pairs]))
        await self._scripts.demand(calls)

    async def forget(self) -> int:
        """Drop materialised entries whose grace time is over, a bounded number; how many.

        Raises:
            Unreachable: the buffer cannot be reached.
        """
        (time,) = await self._scripts.demand([Call("TIME", None, [])])
        now = int(time[0]) * 1000 + int(time[1]) // 1000
        partitions = range(self._keys.partitions)
        due = await self._scripts.demand(
            [
                Call(
                    "ZRANGEBYSCORE",
                    None,
                    [self._keys.grace(partition), "-inf", now, "LIMIT", 0, _FORGET_AT_ONCE],
                )
                for partition in partitions
            ]
        )
        calls = []
        for partition, elements in zip(partitions, due, strict=True):
            keys = [self._keys.grace(partition)]
            arguments: list[str | bytes] = []
            for element in elements:
                last, _, environment = element.decode().partition(" ")
                names = self._keys.environment(environment)
                keys += (names.entries, names.index, names.drain, names.overlays)
                arguments += (element, last)
            if elements:
                calls.append(Call("forget", keys, arguments))
        return sum(await self._scripts.demand(calls))

    def _by_partition(self, environments: Sequence[str]) -> dict[int, list[str]]:
        groups: defaultdict[int, list[str]] = defaultdict(list)
        for environment in environments:
            groups[self._keys.environment(environment).partition].append(environment)
        return groups


class Wake:
    """Wakes a drainer when an environment becomes ready. A lost message only costs the wait's timeout."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._pubsub = redis.pubsub()
        self._channel = keys.wake

    async def wait(self, timeout_s: float) -> bool:
        """Return when something may have become ready, at the latest after `timeout_s`: whether it may."""
        try:
            if not self._pubsub.subscribed:
                await self._pubsub.subscribe(self._channel)
                return True
            message = await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
        except LOST:
            await asyncio.sleep(timeout_s)
            return True
        return message is not None

    async def close(self) -> None:
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]

"""Whose turn it is to be drained: organizations by weighted virtual time, then the environments of one.

The schedule (`lua/schedule.lua`) is one for all drainers and all partitions. It hands environments out, and
a drainer has each of its own to itself until it reports what it did, or its heartbeat is gone.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from app.keys import Keys
from app.redis_client import Call, Scripts
from app.settings import Settings

_ARRIVALS = 64
_LOOK_EVERY_S = 0.25
"""How often a busy drainer looks who arrived and who died."""


class Report(NamedTuple):
    """What a drainer did with an environment: entries that it took, and how many are left (None: unknown).

    `generation` is the server's time, in us, of which that is true.
    """

    taken: int
    left: int | None
    generation: int
    outcome: str


_UNKNOWN = Report(0, None, 0, "done")


class HandOut(NamedTuple):
    """How many entries to take of each environment. `hold` tells it from any other, of this drainer."""

    hold: int
    shares: dict[str, int]


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


class Schedule:
    """One drainer's view of the schedule: what it was handed, and what it has to report."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings, consumer: str) -> None:
        self._scripts = scripts
        self._keys = keys
        self._consumer = consumer
        self._batch = settings.drain_batch_size
        self._reports: dict[str, Report] = {}
        self._held: dict[str, int] = {}
        self._hold = 0
        self._is_sure = True
        self._is_stirred = True
        self._are_more = False
        self._looked = 0.0
        self.rate = settings.drain_max_rate
        """Entries a second of all drainers together, 0: no limit; to be kept as operators want it."""
        self.wait_s = 0.0
        """After nothing was handed out: how long that may stay so if nothing arrives."""

    def stir(self) -> None:
        """Something has become ready: look there first."""
        self._is_stirred = True

    def report(self, environment: str, hold: int, report: Report) -> None:
        """Give an environment back, with the next call; unless it was handed out once more since."""
        if self._held.get(environment) == hold:
            del self._held[environment]
            self._reports[environment] = report

    def forget(self, environments: Iterable[str], hold: int) -> None:
        """Give environments back of which it is not known what was done; they are handed out again."""
        for environment in environments:
            self.report(environment, hold, _UNKNOWN)

    async def flush(self) -> None:
        """Report at once.

        Raises:
            Unreachable: the schedule cannot be reached; the reports are kept.
        """
        if self._reports:
            await self._call(0, ())

    async def next(self, most: int) -> HandOut:
        """Be handed environments, and how many entries to take of each, `most` in all; none: nothing to do.

        Raises:
            Unreachable: the schedule cannot be reached.
        """
        await self._recollect()
        self._hold += 1
        turn = HandOut(self._hold, {})
        try:
            await self._next(most, turn.shares)
        except BaseException:
            self.forget(turn.shares, turn.hold)
            raise
        return turn

    async def _next(self, most: int, shares: dict[str, int]) -> None:
        is_stirred, self._is_stirred = self._is_stirred, False
        if not is_stirred:
            shares |= await self._call(most, ())
        if shares and not self._are_more and time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        arrivals = await self._arrivals()
        if not shares and (arrivals or is_stirred):
            shares |= await self._call(most, arrivals)
        elif arrivals:
            await self._call(0, arrivals)
        await self._strike_off(arrivals)
        if not (shares and is_stirred) and await self._return_of_the_dead() and not shares:
            shares |= await self._call(most, ())

    async def _call(self, most: int, arrivals: Sequence[Arrival]) -> dict[str, int]:
        """Report, announce arrivals, and be handed environments."""
        reports, self._reports = self._reports, {}
        head = (self._consumer, "0", most, self._batch, self.rate, len(reports))
        arguments: list[str | bytes | int] = [*head]
        for environment, (taken, left, generation, outcome) in reports.items():
            arguments += (environment, taken, "" if left is None else left, generation, outcome)
        for arrival in arrivals:
            arguments += (arrival.environment, arrival.generation, arrival.entries, arrival.organization)
        try:
            ((wait_ms, held, *shares),) = await self._scripts.demand(
                [Call("schedule", [self._keys.turns], arguments)]
            )
        except BaseException:
            self._reports = reports | self._reports
            self._is_sure = False
            raise
        self.wait_s = wait_ms / 1000
        handed_out = {
            environment.decode(): entries
            for environment, entries in zip(shares[::2], shares[1::2], strict=True)
        }
        self._held |= dict.fromkeys(handed_out, self._hold)
        self._is_sure = held == len(self._held)
        return handed_out

    async def _recollect(self) -> None:
        """Find out what was handed out in an answer that was lost, the first of two perhaps."""
        if self._is_sure:
            return
        (handed_out,) = await self._scripts.demand(
            [Call("HKEYS", None, [f"{self._keys.turns}:held:{self._consumer}"])]
        )
        self._is_sure = True
        unknown = {environment.decode() for environment in handed_out} - self._held.keys()
        self._reports = dict.fromkeys(unknown, _UNKNOWN) | self._reports

    async def _arrivals(self) -> list[Arrival]:
        """Environments that have become ready and may not be in the schedule yet."""
        partitions = range(self._keys.partitions)
        calls = [
            Call("ZRANGE", None, [self._keys.arrivals(partition), 0, _ARRIVALS - 1])
            for partition in partitions
        ]
        answers = await self._scripts.demand(calls)
        self._are_more = any(len(members) == _ARRIVALS for members in answers)
        return [
            Arrival.read(partition, member)
            for partition, members in zip(partitions, answers, strict=True)
            for member in members
        ]

    async def _strike_off(self, arrivals: Sequence[Arrival]) -> None:
        """Arrivals that the schedule has by now need not be announced again."""
        by_partition: defaultdict[int, list[bytes]] = defaultdict(list)
        for arrival in arrivals:
            by_partition[arrival.partition].append(arrival.member)
        await self._scripts.demand(
            [
                Call("ZREM", None, [self._keys.arrivals(partition), *members])
                for partition, members in by_partition.items()
            ]
        )

    async def _return_of_the_dead(self) -> int:
        """Give back what drainers hold whose heartbeat is gone; how many those were."""
        (members,) = await self._scripts.demand([Call("SMEMBERS", None, [f"{self._keys.turns}:takers"])])
        others = sorted({member.decode() for member in members} - {self._consumer})
        if others:
            self.wait_s = min(self.wait_s, _LOOK_EVERY_S)
        dead = await self.without_heartbeat(others)
        await self._scripts.demand(
            [Call("schedule", [self._keys.turns], [taker, "1", 0, self._batch, 0, 0]) for taker in dead]
        )
        return len(dead)

    async def without_heartbeat(self, consumers: Sequence[str]) -> list[str]:
        """Those of some consumers that are dead."""
        calls = [Call("EXISTS", None, [self._keys.heartbeat(consumer)]) for consumer in consumers]
        answers = await self._scripts.demand(calls)
        return [consumer for consumer, exists in zip(consumers, answers, strict=True) if not exists]

    async def set_weights(self, weights: Mapping[str, int]) -> None:
        """See to it that organizations have these weights, for all drainers; those that are left out have 1.

        Raises:
            Unreachable: the schedule cannot be reached.
        """
        key = f"{self._keys.turns}:weights"
        (known,) = await self._scripts.demand([Call("HGETALL", None, [key])])
        if known == {organization.encode(): b"%d" % weight for organization, weight in weights.items()}:
            return
        calls = [Call("MULTI", None, []), Call("DEL", None, [key]), Call("EXEC", None, [])]
        if weights:
            pairs = [part for pair in weights.items() for part in pair]
            calls.insert(2, Call("HSET", None, [key, *pairs]))
        await self._scripts.demand(calls)

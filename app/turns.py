"""The buffer as drainers see it: the oldest entries of the environments whose turn it is.

The schedule says whose turn it is. Beside that, a drainer writes its name into the drain hash of every
environment that it takes from: that is the truth about who holds it, and it lasts while the drainer's
heartbeat does, so it needs no renewal of its own.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from app.grouping import by_partition
from app.keys import Keys
from app.ports import Taken
from app.redis_client import Call, Scripts
from app.schedule import HandOut, Report, Schedule
from app.settings import Settings
from schemas.snapshot import Snapshot

_FORGET_AT_ONCE = 64


class RedisTurns:
    """Implements `ports.Turns` with `lua/take.lua`, `settle.lua` and `forget.lua`."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings, consumer: str) -> None:
        self._scripts = scripts
        self._keys = keys
        self._consumer = consumer
        self._grace_ms = settings.ack_grace_ttl_s * 1000
        self.schedule = Schedule(scripts, keys, settings, consumer)

    async def take(self, most: int) -> Sequence[Taken]:
        """See `ports.Turns.take`."""
        turn = await self.schedule.next(most)
        try:
            taken, held = await self._take(dict.fromkeys(turn.shares, ""), turn)
            if held:
                dead = await self.schedule.without_heartbeat(sorted(set(held.values())))
                abandoned = {environment: holder for environment, holder in held.items() if holder in dead}
                more, _ = await self._take(abandoned, turn)
                taken += [one._replace(is_taken_over=True) for one in more]
                for environment in held.keys() - abandoned.keys():
                    self.schedule.report(environment, turn.hold, Report(0, None, 0, "busy"))
        except BaseException:
            self.schedule.forget(turn.shares, turn.hold)
            raise
        return taken

    async def _take(self, expected: Mapping[str, str], turn: HandOut) -> tuple[list[Taken], dict[str, str]]:
        """Take from environments that are held as expected; what was taken, and who holds the others."""
        groups = by_partition(self._keys, expected)
        calls = []
        for partition, environments in groups.items():
            keys, arguments = [self._keys.ready(partition)], [self._consumer, str(turn.hold)]
            for environment in environments:
                names = self._keys.environment(environment)
                keys += (names.entries, names.drain, names.overlays)
                arguments += (environment, expected[environment], str(turn.shares[environment]))
            calls.append(Call("take", keys, arguments))
        taken: list[Taken] = []
        held: dict[str, str] = {}
        for environments, answer in zip(groups.values(), await self._scripts.demand(calls), strict=True):
            for environment, result in zip(environments, answer, strict=True):
                if isinstance(result, bytes):
                    held[environment] = result.decode()
                elif len(result) > 1:
                    entries = [(entry.decode(), snapshot) for entry, snapshot, _ in result[1:]]
                    overlays = {entry.decode(): overlay for entry, _, overlay in result[1:] if overlay}
                    taken.append(Taken(environment, entries, overlays, turn.hold))
                else:
                    self.schedule.report(environment, turn.hold, Report(0, 0, int(result[0]), "done"))
        return taken, held

    async def settle(self, taken: Sequence[Taken], runs: Sequence[Snapshot]) -> None:
        """See `ports.Turns.settle`."""
        claims: defaultdict[str, list[Snapshot]] = defaultdict(list)
        for run in runs:
            if run.idempotency_key is not None:
                claims[run.environment_id].append(run)
        marks = {one.environment_id: (one.hold, one.entries[-1][0], len(one.entries)) for one in taken}
        await self._settle(marks, claims, "done")

    async def put_back(self, taken: Sequence[Taken], *, apart: bool, may_be_done: bool = False) -> None:
        """See `ports.Turns.put_back`."""
        marks = {
            one.environment_id: (one.hold, one.entries[-1][0] if may_be_done else "", 0) for one in taken
        }
        await self._settle(marks, {}, "failed" if apart else "done")

    async def _settle(
        self,
        marks: Mapping[str, tuple[int, str, int]],
        claims: Mapping[str, Sequence[Snapshot]],
        outcome: str,
    ) -> None:
        """End holds. A mark has the hold, the last entry that it is about, and how many are settled."""
        groups = by_partition(self._keys, marks)
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
            for environment, (hold, _, _) in marks.items():
                self.schedule.forget([environment], hold)
            raise
        for environments, answer in zip(groups.values(), answers, strict=True):
            for environment, result in zip(environments, answer, strict=True):
                hold, _, settled = marks[environment]
                left, generation = (None, 0) if result is None else (int(result[0]), int(result[1]))
                self.schedule.report(environment, hold, Report(settled, left, generation, outcome))

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

"""The sweeper's side of the buffer: what is in it, and the environments that no drainer knows of."""

from collections.abc import Mapping, Sequence
from operator import itemgetter

from app.keys import Keys
from app.ports import Figures, StreamFigures
from app.redis_client import Call, Scripts, consumers_in
from app.settings import Settings

_LOOK_AT_ENVIRONMENTS = 1000
"""Most environments of a pass whose stale entries are counted; each of the others counts as one entry."""

_LOOK_AT_ENTRIES = 200
"""About how many entries of an environment are looked at; the share of stale ones is taken for all of it."""

_NAMED = 10
"""Most environments in a report of stale entries."""

_LOOK_AT_CONSUMERS = 1000
"""Most consumers of a stream whose heartbeats are looked for: those that were at work last."""

_SEARCH_ENVIRONMENTS = 4000
"""Most environments of a pass that are looked for in the schedule."""

_READY_MS = 5000
"""For how long an environment must have been ready before the schedule is expected to know it."""


class RedisCensus:
    """Implements `ports.Census`: each of its methods costs as many round trips whatever is buffered."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings) -> None:
        self._scripts = scripts
        self._keys = keys
        self._stale_ms = settings.stale_threshold_ms
        self._passed_over = 0

    async def count(self) -> Figures:
        """See `ports.Census.count`."""
        most = self._share(_LOOK_AT_ENVIRONMENTS)
        partitions = range(self._keys.partitions)
        calls = [
            Call(
                "count_buffered",
                [self._keys.ready(partition), self._keys.totals(partition)],
                [self._stale_ms, most],
            )
            for partition in partitions
        ]
        *counts, draining = await self._scripts.demand(
            [*calls, Call("count_draining", [self._keys.turns], [])]
        )
        stale = await self._count_stale(
            [(now - self._stale_ms, [one.decode() for one in oldest]) for now, _, _, _, oldest in counts]
        )
        depth = sum(entries for _, entries, _, _, _ in counts)
        environments = sum(count for _, _, _, count, _ in counts)
        return Figures(
            depth=depth,
            oldest_dwell_s=max(dwell_ms for _, _, dwell_ms, _, _ in counts) / 1000,
            draining=min(draining, depth),
            stale=sum(stale.values()) + max(0, environments - len(stale)),
            stalest=sorted(stale.items(), key=lambda one: one[1], reverse=True)[:_NAMED],
        )

    async def _count_stale(self, partitions: Sequence[tuple[int, Sequence[str]]]) -> dict[str, int]:
        """Stale entries by environment; `partitions` are cutoffs in ms, and the environments to look at."""
        partitions = [(cutoff, environments) for cutoff, environments in partitions if environments]
        calls = []
        for cutoff, environments in partitions:
            keys: list[str] = []
            for environment in environments:
                names = self._keys.environment(environment)
                keys += (names.index, names.drain)
            calls.append(Call("count_stale", keys, [cutoff, _LOOK_AT_ENTRIES]))
        return {
            environment: entries
            for (_, environments), answer in zip(partitions, await self._scripts.demand(calls), strict=True)
            for environment, entries in zip(environments, answer, strict=True)
        }

    async def count_streams(self) -> tuple[Mapping[str, StreamFigures], int]:
        """See `ports.Census.count_streams`."""
        streams = {"triggers": self._keys.triggers, "operations": self._keys.operations}
        answers = await self._scripts.run(
            [Call("XINFO", None, ["CONSUMERS", stream, self._keys.group]) for stream in streams.values()]
        )
        consumers = [sorted(consumers_in(answer), key=itemgetter(b"idle")) for answer in answers]
        names = [[one[b"name"].decode() for one in of_stream[:_LOOK_AT_CONSUMERS]] for of_stream in consumers]
        lengths = [Call("XLEN", None, [stream]) for stream in (*streams.values(), self._keys.dead_letters)]
        beats = [
            Call("EXISTS", None, [self._keys.heartbeat(name)]) for of_stream in names for name in of_stream
        ]
        answers = await self._scripts.demand([*lengths, *beats])
        alive = iter(answers[len(lengths) :])
        figures = {}
        for stream, of_stream, named, length in zip(streams, consumers, names, answers, strict=False):
            pending = sum(one[b"pending"] for one in of_stream)
            # What is answered is deleted: whatever is neither that nor pending has not been read yet.
            waiting = max(0, length - pending)
            figures[stream] = StreamFigures(sum(next(alive) for _ in named), waiting, pending)
        return figures, answers[len(streams)]

    async def announce_lost(self) -> int:
        """See `ports.Census.announce_lost`."""
        found = await self._find_ready()
        environments = [environment for some in found.values() for environment, _ in some]
        if not environments:
            return 0
        (states,) = await self._scripts.demand(
            [Call("HMGET", None, [f"{self._keys.turns}:states", *environments])]
        )
        known = {environment for environment, state in zip(environments, states, strict=True) if state}
        calls = []
        for partition, some in found.items():
            keys = [self._keys.ready(partition), self._keys.arrivals(partition)]
            arguments = [self._keys.wake]
            for environment, score in some:
                if environment not in known:
                    keys.append(self._keys.environment(environment).drain)
                    arguments += (environment, score)
            if len(arguments) > 1:
                calls.append(Call("announce", keys, arguments))
        return sum(await self._scripts.demand(calls))

    async def _find_ready(self) -> dict[int, list[tuple[str, str]]]:
        """Environments and their scores in `ready`, by partition; each call looks on, then starts over."""
        most = self._share(_SEARCH_ENVIRONMENTS)
        partitions = range(self._keys.partitions)
        answers = await self._scripts.demand(
            [
                Call("find_ready", [self._keys.ready(partition)], [_READY_MS, self._passed_over, most])
                for partition in partitions
            ]
        )
        is_end = all(len(answer) < 2 * most for answer in answers)
        self._passed_over = 0 if is_end else self._passed_over + most
        return {
            partition: [
                (environment.decode(), score.decode())
                for environment, score in zip(answer[::2], answer[1::2], strict=True)
            ]
            for partition, answer in zip(partitions, answers, strict=True)
        }

    def _share(self, environments: int) -> int:
        """What one partition may have of a number of environments, rounded up."""
        return -(-environments // self._keys.partitions)

"""Whose turn it is: environments with queued entries, the longest waiting first, one drainer each.

A drainer holds an environment by writing its name into the drain hash. The hold lasts while that
drainer's heartbeat does, so it needs no renewal of its own, and what a dead drainer held is taken
over by comparing and setting that name.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from app.keys import Keys
from app.ports import Taken
from app.redis_client import LOST, Call, Scripts
from app.settings import Settings

_ENVIRONMENTS = 64
"""Environments that share one turn."""

_FORGET_AT_ONCE = 64


class RedisTurns:
    """Implements `ports.Turns` with `lua/take.lua`, `settle.lua` and `forget.lua`."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings, consumer: str) -> None:
        self._scripts = scripts
        self._keys = keys
        self._consumer = consumer
        self._grace_ms = settings.ack_grace_ttl_s * 1000

    async def take(self, most: int) -> Sequence[Taken]:
        """See `ports.Turns.take`."""
        waiting = await self._waiting()
        if not waiting:
            return []
        share = -(-most // len(waiting))
        taken, held = await self._take(dict.fromkeys(waiting, ""), share)
        abandoned = await self._abandoned(held)
        if abandoned:
            more, _ = await self._take(abandoned, share)
            taken += more
        return taken

    async def _waiting(self) -> list[str]:
        """Environments with queued entries, over all partitions, the longest waiting first."""
        partitions = range(self._keys.partitions)
        calls = [
            Call("ZRANGE", None, [self._keys.ready(partition), 0, _ENVIRONMENTS - 1, "WITHSCORES"])
            for partition in partitions
        ]
        waiting = []
        for answer in await self._scripts.demand(calls):
            waiting += [(float(score), environment.decode()) for environment, score in _pairs(answer)]
        return [environment for _, environment in sorted(waiting)[:_ENVIRONMENTS]]

    async def _take(self, expected: dict[str, str], share: int) -> tuple[list[Taken], dict[str, str]]:
        """Take from environments that are held as expected; what was taken, and who holds the others."""
        groups = self._by_partition(list(expected))
        calls = []
        for partition, environments in groups.items():
            keys, arguments = [self._keys.ready(partition)], [self._consumer]
            for environment in environments:
                names = self._keys.environment(environment)
                keys += (names.entries, names.drain)
                arguments += (environment, expected[environment], str(share))
            calls.append(Call("take", keys, arguments))
        taken: list[Taken] = []
        held: dict[str, str] = {}
        for environments, answer in zip(groups.values(), await self._scripts.demand(calls), strict=True):
            for environment, result in zip(environments, answer, strict=True):
                if isinstance(result, bytes):
                    held[environment] = result.decode()
                elif result:
                    taken.append(
                        Taken(environment, [(entry.decode(), snapshot) for entry, snapshot in result])
                    )
        return taken, held

    async def _abandoned(self, held: dict[str, str]) -> dict[str, str]:
        """Of environments and their holders, those whose holder's heartbeat is gone."""
        holders = sorted(set(held.values()))
        calls = [Call("EXISTS", None, [self._keys.heartbeat(holder)]) for holder in holders]
        alive = {
            holder
            for holder, exists in zip(holders, await self._scripts.demand(calls), strict=True)
            if exists
        }
        return {environment: holder for environment, holder in held.items() if holder not in alive}

    async def settle(self, taken: Sequence[Taken]) -> None:
        """See `ports.Turns.settle`."""
        await self._settle({one.environment_id: (one.entries[-1][0], len(one.entries)) for one in taken})

    async def put_back(self, taken: Sequence[Taken]) -> None:
        """See `ports.Turns.put_back`."""
        await self._settle({one.environment_id: ("", 0) for one in taken})

    async def _settle(self, marks: dict[str, tuple[str, int]]) -> None:
        calls = []
        for partition, environments in self._by_partition(list(marks)).items():
            keys = [self._keys.ready(partition), self._keys.grace(partition)]
            arguments: list[str | bytes | int] = [self._consumer, self._grace_ms]
            for environment in environments:
                names = self._keys.environment(environment)
                keys += (names.entries, names.drain)
                arguments += (environment, *marks[environment])
            calls.append(Call("settle", keys, arguments))
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
                keys += (names.entries, names.index, names.drain)
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

    async def wait(self, timeout_s: float) -> None:
        """Return when something may have become ready, at the latest after `timeout_s`."""
        try:
            if not self._pubsub.subscribed:
                await self._pubsub.subscribe(self._channel)
                return
            await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
        except LOST:
            await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]


def _pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))

"""What is left behind in Redis: consumers of dead processes; claims and reservations whose run is a row."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from app.keys import Keys, tenant
from app.ports import Kept
from app.postgres import acquire, statement
from app.redis_client import Call, Scripts, consumers_in
from app.settings import Settings

_PENDING = b"pending:"
_DROP_AT_ONCE = 100
_SCANS = 10
_SCAN_KEYS = 500
"""About how many keys of the database one step of the search for claims goes; a pass makes _SCANS of them."""

_SCAN_RESERVATIONS = 2000


class RedisLeftovers:
    """Implements `ports.Leftovers`. Where its search has got to is kept from one pass to the next."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings) -> None:
        self._scripts = scripts
        self._keys = keys
        self._reclaim_idle_ms = settings.reclaim_idle_ms
        self._claims_cursor = 0
        self._chosen_cursors = [0] * keys.partitions

    async def drop_consumers(self) -> int:
        """See `ports.Leftovers.drop_consumers`."""
        streams = (self._keys.triggers, self._keys.operations)
        answers = await self._scripts.run(
            [Call("XINFO", None, ["CONSUMERS", stream, self._keys.group]) for stream in streams]
        )
        idle = {
            stream: [name for name in map(self._idle_consumer, consumers_in(answer)) if name][:_DROP_AT_ONCE]
            for stream, answer in zip(streams, answers, strict=True)
        }
        dead = await self._without_heartbeat(sorted({name for names in idle.values() for name in names}))
        calls = [
            Call("drop_consumers", [stream], [self._keys.group, self._reclaim_idle_ms, *names])
            for stream, names in ((stream, dead.intersection(names)) for stream, names in idle.items())
            if names
        ]
        return sum(await self._scripts.demand(calls))

    def _idle_consumer(self, consumer: Mapping[bytes, Any]) -> str:
        """Its name, if it has nothing pending and was idle for RECLAIM_IDLE_MS; else ''."""
        is_idle = consumer[b"pending"] == 0 and consumer[b"idle"] > self._reclaim_idle_ms
        return consumer[b"name"].decode() if is_idle else ""

    async def _without_heartbeat(self, consumers: Sequence[str]) -> set[str]:
        answers = await self._scripts.demand(
            [Call("EXISTS", None, [self._keys.heartbeat(consumer)]) for consumer in consumers]
        )
        return {consumer for consumer, exists in zip(consumers, answers, strict=True) if not exists}

    async def find(self) -> Kept:
        """See `ports.Leftovers.find`."""
        by_tag = await self._claim_keys()
        claims = [Call("MGET", None, names) for names in by_tag.values()]
        count = -(-_SCAN_RESERVATIONS // self._keys.partitions)
        reservations = [
            Call("HSCAN", None, [self._keys.chosen(partition), str(cursor), "COUNT", str(count)])
            for partition, cursor in enumerate(self._chosen_cursors)
        ]
        answers = await self._scripts.demand([*claims, *reservations])
        kept = Kept([], [])
        for names, values in zip(by_tag.values(), answers, strict=False):
            for name, value in zip(names, values, strict=True):
                if value is not None and not value.startswith(_PENDING):
                    kept.claims.append((value.decode(), name))
        for partition, (cursor, chosen) in enumerate(answers[len(claims) :]):
            self._chosen_cursors[partition] = cursor
            kept.reservations.extend((run_id.decode(), one.decode()) for run_id, one in chosen.items())
        return kept

    async def _claim_keys(self) -> dict[str, list[str]]:
        """The keys of claims among the next keys of the database, by their hash tag."""
        by_tag: defaultdict[str, list[str]] = defaultdict(list)
        for _ in range(_SCANS):
            cursor, count = str(self._claims_cursor), str(_SCAN_KEYS)
            arguments = [cursor, "MATCH", self._keys.claims, "COUNT", count]
            ((self._claims_cursor, names),) = await self._scripts.demand([Call("SCAN", None, arguments)])
            for name in names:
                by_tag[_tag(name.decode())].append(name.decode())
            if self._claims_cursor == 0:
                break
        return by_tag

    async def not_buffered(self, reservations: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """See `ports.Leftovers.not_buffered`."""
        calls = []
        for run_id, owner in reservations:
            _, _, environment = owner.partition("\0")
            calls.append(Call("HEXISTS", None, [self._keys.environment(environment).index, run_id]))
        answers = await self._scripts.demand(calls)
        return [one for one, is_buffered in zip(reservations, answers, strict=True) if not is_buffered]

    async def retire(self, kept: Kept) -> tuple[int, int]:
        """See `ports.Leftovers.retire`."""
        claims: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for run_id, key in kept.claims:
            claims[_tag(key)].append((run_id, key))
        reservations: defaultdict[int, list[str]] = defaultdict(list)
        for run_id, owner in kept.reservations:
            reservations[self._keys.partition(run_id)] += (run_id, owner)
        calls = []
        for some in claims.values():
            arguments: list[str | int] = []
            for run_id, _ in some:
                arguments += (run_id, "", 0)
            calls.append(Call("settle_claims", [key for _, key in some], arguments))
        for partition, pairs in reservations.items():
            calls.append(Call("release", [self._keys.chosen(partition)], pairs))
        answers = await self._scripts.demand(calls)
        return sum(map(sum, answers[: len(claims)])), sum(answers[len(claims) :])


class PostgresRows:
    """Implements `ports.Rows`."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", settings: Settings) -> None:
        self._pool = pool
        self._timeout_s = settings.store_timeout_ms / 1000

    async def tenants_of(self, run_ids: Sequence[str]) -> Mapping[str, str]:
        """See `ports.Rows.tenants_of`."""
        async with acquire(self._pool, self._timeout_s) as connection:
            records = await connection.fetch(statement("look_up_rows"), list(run_ids))
        return {run_id: tenant(*owner) for run_id, *owner in records}


def _tag(key: str) -> str:
    return key[key.index("{") : key.index("}")]

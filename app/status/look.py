"""One look at an installation, whatever of it is away."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
from redis.asyncio import Redis

import schemas.status
from app import operator_settings
from app.errors import StoreUnavailable, Unreachable
from app.fleet import server_ms
from app.keys import Keys
from app.postgres import acquire
from app.reason import root_reason
from app.redis_client import Call, Scripts
from app.settings import Settings
from app.status import fleet
from app.status.environments import ORDERS, Environments, read_gate
from app.status.pace import Mark, Pace, Pacer
from app.switches import Switches
from schemas.status import Buffer, Environment, Status

LIMIT_S = 3.0
"""How long a look waits for a server."""


class Lookout:
    """Looks at an installation, again and again if asked to."""

    def __init__(
        self, settings: Settings, keys: Keys, redis: Redis, pool: "asyncpg.Pool[asyncpg.Record]"
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._scripts = Scripts(redis)
        self._pool = pool
        self._environments = Environments(self._scripts, keys, settings)
        self._pacer = Pacer()
        self._switches = Switches.of(settings)
        """What held when Postgres was last read."""

    async def glance(self) -> None:
        """Note how much there is and what is decided, for the next look to make sense of what it sees."""
        await asyncio.gather(_outcome(self._counters()), _outcome(self._look_at_postgres()))

    async def look(self, limit: int, order: str = "depth") -> Status:
        """What there is to see; the `limit` worst environments by one of `ORDERS`. Raises nothing."""
        status = Status(
            at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            switches=_shown(self._switches, is_known=False),
        )
        status.redis, status.postgres = await asyncio.gather(
            _outcome(self._look_at_redis(status, limit, order)), _outcome(self._look_at_postgres())
        )
        status.switches = _shown(self._switches, is_known=status.postgres is None)
        return status

    async def _look_at_redis(self, status: Status, limit: int, order: str) -> None:
        now_ms, depth, pace = await self._counters()
        holding = await fleet.held(self._scripts, self._keys)
        draining = Counter[str]()
        for environments in holding.values():
            draining.update(environments)
        found = await self._environments.look(draining, now_ms, self._switches)
        status.environments = sorted(found, key=ORDERS[order], reverse=True)[:limit]
        status.buffer = await self._buffer(now_ms, depth, min(depth, draining.total()), pace, found)
        status.streams = await fleet.streams(self._scripts, self._keys, now_ms)
        status.consumers = await fleet.consumers(self._scripts, self._keys, holding, now_ms)
        status.dead_letters = await fleet.dead_letters(self._scripts, self._keys, now_ms)

    async def _look_at_postgres(self) -> None:
        async with acquire(self._pool, LIMIT_S) as connection:
            decided = await operator_settings.load(connection)
        self._switches = Switches.of(self._settings, decided)

    async def _counters(self) -> tuple[int, int, Pace]:
        """The server's time, the entries in the buffer, and how fast that changes."""
        partitions = range(self._keys.partitions)
        time, drained, *totals = await self._scripts.demand(
            [
                Call("TIME", None, []),
                Call("GET", None, [f"{self._keys.turns}:drained"]),
                *(Call("HGET", None, [self._keys.totals(partition), "queued"]) for partition in partitions),
            ]
        )
        mark = Mark(server_ms(time), int(drained or 0), sum(int(one or 0) for one in totals))
        return mark.ms, mark.depth, self._pacer.add(mark)

    async def _buffer(
        self, now_ms: int, depth: int, draining: int, pace: Pace, found: Sequence[Environment]
    ) -> Buffer:
        partitions = range(self._keys.partitions)
        gate, *environments = await self._scripts.demand(
            [
                Call("GET", None, [self._keys.fleet_gate]),
                *(Call("ZCARD", None, [self._keys.ready(partition)]) for partition in partitions),
            ]
        )
        left_ms = read_gate(gate, now_ms, self._switches.rate).tripped_until_ms - now_ms
        return Buffer(
            depth=depth,
            draining=draining,
            oldest_dwell_s=max((one.oldest_dwell_s for one in found), default=0.0),
            environments=sum(environments),
            tripped=sum(one.tripped for one in found),
            all_tripped_for_s=left_ms / 1000 if left_ms > 0 else None,
            looked_at=len(found),
            drained_per_s=pace.drained_per_s,
            accepted_per_s=pace.accepted_per_s,
            empty_in_s=pace.empty_in_s,
        )


def _shown(switches: Switches, *, is_known: bool) -> schemas.status.Switches:
    decided = switches.decided
    return schemas.status.Switches(
        known=is_known,
        mode="off" if not switches.enabled else "shadow" if switches.shadow_mode else "on",
        drain_paused=decided.drain_paused,
        drain_rate=switches.drain_rate,
        enrolments=len(decided.enrolment),
        weights=len(decided.weights),
        gates=len(decided.environments) + len(decided.organizations),
    )


async def _outcome(looking: Coroutine[Any, Any, Any]) -> str | None:
    """Why a look at a server came to nothing, or not to all; None: it did."""
    try:
        async with asyncio.timeout(LIMIT_S):
            await looking
    except (Unreachable, StoreUnavailable, TimeoutError) as error:
        return root_reason(error)
    return None

"""Claims of idempotency keys in Redis. DESIGN section 7.

A claim is one key: `pending:<token>` while a request works on it, then the winner's run id. The token
starts with the run id of the request, so that its next attempt takes over at once.
"""

import secrets
from collections.abc import Sequence
from datetime import datetime

from app.batch import Claim
from app.grouping import grouped, in_order
from app.keys import Keys
from app.ports import Settlement
from app.redis_client import Call, Scripts
from app.settings import Settings
from schemas.snapshot import Snapshot, decode_snapshot

PENDING = "pending:"

_CLAIMED = 1
_PENDING = Claim("pending")


class RedisClaims:
    """Implements `ports.Claims` with `lua/claim.lua`, `find_winners.lua` and `settle_claims.lua`; and
    `scene.KeyHolders`.
    """

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings) -> None:
        self._scripts = scripts
        self._keys = keys
        self._shortest_ms = settings.claim_min_ttl_s * 1000
        self._longest_ms = settings.claim_ttl_s * 1000

    async def claim(self, runs: Sequence[Snapshot], now: datetime, *, seek: bool = False) -> Sequence[Claim]:
        """See `ports.Claims.claim`."""
        attempt = secrets.token_hex(8)
        lives: dict[datetime, int] = {}
        groups = grouped(self._keys, runs)
        calls = []
        for environments in groups.values():
            keys: list[str] = []
            arguments: list[str | int] = [attempt, int(seek)]
            for environment, positions in environments.items():
                names = self._keys.environment(environment)
                keys += (names.entries, names.index, names.drain)
                arguments.append(len(positions))
                for position in positions:
                    run = runs[position]
                    keys.append(self._keys.claim(run))
                    arguments += (run.id, self._life_ms(run, now, lives))
            calls.append(Call("claim", keys, arguments))
        claims: list[Claim] = [_PENDING] * len(runs)
        for positions, answer in zip(in_order(groups), await self._scripts.demand(calls), strict=True):
            for position, result in zip(positions, answer, strict=True):
                if result == _CLAIMED:
                    claims[position] = Claim("claimed", f"{PENDING}{runs[position].id}:{attempt}")
                elif isinstance(result, list):
                    run_id, snapshot = result
                    winner = decode_snapshot(snapshot) if snapshot else None
                    claims[position] = Claim("taken", run_id.decode(), winner)
        return claims

    async def find_winners(self, runs: Sequence[Snapshot]) -> Sequence[Snapshot | None]:
        """See `ports.Claims.find_winners`."""
        groups = self._by_partition(runs)
        calls = []
        for positions in groups:
            keys: list[str] = []
            for position in positions:
                names = self._keys.environment(runs[position].environment_id)
                keys += (self._keys.claim(runs[position]), names.entries, names.index, names.drain)
            calls.append(Call("find_winners", keys, []))
        winners: list[Snapshot | None] = [None] * len(runs)
        for positions, answer in zip(groups, await self._scripts.demand(calls), strict=True):
            for position, snapshot in zip(positions, answer, strict=True):
                winners[position] = None if snapshot is None else decode_snapshot(snapshot)
        return winners

    async def settle(self, settlements: Sequence[Settlement], now: datetime) -> Sequence[bool]:
        """See `ports.Claims.settle`."""
        lives: dict[datetime, int] = {}
        groups = self._by_partition([one.run for one in settlements])
        calls = []
        for positions in groups:
            keys: list[str] = []
            arguments: list[str | int] = []
            for position in positions:
                one = settlements[position]
                keys.append(self._keys.claim(one.run))
                life_ms = self._shortest_ms
                if one.winner_id == one.run.id:
                    life_ms = self._life_ms(one.run, now, lives)
                arguments += (one.expected, one.winner_id, life_ms)
            calls.append(Call("settle_claims", keys, arguments))
        ended = [False] * len(settlements)
        for positions, answer in zip(groups, await self._scripts.demand(calls), strict=True):
            for position, has_ended in zip(positions, answer, strict=True):
                ended[position] = bool(has_ended)
        return ended

    async def holder(self, run: Snapshot) -> str | None:
        """See `scene.KeyHolders.holder`."""
        (value,) = await self._scripts.demand([Call("GET", None, [self._keys.claim(run)])])
        return None if value is None or value.startswith(PENDING.encode()) else value.decode()

    async def end(self, run: Snapshot, run_id: str) -> None:
        """See `scene.KeyHolders.end`."""
        await self._scripts.demand([Call("settle_claims", [self._keys.claim(run)], [run_id, "", 1])])

    def _life_ms(self, run: Snapshot, now: datetime, known: dict[datetime, int]) -> int:
        """How long a claim may live: as long as its key, within the bounds of the settings."""
        expires_at = run.idempotency_key_expires_at
        assert expires_at is not None
        if expires_at not in known:
            left_ms = int((expires_at - now).total_seconds() * 1000)
            known[expires_at] = min(max(left_ms, self._shortest_ms), self._longest_ms)
        return known[expires_at]

    def _by_partition(self, runs: Sequence[Snapshot]) -> list[list[int]]:
        return in_order(grouped(self._keys, runs))

"""Claims of idempotency keys in Redis. DESIGN section 7.

A claim is one key: `pending:<token>` while a request works on it, then the winner's run id. The token
starts with the run id of the request, so that its next attempt takes over at once.
"""

import secrets
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

from app.batch import Claim
from app.keys import Keys
from app.ports import Settlement
from app.redis_client import Call, Scripts
from app.settings import Settings
from schemas.snapshot import Snapshot, decode_snapshot

PENDING = "pending:"


class RedisClaims:
    """Implements `ports.Claims` with `lua/claim.lua`, `find_winners.lua` and `settle_claims.lua`; and
    `scene.KeyHolders`.
    """

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings) -> None:
        self._scripts = scripts
        self._keys = keys
        self._shortest_ms = settings.claim_min_ttl_s * 1000
        self._longest_ms = settings.claim_ttl_s * 1000

    async def claim(self, runs: Sequence[Snapshot], now: datetime) -> Sequence[Claim]:
        """See `ports.Claims.claim`."""
        attempt = secrets.token_hex(8)
        tokens = [f"{run.id}:{attempt}" for run in runs]
        groups = self._by_partition(runs)
        calls = []
        for positions in groups.values():
            keys: list[str] = []
            arguments: list[str | int] = []
            for position in positions:
                run = runs[position]
                names = self._keys.environment(run.environment_id)
                keys += (self._keys.claim(run), names.entries, names.index, names.drain)
                arguments += (run.id, tokens[position], self._life_ms(run, now))
            calls.append(Call("claim", keys, arguments))
        claims: list[Claim] = [Claim("pending")] * len(runs)
        for positions, answer in zip(groups.values(), await self._scripts.demand(calls), strict=True):
            for position, (state, *details) in zip(positions, answer, strict=True):
                claims[position] = _claim(state.decode(), tokens[position], details)
        return claims

    async def find_winners(self, runs: Sequence[Snapshot]) -> Sequence[Snapshot | None]:
        """See `ports.Claims.find_winners`."""
        groups = self._by_partition(runs)
        calls = []
        for positions in groups.values():
            keys: list[str] = []
            for position in positions:
                names = self._keys.environment(runs[position].environment_id)
                keys += (self._keys.claim(runs[position]), names.entries, names.index, names.drain)
            calls.append(Call("find_winners", keys, []))
        winners: list[Snapshot | None] = [None] * len(runs)
        for positions, answer in zip(groups.values(), await self._scripts.demand(calls), strict=True):
            for position, snapshot in zip(positions, answer, strict=True):
                winners[position] = None if snapshot is None else decode_snapshot(snapshot)
        return winners

    async def settle(self, settlements: Sequence[Settlement], now: datetime) -> Sequence[bool]:
        """See `ports.Claims.settle`."""
        groups = self._by_partition([one.run for one in settlements])
        calls = []
        for positions in groups.values():
            keys: list[str] = []
            arguments: list[str | int] = []
            for position in positions:
                run, expected, winner_id = settlements[position]
                keys.append(self._keys.claim(run))
                is_own = winner_id == run.id
                arguments += (expected, winner_id, self._life_ms(run, now) if is_own else self._shortest_ms)
            calls.append(Call("settle_claims", keys, arguments))
        ended = [False] * len(settlements)
        for positions, answer in zip(groups.values(), await self._scripts.demand(calls), strict=True):
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

    def _life_ms(self, run: Snapshot, now: datetime) -> int:
        """How long a claim may live: as long as its key, within the bounds of the settings."""
        assert run.idempotency_key_expires_at is not None
        left_ms = int((run.idempotency_key_expires_at - now).total_seconds() * 1000)
        return min(max(left_ms, self._shortest_ms), self._longest_ms)

    def _by_partition(self, runs: Sequence[Snapshot]) -> dict[int, list[int]]:
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for position, run in enumerate(runs):
            groups[self._keys.environment(run.environment_id).partition].append(position)
        return groups


def _claim(state: str, token: str, details: Sequence[bytes]) -> Claim:
    if state == "claimed":
        return Claim("claimed", expected=PENDING + token)
    if state == "pending":
        return Claim("pending")
    run_id, snapshot = details
    return Claim("taken", expected=run_id.decode(), winner=decode_snapshot(snapshot) if snapshot else None)

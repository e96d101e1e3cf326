"""Environments as a look sees them: what they have buffered, what the gate counts, which are the worst."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from app.grouping import by_partition
from app.keys import Keys
from app.redis_client import Call, Scripts
from app.settings import Settings
from app.switches import Rate, Switches
from schemas.status import Environment

LOOK_AT = 20_000
"""Most environments of a look: in each partition those with the oldest entries."""

_PAGE = 1000
_SCANS = 20
"""Steps of the search for environments that have nothing buffered, of about _PAGE keys each."""

ORDERS: Mapping[str, Callable[[Environment], tuple[float, ...]]] = {
    "depth": lambda one: (one.queued + one.draining, one.tripped, one.rate_per_s),
    "dwell": lambda one: (one.oldest_dwell_s, one.queued + one.draining, one.tripped),
    "rate": lambda one: (one.rate_per_s, one.tripped, one.queued + one.draining),
}
"""What makes an environment worse than another; the larger the worse."""


class Gate(NamedTuple):
    """What the gate knows of an environment, or of the fleet."""

    rate_per_s: float
    tripped_until_ms: int


NO_GATE = Gate(0.0, 0)


def read_gate(state: bytes | None, now_ms: int, rate: Rate) -> Gate:
    """What `lua/gate.lua` makes of what it has written. The rate is that of a window which ends now."""
    if state is None:
        return NO_GATE
    start, count, previous, tripped_until = map(int, state.split())
    ended = (now_ms - start) // rate.window_ms
    if ended >= 1:
        start, count, previous = start + rate.window_ms, 0, count if ended == 1 else 0
    carried = previous * max(0, rate.window_ms - (now_ms - start)) / rate.window_ms
    return Gate((carried + count) * 1000 / rate.window_ms, min(tripped_until, now_ms + rate.hold_ms))


class Environments:
    """Looks at environments. How far its search has got is kept from one look to the next."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings) -> None:
        self._scripts = scripts
        self._keys = keys
        self._hold_until_drained = settings.hold_until_drained
        self._cursor = 0

    async def look(
        self, draining: Mapping[str, int], now_ms: int, switches: Switches
    ) -> Sequence[Environment]:
        """All that were found; `draining` are entries by environment.

        Raises:
            Unreachable: Redis did not answer.
        """
        since_ms = await self._oldest()
        drains = [
            Call("HMGET", None, [self._keys.environment(one).drain, "organization_id", "queued"])
            for one in since_ms
        ]
        states = dict(zip(since_ms, await self._paged(drains), strict=True))
        gates = await self._gates({*since_ms, *await self._search()})
        organizations = {one: (states[one][0] or b"").decode() if one in states else "" for one in gates}
        rates = switches.rates(organizations.items())
        found = []
        for environment, state in gates.items():
            _, queued = states.get(environment, (None, None))
            gate = read_gate(state, now_ms, rates.get(environment, switches.rate))
            depth, held = int(queued or 0), draining.get(environment, 0)
            left_ms = gate.tripped_until_ms - now_ms
            is_tripped = left_ms > 0 or (self._hold_until_drained and depth > 0)
            found.append(
                Environment(
                    environment=environment,
                    organization=organizations[environment] or None,
                    rate_per_s=round(gate.rate_per_s, 1),
                    tripped=is_tripped,
                    tripped_for_s=left_ms / 1000 if left_ms > 0 else None,
                    tripped_until=_instant(gate.tripped_until_ms) if left_ms > 0 else None,
                    queued=max(0, depth - held),
                    draining=min(depth, held),
                    oldest_dwell_s=max(0, now_ms - since_ms.get(environment, now_ms)) / 1000,
                )
            )
        return found

    async def _oldest(self) -> dict[str, int]:
        """The environments with the oldest entries, and when those were accepted, in ms since 1970."""
        last = -(-LOOK_AT // self._keys.partitions) - 1
        partitions = range(self._keys.partitions)
        pages = await self._scripts.demand(
            [Call("ZRANGE", None, [self._keys.ready(one), 0, last, "WITHSCORES"]) for one in partitions]
        )
        return {
            environment.decode(): int(float(score))
            for page in pages
            for environment, score in zip(page[::2], page[1::2], strict=True)
        }

    async def _search(self) -> set[str]:
        """Environments that the gate counts, among the next keys of the database."""
        pattern = f"{self._keys.namespace}:{{*}}:gate:*"
        found: set[str] = set()
        for _ in range(_SCANS):
            arguments: list[str | int] = [self._cursor, "MATCH", pattern, "COUNT", _PAGE]
            ((self._cursor, names),) = await self._scripts.demand([Call("SCAN", None, arguments)])
            found.update(name.decode().partition(":gate:")[2] for name in names)
            if self._cursor == 0:
                break
        return found

    async def _gates(self, environments: Iterable[str]) -> dict[str, bytes | None]:
        """What the gate has written of environments; None: it does not count one at present."""
        pages = [
            some[start : start + _PAGE]
            for some in by_partition(self._keys, environments).values()
            for start in range(0, len(some), _PAGE)
        ]
        calls = [Call("MGET", None, [self._keys.environment(one).gate for one in page]) for page in pages]
        answers = await self._scripts.demand(calls)
        return {
            environment: state
            for page, states in zip(pages, answers, strict=True)
            for environment, state in zip(page, states, strict=True)
        }

    async def _paged(self, calls: Sequence[Call]) -> list[Any]:
        """The answers to many calls, a page at a time: others are served in between."""
        answers: list[Any] = []
        for start in range(0, len(calls), _PAGE):
            answers += await self._scripts.demand(calls[start : start + _PAGE])
        return answers


def _instant(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

"""The world in memory, for telling the pipeline's story. `test_ports.py` holds the fakes and the real
adapters to the same behaviour.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from sys import maxsize

from app.batch import Answer, Claim, Item, Parent
from app.errors import (
    ClaimLost,
    InvalidRequest,
    MollifierError,
    QueueLimitExceeded,
    RequestError,
    RunIdConflict,
    StoreUnavailable,
)
from app.ports import Admission, KeyHolder, Settlement
from app.switches import Rate
from schemas.snapshot import Snapshot

Key = tuple[str, str, str | None]


class FakeHeart:
    """A process' heart; `lives` is how many it has had."""

    lives = 0

    def life(self) -> int:
        return self.lives

    async def renew(self) -> None:
        """As `fence.Heart`."""


class FakeGate:
    """Lets the first `passes` requests of each environment pass."""

    def __init__(self, passes: int = maxsize) -> None:
        self.passes = passes
        self.fleet = maxsize
        self.asked: list[Mapping[str, int]] = []
        self.rates: list[Mapping[str, Rate]] = []
        self.failure: MollifierError | None = None

    async def admit(self, requests: Mapping[str, int], *, rates: Mapping[str, Rate]) -> Admission:
        if self.failure:
            raise self.failure
        self.asked.append(dict(requests))
        self.rates.append(rates)
        return Admission(dict.fromkeys(requests, self.passes), self.fleet)


class FakeBuffer:
    """Runs by environment and id, in order."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.runs: dict[tuple[str, str], Snapshot] = {}
        self.chosen: dict[str, str] = {}
        self.published: dict[Key, str] = {}
        self.loses_claims = False
        self.failure: MollifierError | None = None

    async def accept(
        self, runs: Sequence[Snapshot], claims: Sequence[Claim | None]
    ) -> Sequence[Answer | RequestError]:
        if self.failure:
            raise self.failure
        if self.loses_claims:
            return [ClaimLost() for _ in runs]
        for run, claim in zip(runs, claims, strict=True):
            if claim is not None:
                self.published[_key(run)] = run.id
        return [self._accept(run) for run in runs]

    def _accept(self, run: Snapshot) -> Answer | RequestError:
        key = (run.environment_id, run.id)
        queued = sum(environment == run.environment_id for environment, _ in self.runs)
        if key not in self.runs and self.limit and queued >= self.limit:
            return QueueLimitExceeded()
        self.runs.setdefault(key, run)
        return Answer(run.id, run.span_id, run.delay_until, is_mollified=True)

    async def recall(
        self, runs: Sequence[Snapshot], reserve: Sequence[Snapshot]
    ) -> Sequence[Answer | RequestError | None]:
        if self.failure:
            raise self.failure
        for run in reserve:
            self.chosen.setdefault(run.id, run.environment_id)
        reserved = {run.id for run in reserve}
        return [self._recall(run, run.id in reserved) for run in runs]

    def _recall(self, run: Snapshot, is_reserved: bool) -> Answer | RequestError | None:
        known = self.runs.get((run.environment_id, run.id))
        if known is not None:
            return self._accept(run) if known.organization_id == run.organization_id else RunIdConflict()
        taken = is_reserved and self.chosen[run.id] != run.environment_id
        return RunIdConflict() if taken else None

    async def find_parents(self, children: Sequence[Snapshot]) -> Sequence[Parent | None]:
        return [
            _parent(child, self.runs.get((child.environment_id, child.parent_run_id or "")))
            for child in children
        ]

    async def release(self, runs: Sequence[Snapshot]) -> None:
        for run in runs:
            if self.chosen.get(run.id) == run.environment_id:
                del self.chosen[run.id]


class FakeClaims:
    """Claims by key, without time; the buffer publishes into the same values."""

    def __init__(self, buffer: FakeBuffer) -> None:
        self.values = buffer.published
        self._runs = buffer.runs
        self.failure: MollifierError | None = None

    async def claim(self, runs: Sequence[Snapshot], now: datetime, *, seek: bool = False) -> Sequence[Claim]:
        if self.failure:
            raise self.failure
        return [self._claim(run, seek) for run in runs]

    def _claim(self, run: Snapshot, seek: bool) -> Claim:
        known = self._runs.get((run.environment_id, run.id))
        if seek and known is not None:
            return Claim("taken", expected=run.id, winner=known)
        own = f"pending:{run.id}:token"
        value = self.values.setdefault(_key(run), own)
        if value == own:
            return Claim("claimed", expected=own)
        if value.startswith("pending:"):
            return Claim("pending")
        return Claim("taken", expected=value, winner=self._runs.get((run.environment_id, value)))

    async def find_winners(self, runs: Sequence[Snapshot]) -> Sequence[Snapshot | None]:
        if self.failure:
            raise self.failure
        return [self._runs.get((run.environment_id, self.values.get(_key(run), ""))) for run in runs]

    async def settle(self, settlements: Sequence[Settlement], now: datetime) -> Sequence[bool]:
        return [self._settle(settlement) for settlement in settlements]

    def _settle(self, settlement: Settlement) -> bool:
        run, expected, winner_id = settlement.run, settlement.expected, settlement.winner_id
        value = self.values.get(_key(run), "")
        if not (value.startswith(expected) if expected.endswith(":") else value == expected):
            return False
        if winner_id:
            self.values[_key(run)] = winner_id
        else:
            del self.values[_key(run)]
        return True


def _parent(child: Snapshot, run: Snapshot | None) -> Parent | None:
    tenant = (child.environment_id, child.organization_id)
    if run is None or (run.environment_id, run.organization_id) != tenant:
        return None
    return Parent(run.id, run.depth, run.root_run_id or run.id)


def _key(run: Snapshot) -> Key:
    return run.environment_id, run.task, run.idempotency_key


class FakeStore:
    """Rows by id."""

    def __init__(self) -> None:
        self.rows: dict[str, Snapshot] = {}
        self.refuses: set[bytes | None] = set()
        self.failure: MollifierError | None = None
        self.waitpoints: set[tuple[str, str | None]] = set()
        self.waitpoints_fail = False

    async def let_parents_wait(
        self, runs: Sequence[Snapshot], answers: Sequence[Answer | RequestError]
    ) -> None:
        if self.waitpoints_fail:
            raise StoreUnavailable
        for run, answer in zip(runs, answers, strict=True):
            if run.resume_parent_on_completion and isinstance(answer, Answer):
                self.waitpoints.add((answer.run_id, run.parent_run_id))

    async def insert(self, runs: Sequence[Snapshot], now: datetime) -> Sequence[Answer | RequestError]:
        if self.failure:
            raise self.failure
        for run in runs:
            if run.metadata not in self.refuses:
                self.rows.setdefault(run.id, run)
        return [self._answer(run) if run.id in self.rows else InvalidRequest() for run in runs]

    async def recall(self, runs: Sequence[Snapshot]) -> Sequence[Answer | RequestError | None]:
        if self.failure:
            raise self.failure
        return [self._answer(run) if run.id in self.rows else None for run in runs]

    async def look_up_keys(
        self, runs: Sequence[Snapshot], now: datetime, sought: Sequence[str] = ()
    ) -> Sequence[KeyHolder | None]:
        if self.failure:
            raise self.failure
        rows = {_key(row): row for row in self.rows.values() if row.idempotency_key is not None}
        own = {run_id: self.rows[run_id] for run_id in sought if run_id in self.rows}
        holders = [own.get(run.id) or rows.get(_key(run)) for run in runs]
        return [
            None
            if row is None
            else KeyHolder(row.id, row.span_id, row.delay_until, row.buffered_at is not None)
            for row in holders
        ]

    async def find_parents(self, children: Sequence[Snapshot]) -> Sequence[Parent | None]:
        if self.failure:
            raise self.failure
        return [_parent(child, self.rows.get(child.parent_run_id or "")) for child in children]

    def _answer(self, run: Snapshot) -> Answer | RequestError:
        row = self.rows[run.id]
        if (row.environment_id, row.organization_id) != (run.environment_id, run.organization_id):
            return RunIdConflict()
        return Answer(row.id, row.span_id, row.delay_until, is_mollified=row.buffered_at is not None)


class FakeDesk:
    """What was published, set aside and acknowledged, in order."""

    def __init__(self) -> None:
        self.replies: list[tuple[str, bytes]] = []
        self.dead: list[Item] = []
        self.acknowledged: list[str] = []

    async def set_aside(self, items: Sequence[Item]) -> Sequence[Item]:
        self.dead += items
        return []

    async def respond(self, replies: Sequence[tuple[Item, bytes | None]]) -> None:
        for item, reply in replies:
            if reply is not None and item.reply_to is not None:
                self.replies.append((item.reply_to, reply))
            self.acknowledged.append(item.entry.id)

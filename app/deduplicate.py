"""Step 5: one run per idempotency key (G4). Claim the keys of a batch, look the won ones up in Postgres.

Requests with one key follow the first of them. A request whose key another worker holds leaves the
batch for the waiting room, and comes back, by way of `recall`, when the key is free or taken. What cannot
be mollified claims nothing: Postgres' unique index is the arbiter, once the buffer has no run of the key.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from app.batch import Answer, Batch, Item
from app.decide import may_be_mollified
from app.errors import ClaimTimedOut, StoreUnavailable, Unreachable
from app.ports import Claims, KeyHolder, Settlement, Store
from app.telemetry import Telemetry
from schemas.snapshot import Snapshot


class Deduplicate:
    """Gives each keyed item its claim, a leader to follow, a cached answer, or a place to wait."""

    def __init__(
        self,
        claims: Claims,
        store: Store,
        wait: Callable[[Sequence[Item]], None],
        telemetry: Telemetry,
    ) -> None:
        self._claims = claims
        self._store = store
        self._wait = wait
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        leaders, unclaimed = self._sort(batch)
        try:
            await self._find_winners(unclaimed)
            await self._claim(
                [leader for leader in leaders if leader.claim is None and not leader.is_late], batch
            )
            await self._look_up([leader for leader in leaders if leader.open and leader.claim], batch)
        except Unreachable as error:
            # Without claims Postgres' unique index is the arbiter.
            self._telemetry.unreachable("claims", error)
        await self._give_up([leader for leader in leaders if leader.open and leader.is_late], batch)

    async def _give_up(self, late: Sequence[Item], batch: Batch) -> None:
        """Answer who has waited long enough, with the row if there is one: its claim may not say so yet."""
        holders: Sequence[KeyHolder | None] = [None] * len(late)
        if late:
            try:
                holders = await self._store.look_up_keys(_runs(late), batch.now)
            except StoreUnavailable as error:
                self._telemetry.recall_failed(error)
        for item, holder in zip(late, holders, strict=True):
            item.outcome = ClaimTimedOut() if holder is None else _stored(item, holder)

    def _sort(self, batch: Batch) -> tuple[list[Item], list[Item]]:
        """The first item of each key; the others follow theirs, and are open no more. And those that claim
        nothing, and may meet a buffered run of their key all the same: of one that is no bypass, or that came
        before operators took the organization out, or switched to shadow mode.
        """
        leaders: dict[tuple[str, str, str, str], Item] = {}
        unclaimed: list[Item] = []
        for item in batch.open():
            run = item.run
            if run is None or run.idempotency_key is None:
                continue
            if not may_be_mollified(item, batch.switches):
                unclaimed.append(item)
                continue
            key = (run.organization_id, run.environment_id, run.task, run.idempotency_key)
            leader = leaders.setdefault(key, item)
            if leader is not item:
                item.follows = True
                leader.followers.append(item)
        return list(leaders.values()), unclaimed if batch.switches.enabled else []

    async def _find_winners(self, items: Sequence[Item]) -> None:
        """Answer who claims nothing and whose key a buffered run has; a parent waits for that one then."""
        if not items:
            return
        hits = []
        for item, winner in zip(items, await self._claims.find_winners(_runs(items)), strict=True):
            if winner is not None:
                item.outcome = _buffered(item, winner)
                hits.append(item)
        waiting = [item for item in hits if item.run is not None and item.run.resume_parent_on_completion]
        if waiting:
            outcomes = [item.outcome for item in waiting if item.outcome is not None]
            try:
                await self._store.let_parents_wait(_runs(waiting), outcomes)
            except StoreUnavailable as error:
                for item in waiting:
                    item.outcome = error

    async def _claim(self, leaders: Sequence[Item], batch: Batch) -> None:
        claims = await self._claims.claim(_runs(leaders), batch.now) if leaders else ()
        for leader, claim in zip(leaders, claims, strict=True):
            leader.claim = claim
            if claim.state == "pending":
                self._wait_with_followers(leader)
            elif claim.winner is not None:
                leader.outcome = _buffered(leader, claim.winner)
        self._telemetry.claimed(Counter(claim.state for claim in claims))

    async def _look_up(self, leaders: Sequence[Item], batch: Batch) -> None:
        """Answer those whose key a live row has. A claim that names a run which is nowhere is let go."""
        if not leaders:
            return
        stale = []
        try:
            holders = await self._store.look_up_keys(_runs(leaders), batch.now)
        except StoreUnavailable as error:
            self._telemetry.recall_failed(error)
            for leader in leaders:
                if leader.claim is not None and leader.claim.state == "taken":
                    leader.outcome = Answer(leader.claim.expected or "", None, None, False, is_cached=True)
            return
        for leader, holder in zip(leaders, holders, strict=True):
            if holder is not None:
                leader.outcome = _stored(leader, holder)
            elif leader.claim is not None and leader.claim.state == "taken":
                stale.append(leader)
        if stale:
            await self._claims.settle(
                [
                    Settlement(leader.run, leader.claim.expected or "", "")
                    for leader in stale
                    if leader.run is not None and leader.claim is not None
                ],
                batch.now,
            )
            for leader in stale:
                self._wait_with_followers(leader)

    def _wait_with_followers(self, leader: Item) -> None:
        leader.claim = None
        self._wait([leader, *leader.followers])
        leader.followers = []


def _runs(items: Sequence[Item]) -> list[Snapshot]:
    return [item.run for item in items if item.run is not None]


def _buffered(item: Item, winner: Snapshot) -> Answer:
    return Answer(
        winner.id,
        winner.span_id,
        winner.delay_until,
        is_mollified=True,
        is_cached=not _is_own(item, winner.id),
    )


def _stored(item: Item, holder: KeyHolder) -> Answer:
    return Answer(
        holder.run_id,
        holder.span_id,
        holder.delay_until,
        is_mollified=False,
        is_cached=not _is_own(item, holder.run_id),
    )


def _is_own(item: Item, run_id: str) -> bool:
    return item.run is not None and item.run.id == run_id

"""Step 5: one run per idempotency key (G4). Claim the keys of a batch, look the won ones up in Postgres.

Requests with one key follow the first of them. A request whose key another worker holds leaves the
batch for the waiting room, and comes back, by way of `recall`, when the key is free or taken. What cannot
be mollified claims nothing: Postgres' unique index is the arbiter, once the buffer has no run of the key.

The id of a request that is `sought` is looked for on the same two ways, the buffer first, as in `recall`.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from app.batch import Answer, Batch, Item, Key
from app.decide import claimed_key
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
            await self._look_up(
                [leader for leader in leaders if leader.claim and _is_in_doubt(leader)], batch
            )
        except Unreachable as error:
            # Without claims Postgres' unique index is the arbiter; but not over what may be buffered.
            self._telemetry.unreachable("claims", error)
            for leader in leaders:
                if leader.sought and leader.open:
                    leader.suspended = True
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
        leaders: dict[Key, Item] = {}
        unclaimed: list[Item] = []
        for item in batch.open():
            key = claimed_key(item, batch.switches)
            if key is not None:
                leader = leaders.setdefault(key, item)
                if leader is not item:
                    item.follows = True
                    leader.followers.append(item)
            elif item.key is not None:
                unclaimed.append(item)
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
        if not leaders:
            return
        seek = any(leader.sought for leader in leaders)
        claims = await self._claims.claim(_runs(leaders), batch.now, seek=seek)
        for leader, claim in zip(leaders, claims, strict=True):
            leader.claim = claim
            if claim.state == "pending":
                leader.claim = None
                self._wait([leader])
                self._lead_nobody(leader)
            elif claim.winner is not None:
                leader.outcome = _buffered(leader, claim.winner)
                if _is_own(leader, claim.winner.id):
                    self._lead_nobody(leader)
        self._telemetry.claimed(Counter(claim.state for claim in claims))

    async def _look_up(self, leaders: Sequence[Item], batch: Batch) -> None:
        """Answer those whose key a live row has, or who are one. A claim that names a run which is nowhere is
        let go.
        """
        if not leaders:
            return
        idle = []
        try:
            holders = await self._store.look_up_keys(
                _runs(leaders),
                batch.now,
                [leader.run.id for leader in leaders if leader.sought and leader.run],
            )
        except StoreUnavailable as error:
            self._telemetry.recall_failed(error)
            for leader in leaders:
                leader.unsure = leader.unsure or leader.sought
                if leader.open and leader.claim is not None and leader.claim.state == "taken":
                    winner_id = leader.claim.expected or ""
                    is_cached = not _is_own(leader, winner_id)
                    leader.outcome = Answer(winner_id, None, None, is_mollified=False, is_cached=is_cached)
            return
        for leader, holder in zip(leaders, holders, strict=True):
            assert leader.claim is not None
            if holder is not None and _is_own(leader, holder.run_id):
                leader.outcome = _stored(leader, holder)
                self._lead_nobody(leader)
                if leader.claim.state == "claimed":
                    idle.append(leader)
            elif leader.open and holder is not None:
                leader.outcome = _stored(leader, holder)
            elif leader.open and leader.claim.state == "taken":
                idle.append(leader)
        if idle:
            await self._let_go(idle, batch)

    async def _let_go(self, leaders: Sequence[Item], batch: Batch) -> None:
        """Release claims of runs that are nowhere, or were there before: others find out who has the key."""
        await self._claims.settle(
            [
                Settlement(leader.run, leader.claim.expected or "", "")
                for leader in leaders
                if leader.run is not None and leader.claim is not None
            ],
            batch.now,
        )
        for leader in leaders:
            leader.claim = None
            if leader.open:
                self._wait([leader])
            self._lead_nobody(leader)

    def _lead_nobody(self, leader: Item) -> None:
        """Have followers find out for themselves: the run that is there already need not have the key now."""
        self._wait(leader.followers)
        leader.followers = []


def _is_in_doubt(leader: Item) -> bool:
    """Whether Postgres has to be asked; it alone knows of a row with the leader's id that lost its key."""
    outcome = leader.outcome
    return leader.open or (leader.sought and isinstance(outcome, Answer) and outcome.is_cached)


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
    if item.run is not None and item.run.id == holder.run_id:
        return Answer(holder.run_id, item.run.span_id, holder.delay_until, is_mollified=holder.is_buffered)
    return Answer(holder.run_id, holder.span_id, holder.delay_until, is_mollified=False, is_cached=True)


def _is_own(item: Item, run_id: str) -> bool:
    return item.run is not None and item.run.id == run_id

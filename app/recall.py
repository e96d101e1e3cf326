"""Step 3: find the run of a request that was handled before, by its id, in both stores.

Buffer first, then Postgres: a run only ever moves that way, so it cannot slip through between.
Only then may a deadline or a count of deliveries refuse a request. What is sure to be looked for with its
key (step 5) is left to that.
"""

from collections.abc import Awaitable, Callable, Sequence

from app import run_ids
from app.batch import Answer, Batch, DeadLetter, Item, Key
from app.decide import claimed_key
from app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    RequestError,
    RunIdConflict,
    StoreUnavailable,
)
from app.ports import Buffer, Store
from app.settings import Settings
from app.telemetry import Telemetry
from schemas.snapshot import Snapshot

Lookup = Callable[[Sequence[Item]], Awaitable[Sequence[Answer | RequestError | None]]]


class Recall:
    """Answers what has a run already, then refuses what is late, worn out, or claims an id it may not."""

    def __init__(self, buffer: Buffer, store: Store, settings: Settings, telemetry: Telemetry) -> None:
        self._buffer = buffer
        self._store = store
        self._settings = settings
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        asked = self._asked(batch)
        contested: list[Item] = []
        if batch.switches.enabled:
            await _look_up(asked, self._recall_from_buffer)
            # Somebody else holds the id, perhaps in vain: the run may be a row of this environment.
            contested = [item for item in asked if isinstance(item.outcome, RunIdConflict)]
            for item in contested:
                item.outcome = None
        try:
            await _look_up([item for item in asked if item.open], self._recall_from_store)
        except StoreUnavailable as error:
            # An invented id can then not be told from a repeated one. Everything else can go on: if its
            # run is a row already, Postgres ignores the second one.
            self._telemetry.recall_failed(error)
            _settle(asked, _has_reserved_form, error)
            _settle(contested, _any, error)
            # Nor can one that has a run from one that comes too late to have any.
            _settle(asked, lambda item: self._is_over(item, batch), error)
            for item in asked:
                item.unsure = item.open
        _settle(contested, _any, RunIdConflict())
        _settle(
            asked,
            _has_reserved_form,
            InvalidRequest("options.run_id: no run of this environment has this id"),
        )
        for item in batch.open():
            self._refuse(item, batch)

    def _asked(self, batch: Batch) -> list[Item]:
        """What is to be looked for here. The rest of what may be known is `sought` with its key."""
        known = [item for item in batch.open() if item.may_be_known]
        if not any(item.has_bound_id for item in known):
            return known
        leaders: dict[Key, Item] = {}
        for item in batch.open():
            key = claimed_key(item, batch.switches)
            is_leader = key is not None and leaders.setdefault(key, item) is item
            item.sought = is_leader and self._is_sought(item, batch)
        return [item for item in known if not item.sought]

    def _is_sought(self, item: Item, batch: Batch) -> bool:
        """Whether the first request with a key is new but for its id, which is bound, and not over yet."""
        is_new = not item.is_redelivered and item.waiting_since is None
        return is_new and item.has_bound_id and not self._is_over(item, batch)

    def _is_over(self, item: Item, batch: Batch) -> bool:
        """Whether a request is to be refused unless it has a run by now."""
        assert item.request is not None
        is_worn_out = item.entry.deliveries > self._settings.max_deliveries
        return is_worn_out or (item.request.deadline is not None and item.request.deadline <= batch.now)

    async def _recall_from_buffer(self, items: Sequence[Item]) -> Sequence[Answer | RequestError | None]:
        return await self._buffer.recall(
            _runs(items), [item.run for item in items if item.needs_reservation and item.run]
        )

    async def _recall_from_store(self, items: Sequence[Item]) -> Sequence[Answer | RequestError | None]:
        return await self._store.recall(_runs(items))

    def _refuse(self, item: Item, batch: Batch) -> None:
        if not self._is_over(item, batch):
            return
        if item.entry.deliveries > self._settings.max_deliveries:
            item.dead_letter = DeadLetter(
                "deliveries", "it was handed out too often without ever being finished"
            )
            item.outcome = InternalError()
        else:
            item.outcome = DeadlineExceeded()


async def _look_up(items: Sequence[Item], lookup: Lookup) -> None:
    if items:
        for item, found in zip(items, await lookup(items), strict=True):
            item.outcome = found


def _runs(items: Sequence[Item]) -> list[Snapshot]:
    return [item.run for item in items if item.run is not None]


def _settle(items: Sequence[Item], condition: Callable[[Item], bool], error: RequestError) -> None:
    for item in items:
        if item.open and condition(item):
            item.outcome = error


def _any(item: Item) -> bool:
    return True


def _has_reserved_form(item: Item) -> bool:
    return item.has_chosen_id and item.run is not None and run_ids.is_derived(item.run.id)

"""Step 4: a child's parent, looked up in the child's own environment; depth and root come from it. G7.

Buffer first, then Postgres: a run only ever moves that way.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from app.batch import Batch, Item, Parent
from app.errors import ParentRunNotFound, StoreUnavailable
from app.ports import Buffer, Store
from schemas.snapshot import Snapshot


class Relate:
    """Completes each child with what it inherits, or refuses it."""

    def __init__(self, buffer: Buffer, store: Store) -> None:
        self._buffer = buffer
        self._store = store

    async def __call__(self, batch: Batch) -> None:
        children = [
            item for item in batch.open() if item.run is not None and item.run.parent_run_id is not None
        ]
        if not children:
            return
        if batch.switches.enabled:
            children = _related(children, await self._buffer.find_parents(_runs(children)))
        if children:
            try:
                children = _related(children, await self._store.find_parents(_runs(children)))
            except StoreUnavailable as error:
                for item in children:
                    item.outcome = error
                return
        for item in children:
            item.outcome = ParentRunNotFound()


def _related(children: Sequence[Item], parents: Sequence[Parent | None]) -> list[Item]:
    """Complete the children whose parent was found; the others."""
    orphans = []
    for item, parent in zip(children, parents, strict=True):
        if parent is None or item.run is None:
            orphans.append(item)
        else:
            item.run = replace(
                item.run, parent_run_id=parent.run_id, depth=parent.depth + 1, root_run_id=parent.root_run_id
            )
    return orphans


def _runs(items: Sequence[Item]) -> list[Snapshot]:
    return [item.run for item in items if item.run is not None]

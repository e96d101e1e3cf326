"""What an operation is given to work with."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from app import run_ids
from app.batch import Answer, Item, Shown
from app.details import details
from app.errors import InvalidRequest
from app.runs import Found, Runs, Tenancy
from app.settings import Settings
from schemas.operations import Operation
from schemas.replies import RunDetailsReply
from schemas.snapshot import Snapshot


class Position(NamedTuple):
    """A place in the order of runs: the newest first, then the greatest id."""

    created_at: datetime
    run_id: str


class Filter(NamedTuple):
    """Which runs to list: all conditions that are not None hold; `before` is a place in the order."""

    limit: int
    before: Position | None
    status: str | None
    task: str | None
    tag: str | None
    since: datetime | None
    until: datetime | None


class Listing(Protocol):
    async def newest(self, tenancy: Tenancy, wanted: Filter, now: datetime) -> Sequence[Found]:
        """The first `limit` runs of a place that pass the filter, in order.

        Raises:
            StoreUnavailable, BufferUnavailable, Unreachable: it cannot be read.
        """
        ...


class KeyHolders(Protocol):
    async def holder(self, run: Snapshot) -> str | None:
        """The id of the run that has published its claim of a key. `run` names tenant, task and key.

        Raises:
            Unreachable: claims cannot be reached.
        """
        ...

    async def end(self, run: Snapshot, run_id: str) -> None:
        """End the claim of a key, if it still names that run.

        Raises:
            Unreachable: claims cannot be reached.
        """
        ...


class StoredKeys(Protocol):
    async def reset_key(self, tenancy: Tenancy, task: str, key: str, until: datetime | None) -> str | None:
        """Take an idempotency key off the row that has it, if it was requested by then; the row's id.

        Raises:
            StoreUnavailable: Postgres cannot be written.
        """
        ...


class FrontDoor(Protocol):
    async def trigger(self, body: bytes, reply_to: str | None, correlation_id: str | None) -> None:
        """Append a trigger request.

        Raises:
            BufferUnavailable: Redis refuses to write.
            Unreachable: it is not known whether it was appended.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """The world as operations see it."""

    runs: Runs
    stored: Listing
    buffered: Listing
    claims: KeyHolders
    keys: StoredKeys
    front_door: FrontDoor
    settings: Settings


class Turn(NamedTuple):
    """One operation to perform. `asked_at` is the time of its entry, `now` that at which it is performed."""

    item: Item
    request: Any
    tenancy: Tenancy
    asked_at: datetime
    now: datetime

    @property
    def id(self) -> str:
        """The same at every redelivery."""
        return self.item.entry.id


Perform = Callable[[Scene, Turn], Awaitable[Answer | Shown]]


def tenancy_of(request: Operation) -> Tenancy:
    return Tenancy(request.environment.organization_id, request.environment.id)


def parse_run_id(friendly_id: str) -> str:
    """The id in `run_id`.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return run_ids.parse_friendly(friendly_id)
    except ValueError as error:
        raise InvalidRequest(f"run_id: {error}") from None


def show(found: Found) -> RunDetailsReply:
    """The reply that shows a run."""
    return RunDetailsReply(correlation_id=None, run=details(found))

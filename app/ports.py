"""What the core needs from the world. Adapters are named in `wiring` only.

Every method takes a whole batch and costs a constant number of round trips. Failures come as
`app.errors`: the world refused (`BufferUnavailable`, `StoreUnavailable`: nothing was done), or it
cannot be told what happened (`Unreachable`: the item is suspended and handed out again).
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

from msgspec import Struct

from app.batch import Answer, Claim, Item, Parent
from app.errors import RequestError
from app.rows import Materialised, Row
from app.switches import Rate
from schemas.snapshot import Snapshot


class Admission(NamedTuple):
    """How many requests of each environment, and of all together, pass; counted from the first."""

    by_environment: Mapping[str, int]
    fleet: int


class RateGate(Protocol):
    async def admit(self, requests: Mapping[str, int], *, rates: Mapping[str, Rate]) -> Admission:
        """Count `requests` (environment id -> how many) against their rates: the settings', but for `rates`.

        Raises:
            GateUnavailable: the counters cannot be reached.
        """
        ...


class Buffer(Protocol):
    async def accept(
        self, runs: Sequence[Snapshot], claims: Sequence[Claim | None]
    ) -> Sequence[Answer | RequestError]:
        """Append runs to their environments' buffers; per run, in order, its answer or its refusal.

        A run with an idempotency key publishes its claim in the same step; one whose key has a winner by
        now is answered with that winner instead.

        Raises:
            BufferUnavailable: Redis refuses to write; nothing was accepted.
            Unreachable: it is not known whether anything was.
        """
        ...

    async def recall(
        self, runs: Sequence[Snapshot], reserve: Sequence[Snapshot]
    ) -> Sequence[Answer | RequestError | None]:
        """Per run, in order, its answer if the buffer knows its id, else None.

        Ids in `reserve` were chosen by their callers: they are held for their environments, and one
        that another environment holds is a `RunIdConflict`.

        Raises:
            Unreachable: the buffer cannot be read.
        """
        ...

    async def find_parents(self, children: Sequence[Snapshot]) -> Sequence[Parent | None]:
        """Per child, in order, its parent if the buffer has it in the child's environment.

        Raises:
            Unreachable: the buffer cannot be read.
        """
        ...


class Reservations(Protocol):
    async def release(self, runs: Sequence[Snapshot]) -> None:
        """Let go of reserved ids that are rows by now, or came to nothing.

        Raises:
            Unreachable: some may still be held; that is harmless.
        """
        ...


class Settlement(Struct, frozen=True, gc=False):
    """The end of a claim that has the value `expected`: published with a run id, or released with ''.

    `pending:<run id>:` is expected of a claim of any attempt of that run.
    """

    run: Snapshot
    expected: str
    winner_id: str


class Claims(Protocol):
    async def claim(self, runs: Sequence[Snapshot], now: datetime, *, seek: bool = False) -> Sequence[Claim]:
        """Claim the idempotency keys of runs; per run, in order, what became of it.

        With `seek`, a run that the buffer knows itself claims nothing: it is `taken` by that run.

        Raises:
            Unreachable: claims cannot be reached.
        """
        ...

    async def find_winners(self, runs: Sequence[Snapshot]) -> Sequence[Snapshot | None]:
        """Per run, in order, the buffered run that has its idempotency key, if there is one.

        Raises:
            Unreachable: claims cannot be reached.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement], now: datetime) -> Sequence[bool]:
        """Publish or release claims, each only if it still has the expected value; per claim, whether it had.

        Raises:
            Unreachable: claims cannot be reached; they end by themselves.
        """
        ...


class KeyHolder(NamedTuple):
    """The live row that has an idempotency key; or what is there of a run that is sought by its id."""

    run_id: str
    span_id: str | None
    delay_until: datetime | None
    is_buffered: bool = False


class Store(Protocol):
    async def insert(self, runs: Sequence[Snapshot], now: datetime) -> Sequence[Answer | RequestError]:
        """Insert runs in one statement; per run, in order, its answer or why it was refused.

        `now` decides which runs are still delayed. A parent that is to wait for its child gets its
        waitpoint in the same transaction, also when an earlier run answers.

        A row that Postgres refuses is found and refused alone; it does not disturb the others.

        Raises:
            StoreUnavailable: Postgres cannot be written. A statement that was cut off may have inserted
                all the same; the same run id finds out.
        """
        ...

    async def look_up_keys(
        self, runs: Sequence[Snapshot], now: datetime, sought: Sequence[str] = ()
    ) -> Sequence[KeyHolder | None]:
        """Per run, in order, the row that has its idempotency key, if the key is not free; but of those whose
        ids are `sought`, and bound to their tenants, first of all the run itself.

        Raises:
            StoreUnavailable: Postgres cannot be read.
        """
        ...

    async def recall(self, runs: Sequence[Snapshot]) -> Sequence[Answer | RequestError | None]:
        """Per run, in order, its answer if its id is a row of its environment, a `RunIdConflict` if of
        another's, else None.

        Raises:
            StoreUnavailable: Postgres cannot be read.
        """
        ...

    async def let_parents_wait(
        self, runs: Sequence[Snapshot], answers: Sequence[Answer | RequestError]
    ) -> None:
        """Write waitpoints: the parent of each run that is to resume it waits for the run that answers.

        Raises:
            StoreUnavailable: Postgres cannot be written.
        """
        ...

    async def find_parents(self, children: Sequence[Snapshot]) -> Sequence[Parent | None]:
        """Per child, in order, its parent if it is a row of the child's environment.

        Raises:
            StoreUnavailable: Postgres cannot be read.
        """
        ...


class Taken(NamedTuple):
    """The oldest entries of one environment, held by a drainer: (entry id, encoded snapshot), in order.

    `overlays` has what was changed since, by entry id; `hold` tells this time from any other. They
    may be taken over from a drainer that has died.
    """

    environment_id: str
    entries: Sequence[tuple[str, bytes]]
    overlays: Mapping[str, bytes]
    hold: int
    is_taken_over: bool = False


class Turns(Protocol):
    """Whose turn it is to be drained, and the entries that come with a turn."""

    async def take(self, most: int) -> Sequence[Taken]:
        """Take up to `most` entries of the environments whose turn it is; none: nothing to do.

        Raises:
            Unreachable: the buffer cannot be reached.
        """
        ...

    async def settle(self, taken: Sequence[Taken], runs: Sequence[Snapshot]) -> None:
        """Take entries off the buffer: Postgres (or a dead letter) has them. The claims of `runs` end.

        Raises:
            Unreachable: it is not known whether that was done; they may be handed out again.
        """
        ...

    async def put_back(self, taken: Sequence[Taken], *, apart: bool, may_be_done: bool = False) -> None:
        """Return entries to the buffer, in their place. What `may_be_done` cannot be changed meanwhile.

        `apart`: one of the environments may hang the others, so each is taken on its own next time, later.

        Raises:
            Unreachable: it is not known whether that was done.
        """
        ...


class Materialiser(Protocol):
    async def materialise(self, rows: Sequence[Row], now: datetime) -> Sequence[Materialised]:
        """Write rows in one statement, ignoring those that are there; per row, in order, what became of it.

        `now` decides which idempotency keys have become free for them.

        Raises:
            StoreUnavailable: Postgres cannot be written; some rows may have been.
        """
        ...


class Letter(NamedTuple):
    """A buffered entry that has no row, and why."""

    environment_id: str
    entry_id: str
    snapshot: bytes
    overlay: bytes | None
    reason: Literal["undecodable", "refused"]
    detail: str


class Graveyard(Protocol):
    async def bury(self, letters: Sequence[Letter]) -> None:
        """Write dead letters.

        Raises:
            Unreachable: it is not known whether any was written.
        """
        ...


class Desk(Protocol):
    """Where requests come from and replies go to."""

    async def set_aside(self, items: Sequence[Item]) -> Sequence[Item]:
        """Write dead letters; the entries themselves stay until `respond`.

        Returns those that could not be written: they may not be acknowledged, and come again.

        Raises:
            Unreachable: it is not known whether any was written.
        """
        ...

    async def respond(self, replies: Sequence[tuple[Item, bytes | None]]) -> None:
        """Publish each item's reply, if it has one, then acknowledge and delete its entry; one round trip.

        Raises:
            Unreachable: it is not known whether that was done; the entries may come again.
        """
        ...


class Figures(NamedTuple):
    """What is buffered at one moment.

    `stale` has the entries whose dwell is over STALE_THRESHOLD_MS, about right where there are very many;
    `stalest` the environments that have most of them, with how many.
    """

    depth: int
    oldest_dwell_s: float
    draining: int
    stale: int
    stalest: Sequence[tuple[str, int]]


class StreamFigures(NamedTuple):
    """A request stream at one moment: consumers that are alive, requests not read yet, requests at work."""

    consumers: int
    waiting: int
    pending: int


class Census(Protocol):
    """The buffer as a whole, and the streams beside it, as the sweeper sees them."""

    async def count(self) -> Figures:
        """Count what is buffered.

        Raises:
            Unreachable: the buffer cannot be read.
        """
        ...

    async def count_streams(self) -> tuple[Mapping[str, StreamFigures], int]:
        """The request streams, by `triggers` and `operations`; and how many dead letters there are.

        Raises:
            Unreachable: they cannot be read.
        """
        ...

    async def announce_lost(self) -> int:
        """Announce environments, a bounded number, that are ready and that no drainer knows of; how many.

        Raises:
            Unreachable: it is not known whether that was done.
        """
        ...


class Kept(NamedTuple):
    """What is kept for runs until they are rows: (run id, key) of claims, (run id, tenant) of
    reservations."""

    claims: list[tuple[str, str]]
    reservations: list[tuple[str, str]]


class Leftovers(Protocol):
    """What stays behind in Redis when processes die."""

    async def drop_consumers(self) -> int:
        """Drop dead consumers of the request streams that have nothing pending, a bounded number; how many.

        Raises:
            Unreachable: it is not known whether that was done.
        """
        ...

    async def find(self) -> Kept:
        """A bounded number of published claims and reservations; each call looks further, then starts over.

        Raises:
            Unreachable: they cannot be read.
        """
        ...

    async def not_buffered(self, reservations: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """Those of some reservations whose run is not in the buffer.

        Raises:
            Unreachable: the buffer cannot be read.
        """
        ...

    async def retire(self, kept: Kept) -> tuple[int, int]:
        """End claims and reservations, each only if it is still that run's; how many claims, reservations.

        Raises:
            Unreachable: it is not known whether that was done.
        """
        ...


class Rows(Protocol):
    async def tenants_of(self, run_ids: Sequence[str]) -> Mapping[str, str]:
        """Of the ids that are rows by now, or stand for one, the tenant (`keys.tenant`).

        Raises:
            StoreUnavailable: Postgres cannot be read.
        """
        ...

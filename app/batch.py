"""The values that travel through the pipeline: entries come in, items gain an outcome, replies go out.

What there is one of for every request is a `Struct`: made in C, and (without `gc`) never looked at by the
garbage collector, it costs a tenth of a tuple with names or a dataclass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal, NamedTuple

from msgspec import Struct

from app import run_ids
from app.errors import RequestError
from app.switches import Switches
from schemas.operations import OperationRequest
from schemas.replies import KeyResetReply, RunDetailsReply, RunListReply
from schemas.requests import TriggerRequest
from schemas.snapshot import Snapshot


class Entry(Struct, frozen=True, gc=False):
    """One entry of a request stream, as it was read. `deliveries` counts this one.

    `life` is that of the process when it asked for entries (`app/heartbeat.py`).
    """

    id: str
    fields: Mapping[bytes, bytes]
    deliveries: int = 1
    life: int = 0

    @property
    def ms(self) -> int:
        """The time of the entry, in ms since 1970."""
        return int(self.id.partition("-")[0])


class Outcome(StrEnum):
    """What the gate's answer comes to; the wire's and the metrics' word for it."""

    PASS_THROUGH = "pass_through"
    MOLLIFY = "mollify"
    SHADOW = "shadow"


class Decision(Struct, frozen=True, gc=False):
    """The gate's answer for one request and why. `divertible`: the buffer may take it if Postgres fails."""

    outcome: Outcome
    reason: str
    enrolled: bool = False
    divertible: bool = False

    @property
    def mollified(self) -> bool:
        return self.outcome is Outcome.MOLLIFY


class Answer(Struct, frozen=True, gc=False):
    """The run that answers a request: its own, or (cached) one that was there before."""

    run_id: str
    span_id: str | None
    delay_until: datetime | None
    is_mollified: bool
    is_cached: bool = False


Shown = RunDetailsReply | RunListReply | KeyResetReply
"""The answer to an operation, but for its correlation id."""


class DeadLetter(NamedTuple):
    """Why an entry is set aside. `reason` is a metric's label, `detail` a sentence."""

    reason: Literal["undecodable", "reply_channel", "unanswerable", "deliveries"]
    detail: str


class Parent(NamedTuple):
    """What a child inherits from its parent."""

    run_id: str
    depth: int
    root_run_id: str


Key = tuple[str, str, str, str]
"""An idempotency key with what it belongs to: organization, environment and task come first."""


class Claim(Struct, frozen=True, gc=False):
    """What became of a claim: `claimed` by this request, `pending` for another, or `taken` by a winner.

    `expected` is the value the claim has now (None while pending); `winner` is there if buffered.
    """

    state: Literal["claimed", "pending", "taken"]
    expected: str | None = None
    winner: Snapshot | None = None


class Item(Struct, eq=False):
    """One request on its way. Each step fills in its part; `outcome` ends the way.

    `request` and `run` are a trigger's, `operation` and `shown` (its answer) an operation's. `claim` and
    `followers` belong to the first request of an idempotency key; the others `follow` it. A `suspended` item
    leaves its batch without an outcome: it `waits` for its key, or else its entry stays pending and is handed
    out again. One that `is_late` has waited long enough. Of one that is `unsure` nobody could tell whether it
    has a run, Postgres being away. The id of one that is `sought` is looked for together with its key.
    """

    entry: Entry
    reply_to: str | None = None
    correlation_id: str | None = None
    request: TriggerRequest | None = None
    operation: OperationRequest | None = None
    run: Snapshot | None = None
    decision: Decision | None = None
    outcome: Answer | RequestError | None = None
    shown: Shown | None = None
    dead_letter: DeadLetter | None = None
    claim: Claim | None = None
    followers: list["Item"] = []
    follows: bool = False
    suspended: bool = False
    waits: bool = False
    waiting_since: float | None = None
    is_late: bool = False
    unsure: bool = False
    sought: bool = False

    @property
    def open(self) -> bool:
        """Whether later steps still have something to do with it."""
        return self.outcome is None and self.dead_letter is None and not (self.suspended or self.follows)

    @property
    def key(self) -> Key | None:
        """The idempotency key of its run, if that has one."""
        run = self.run
        if run is None or run.idempotency_key is None:
            return None
        return run.organization_id, run.environment_id, run.task, run.idempotency_key

    @property
    def is_redelivered(self) -> bool:
        return self.entry.deliveries > 1

    @property
    def may_be_known(self) -> bool:
        """Whether it may have a run already: handed out before, or while it waited, or a chosen id."""
        return self.is_redelivered or self.waiting_since is not None or self.has_chosen_id

    @property
    def has_chosen_id(self) -> bool:
        """Whether the caller chose the run's id."""
        return self.request is not None and self.request.options.run_id is not None

    @property
    def has_bound_id(self) -> bool:
        """Whether the caller chose an id that is bound to its tenant."""
        return self.has_chosen_id and self.run is not None and run_ids.is_bound(self.run.id)

    @property
    def needs_reservation(self) -> bool:
        """Whether the caller chose an id that has to be reserved."""
        return self.has_chosen_id and self.run is not None and run_ids.needs_reservation(self.run.id)


@dataclass(slots=True)
class Batch:
    """Requests that are handled together. `now` is the time they count as handled at, in UTC.

    All steps go by the same `switches`, whatever operators decide meanwhile.
    """

    items: Sequence[Item]
    now: datetime
    switches: Switches

    def open(self) -> Iterator[Item]:
        """The items that no step has settled yet."""
        return (item for item in self.items if item.open)

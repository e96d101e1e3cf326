"""What `mollifier status --json` prints. Fields may be added; none changes its meaning.

Times are in seconds, rates per second. What a server that did not answer would tell is null, or empty.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct


class Environment(Struct, kw_only=True):
    """One environment."""

    environment: Annotated[str, Meta(description="Its id.")]
    organization: Annotated[str | None, Meta(description="Its organization, if anything is buffered.")]
    rate_per_s: Annotated[float, Meta(description="Triggers that the gate counts at present.")]
    tripped: Annotated[bool, Meta(description="Whether all that it triggers is mollified.")]
    tripped_for_s: Annotated[
        float | None,
        Meta(description="For how long, if it keeps within its rate; null: not, or until it is drained."),
    ]
    tripped_until: Annotated[str | None, Meta(description="The same as an ISO 8601 instant.")]
    queued: Annotated[int, Meta(description="Entries that no drainer has been handed.")]
    draining: Annotated[int, Meta(description="Entries that a drainer has been handed and is writing.")]
    oldest_dwell_s: Annotated[float, Meta(description="How long its oldest entry has been in the buffer.")]


class Buffer(Struct, kw_only=True):
    """The buffer as a whole."""

    depth: Annotated[int, Meta(description="Entries in it, queued or draining.")]
    draining: Annotated[int, Meta(description="Those of them that drainers are writing.")]
    oldest_dwell_s: Annotated[float, Meta(description="How long the oldest entry has been in it.")]
    environments: Annotated[int, Meta(description="Environments that have something in it.")]
    tripped: Annotated[int, Meta(description="Environments that are tripped, of those that were looked at.")]
    all_tripped_for_s: Annotated[
        float | None, Meta(description="For how long the gate is tripped for all, by the rate of the fleet.")
    ]
    looked_at: Annotated[
        int, Meta(description="Environments that were looked at: those with the oldest entries.")
    ]
    drained_per_s: Annotated[
        float | None, Meta(description="Entries that become rows, between the first look and the last.")
    ]
    accepted_per_s: Annotated[float | None, Meta(description="Entries that are added, in the same time.")]
    empty_in_s: Annotated[
        float | None,
        Meta(description="When it is empty if both go on like that; null: it does not get any emptier."),
    ]


class Stream(Struct, kw_only=True):
    """A stream of requests."""

    stream: Annotated[str, Meta(description="Its name.")]
    length: Annotated[int, Meta(description="Requests that are not answered yet.")]
    pending: Annotated[int, Meta(description="Those of them that a worker has.")]
    lag: Annotated[int | None, Meta(description="Those that none has; null: the server cannot tell.")]
    oldest_s: Annotated[float, Meta(description="How long the oldest request waits; 0: none does.")]


class Consumer(Struct, kw_only=True):
    """A process of the fleet."""

    kind: Annotated[str, Meta(description="The line of the Procfile: `triggers`, `operations`, ...")]
    consumer: Annotated[str, Meta(description="Its name.")]
    alive: Annotated[bool, Meta(description="Whether its heartbeat is there.")]
    heartbeat_s: Annotated[
        float | None, Meta(description="How long ago its heart beat; null: for over an hour.")
    ]
    pending: Annotated[int, Meta(description="Requests or entries that it has been handed.")]


class DeadLetters(Struct, kw_only=True):
    """What was set aside."""

    count: Annotated[int, Meta(description="How many there are.")]
    newest_reason: Annotated[str | None, Meta(description="Why the newest was set aside.")]
    newest_s: Annotated[float | None, Meta(description="How long ago that was.")]


class Switches(Struct, kw_only=True):
    """What operators have decided, over what the command's own environment variables say."""

    known: Annotated[bool, Meta(description="Whether it is known what operators have decided.")]
    mode: Annotated[Literal["on", "off", "shadow"], Meta(description="`mollifier switch`.")]
    drain_paused: Annotated[bool, Meta(description="`mollifier drain pause`.")]
    drain_rate: Annotated[int, Meta(description="Most rows a second of all drainers together; 0: no limit.")]
    enrolments: Annotated[int, Meta(description="Organizations on whose part is decided: `mollifier orgs`.")]
    weights: Annotated[int, Meta(description="Organizations whose share of the drain is not 1.")]
    gates: Annotated[int, Meta(description="Environments and organizations with a gate of their own.")]


class Status(Struct, kw_only=True):
    """One look at an installation."""

    at: Annotated[
        str, Meta(description="When, by the clock of the machine that looked; an ISO 8601 instant.")
    ]
    redis: Annotated[str | None, Meta(description="Why Redis did not answer; null: it did.")] = None
    postgres: Annotated[str | None, Meta(description="Why Postgres did not answer; null: it did.")] = None
    switches: Annotated[Switches, Meta(description="The switches that hold.")]
    buffer: Annotated[Buffer | None, Meta(description="The buffer as a whole.")] = None
    environments: Annotated[list[Environment], Meta(description="The worst, at most `--limit`.")] = []
    streams: Annotated[list[Stream], Meta(description="The streams of triggers and operations.")] = []
    consumers: Annotated[list[Consumer], Meta(description="The processes, those in trouble first.")] = []
    dead_letters: Annotated[DeadLetters | None, Meta(description="What was set aside.")] = None

"""What is published on a request's reply channel, wire version 1."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from schemas.run import RunDetails

RunStatus = Literal["QUEUED", "DELAYED"]


class RunReference(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The run that answers a request. `id` is the primary key, `friendly_id` what customers see."""

    id: str
    friendly_id: str
    span_id: str | None = None


class Notice(Struct, frozen=True, kw_only=True, gc=False):
    """A remark for the producer's log; nothing has to be done about it."""

    code: str
    message: str
    docs: str


MOLLIFIED = Notice(
    code="mollifier.queued",
    message="This environment triggers faster than its rate. The run was accepted and will start soon.",
    docs="docs/wire.md#notices",
)


class RunReply(Struct, frozen=True, kw_only=True, tag_field="type", tag="run"):
    """A request's success. `notice` is there only for a run that was newly mollified."""

    correlation_id: str | None
    run: RunReference
    status: RunStatus
    is_cached: bool
    is_mollified: bool
    notice: Notice | UnsetType = UNSET


class ErrorDetail(Struct, frozen=True, kw_only=True, gc=False):
    """`status` is the HTTP status of the same meaning; `retryable` whether sending it again can help."""

    code: str
    message: str
    status: int
    retryable: bool


class ErrorReply(Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """A request's failure."""

    correlation_id: str | None
    error: ErrorDetail


class RunDetailsReply(Struct, frozen=True, kw_only=True, tag_field="type", tag="run_details"):
    """The run that an operation was about, as it is now."""

    correlation_id: str | None
    run: RunDetails


class RunListReply(Struct, frozen=True, kw_only=True, tag_field="type", tag="run_list"):
    """One page of runs, the newest first. `next_cursor` is null on the last one."""

    correlation_id: str | None
    runs: list[RunDetails]
    next_cursor: str | None


class KeyResetReply(Struct, frozen=True, kw_only=True, tag_field="type", tag="idempotency_key_reset"):
    """The key is free. `run_id` is the run that had it; None where an earlier attempt may have freed it."""

    correlation_id: str | None
    task: str
    idempotency_key: str
    run_id: str | None


Reply = RunReply | RunDetailsReply | RunListReply | KeyResetReply | ErrorReply

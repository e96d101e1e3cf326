"""Replies as a client reads them: typed, or raised as the error that they speak of."""

from collections.abc import Iterable
from typing import TypeVar

import msgspec
from msgspec import Raw
from msgspec.structs import force_setattr

from app.errors import InternalError, InvalidRequest, RequestError
from schemas.replies import ErrorDetail, ErrorReply, KeyResetReply, RunDetailsReply, RunListReply, RunReply
from schemas.run import RunDetails

Success = TypeVar("Success")

_NULL = Raw(b"null")


class UnreadableReply(InternalError):
    """A reply came, and this version cannot read it. What was asked for may have been done."""

    retryable = False


class Details(RunDetails, frozen=True, kw_only=True):
    """A run as it is read. msgspec can write `Raw | None`, but not read it: null is read as Raw first."""

    payload: Raw
    metadata: Raw
    idempotency_key_options: Raw
    trace_context: Raw
    error: Raw

    def __post_init__(self) -> None:
        for name in Details.__annotations__:
            if getattr(self, name) == _NULL:
                force_setattr(self, name, None)


class DetailsReply(RunDetailsReply, frozen=True, kw_only=True, tag_field="type", tag="run_details"):
    run: Details


class ListReply(RunListReply, frozen=True, kw_only=True, tag_field="type", tag="run_list"):
    runs: list[Details]  # type: ignore[assignment]


_decoder: "msgspec.json.Decoder[RunReply | DetailsReply | ListReply | KeyResetReply | ErrorReply]" = (
    msgspec.json.Decoder(RunReply | DetailsReply | ListReply | KeyResetReply | ErrorReply)
)


def read_reply(message: bytes, expected: type[Success]) -> Success:
    """The reply in a message.

    Raises:
        RequestError: it is an error, of the class with its code; or `UnreadableReply`: it is not `expected`.
    """
    try:
        reply = _decoder.decode(message)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise UnreadableReply(f"the reply cannot be read: {error}") from error
    if isinstance(reply, expected):
        return reply
    if isinstance(reply, ErrorReply):
        raise error_of(reply.error)
    raise UnreadableReply(f"the reply is another's: {type(reply).__name__}")


def error_of(detail: ErrorDetail) -> RequestError:
    """The error that a reply speaks of. A code from a newer service keeps its being retryable or not."""
    known = _CLASSES.get(detail.code)
    if known is not None:
        return known(detail.message)
    unknown = InternalError if detail.retryable else InvalidRequest
    return unknown(f"{detail.code}: {detail.message}")


def _subclasses(root: type[RequestError]) -> Iterable[type[RequestError]]:
    for one in root.__subclasses__():
        yield one
        yield from _subclasses(one)


_CLASSES = {one.code: one for one in _subclasses(RequestError) if "code" in vars(one)}

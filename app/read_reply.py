"""Replies as a client reads them: typed, or raised as the error that they speak of."""

from typing import TypeVar

import msgspec

from app.errors import CODES, InternalError, InvalidRequest, RequestError
from schemas.replies import ErrorDetail, ErrorReply, Reply

Success = TypeVar("Success")


class UnreadableReply(InternalError):
    """A reply came, and this version cannot read it. What was asked for may have been done."""

    retryable = False


_decoder: "msgspec.json.Decoder[Reply]" = msgspec.json.Decoder(Reply)


class _Addressed(msgspec.Struct, gc=False):
    correlation_id: str | None = None


_addressed = msgspec.json.Decoder(_Addressed)


def correlation_id(message: bytes) -> str | None:
    """Which request a message answers, whatever else it holds; None: it does not say."""
    try:
        return _addressed.decode(message).correlation_id
    except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        return None


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
    known = CODES.get(detail.code)
    if known is not None:
        return known(detail.message)
    unknown = InternalError if detail.retryable else InvalidRequest
    return unknown(f"{detail.code}: {detail.message}")

"""Every error that a request can end with, and the ways in which the world fails.

    MollifierError
    ├── ConfigurationError             a setting is wrong; the process does not start
    ├── GateUnavailable                Redis could not evaluate the gate; never leaves the program
    ├── Unreachable                    a server went silent, so what it did is not known; the work comes back
    └── RequestError                   has a wire code; becomes an error reply
        ├── InvalidRequest             400 invalid_request
        │   └── Undecodable            400 invalid_request, and a dead letter: nothing could be read
        ├── PayloadTooLarge            413 payload_too_large
        ├── MetadataTooLarge           413 metadata_too_large
        ├── TooManyTags                422 too_many_tags
        ├── RunNotFound                404 run_not_found
        ├── ParentRunNotFound          404 parent_run_not_found
        ├── RunIdConflict              409 run_id_conflict
        ├── OneTimeUseTokenUsed        422 one_time_use_token_used
        ├── RunNotDelayed              422 run_not_delayed
        ├── RunFinished                409 run_finished
        ├── DeadlineExceeded           408 deadline_exceeded
        ├── QueueLimitExceeded         429 queue_limit_exceeded   retryable
        ├── ClaimTimedOut              503 claim_timed_out        retryable
        │   └── ClaimLost              503 claim_timed_out        it ran out on the way, and is claimed again
        ├── RunBusy                    503 run_busy               retryable
        ├── BufferUnavailable          503 buffer_unavailable     retryable
        ├── StoreUnavailable           503 store_unavailable      retryable
        │   └── StatementTimedOut      503 store_unavailable      a statement hung and was cut off
        └── InternalError              500 internal_error         retryable

Adapters translate their driver's errors into these once; the core asks only `retryable`.
"""

from collections.abc import Iterator
from typing import ClassVar


class MollifierError(Exception):
    """The root: every error this program raises on purpose."""


class ConfigurationError(MollifierError):
    """A setting is missing or wrong; the message names the variable."""


class GateUnavailable(MollifierError):
    """The gate's counters could not be reached. The gate fails open."""


class Unreachable(MollifierError):
    """A server did not answer: whatever was asked may or may not have been done.

    Nothing is answered on such ground. The work stays pending, is handed out again, and finds out.
    """


class RequestError(MollifierError):
    """An error with a wire code (docs/wire.md). The message is sent to the producer as it is."""

    code: ClassVar[str]
    status: ClassVar[int]
    retryable: ClassVar[bool] = False
    default: ClassVar[str]

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.default)

    @property
    def message(self) -> str:
        return str(self)


class InvalidRequest(RequestError):
    code, status, default = "invalid_request", 400, "The request is not valid."


class Undecodable(InvalidRequest):
    """The entry holds no readable request at all: poison, kept as a dead letter."""

    default = "body: no request can be read from it"


class PayloadTooLarge(RequestError):
    code, status, default = "payload_too_large", 413, "payload: too large"


class MetadataTooLarge(RequestError):
    code, status, default = "metadata_too_large", 413, "options.metadata: too large"


class TooManyTags(RequestError):
    code, status, default = "too_many_tags", 422, "options.tags: too many"


class RunNotFound(RequestError):
    code, status, default = "run_not_found", 404, "There is no such run in this environment."


class ParentRunNotFound(RequestError):
    code, status = "parent_run_not_found", 404
    default = "options.parent_run_id: there is no such run in this environment"


class RunIdConflict(RequestError):
    code, status, default = "run_id_conflict", 409, "options.run_id: this id cannot be used"


class OneTimeUseTokenUsed(RequestError):
    code, status = "one_time_use_token_used", 422
    default = "options.one_time_use_token: this token was used before"


class RunNotDelayed(RequestError):
    code, status, default = "run_not_delayed", 422, "The run is not delayed."


class RunFinished(RequestError):
    code, status, default = "run_finished", 409, "The run has finished."


class DeadlineExceeded(RequestError):
    code, status = "deadline_exceeded", 408
    default = "deadline: it passed before the request was handled"


class QueueLimitExceeded(RequestError):
    code, status, retryable = "queue_limit_exceeded", 429, True
    default = "This environment holds as many waiting runs as it may. Try again later."


class ClaimTimedOut(RequestError):
    code, status, retryable = "claim_timed_out", 503, True
    default = "Another request holds this idempotency key and has not finished. Try again."


class ClaimLost(ClaimTimedOut):
    """The claim of a request ran out while it was handled, and may be another's. It claims again."""


class RunBusy(RequestError):
    code, status, retryable = "run_busy", 503, True
    default = "The run is being written. Try again."


class BufferUnavailable(RequestError):
    code, status, retryable = "buffer_unavailable", 503, True
    default = "The buffer cannot be written just now. Nothing was accepted; try again."


class StoreUnavailable(RequestError):
    """Postgres cannot be written. `may_be_done`: a statement was under way whose end nobody heard of."""

    may_be_done = False
    code, status, retryable = "store_unavailable", 503, True
    default = "The database cannot be written just now. Try again."


class StatementTimedOut(StoreUnavailable):
    """Postgres was reached, and one statement took so long that it was cut off."""


class InternalError(RequestError):
    code, status, retryable = "internal_error", 500, True
    default = "The request could not be handled. Try again."


def _subclasses(root: type[RequestError]) -> Iterator[type[RequestError]]:
    for one in root.__subclasses__():
        yield one
        yield from _subclasses(one)


CODES = {one.code: one for one in _subclasses(RequestError) if "code" in vars(one)}
"""The class of every wire code."""

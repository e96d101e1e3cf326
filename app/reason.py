"""Why a server could not be reached, in a few words and without its address."""

import errno
import re

from redis.exceptions import TimeoutError as RedisTimeoutError

_REFUSED = re.compile(rf"\bErr(no|or) {errno.ECONNREFUSED}\b")  # how the drivers pass it on


def reason(error: BaseException) -> str:
    """What is behind an error, to be told to an operator."""
    if isinstance(error, ConnectionRefusedError) or _REFUSED.search(str(error)):
        return "connection refused"
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return "no answer"
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def root_reason(error: BaseException) -> str:
    """The same of an error of ours: what the driver had said."""
    while error.__cause__ is not None and not isinstance(error, TimeoutError):
        error = error.__cause__
    return reason(error)

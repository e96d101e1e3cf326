"""What the commands say when something is wrong: a sentence, and whose fault it may be."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.embedded import EmbeddedServerError
from app.errors import ConfigurationError, MollifierError
from app.settings import Settings

_REFUSED = re.compile(rf"\bErr(no|or) {errno.ECONNREFUSED}\b")  # how the drivers pass it on
_SERVERS = {"REDIS_URL": "Redis", "DATABASE_URL": "Postgres"}


class Complaint(MollifierError):
    """What a command could not do, in a sentence for the person who asked for it."""


@contextmanager
def reaching(variable: str, settings: Settings) -> Iterator[None]:
    """Turn the failure to talk to the server that `REDIS_URL` or `DATABASE_URL` names into a complaint."""
    try:
        yield
    except (OSError, ValueError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        url = settings.masked()[variable]
        raise Complaint(f"{_SERVERS[variable]} at {url}: {reason(error)}. Is {variable} right?") from error


def reason(error: BaseException) -> str:
    """Why a server could not be reached, in a few words and without the address."""
    if isinstance(error, ConnectionRefusedError) or _REFUSED.search(str(error)):
        return "connection refused"
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return "no answer"
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def sentence(error: Exception) -> str | None:
    """What to tell about an error that ended a command; None for one that nobody expected."""
    if isinstance(error, ConfigurationError):
        return f"the configuration is wrong.\n{error}"
    if isinstance(error, MollifierError | EmbeddedServerError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else reason(error)
    return None

"""What the commands say when something is wrong: a sentence, and whose fault it may be."""

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from redis.exceptions import RedisError

from app.embedded import EmbeddedServerError
from app.errors import ConfigurationError, MollifierError
from app.reason import reason
from app.settings import Settings

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


def sentence(error: Exception) -> str | None:
    """What to tell about an error that ended a command; None for one that nobody expected."""
    if isinstance(error, ConfigurationError):
        return f"the configuration is wrong.\n{error}"
    if isinstance(error, MollifierError | EmbeddedServerError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else reason(error)
    return None

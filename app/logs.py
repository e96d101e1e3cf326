"""Log lines on standard output, one an event: JSON, or coloured for people. structlog writes them."""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import orjson
import structlog

from app.settings import Settings

Level = Literal["info", "warning", "error"]

REPEAT_S = 5.0
"""A storm would say the same thing over and over; it is said once in so much time."""


_MOST_NAMES = 1000
_NAMED = 10


class Log:
    """What one process says. A line that cannot be written is given up, and `failed` is called."""

    def __init__(
        self, process: str, failed: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = structlog.get_logger().bind(process=process)
        self._failed = failed
        self._clock = clock
        self._said: dict[str, float] = {}
        self._left_out: Counter[str] = Counter()

    def say(self, level: Level, name: str, **fields: Any) -> None:
        """Write one line."""
        try:
            getattr(self._logger, level)(name, **fields)
        except Exception:  # a pipe that nobody reads any more, a full disk: no request may fail of it
            self._failed()

    def say_seldom(self, level: Level, name: str, kind: str = "", **fields: Any) -> None:
        """Write one line, but only one of a name (and kind) every REPEAT_S; `left_out` counts the others."""
        what = f"{name} {kind}"
        if not self.is_due(what):
            self._left_out[what] += 1
            return
        left_out = self._left_out.pop(what, 0)
        self.say(level, name, **fields, **({"left_out": left_out} if left_out else {}))

    def is_due(self, what: str) -> bool:
        """Whether `what` may be said again; it then counts as said."""
        now = self._clock()
        if now - self._said.get(what, -REPEAT_S) < REPEAT_S:
            return False
        self._said[what] = now
        return True


class Tally:
    """Counts by name until they are logged together. Names that come too late are all `other`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.total = 0

    def add(self, name: str, count: int) -> None:
        is_known = name in self._counts or len(self._counts) < _MOST_NAMES
        self._counts[name if is_known else "other"] += count
        self.total += count

    def take(self) -> tuple[int, dict[str, int]]:
        """The total, and the names that have most of it, most first; then it is empty."""
        taken = self.total, dict(self._counts.most_common(_NAMED))
        self._counts.clear()
        self.total = 0
        return taken


def configure_logging(settings: Settings) -> None:
    """Have all lines written to standard output, warnings of libraries included."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.log_format == "json":
        # Without the variables of a traceback's frames: they hold payloads.
        traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
        rendering: list[Any] = [
            structlog.processors.ExceptionRenderer(traceback),
            structlog.processors.JSONRenderer(serializer=_json),
        ]
    else:
        rendering = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)


def _json(event: Any, **options: Any) -> str:
    return orjson.dumps(event, **options).decode()


def flush_logs() -> None:
    """Write what is left; dropped where nobody reads it, else that would be the process' exit status.

    Source: the note on SIGPIPE in the documentation of Python's module `signal`.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""What tracing needs from whoever makes spans: `app/traces.py`, while an exporter is configured."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from app.batch import Item
from schemas.snapshot import Snapshot

Ends = Sequence[tuple[Snapshot | None, str]]
"""What became of entries that were drained together: the run, if it could be read, and the result."""


class Spans(Protocol):
    """Makes spans and delivers them. Whatever it raises, the work goes on."""

    def answered(self, items: Sequence[Item], now_s: float) -> None:
        """Requests were answered, `now_s` seconds after 1970."""
        ...

    def materialised(self, ends: Ends, taken_at: datetime, written_at: datetime) -> None:
        """Buffered runs became rows together."""
        ...

    def close(self) -> None:
        """Deliver what is left, or give up within a few seconds."""
        ...

"""How fast the buffer fills and drains, from looks at two counters some time apart."""

from collections import deque
from typing import NamedTuple

_SPAN_MS = 10_000
"""Over how long rates are taken, when there are looks that far back."""


class Mark(NamedTuple):
    """One look: the server's time, entries that became rows since there were none, entries that are there."""

    ms: int
    drained: int
    depth: int


class Pace(NamedTuple):
    """Rates per second, and seconds until the buffer is empty; None is what is not known, or never."""

    drained_per_s: float | None = None
    accepted_per_s: float | None = None
    empty_in_s: float | None = None


class Pacer:
    """Remembers the looks of the last seconds."""

    def __init__(self) -> None:
        self._marks: deque[Mark] = deque()

    def add(self, mark: Mark) -> Pace:
        """Add a look; the pace since the oldest that is remembered."""
        if self._marks and mark.drained < self._marks[-1].drained:
            self._marks.clear()  # it was empty in between, and the count began again
        self._marks.append(mark)
        while len(self._marks) > 2 and mark.ms - self._marks[0].ms > _SPAN_MS:
            self._marks.popleft()
        first = self._marks[0]
        seconds = (mark.ms - first.ms) / 1000
        if seconds <= 0:
            return Pace()
        drained, growth = (mark.drained - first.drained) / seconds, (mark.depth - first.depth) / seconds
        empty_in_s = 0.0 if not mark.depth else mark.depth / -growth if growth < 0 else None
        return Pace(drained, max(0.0, drained + growth), empty_in_s)

"""How many rows to commit at once: fewer while Postgres is slow, more while it is quick."""

from collections.abc import Callable

_LEAST = 1
_SHRINK_MOST = 0.5
_SHRINK_LEAST = 0.9
_GROW = 1.1


class BatchSize:
    """A size between 1 and `most` that follows commit latency around a target.

    Over the target it shrinks in proportion, to no less than half at once; under it, it grows by a tenth.
    """

    def __init__(
        self, most: int, target_s: float, changed: Callable[[int], None] = lambda size: None
    ) -> None:
        self._most = most
        self._target_s = target_s
        self._changed = changed
        self.current = most

    def observe(self, latency_s: float) -> None:
        """A batch took so much time to commit, in seconds."""
        if latency_s > self._target_s:
            factor = min(_SHRINK_LEAST, max(_SHRINK_MOST, self._target_s / latency_s))
            size = max(_LEAST, int(self.current * factor))
        else:
            size = min(self._most, int(self.current * _GROW) + 1)
        if size != self.current:
            self.current = size
            self._changed(size)

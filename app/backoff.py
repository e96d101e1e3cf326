"""Waiting longer after each failure, never in step with others."""

import random
from collections.abc import Callable


class Backoff:
    """Delays that double from `first_s` to `longest_s`; each is drawn from the upper half of its range."""

    def __init__(
        self, first_s: float, longest_s: float, draw: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._draw = draw
        self._next_s = first_s

    def reset(self) -> None:
        """It worked: the next failure waits `first_s` again."""
        self._next_s = self._first_s

    def delay_s(self) -> float:
        """How long to wait after one more failure, in seconds."""
        limit = self._next_s
        self._next_s = min(self._longest_s, 2 * limit)
        return self._draw(limit / 2, limit)

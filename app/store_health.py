"""How Postgres is doing, as seen by this process' own writes: the gate's store_* reasons."""

import time
from collections.abc import Callable

from app.settings import Settings

_SMOOTHING = 0.2
_PROBE_INTERVAL_S = 1.0


class StoreHealth:
    """A moving average of write times, and whether the last write failed.

    While there is trouble, one caller a second is told that there is none: its write is the probe
    that finds out when Postgres is well again.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = settings.store_pressure_latency_ms / 1000
        self._clock = clock
        self._latency_s = 0.0
        self._failing = False
        self._next_probe = 0.0

    @property
    def latency_s(self) -> float:
        """The moving average of the time a write takes, in seconds."""
        return self._latency_s

    @property
    def failing(self) -> bool:
        return self._failing

    def wrote(self, seconds: float) -> None:
        """A write succeeded in so much time."""
        self._failing = False
        self._latency_s += _SMOOTHING * (seconds - self._latency_s)

    def failed(self) -> None:
        """A write failed because Postgres did."""
        self._failing = True
        self._next_probe = self._clock() + _PROBE_INTERVAL_S

    def trouble(self) -> str | None:
        """`store_unavailable`, `store_pressure`, or None: write (perhaps as the probe)."""
        if not self._failing and self._latency_s <= self._limit_s:
            return None
        now = self._clock()
        if now >= self._next_probe:
            self._next_probe = now + _PROBE_INTERVAL_S
            return None
        return "store_unavailable" if self._failing else "store_pressure"

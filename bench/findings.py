"""What a comparison promises, and what was found. Values only; how they are written: `report`."""

import os
from collections.abc import Awaitable, Callable, Mapping
from statistics import median
from typing import Literal

import msgspec


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """What the median of a comparison's values has to keep, `least` and `most` included."""

    name: str
    """In words, one line; unique in its comparison."""
    unit: str = "times"
    least: float | None = None
    most: float | None = None
    aim: float | None = None
    """What one would like to see; nothing fails over it."""
    guard: float | None = None
    """What was reached and must not be lost, where that is less than it has to keep."""

    def stands(self, value: float) -> bool:
        """Whether nothing was lost."""
        if self.guard is None:
            return self.holds(value)
        return value >= self.guard if self.least is not None else value <= self.guard

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


class Figure(msgspec.Struct, frozen=True):
    """Absolute values, one a repeat. Context only: they say more about the machine than about us."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)


class Measured(msgspec.Struct, frozen=True):
    """What one comparison measured: for each bound (by name) one value a repeat, and the context."""

    values: Mapping[str, tuple[float, ...]]
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


class NotMeasured(Exception):
    """What a comparison needs is not on this machine; the message says what. Never a pass."""


class Verdict(msgspec.Struct, frozen=True):
    """A bound and what was found for it; without values it was not measured."""

    bound: Bound
    values: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def holds(self) -> bool:
        return bool(self.values) and self.bound.holds(self.median)

    @property
    def stands(self) -> bool:
        return bool(self.values) and self.bound.stands(self.median)


class Outcome(msgspec.Struct, frozen=True):
    """One comparison as it came out."""

    name: str
    title: str
    how: str
    verdicts: tuple[Verdict, ...]
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class Reading(msgspec.Struct, frozen=True):
    """One side of a comparison, measured once: work done, time, and processor time used meanwhile."""

    count: int
    seconds: float
    cpu_s: float = 0.0
    """Of the processes that are compared, user and system."""
    redis_s: float = 0.0
    """Of the Redis server."""
    machine_s: float = 0.0
    """Of everything on this machine."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    """How long replies took."""

    @property
    def rate(self) -> float:
        """Per second."""
        return self.count / self.seconds

    @property
    def cpu_us(self) -> float:
        """Of one piece of work."""
        return self.cpu_s / self.count * 1e6

    @property
    def redis_us(self) -> float:
        return self.redis_s / self.count * 1e6

    @property
    def cost_us(self) -> float:
        """Of one piece of work, Redis included."""
        return self.cpu_us + self.redis_us

    @property
    def redis_percent(self) -> float:
        """How much of its one core Redis used."""
        return 100 * self.redis_s / self.seconds

    @property
    def machine_percent(self) -> float:
        """How much of all cores was used."""
        return 100 * self.machine_s / self.seconds / (os.cpu_count() or 1)


Value = Literal[
    "rate", "cpu_us", "redis_us", "cost_us", "redis_percent", "machine_percent", "p50_ms", "p99_ms"
]
Side = Callable[[], Awaitable[Reading]]

_SHOWN: tuple[tuple[Value, str, str], ...] = (
    ("rate", "a second", ""),
    ("cpu_us", "processor time of each", "µs"),
    ("redis_us", "processor time of Redis for each", "µs"),
    ("p50_ms", "half of the replies within", "ms"),
    ("p99_ms", "99% of the replies within", "ms"),
)


class Rounds(msgspec.Struct, frozen=True):
    """The readings of every side, by its name: one a round."""

    readings: dict[str, tuple[Reading, ...]]

    def values(self, side: str, value: Value) -> tuple[float, ...]:
        """One value of a side, round by round."""
        return tuple(getattr(reading, value) for reading in self.readings[side])

    def ratios(self, value: Value, side: str, other: str) -> tuple[float, ...]:
        """One side divided by another, round by round."""
        pairs = zip(self.values(side, value), self.values(other, value), strict=True)
        return tuple(one / two for one, two in pairs)

    def figures(self) -> tuple[Figure, ...]:
        """The absolute values of all sides; what is 0 throughout was not looked at."""
        return tuple(
            Figure(f"{side}, {name}", unit, values)
            for side in self.readings
            for value, name, unit in _SHOWN
            if any(values := self.values(side, value))
        )


async def in_turn(sides: Mapping[str, Side], rounds: int) -> Rounds:
    """Measure every side once a round, every other round backwards: A B, B A, A B."""
    readings: dict[str, list[Reading]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(list(sides)):
            readings[name].append(await sides[name]())
    return Rounds({name: tuple(found) for name, found in readings.items()})

"""The seeded plan of a storm: which fault, when, for how long. The same seed makes the same plan."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.faults import Kind

_CALM_AT_FIRST_S = 3.0
_GAP_S = (0.7, 2.5)
_OVERLAPS = 0.4


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault: it begins `at_s` after the storm's beginning. `seed` decides whom it hits, and how."""

    kind: Kind
    at_s: float
    lasts_s: float
    seed: int


def plan(seed: int, seconds: float, kinds: Sequence[Kind]) -> list[Planned]:
    """Faults for so many seconds. Each kind comes once before any comes again; some overlap."""
    rng = random.Random(f"plan {seed}")
    planned: list[Planned] = []
    deck: list[Kind] = []
    at_s = _CALM_AT_FIRST_S
    while True:
        deck = deck or rng.sample(list(kinds), len(kinds))
        kind = deck.pop()
        lasts_s = rng.uniform(*kind.lasts_s)
        if at_s + lasts_s > seconds:
            return planned
        planned.append(Planned(kind, at_s, lasts_s, rng.randrange(2**32)))
        at_s += 0.2 if rng.random() < _OVERLAPS else lasts_s + rng.uniform(*_GAP_S)

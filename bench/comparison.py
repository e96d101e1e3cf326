"""What a comparison is: its bounds, and how it is measured."""

import time
from collections.abc import Awaitable, Callable

import msgspec

from bench.findings import Bound, Measured, NotMeasured, Outcome, Verdict
from bench.stage import Stage


class Scale(msgspec.Struct, frozen=True):
    """How much is measured: repeats, and the share of a comparison's usual amount of work."""

    pairs: int
    share: float = 1.0

    def of(self, count: int) -> int:
        return max(1, round(count * self.share))


class Comparison(msgspec.Struct, frozen=True):
    """One comparison. `measure` gives values for all `bounds`, or raises NotMeasured."""

    name: str
    title: str
    how: str
    """What is compared with what, and what was done to be fair; one paragraph, of any shape."""
    bounds: tuple[Bound, ...]
    measure: Callable[[Stage, Scale], Awaitable[Measured]]

    async def run(self, stage: Stage, scale: Scale) -> Outcome:
        started = time.monotonic()
        try:
            measured = await self.measure(stage, scale)
        except NotMeasured as why:
            nothing = {bound.name: () for bound in self.bounds}
            measured = Measured(nothing, notes=(f"NOT MEASURED: {why}.",))
        return Outcome(
            self.name,
            self.title,
            self.how,
            tuple(Verdict(bound, measured.values[bound.name]) for bound in self.bounds),
            measured.figures,
            measured.notes,
            time.monotonic() - started,
        )

"""One pass of the sweeper. DESIGN section 9.

The figures come first, so no later step makes them wait. Each step is safe to repeat, and safe beside another
sweeper that has not noticed yet that it lost the lease.
"""

import time
from collections.abc import Callable, Sequence

from app.errors import StoreUnavailable
from app.ports import Census, Kept, Leftovers, Rows
from app.settings import Settings
from app.telemetry import Telemetry

Reservation = tuple[str, str]
"""A run id and its tenant."""

_FORGET_AFTER = 10
"""In how many times its patience a sweeper is sure to have come by a reservation again."""


class Sweep:
    """Looks after the whole buffer, a bounded piece of work at a time."""

    def __init__(
        self,
        *,
        census: Census,
        leftovers: Leftovers,
        rows: Rows,
        settings: Settings,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._census = census
        self._leftovers = leftovers
        self._rows = rows
        self._patience_s = settings.claim_ttl_s
        self._telemetry = telemetry
        self._clock = clock
        self._runless: dict[Reservation, float] = {}

    async def make_pass(self) -> None:
        """Make one pass; when it fails, the figures are not known until another succeeds.

        Raises:
            Unreachable: Redis went silent; what is left is for the next pass.
        """
        try:
            await self._count()
            await self._count_streams()
            await self._announce_lost()
            await self._drop_consumers()
            result = await self._retire()
        except BaseException:
            self._telemetry.figures_unknown()
            self._telemetry.passed("failed")
            raise
        self._telemetry.passed(result)

    async def _count(self) -> None:
        """Show the figures, and report entries whose dwell is over STALE_THRESHOLD_MS."""
        figures = await self._census.count()
        self._telemetry.buffered(figures.depth, figures.oldest_dwell_s, figures.draining, figures.stale)
        if figures.stale:
            self._telemetry.found_stale(figures.stale, figures.oldest_dwell_s, figures.stalest)

    async def _count_streams(self) -> None:
        streams, dead_letters = await self._census.count_streams()
        for stream, figures in streams.items():
            self._telemetry.streamed(stream, *figures)
        self._telemetry.dead_letters_held(dead_letters)

    async def _announce_lost(self) -> None:
        """Bring back environments that the schedule lost: one is announced only when it becomes ready."""
        announced = await self._census.announce_lost()
        if announced:
            self._telemetry.swept("environment", announced)
            self._telemetry.trouble("environments.announced", environments=announced)

    async def _drop_consumers(self) -> None:
        self._telemetry.swept("consumer", await self._leftovers.drop_consumers())

    async def _retire(self) -> str:
        """End claims and reservations of runs that are rows by now: Postgres guards their keys and ids.

        The claim of a run that is no row stays, for the run may be buffered. So does a reservation, until it
        has been seen without a run for longer than any request is at work. Returns the result of the pass.
        """
        kept = await self._leftovers.find()
        run_ids = {run_id for run_id, _ in (*kept.claims, *kept.reservations)}
        if not run_ids:
            return "complete"
        try:
            tenants = await self._rows.tenants_of(sorted(run_ids))
        except StoreUnavailable as error:
            self._telemetry.trouble("store.unavailable", error=repr(error.__cause__))
            return "without_store"
        are_rows = [(run_id, owner) for run_id, owner in kept.reservations if tenants.get(run_id) == owner]
        others = sorted(set(kept.reservations).difference(are_rows))
        abandoned = self._abandoned(await self._leftovers.not_buffered(others))
        claims, reservations = await self._leftovers.retire(
            Kept([(run_id, key) for run_id, key in kept.claims if run_id in tenants], [*are_rows, *abandoned])
        )
        self._telemetry.swept("claim", claims)
        self._telemetry.swept("reservation", reservations)
        return "complete"

    def _abandoned(self, runless: Sequence[Reservation]) -> list[Reservation]:
        """Of reservations without a run, those that had none when they were seen long ago."""
        now = self._clock()
        longest_s = _FORGET_AFTER * self._patience_s
        self._runless = {one: since for one, since in self._runless.items() if now - since <= longest_s}
        return [one for one in runless if now - self._runless.setdefault(one, now) > self._patience_s]

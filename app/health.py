"""Whether a process is alive (its loops move) and ready (Redis and Postgres answer)."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

_CHECK_S = 2.0
_FRESH_S = 1.0


class Health:
    """Liveness follows the loops' own progress, readiness the servers; the two never mix."""

    def __init__(
        self,
        checks: Mapping[str, Callable[[], Awaitable[object]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checks = checks
        self._clock = clock
        self._loops: dict[str, tuple[float, float]] = {}
        self._answer: tuple[float, dict[str, str]] | None = None

    def progress(self, loop: str, within_s: float = 30.0) -> None:
        """A loop has moved, and is to move again within so many seconds."""
        self._loops[loop] = (self._clock(), within_s)

    def stuck(self) -> dict[str, float]:
        """The loops that have not moved in time, with the seconds since they did; empty: alive."""
        now = self._clock()
        return {
            loop: now - moved for loop, (moved, within_s) in self._loops.items() if now - moved > within_s
        }

    async def missing(self) -> dict[str, str]:
        """What does not answer, and why; empty: ready. Asked at most once a second."""
        now = self._clock()
        if self._answer is None or now - self._answer[0] > _FRESH_S:
            results = await asyncio.gather(*(_ask(check) for check in self._checks.values()))
            failures = {name: result for name, result in zip(self._checks, results, strict=True) if result}
            self._answer = (now, failures)
        return self._answer[1]


async def _ask(check: Callable[[], Awaitable[object]]) -> str:
    try:
        async with asyncio.timeout(_CHECK_S):
            await check()
    except TimeoutError:
        return f"no answer within {_CHECK_S:.0f} s"
    except Exception as error:
        reason = error.__cause__ or error  # an adapter's own error is a sentence for producers
        return str(reason) or type(reason).__name__
    return ""

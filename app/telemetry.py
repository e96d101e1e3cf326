"""What a process tells the world. The core says here what has happened; it is counted, logged and traced.

Nothing in here fails a request. No log line carries a payload or a credential.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import cache
from typing import Any

from app.batch import Entry, Item, Outcome
from app.errors import RequestError
from app.logs import Log, Tally
from app.metrics import Metrics, Timed
from app.spans import Ends, Spans
from app.switches import Switches
from schemas.diagnosis import Finding


class Telemetry:
    """What one process tells the world. Without `spans` nothing is traced."""

    def __init__(self, process: str) -> None:
        self.process = process
        self._metrics = Metrics()
        self._log = Log(process, lambda: self.failed_to_tell("log"))
        self.spans: Spans | None = None
        self._shadowed = Tally()
        self._stage = cache(lambda name: self._metrics.stages.labels(name).observe)
        self.registry = self._metrics.registry

    # Requests

    def received(self, stream: str, entries: Sequence[Entry]) -> None:
        """A batch begins: what was read, or taken over."""
        again = len([entry for entry in entries if entry.deliveries > 1])
        self._metrics.requests.labels(stream, "first").inc(len(entries) - again)
        self._metrics.requests.labels(stream, "again").inc(again)
        self.batch(stream, len(entries))

    def batch(self, stage: str, size: int) -> None:
        """So much is handled together."""
        self._metrics.batch_sizes.labels(stage).observe(size)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time one step on one batch."""
        return Timed(self._stage(name))

    def decided(self, items: Sequence[Item]) -> None:
        """Count decisions once they stand."""
        counts = Counter(
            [
                (item.decision, item.run.organization_id)
                for item in items
                if item.decision is not None and item.run is not None and not item.suspended
            ]
        )
        for (decision, organization_id), count in counts.items():
            organization = self._metrics.organization(organization_id) if decision.enrolled else ""
            labels = decision.outcome.value, decision.reason, str(decision.enrolled).lower(), organization
            self._metrics.decisions.labels(*labels).inc(count)
            if decision.outcome is Outcome.SHADOW:
                self._shadowed.add(organization_id, count)
        self.summarise()

    def claimed(self, states: Mapping[str, int]) -> None:
        """Count claims by what became of them."""
        for state, count in states.items():
            self._metrics.claims.labels(state).inc(count)

    def claims_lost(self, count: int) -> None:
        """Count claims that had run out, or were another's, when they were to be ended."""
        if count:
            self._metrics.claims.labels("lost").inc(count)

    def responded(self, items: Sequence[Item]) -> None:
        """Count finished requests, and how long their producers waited."""
        now_s = time.time()
        self._metrics.reply_latency.observe_all(_ages_s(items, now_s))
        waits = [time.monotonic() - item.waiting_since for item in items if item.waiting_since is not None]
        if waits:
            self._metrics.claim_wait.observe_all(waits)
        runs = 0
        for item in items:
            if isinstance(item.outcome, RequestError):
                self._metrics.replies.labels(item.outcome.code).inc()
            elif item.outcome is not None or item.shown is not None:
                runs += 1
            if item.dead_letter is not None:
                self.dead_letter(item.dead_letter.reason, item.entry.id, item.dead_letter.detail)
        self._metrics.replies.labels("run").inc(runs)
        if self.spans is not None:
            with self._traced():
                self.spans.answered(items, now_s)

    def dead_letter(self, reason: str, entry_id: str, detail: str) -> None:
        self._metrics.dead_letters.labels(reason).inc()
        self.trouble("dead_letter", reason=reason, entry_id=entry_id, detail=detail)

    def recovered(self, why: str, count: int) -> None:
        """Entries were taken over, by what had become of their holder."""
        self._metrics.recovered.labels(why).inc(count)
        self._log.say("warning", "recovered", why=why, entries=count)

    # The drain

    def drained(self, ends: Ends, taken_at: datetime, written_at: datetime) -> None:
        """Count materialised entries by result, and how long each had been buffered."""
        for result, count in Counter([result for _, result in ends]).items():
            self._metrics.drained.labels(result).inc(count)
        written_s = written_at.timestamp()
        self._metrics.dwell.observe_all(
            [
                written_s - run.buffered_at.timestamp()
                for run, _ in ends
                if run is not None and run.buffered_at is not None
            ]
        )
        if self.spans is not None:
            with self._traced():
                self.spans.materialised(ends, taken_at, written_at)

    def put_back(self, why: str, count: int) -> None:
        """Entries stay buffered for now, and are taken again."""
        self._metrics.put_back.labels(why).inc(count)

    def committed(self, seconds: float) -> None:
        """Postgres took so long to commit one batch of the drain."""
        self._metrics.commits.observe(seconds)

    def drain_batch_size(self, size: int) -> None:
        self._metrics.drain_batch_size.set(size)

    # What all processes share

    def buffered(self, depth: float, oldest_dwell_s: float, draining: float, stale: float) -> None:
        """The buffer's figures."""
        self._metrics.depth.set(depth)
        self._metrics.oldest_dwell.set(oldest_dwell_s)
        self._metrics.draining.set(draining)
        self._metrics.stale.set(stale)

    def streamed(self, stream: str, consumers: float, waiting: float, pending: float) -> None:
        """A request stream's figures."""
        self._metrics.consumers.labels(stream).set(consumers)
        self._metrics.waiting.labels(stream).set(waiting)
        self._metrics.pending.labels(stream).set(pending)

    def dead_letters_held(self, count: float) -> None:
        self._metrics.dead_letters_held.set(count)

    def figures_unknown(self) -> None:
        """The figures of what is shared are not known any more."""
        self._metrics.forget_shared()

    def found_stale(
        self, entries: int, oldest_dwell_s: float, environments: Sequence[tuple[str, int]]
    ) -> None:
        """Report stale entries, with the environments that have most of them."""
        self.trouble("stale", entries=entries, oldest_dwell_s=oldest_dwell_s, environments=dict(environments))

    def sweeping(self, is_active: bool) -> None:
        self._metrics.sweeping.set(is_active)

    def swept(self, what: str, count: int) -> None:
        """Count what was put in order."""
        self._metrics.swept.labels(what).inc(count)

    def passed(self, result: str) -> None:
        self._metrics.passes.labels(result).inc()

    # The process

    def switched(self, switches: Switches) -> None:
        """The process goes by these switches."""
        self._metrics.switch.labels("enabled").set(switches.enabled)
        self._metrics.switch.labels("shadow_mode").set(switches.shadow_mode)
        self._metrics.switch.labels("drain_paused").set(switches.decided.drain_paused)

    def ready(self, is_ready: bool) -> None:
        self._metrics.ready.set(is_ready)

    def gate_failed(self, error: Exception) -> None:
        self._metrics.gate_failures.inc()
        self.trouble("gate.failed", error=str(error))

    def recall_failed(self, error: Exception) -> None:
        self.trouble("recall.failed", error=str(error))

    def unreachable(self, what: str, error: Exception) -> None:
        self._metrics.unreachable.labels(what).inc()
        self.trouble("unreachable", what=what, error=str(error))

    def diagnosed(self, found: Finding) -> None:
        """Warn of what is configured wrong; each time, for there are several at once."""
        fields = {"check": found.check, "severity": found.level, "seen": found.seen, "remedy": found.remedy}
        self._log.say("warning", "doctor.warning", **fields)

    def event(self, name: str, **fields: Any) -> None:
        """Log something that happens a few times in the life of a process."""
        self._log.say("info", name, **fields)

    def trouble(self, name: str, **fields: Any) -> None:
        """Log something that is wrong and may go on for a while; repeated every few seconds at most."""
        self._log.say_seldom("warning", name, **fields)

    def failed(self, name: str, error: BaseException, **fields: Any) -> None:
        """Log an error that nobody expected, with its stack; one of its kind every few seconds at most."""
        self._log.say_seldom("error", name, type(error).__name__, exc_info=error, **fields)

    def traces_failed(self, error: object) -> None:
        """Spans could not be made or delivered. Also called from the thread that delivers them."""
        self.failed_to_tell("traces")
        self.trouble("traces.failed", error=str(error))

    def failed_to_tell(self, what: str) -> None:
        self._metrics.telemetry_failures.labels(what).inc()

    def summarise(self) -> None:
        """Log what is summed up before it is logged, when it is due."""
        if self._shadowed.total and self._log.is_due("gate.shadow"):
            requests, organizations = self._shadowed.take()
            self._log.say("info", "gate.shadow", requests=requests, organizations=organizations)

    def close(self) -> None:
        """Deliver what has not been yet."""
        self.summarise()
        if self.spans is not None:
            with self._traced():
                self.spans.close()

    @contextmanager
    def _traced(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.traces_failed(error)


def _ages_s(items: Sequence[Item], now_s: float) -> list[float]:
    """How long ago those requests arrived whose producers wait. An id is read once for each millisecond: in a
    storm that would be most of what telemetry costs.
    """
    ages: list[float] = []
    prefix, age_s = "-", 0.0
    for item in items:
        if item.reply_to is None:
            continue
        entry_id = item.entry.id
        if not entry_id.startswith(prefix):
            prefix = entry_id.partition("-")[0] + "-"
            age_s = now_s - item.entry.ms / 1000
        ages.append(age_s)
    return ages

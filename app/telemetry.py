"""Every metric and log event, by name. Metrics are Prometheus', log lines structlog's.

Labels are bounded: an organization is one only when it is enrolled, environments and runs never.
No event carries a payload or a credential.
"""

import logging
import sys
import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan
from typing import Any

import orjson
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.batch import Item
from app.errors import RequestError
from app.settings import Settings
from app.switches import Switches

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_SIZES = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2000, 3000)
_REPEAT_S = 5.0


class Telemetry:
    """What one process tells the world. One registry a process, so tests can have many."""

    def __init__(self, process: str) -> None:
        self.registry = CollectorRegistry()
        self.log: structlog.stdlib.BoundLogger = structlog.get_logger().bind(process=process)
        self._last_said: dict[str, float] = {}
        registry = self.registry
        self._decisions = Counter(
            "mollifier_decisions",
            "Gate decisions, by what became of the request and why.",
            ["outcome", "reason", "enrolled", "organization"],
            registry=registry,
        )
        self._gate_failures = Counter(
            "mollifier_gate_failures",
            "Evaluations of the gate that failed, and so let pass.",
            registry=registry,
        )
        self._replies = Counter(
            "mollifier_replies",
            "Requests that were finished, by code (`run` for a run).",
            ["code"],
            registry=registry,
        )
        self._reply_latency = Histogram(
            "mollifier_reply_seconds",
            "From a request's arrival in the stream to its reply.",
            buckets=_FAST,
            registry=registry,
        )
        self._stages = Histogram(
            "mollifier_stage_seconds",
            "Time of one step on one batch.",
            ["stage"],
            buckets=_FAST,
            registry=registry,
        )
        self._batch_sizes = Histogram(
            "mollifier_batch_size",
            "Requests or rows handled together.",
            ["stage"],
            buckets=_SIZES,
            registry=registry,
        )
        self._claims = Counter(
            "mollifier_claims",
            "Claims of idempotency keys, by what became of them.",
            ["state"],
            registry=registry,
        )
        self._dead_letters = Counter(
            "mollifier_dead_letters", "Requests and entries set aside.", ["reason"], registry=registry
        )
        self._recovered = Counter(
            "mollifier_recovered",
            "Entries taken over, by what had become of their holder.",
            ["why"],
            registry=registry,
        )
        self._unreachable = Counter(
            "mollifier_unreachable",
            "Times that a server did not answer, by what was asked.",
            ["what"],
            registry=registry,
        )
        self._drained = Counter(
            "mollifier_drained",
            "Buffered runs that were materialised, by result.",
            ["result"],
            registry=registry,
        )
        self._dwell = Histogram(
            "mollifier_dwell_seconds",
            "From acceptance into the buffer to the row.",
            buckets=_SLOW,
            registry=registry,
        )
        self._commits = Histogram(
            "mollifier_drain_commit_seconds",
            "Time that Postgres takes to commit one batch of the drain.",
            buckets=_FAST,
            registry=registry,
        )
        self._drain_batch_size = Gauge(
            "mollifier_drain_batch_size",
            "Rows that the drain commits at once; it follows the time of commits.",
            registry=registry,
        )
        self._depth = Gauge(
            "mollifier_buffer_depth", "Entries in the buffer, queued or draining.", registry=registry
        )
        self._oldest_dwell = Gauge(
            "mollifier_buffer_oldest_dwell_seconds",
            "How long the oldest entry has been in the buffer.",
            registry=registry,
        )
        self._draining = Gauge(
            "mollifier_buffer_draining", "Entries that drainers are writing.", registry=registry
        )
        self._stale = Gauge(
            "mollifier_buffer_stale",
            "Entries in the buffer whose dwell is over MOLLIFIER_STALE_THRESHOLD_MS.",
            registry=registry,
        )
        self.buffered()
        self._sweeping = Gauge(
            "mollifier_sweeper_active",
            "1 while this sweeper is the one that works, else 0.",
            registry=registry,
        )
        self._passes = Counter(
            "mollifier_sweeper_passes", "Passes of the sweeper, by result.", ["result"], registry=registry
        )
        self._swept = Counter(
            "mollifier_swept", "What the sweeper put in order, by kind.", ["what"], registry=registry
        )
        self._switch = Gauge(
            "mollifier_switch",
            "1 while a switch is on in this process, else 0.",
            ["switch"],
            registry=registry,
        )
        self._ready = Gauge(
            "mollifier_ready", "1 while the process has what it needs to work, else 0.", registry=registry
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one step on one batch."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._stages.labels(name).observe(time.perf_counter() - started)

    def batch(self, stage: str, size: int) -> None:
        self._batch_sizes.labels(stage).observe(size)

    def decided(self, items: Sequence[Item]) -> None:
        """Count decisions once they stand."""
        counts = Tally(
            (
                decision.outcome.value,
                decision.reason,
                decision.enrolled,
                run.organization_id if decision.enrolled else "",
            )
            for decision, run in ((item.decision, item.run) for item in items if not item.suspended)
            if decision is not None and run is not None
        )
        for (outcome, reason, enrolled, organization), count in counts.items():
            self._decisions.labels(outcome, reason, str(enrolled).lower(), organization).inc(count)

    def gate_failed(self, error: Exception) -> None:
        self._gate_failures.inc()
        self._say("gate.failed", error=str(error))

    def recall_failed(self, error: Exception) -> None:
        self._say("recall.failed", error=str(error))

    def unreachable(self, what: str, error: Exception) -> None:
        self._unreachable.labels(what).inc()
        self._say("unreachable", what=what, error=str(error))

    def claimed(self, states: Mapping[str, int]) -> None:
        """Count claims by what became of them."""
        for state, count in states.items():
            self._claims.labels(state).inc(count)

    def claims_lost(self, count: int) -> None:
        """Count claims that had run out, or were another's, when they were to be ended."""
        if count:
            self._claims.labels("lost").inc(count)

    def responded(self, items: Sequence[Item]) -> None:
        """Count finished requests, and how long their producers waited."""
        now_ms = time.time() * 1000
        for item in items:
            if item.reply_to is not None:
                self._reply_latency.observe(max(0.0, now_ms - item.entry.ms) / 1000)
            if item.dead_letter is not None:
                self.dead_letter(item.dead_letter.reason, item.entry.id, item.dead_letter.detail)
        codes = Tally(
            item.outcome.code if isinstance(item.outcome, RequestError) else "run"
            for item in items
            if item.outcome is not None or item.shown is not None
        )
        for code, count in codes.items():
            self._replies.labels(code).inc(count)

    def dead_letter(self, reason: str, entry_id: str, detail: str) -> None:
        self._dead_letters.labels(reason).inc()
        self._say("dead_letter", reason=reason, entry_id=entry_id, detail=detail)

    def recovered(self, why: str, count: int) -> None:
        self._recovered.labels(why).inc(count)
        self.log.warning("recovered", why=why, entries=count)

    def drained(self, results: Mapping[str, int], dwells_s: Iterable[float]) -> None:
        """Count materialised entries by result, and how long each had been buffered."""
        for result, count in results.items():
            self._drained.labels(result).inc(count)
        for dwell_s in dwells_s:
            self._dwell.observe(max(0.0, dwell_s))

    def committed(self, seconds: float) -> None:
        """Postgres took so long to commit one batch of the drain."""
        self._commits.observe(seconds)

    def drain_batch_size(self, size: int) -> None:
        self._drain_batch_size.set(size)

    def buffered(
        self,
        depth: float = nan,
        oldest_dwell_s: float = nan,
        draining: float = nan,
        stale: float = nan,
    ) -> None:
        """The buffer's figures; without any they are not known (any more)."""
        self._depth.set(depth)
        self._oldest_dwell.set(oldest_dwell_s)
        self._draining.set(draining)
        self._stale.set(stale)

    def found_stale(
        self, entries: int, oldest_dwell_s: float, environments: Sequence[tuple[str, int]]
    ) -> None:
        """Report stale entries, with the environments that have most of them."""
        self._say("stale", entries=entries, oldest_dwell_s=oldest_dwell_s, environments=dict(environments))

    def sweeping(self, is_active: bool) -> None:
        self._sweeping.set(is_active)

    def swept(self, what: str, count: int) -> None:
        """Count what was put in order."""
        self._swept.labels(what).inc(count)

    def passed(self, result: str) -> None:
        self._passes.labels(result).inc()

    def switched(self, switches: Switches) -> None:
        """The process goes by these switches."""
        self._switch.labels("enabled").set(switches.enabled)
        self._switch.labels("shadow_mode").set(switches.shadow_mode)
        self._switch.labels("drain_paused").set(switches.decided.drain_paused)

    def ready(self, is_ready: bool) -> None:
        self._ready.set(is_ready)

    def event(self, name: str, **fields: Any) -> None:
        """Log something that happens a few times in the life of a process."""
        self.log.info(name, **fields)

    def trouble(self, name: str, **fields: Any) -> None:
        """Log something that is wrong and may go on for a while; repeated every few seconds at most."""
        self._say(name, **fields)

    def failed(self, name: str, error: BaseException, **fields: Any) -> None:
        """Log an error that nobody expected, with its stack."""
        self.log.error(name, exc_info=error, **fields)

    def _say(self, name: str, **fields: Any) -> None:
        now = time.monotonic()
        if now - self._last_said.get(name, -_REPEAT_S) >= _REPEAT_S:
            self._last_said[name] = now
            self.log.warning(name, **fields)


def configure_logging(settings: Settings) -> None:
    """One line an event on standard output: JSON, or coloured for people. Libraries' warnings included."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.log_format == "json":
        # Without the variables of a traceback's frames: they hold payloads.
        traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
        rendering: list[Any] = [
            structlog.processors.ExceptionRenderer(traceback),
            structlog.processors.JSONRenderer(serializer=_json),
        ]
    else:
        rendering = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)


def _json(event: Any, **options: Any) -> str:
    return orjson.dumps(event, **options).decode()

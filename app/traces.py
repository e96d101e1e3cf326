"""Spans of runs, by way of OpenTelemetry: the request of a run, and the time that it was buffered.

Both are made when they are over, from what the run itself holds, so nothing is carried along meanwhile, and
what nobody samples costs a look at its `traceparent`. All ids are derived: what is done twice is one span.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from app import run_ids
from app.batch import Answer, Item
from app.errors import RequestError
from app.spans import Ends
from schemas.requests import TraceContext
from schemas.snapshot import Snapshot

REQUEST, BUFFERED = "mollifier.trigger", "mollifier.buffered"

_CLOSE_S = 3.0
_FLAGS = slice(53, 55)
_NO_ROW = ("refused", "dead")

_decode_context = msgspec.json.Decoder(TraceContext).decode


class OtelSpans:
    """Implements `spans.Spans`. Exporter, sampler and queue are set up by the variables `OTEL_*`."""

    def __init__(self, process: str, failed: Callable[[str], None]) -> None:
        """`failed` is called, from any thread, with each complaint of the exporter or its queue."""
        complaints = logging.getLogger("opentelemetry")
        complaints.handlers, complaints.propagate = [_Complaints(failed)], False
        named = Resource.create({SERVICE_NAME: "mollifier", "mollifier.process": process})
        self._ids = _Ids()
        self._provider = TracerProvider(
            resource=named.merge(OTELResourceDetector().detect()),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("mollifier")

    def answered(self, items: Sequence[Item], now_s: float) -> None:
        """See `spans.Spans.answered`."""
        now_ns = int(now_s * 1e9)
        for item in items:
            run = item.run
            if run is None or (origin := _origin(run)) is None:
                continue
            # Producers may write entry ids of any time.
            arrived_ns = min(item.entry.ms * 1_000_000, now_ns)
            span = self._start(REQUEST, SpanKind.CONSUMER, run, run.span_id, origin, arrived_ns)
            if span.is_recording():
                _describe_answer(span, item)
            span.end(now_ns)

    def materialised(self, ends: Ends, taken_at: datetime, written_at: datetime) -> None:
        """See `spans.Spans.materialised`."""
        for run, result in ends:
            if run is None or run.buffered_at is None or (origin := _origin(run)) is None:
                continue
            if not self._is_sampled(run, origin):
                continue
            request = SpanContext(
                int(run.trace_id, 16), int(run.span_id, 16), is_remote=True, trace_flags=TraceFlags(1)
            )
            span = self._start(
                BUFFERED,
                SpanKind.INTERNAL,
                run,
                run_ids.buffered_span_id(run.id),
                set_span_in_context(NonRecordingSpan(request), Context()),
                _ns(run.buffered_at),
            )
            span.set_attributes({"mollifier.result": result, "mollifier.drain.rows": len(ends)})
            span.add_event("taken", timestamp=_ns(taken_at))
            if result in _NO_ROW:
                span.set_status(Status(StatusCode.ERROR))
            span.end(_ns(written_at))

    def close(self) -> None:
        """See `spans.Spans.close`."""
        # A collector that does not answer would hold the process up for half a minute.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def _is_sampled(self, run: Snapshot, origin: Context) -> bool:
        """Whether its request was sampled: samplers decide by the producer's flag and by the trace id."""
        answer = self._provider.sampler.should_sample(origin, int(run.trace_id, 16), REQUEST)
        return answer.decision is Decision.RECORD_AND_SAMPLE

    def _start(
        self, name: str, kind: SpanKind, run: Snapshot, span_id: str, parent: Context, start_ns: int
    ) -> Span:
        self._ids.next = int(run.trace_id, 16), int(span_id, 16)
        span = self._tracer.start_span(name, parent, kind, start_time=start_ns)
        if span.is_recording():
            span.set_attributes(
                {
                    "mollifier.run_id": run_ids.friendly(run.id),
                    "mollifier.organization_id": run.organization_id,
                    "mollifier.environment_id": run.environment_id,
                    "mollifier.task": run.task,
                }
            )
        return span


class _Ids(IdGenerator):
    """Gives the next span the ids that it is to have. One thread makes spans."""

    next = (0, 0)

    def generate_trace_id(self) -> int:
        return self.next[0]

    def generate_span_id(self) -> int:
        return self.next[1]


class _Complaints(logging.Handler):
    """What the library would log, told to `failed` instead."""

    def __init__(self, failed: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._failed = failed

    def emit(self, record: logging.LogRecord) -> None:
        self._failed(record.getMessage())


def _origin(run: Snapshot) -> Context | None:
    """The producer's span, or an empty context when there is none; None when it did not sample its trace."""
    if run.trace_context is None:
        return Context()
    given = _decode_context(run.trace_context)
    if given.traceparent is None or run.parent_span_id is None:
        return Context()
    if not int(given.traceparent[_FLAGS], 16) & TraceFlags.SAMPLED:
        return None
    producer = SpanContext(
        int(run.trace_id, 16),
        int(run.parent_span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([given.tracestate] if given.tracestate else []),
    )
    return set_span_in_context(NonRecordingSpan(producer), Context())


def _describe_answer(span: Span, item: Item) -> None:
    if item.decision is not None:
        span.set_attributes(
            {"mollifier.outcome": item.decision.outcome.value, "mollifier.reason": item.decision.reason}
        )
    span.set_attribute("mollifier.deliveries", item.entry.deliveries)
    if isinstance(item.outcome, Answer):
        span.set_attributes(
            {
                "mollifier.code": "run",
                "mollifier.answer_run_id": run_ids.friendly(item.outcome.run_id),
                "mollifier.is_cached": item.outcome.is_cached,
                "mollifier.is_mollified": item.outcome.is_mollified,
            }
        )
    elif isinstance(item.outcome, RequestError):
        span.set_attribute("mollifier.code", item.outcome.code)
        span.set_status(Status(StatusCode.ERROR, item.outcome.code))


def _ns(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000) * 1000

"""An OpenTelemetry collector that keeps the spans it is sent."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class ReceivedSpan:
    """One span; ids in hexadecimal digits, times in seconds since 1970."""

    process: str
    name: str
    trace_id: str
    span_id: str
    parent_span_id: str
    start: float
    end: float
    attributes: dict[str, Any]
    events: dict[str, float]
    is_error: bool


class Collector:
    """What has arrived so far."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.spans: list[ReceivedSpan] = []

    def of_trace(self, trace_id: str) -> dict[str, ReceivedSpan]:
        """The spans of one trace, by name; none may be there twice."""
        found = [span for span in self.spans if span.trace_id == trace_id]
        assert len({span.name for span in found}) == len(found), found
        return {span.name: span for span in found}

    def receive(self, message: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(message)
        for of_resource in request.resource_spans:
            resource = _attributes(of_resource.resource.attributes)
            assert resource["service.name"] == "mollifier"
            for span in (one for scope in of_resource.scope_spans for one in scope.spans):
                self.spans.append(
                    ReceivedSpan(
                        resource["mollifier.process"],
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano / 1e9,
                        span.end_time_unix_nano / 1e9,
                        _attributes(span.attributes),
                        {event.name: event.time_unix_nano / 1e9 for event in span.events},
                        span.status.code == Status.STATUS_CODE_ERROR,
                    )
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens for as long as the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            collector.receive(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()

"""Spans of runs, at a collector: one trace from the producer to the row, and none where nobody asked."""

import secrets
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.collector import Collector, ReceivedSpan, collecting
from tests.processes import ROOT, TRIPS_AT_TWO, Workers, procfile, staged
from tests.producer import new_environment, request
from tests.waiting import eventually

pytestmark = pytest.mark.one_redis

NOBODY = "http://127.0.0.1:9"
REQUEST, BUFFERED = "mollifier.trigger", "mollifier.buffered"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that all processes of the test send their spans to."""
    with collecting() as one:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", one.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield one


class Caller:
    """A producer's span, as its `traceparent` says it."""

    def __init__(self, *, is_sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.context = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{int(is_sampled):02}"}

    def request(self, environment: str, **fields: Any) -> dict[str, Any]:
        return request(environment, enrolled=True, trace_context=self.context, **fields)


async def arrived(collector: Collector, trace_id: str, *names: str) -> dict[str, ReceivedSpan]:
    """The spans of a trace, once there are all that are named."""

    async def all_there() -> dict[str, ReceivedSpan]:
        spans = collector.of_trace(trace_id)
        assert sorted(spans) == sorted(names)
        return spans

    return await eventually(all_there)


def seconds(at: datetime) -> float:
    return at.astimezone(UTC).timestamp()


async def test_one_trace_from_the_producer_to_the_row(
    collector: Collector, workers: Workers, redis_url: str, database_url: str
) -> None:
    environment, caller = new_environment(), Caller()
    async with staged(workers, "triggers", redis_url, database_url, **TRIPS_AT_TWO) as stage:
        await stage.producer.trip(environment)
        sent = await stage.producer.send(caller.request(environment))
        reply = await stage.producer.reply(sent)
        assert reply["is_mollified"]
        await workers.start_ready("drainer", redis_url, database_url)
        row = await stage.row(environment)
    spans = await arrived(collector, caller.trace_id, REQUEST, BUFFERED)

    asked = spans[REQUEST]
    assert (asked.process, asked.parent_span_id) == ("triggers", caller.span_id)
    assert asked.span_id == row["span_id"] == reply["run"]["span_id"], (
        "the run's span is one that was exported"
    )
    assert row["trace_id"] == caller.trace_id
    assert row["parent_span_id"] == caller.span_id
    assert asked.start == pytest.approx(seconds(row["created_at"]), abs=0.001)
    assert asked.attributes == {
        "mollifier.run_id": row["friendly_id"],
        "mollifier.organization_id": row["organization_id"],
        "mollifier.environment_id": environment,
        "mollifier.task": "send-email",
        "mollifier.outcome": "mollify",
        "mollifier.reason": "per_env_rate",
        "mollifier.deliveries": 1,
        "mollifier.code": "run",
        "mollifier.answer_run_id": row["friendly_id"],
        "mollifier.is_cached": False,
        "mollifier.is_mollified": True,
    }

    waited = spans[BUFFERED]
    assert (waited.process, waited.parent_span_id) == ("drainer", asked.span_id)
    assert asked.start <= waited.start <= asked.end < waited.events["taken"] <= waited.end
    assert waited.start == pytest.approx(seconds(row["buffered_at"]), abs=0.001)
    assert waited.end == pytest.approx(seconds(row["materialised_at"]), abs=0.5)
    assert waited.attributes["mollifier.result"] == "inserted"
    assert waited.attributes["mollifier.drain.rows"] >= 1


async def test_what_the_producer_did_not_sample_has_no_spans(
    collector: Collector, workers: Workers, redis_url: str, database_url: str
) -> None:
    environment, unsampled, sampled = new_environment(), Caller(is_sampled=False), Caller()
    async with staged(workers, "triggers drainer", redis_url, database_url, **TRIPS_AT_TWO) as stage:
        await stage.producer.trip(environment)
        await stage.producer.ask_all([one.request(environment) for one in (unsampled, sampled)])
        await stage.rows(environment, count=2)
    await arrived(collector, sampled.trace_id, REQUEST, BUFFERED)
    assert collector.of_trace(unsampled.trace_id) == {}


@pytest.mark.parametrize("sampler", ["parentbased_always_on", "parentbased_always_off"])
async def test_without_a_producers_span_the_run_begins_a_trace_if_the_sampler_says_so(
    collector: Collector,
    workers: Workers,
    redis_url: str,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    environment, caller = new_environment(), Caller()
    async with staged(workers, "triggers drainer", redis_url, database_url, **TRIPS_AT_TWO) as stage:
        await stage.producer.trip(environment)
        await stage.producer.ask_all([request(environment, enrolled=True), caller.request(environment)])
        rows = await stage.rows(environment, count=2)
    (row,) = (row for row in rows if row["trace_id"] != caller.trace_id)
    await arrived(collector, caller.trace_id, REQUEST, BUFFERED)
    if sampler == "parentbased_always_off":
        assert collector.of_trace(row["trace_id"]) == {}
    else:
        spans = await arrived(collector, row["trace_id"], REQUEST, BUFFERED)
        assert (spans[REQUEST].parent_span_id, spans[REQUEST].span_id) == ("", row["span_id"])


async def test_a_request_that_ends_in_an_error_says_which(
    collector: Collector, workers: Workers, redis_url: str, database_url: str
) -> None:
    caller = Caller()
    async with staged(workers, "triggers", redis_url, database_url) as stage:
        late = caller.request(new_environment(), deadline="2020-01-01T00:00:00Z")
        assert (await stage.producer.ask(late))["error"]["code"] == "deadline_exceeded"
    span = (await arrived(collector, caller.trace_id, REQUEST))[REQUEST]
    assert span.is_error
    assert span.attributes["mollifier.code"] == "deadline_exceeded"


async def test_a_collector_that_is_away_changes_nothing_for_requests(
    workers: Workers, redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted and logged, and does not hold up the end of a process."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOBODY)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    async with staged(workers, "triggers", redis_url, database_url) as stage:
        (worker,) = stage.triggers
        replies = await stage.producer.ask_all([Caller().request(new_environment()) for _ in range(20)])
        assert {reply["type"] for reply in replies} == {"run"}

        async def is_counted() -> None:
            assert await worker.metric("mollifier_telemetry_failures_total", what="traces") > 0

        await eventually(is_counted)
        assert worker.log("traces.failed")
        worker.terminate()
        assert await worker.ended(within_s=8) == 0


NOT_IMPORTED = """
import importlib, sys
from app.settings import Settings
from app.wiring import open_telemetry
importlib.import_module(sys.argv[1])
open_telemetry(Settings.load(), "test")
spans = ("opentelemetry.sdk.trace", "opentelemetry.exporter")
print([name for name in sys.modules if name.startswith(spans)])
"""
"""redis-py imports what there is of metrics, and the API, wherever that is installed."""


@pytest.mark.parametrize("line", sorted(procfile()))
def test_without_an_exporter_what_makes_spans_is_not_even_imported(line: str) -> None:
    assert _python(NOT_IMPORTED, f"workers.{line}").stdout == "[]\n"
    assert _python(NOT_IMPORTED, f"workers.{line}", OTEL_TRACES_EXPORTER="none").stdout == "[]\n"


NOT_INSTALLED = """
import sys
sys.modules["opentelemetry"] = None
from workers.process import run
from workers.triggers import Triggers
run(Triggers)
"""


def test_an_exporter_without_opentelemetry_is_a_clear_error_at_start() -> None:
    done = _python(NOT_INSTALLED, OTEL_TRACES_EXPORTER="otlp")
    assert done.returncode == 1
    assert "pip install 'mollifier[traces]'" in done.stderr
    assert "Traceback" not in done.stderr


def _python(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

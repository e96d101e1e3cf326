"""What a process tells the world: bounded, cheap, and never at the cost of a request."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from structlog.testing import capture_logs

from app.batch import Answer, Decision, Entry, Item, Outcome
from app.decode import decode_trigger
from app.errors import StoreUnavailable
from app.logs import REPEAT_S, Log, Tally
from app.metrics import ORGANIZATIONS, Distribution
from app.settings import Settings
from app.telemetry import Telemetry
from app.validate import build_run
from tests.builders import NOW, START_MS, body, run
from tests.processes import ROOT, TRIPS_AT_TWO, Workers, staged
from tests.producer import new_environment, request
from tests.waiting import eventually

SECRET = "sesame-0f3a"


def decided(organization: str, outcome: Outcome = Outcome.MOLLIFY, *, enrolled: bool = True) -> Item:
    """A request that has its decision."""
    item = Item(Entry(f"{START_MS}-0", {}), run=run(organization_id=organization))
    item.decision = Decision(outcome, "per_env_rate", enrolled)
    return item


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(f"mollifier_{name}", labels)


class TestMetrics:
    def test_a_distribution_shows_what_a_histogram_would(self) -> None:
        bounds, pick = (0.001, 0.5, 1, 2.5), random.Random(1)
        batches = [
            [pick.choice((-3.0, 0.0, 0.5, 1, pick.uniform(0, 4))) for _ in range(50)] for _ in range(20)
        ]
        registries = CollectorRegistry(), CollectorRegistry()
        histogram = Histogram("x", "An x.", buckets=bounds, registry=registries[0])
        distribution = Distribution("x", "An x.", bounds, registries[1])
        for batch in [[], *batches]:
            distribution.observe_all(batch)
            for one in batch:
                histogram.observe(max(0.0, one))
        wanted, shown = (
            {
                (sample.name, *sample.labels.values()): sample.value
                for family in registry.collect()
                for sample in family.samples
                if not sample.name.endswith("_created")
            }
            for registry in registries
        )
        assert shown == pytest.approx(wanted)
        assert b"# TYPE x histogram\n" in generate_latest(registries[1])

    def test_organizations_that_are_a_label_are_bounded(self) -> None:
        telemetry = Telemetry("test")
        for number in range(ORGANIZATIONS + 20):
            telemetry.decided([decided(f"org_{number}")] * 2)
        telemetry.decided([decided("org_0"), decided("org_new"), decided("org_aside", enrolled=False)])
        shown = {
            sample.labels["organization"]: sample.value
            for family in telemetry.registry.collect()
            for sample in family.samples
            if sample.name == "mollifier_decisions_total"
        }
        assert len(shown) == ORGANIZATIONS + 2
        assert (shown["org_0"], shown["org_99"], shown["other"], shown[""]) == (3, 2, 41, 1)

    def test_what_is_known_beforehand_is_shown_before_it_happens(self) -> None:
        """Otherwise the first dead letter would be no rise to whoever looks at rates."""
        telemetry = Telemetry("test")
        assert value(telemetry, "dead_letters_total", reason="deliveries") == 0
        assert value(telemetry, "drained_total", result="inserted") == 0
        assert value(telemetry, "telemetry_failures_total", what="log") == 0

    def test_requests_are_counted_by_whether_they_were_handed_out_before(self) -> None:
        telemetry = Telemetry("test")
        telemetry.received("triggers", [Entry("1-0", {}), Entry("1-1", {}, 2), Entry("1-2", {}, 5)])
        assert value(telemetry, "requests_total", stream="triggers", delivery="first") == 1
        assert value(telemetry, "requests_total", stream="triggers", delivery="again") == 2
        assert value(telemetry, "batch_size_sum", stage="triggers") == 3

    def test_replies_are_counted_by_code_and_those_that_waited_for_a_key_by_time(self) -> None:
        telemetry = Telemetry("test")
        entry = Entry("1-0", {})
        answer = Answer("x", None, None, is_mollified=False)
        telemetry.responded(
            [
                Item(entry, outcome=answer, waiting_since=0.0, reply_to="mollifier:reply:x"),
                Item(entry, outcome=answer),
                Item(entry, outcome=StoreUnavailable(), reply_to="mollifier:reply:x"),
                Item(entry, suspended=True),
            ]
        )
        assert value(telemetry, "replies_total", code="run") == 2
        assert value(telemetry, "replies_total", code="store_unavailable") == 1
        assert value(telemetry, "reply_seconds_count") == 2
        assert value(telemetry, "claim_wait_seconds_count") == 1

    def test_they_cost_a_request_little(self) -> None:
        """A batch of 500 in a storm. Reading a request takes under a quarter of the processor time that a
        trigger worker has for it, so a twelfth of that is under two hundredths of the whole.
        """
        telemetry, settings = Telemetry("test"), Settings.model_construct()
        content = json.dumps(body()).encode()
        entries = [Entry(f"{START_MS + place // 20}-{place}", {b"body": content}) for place in range(500)]
        items = [Item(one, "mollifier:reply:x") for one in entries]

        def read() -> None:
            for item in items:
                request = decode_trigger(item.entry.fields[b"body"], len(content))
                item.run = build_run(item.entry, request, settings)

        def tell() -> None:
            telemetry.received("triggers", entries)
            telemetry.claimed({"claimed": 500})
            telemetry.decided(items)
            telemetry.responded(items)
            for stage in range(11):
                with telemetry.stage(f"stage {stage}"):
                    pass

        read()
        for item in items:
            item.decision = Decision(Outcome.MOLLIFY, "per_env_rate", enrolled=True)
            item.outcome = Answer("x", None, None, is_mollified=True)
        least_s = {work: min(_time(work) for _ in range(200)) for work in (read, tell)}
        print({work.__name__: f"{took * 1e6 / 500:.2f} us" for work, took in least_s.items()})
        assert least_s[tell] < least_s[read] / 12


def _time(work: Callable[[], None]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


class BrokenSpans:
    """Spans that cannot be made."""

    def answered(self, items: object, now_s: float) -> None:
        raise ZeroDivisionError

    def materialised(self, ends: object, taken_at: object, written_at: object) -> None:
        raise ZeroDivisionError

    def close(self) -> None:
        raise ZeroDivisionError


def test_spans_that_cannot_be_made_are_counted_and_nothing_else() -> None:
    telemetry = Telemetry("test")
    telemetry.spans = BrokenSpans()
    with capture_logs() as lines:
        telemetry.responded([Item(Entry("1-0", {}))])
        telemetry.drained([(run(), "inserted")], NOW, NOW)
        telemetry.close()
    assert value(telemetry, "telemetry_failures_total", what="traces") == 3
    assert value(telemetry, "drained_total", result="inserted") == 1
    assert [line["event"] for line in lines] == ["traces.failed"]


class TestLog:
    def test_a_storm_is_said_once_in_a_while_and_says_how_much_was_left_out(self) -> None:
        times = [0.0, 1.0, 2.0, REPEAT_S, REPEAT_S + 1, 3 * REPEAT_S]
        now = iter([time for time in times for _ in ("unreachable", "another")])
        log = Log("test", lambda: None, now.__next__)
        with capture_logs() as lines:
            for _ in times:
                log.say_seldom("warning", "unreachable", what="claims")
                log.say_seldom("warning", "another")
        said = [line.get("left_out") for line in lines if line["event"] == "unreachable"]
        assert said == [None, 2, 1]
        assert len(lines) == 6

    def test_errors_are_limited_by_their_kind(self) -> None:
        with capture_logs() as lines:
            for error in (ValueError("a"), ValueError("b"), KeyError("c")):
                Telemetry("test").failed("batch.failed", error)
            telemetry = Telemetry("test")
            for error in (ValueError("a"), ValueError("b"), KeyError("c")):
                telemetry.failed("batch.failed", error)
        assert [str(line["exc_info"]) for line in lines] == ["a", "b", "'c'", "a", "'c'"]

    def test_who_would_be_mollified_is_named_most_first(self) -> None:
        """Of organizations that are not enrolled, too: they are no label, and it is they who matter here."""
        telemetry = Telemetry("test")
        with capture_logs() as lines:
            telemetry.decided([decided("org_0", Outcome.SHADOW, enrolled=False)])
            for number in range(12):
                items = [decided(f"org_{number}", Outcome.SHADOW, enrolled=number % 2 == 0)] * (number + 1)
                telemetry.decided([*items, decided("org_mollified")])
            telemetry.summarise()
            assert len(lines) == 1, "not again within five seconds"
            telemetry._log._said.clear()
            telemetry.summarise()
            telemetry._log._said.clear()
            telemetry.summarise()
        first, rest = lines
        assert (first["event"], first["organizations"], first["requests"]) == ("gate.shadow", {"org_0": 1}, 1)
        assert rest["requests"] == sum(range(1, 13))
        assert list(rest["organizations"].items()) == [(f"org_{n}", n + 1) for n in range(11, 1, -1)]

    def test_a_tally_is_bounded(self) -> None:
        tally = Tally()
        for number in range(3000):
            tally.add(f"org_{number}", 1)
        tally.add("org_7", 1)
        total, most = tally.take()
        assert (total, list(most.items())[:2]) == (3001, [("other", 2000), ("org_7", 2)])
        assert tally.take() == (0, {})


@pytest.fixture
def broken_pipe() -> Iterator[int]:
    """A file descriptor that nobody reads from any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


class TestProcesses:
    async def test_standard_output_that_nobody_reads_fails_no_request(
        self, workers: Workers, redis_url: str, database_url: str, broken_pipe: int
    ) -> None:
        """Lines are counted as lost, the process works on and leaves in good order."""
        async with staged(workers, "", redis_url, database_url) as stage:
            worker = workers.start_speaking_to(broken_pipe, "triggers", redis_url, database_url)
            await worker.wait_ready()
            bodies = [request(new_environment()) for _ in range(5)]
            replies = await stage.producer.ask_all([*bodies, b"not JSON"])
            assert [reply["type"] for reply in replies] == ["run"] * 5 + ["error"]
            assert await worker.metric("mollifier_telemetry_failures_total", what="log") >= 2
            worker.terminate()
            assert await worker.ended() == 0

    async def test_no_line_and_no_metric_holds_a_payload_or_a_credential(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """Whatever is wrong with a request: too long, refused, poison, buffered, waiting."""
        environment = new_environment()
        options = {"metadata": {"a": SECRET}, "tags": [SECRET], "idempotency_key": SECRET}
        content: dict[str, Any] = {"payload": {"password": SECRET}, "options": options}
        database = database_url.replace("postgresql://postgres@", f"postgresql://postgres:{SECRET}@")
        assert SECRET in database
        async with staged(workers, "triggers drainer sweeper", redis_url, database, **TRIPS_AT_TWO) as stage:
            producer = stage.producer
            await producer.trip(environment)
            bodies: list[object] = [
                request(environment, enrolled=True, **content),
                request(environment, enrolled=True, **content),
                request(environment, **{**content, "options": {**options, "delay": "soon"}}),
                request(environment, **{**content, "options": {**options, "one_time_use_token": SECRET}}),
                request(environment, **content, deadline="2020-01-01T00:00:00Z"),
                json.dumps(request(environment, **content)).encode()[:-20],
            ]
            await producer.ask_all(bodies)
            silent = await producer.send_all(bodies[2:], reply=False)
            await producer.dead_letter(producer.entry_ids[silent[0]])
            await stage.row(environment)
            everything = [*stage.all, *(one for one in workers.started if one.line == "sweeper")]
            pages = [(await worker.get("/metrics"))[1] for worker in everything]
            assert len(pages) == 3
            for text in [*pages, *(worker.text() for worker in everything)]:
                assert text
                assert SECRET not in text

    async def test_what_waits_for_a_key_is_timed(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        async with staged(workers, "triggers", redis_url, database_url, claim_wait_ms=200) as stage:
            (worker,), producer = stage.triggers, stage.producer
            environment = new_environment()
            keyed = request(environment, enrolled=True, options={"idempotency_key": "k"})
            await producer.ask(keyed)
            (claim,) = await producer.redis.keys("*:claim:*")
            await producer.redis.set(claim, "pending:somebody:else")
            await _forget_rows(database_url)
            assert (await producer.ask(keyed))["error"]["code"] == "claim_timed_out"

            async def is_timed() -> None:
                assert await worker.metric("mollifier_claim_wait_seconds_count") == 1
                assert await worker.metric("mollifier_claim_wait_seconds_sum") >= 0.2

            await eventually(is_timed)


async def _forget_rows(database_url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("DELETE FROM mollifier.runs")
    finally:
        await connection.close()


def test_lines_are_json_or_for_people() -> None:
    script = "from app.logs import Log, configure_logging\nfrom app.settings import Settings\n"
    script += "configure_logging(Settings.load()); Log('test', lambda: None).say('info', 'started', port=1)"
    for log_format in ("json", "console"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={"MOLLIFIER_LOG_FORMAT": log_format},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        (line,) = done.stdout.splitlines()
        if log_format == "json":
            said = json.loads(line)
            assert (said["event"], said["level"], said["process"], said["port"]) == (
                "started",
                "info",
                "test",
                1,
            )
        else:
            assert "started" in line
            assert not line.startswith("{")

"""Operations on runs, through real processes, while runs are drained and processes die.

Guarantees G1, G2, G4, G7, G10 to G13. What an operation does to a run in each place that it can be in is in
`test_runs.py`.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from datetime import datetime
from statistics import median
from typing import Any

import asyncpg
import msgspec
import pytest
from faststream.redis import RedisBroker
from redis.asyncio import Redis

from app.embedded import Postgres, Valkey
from app.keys import Keys
from schemas.overlay import decode_overlay
from schemas.replies import Reply as AnyReply
from tests.processes import TRIPS_AT_TWO, Stage, Worker, Workers, staged
from tests.producer import (
    ENVELOPES,
    Producer,
    Reply,
    faststream,
    new_environment,
    operation,
    plain,
    producing,
    request,
)
from tests.test_cli import run as run_command
from tests.waiting import eventually, fetch, runs_of, stays_so

OPERATIONS = "mollifier:operations"
HEARTBEAT_MS = 600
SETTINGS: dict[str, object] = {"heartbeat_ttl_ms": HEARTBEAT_MS, "max_tags": 30, **TRIPS_AT_TWO}

ALL: dict[str, Any] = {
    "idempotency_key": "key",
    "idempotency_key_ttl": "1d",
    "idempotency_key_options": {"key": "k", "scope": "run"},
    "delay": "1h",
    "ttl": "2h",
    "queue": "emails",
    "concurrency_key": "user-7",
    "worker_queue": "main",
    "machine": "small-1x",
    "priority": 3,
    "max_attempts": 4,
    "max_duration": 300,
    "lock_to_version": "20260101.1",
    "test": True,
    "tags": ["one", "two"],
    "metadata": {"count": 1, "list": [1, {"deep": None}]},
    "batch": {"id": "batch_1", "index": 7},
    "replayed_from_run_id": "run_before",
}
PAYLOAD = {"n": [1.5, -0.0, 1e30, 12345678901234567890, None, True], "\u00e9": {"\U0001f30a": "\t\u2028"}}
MAY_CHANGE = {"is_buffered", "materialised_at", "updated_at"}
BYPASSES = {"debounce_key", "debounce_until", "one_time_use_token", "resume_parent_on_completion"}
"""What no buffered run has."""


@pytest.fixture(scope="module")
async def stage(
    shared_redis_url: str, shared_database_url: str, shared_workers: Workers
) -> AsyncIterator[Stage]:
    lines = "triggers operations operations drainer drainer"
    settings = {"drain_batch_size": 20, **SETTINGS}
    async with staged(shared_workers, lines, shared_redis_url, shared_database_url, **settings) as stage:
        yield stage


@pytest.fixture(scope="module")
def operators(stage: Stage, shared_workers: Workers) -> list[Worker]:
    """The stage's operations workers."""
    return [worker for worker in shared_workers.started if worker.line == "operations"][:2]


@contextmanager
def undrained(stage: Stage) -> Iterator[None]:
    """The drainer stands still while the block runs."""
    for drainer in stage.drainers:
        drainer.pause()
    try:
        yield
    finally:
        for drainer in stage.drainers:
            drainer.resume()


async def test_g2_a_run_looks_the_same_before_and_after_it_is_materialised(stage: Stage) -> None:
    producer, environment = stage.producer, new_environment()
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "a=b"}
    await producer.trip(environment)
    parent = (await producer.ask(request(environment, task="trip")))["run"]["friendly_id"]
    options = {**ALL, "parent_run_id": parent}
    body = request(environment, payload=PAYLOAD, payload_type="text/x", options=options, trace_context=trace)
    body["environment"] |= {"type": "STAGING"}
    with undrained(stage):
        triggered = await producer.ask(body)
        run_id = triggered["run"]["friendly_id"]
        before = await producer.operate("run.retrieve", environment, run_id=run_id)
        assert before["type"] == "run_details"
        assert before["run"]["is_buffered"] is True
        assert before["run"]["status"] == "DELAYED"
        assert before["run"]["payload"] == PAYLOAD
    row = await stage.row(environment)
    after = await producer.operate("run.retrieve", environment, run_id=run_id)
    assert after["run"]["is_buffered"] is False
    assert {name for name in after["run"] if after["run"][name] != before["run"][name]} == MAY_CHANGE
    internal = {"revision", "applied", "debounced_at"}
    assert row.keys() - internal == after["run"].keys() - {"is_buffered"}, "every column is shown"
    empty = {name for name, value in after["run"].items() if value in (None, [], 0, False)}
    assert empty == BYPASSES | {"is_buffered", "cancelled_at", "cancel_reason", "error"}, (
        "every option is used"
    )
    for reply in (before, after):
        typed = msgspec.json.decode(json.dumps(reply), type=AnyReply)
        assert json.loads(msgspec.json.encode(typed)) == reply, "others can read it by its schema"


@pytest.mark.parametrize("path", ["passed_through", "buffered"])
async def test_changes(stage: Stage, path: str) -> None:
    producer, environment = stage.producer, new_environment()
    if path == "buffered":
        await producer.trip(environment)
    with undrained(stage):
        triggered = await producer.ask(request(environment, options={"delay": "1h", "tags": ["a"]}))
        run_id = triggered["run"]["friendly_id"]

        async def change(kind: str, **fields: Any) -> dict[str, Any]:
            reply = await producer.operate(kind, environment, run_id=run_id, **fields)
            assert reply["type"] == "run_details", reply
            run: dict[str, Any] = reply["run"]
            assert run["is_buffered"] is (path == "buffered")
            return run

        assert (await change("run.add_tags", tags=["b", "a", "c"]))["tags"] == ["a", "b", "c"]
        assert (await change("run.update_metadata", metadata={"n": 1}))["metadata"] == {"n": 1}
        operations = [
            {"type": "increment", "key": "n", "value": 2},
            {"type": "append", "key": "$.deep.list", "value": "y"},
            {"type": "append", "key": "$.deep.list", "value": "x"},
            {"type": "remove", "key": "$.deep.list", "value": "y"},
            {"type": "set", "key": "gone", "value": True},
            {"type": "delete", "key": "gone"},
        ]
        changed = await change("run.update_metadata", operations=operations, metadata={"loses": True})
        assert (changed["metadata"], changed["metadata_version"]) == ({"n": 3, "deep": {"list": ["x"]}}, 3)
        updated = await change(
            "run.update_metadata", operations=[{"type": "update", "value": {"all": "new"}}]
        )
        assert (updated["metadata"], updated["metadata_version"]) == ({"all": "new"}, 4)
        before = changed["delay_until"]
        assert (await change("run.reschedule", delay="2h"))["delay_until"] > before
        first = await change("run.cancel", reason="first")
        assert (first["status"], first["cancel_reason"]) == ("CANCELED", "first")
        second = await change("run.cancel", reason="second")
        assert (second["cancel_reason"], second["cancelled_at"]) == ("first", first["cancelled_at"])
        refused = await producer.operate("run.add_tags", environment, run_id=run_id, tags=["late"])
        assert refused["error"]["code"] == "run_finished"
    row = await stage.row(environment)
    assert (row["status"], row["cancel_reason"], row["tags"]) == ("CANCELED", "first", ["a", "b", "c"])
    assert (json.loads(row["metadata"]), row["metadata_version"]) == ({"all": "new"}, 4)


async def test_replay_and_list_and_reset(stage: Stage) -> None:
    producer, environment = stage.producer, new_environment()
    await producer.trip(environment)
    with undrained(stage):
        first = await producer.ask(request(environment, options={"idempotency_key": "k", "tags": ["t"]}))
        replayed = await producer.operate("run.replay", environment, run_id=first["run"]["friendly_id"])
        assert (replayed["type"], replayed["is_cached"]) == ("run", False)
        assert replayed["run"]["id"] != first["run"]["id"]
        page = await producer.operate("run.list", environment, tag="t")
        assert [run["id"] for run in page["runs"]] == [replayed["run"]["id"], first["run"]["id"]]
        assert page["runs"][0]["replayed_from_run_id"] == first["run"]["id"]
        reset = {"task": page["runs"][0]["task"], "idempotency_key": "k"}
        freed = await producer.operate("idempotency_key.reset", environment, **reset)
        assert (freed["type"], freed["run_id"]) == ("idempotency_key_reset", first["run"]["id"])
        again = await producer.operate("idempotency_key.reset", environment, **reset)
        assert again["error"]["code"] == "run_not_found"
        second = await producer.ask(request(environment, options={"idempotency_key": "k"}))
        assert second["is_cached"] is False
    await stage.rows(environment, count=3)
    walked: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        page = await producer.operate("run.list", environment, limit=1, task=reset["task"], **cursor)
        walked += [run["id"] for run in page["runs"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert walked == [second["run"]["id"], replayed["run"]["id"], first["run"]["id"]]


async def test_the_command_prints_what_there_is(stage: Stage) -> None:
    """Free-form fields as JSON, if the run has them. The rest of the command is in `test_cli_runs.py`."""
    environment = new_environment()
    triggered = await stage.producer.ask(request(environment, options={"metadata": {"n": 1}}))
    arguments = (
        "get",
        triggered["run"]["friendly_id"],
        "--env",
        environment,
        "--org",
        f"org_of_{environment}",
    )
    done = await asyncio.to_thread(run_command, "runs", *arguments, variables={"REDIS_URL": stage.redis_url})
    shown = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    shown = {name.strip(): text.strip() for name, text in shown.items()}
    assert (done.returncode, shown["metadata"]) == (0, '{"n": 1}')
    assert shown.keys().isdisjoint({"payload", "error", "trace context", "idempotency key options"})


@pytest.mark.parametrize("run_id", ["run_nowhere", "run_" + "x" * 128])
async def test_what_is_not_there(stage: Stage, run_id: str) -> None:
    reply = await stage.producer.operate("run.retrieve", new_environment(), run_id=run_id)
    assert reply["error"]["code"] == "run_not_found"


def increment(run_id: str, environment: str, number: int) -> dict[str, Any]:
    """An operation that leaves its number behind, so that one that was made twice shows."""
    operations = [
        {"type": "increment", "key": "n", "value": 1},
        {"type": "append", "key": "done", "value": number},
    ]
    return operation("run.update_metadata", environment, run_id=run_id, operations=operations)


def outcome(reply: Reply) -> str:
    """What a reply comes to: its type, or its error's code."""
    return str(reply["error"]["code"] if reply["type"] == "error" else reply["type"])


async def persistently(producer: Producer, bodies: Sequence[object]) -> Counter[str]:
    """Send operations again until none is told to try again, as a client does; what was answered."""
    outcomes: Counter[str] = Counter()
    while bodies:
        replies = await producer.operate_all(bodies, within=20)
        outcomes.update(outcome(reply) for reply in replies)
        outcomes["buffered"] += sum(
            reply["type"] == "run_details" and reply["run"]["is_buffered"] for reply in replies
        )
        bodies = [
            body
            for body, reply in zip(bodies, replies, strict=True)
            if reply["type"] == "error" and reply["error"]["retryable"]
        ]
    return outcomes


async def mollified(producer: Producer, environment: str, count: int, **options: Any) -> list[str]:
    """Have so many runs buffered; their friendly ids, in the order in which they were accepted."""
    replies = await producer.ask_all([request(environment, options=options)] * count, within=20)
    assert {reply["is_mollified"] for reply in replies} == {True}
    return [reply["run"]["friendly_id"] for reply in replies]


class TestG2TheSameBeforeAndAfter:
    CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
        ("run.add_tags", {"tags": ["three", "one"]}),
        ("run.update_metadata", {"metadata": {"new": [1.5, "\u00e9", {"deep": None}]}}),
        ("run.update_metadata", {"operations": [{"type": "append", "key": "$.list", "value": 1}]}),
        ("run.reschedule", {"delay": "90m"}),
        ("run.reschedule", {"delay": "2030-01-01T00:00:00.5+02:00"}),
        ("run.reschedule", {"delay": "2020-01-01T00:00:00Z"}),
        ("run.cancel", {"reason": "no longer"}),
        ("run.cancel", {}),
        ("idempotency_key.reset", {"task": "send-email"}),
    )

    async def test_whatever_was_changed(self, stage: Stage) -> None:
        """A run with every option for each change, and one for all of them together, retrieved and listed."""
        producer, environment = stage.producer, new_environment()
        await producer.trip(environment)
        runs: dict[str, Any] = {}
        with undrained(stage):
            for number in range(len(self.CHANGES) + 1):
                options = {**ALL, "idempotency_key": f"key {number}"}
                reply = await producer.ask(request(environment, options=options))
                run_id = reply["run"]["friendly_id"]
                changes = self.CHANGES if number == len(self.CHANGES) else self.CHANGES[number : number + 1]
                for kind, fields in changes:
                    is_reset = kind == "idempotency_key.reset"
                    target = (
                        {"idempotency_key": options["idempotency_key"]} if is_reset else {"run_id": run_id}
                    )
                    changed = await producer.operate(kind, environment, **fields, **target)
                    assert outcome(changed) in ("run_details", "idempotency_key_reset", "run_not_delayed")
                runs[run_id] = (await producer.operate("run.retrieve", environment, run_id=run_id))["run"]
            assert {run["is_buffered"] for run in runs.values()} == {True}
            page = await producer.operate("run.list", environment, task="send-email")
            assert page["runs"] == list(reversed(runs.values()))
        await stage.rows(environment, count=len(runs))
        for run_id, before in runs.items():
            after = (await producer.operate("run.retrieve", environment, run_id=run_id))["run"]
            assert {name for name in after if after[name] != before[name]} == MAY_CHANGE
        page = await producer.operate("run.list", environment, task="send-email")
        assert [
            {name: value for name, value in run.items() if name not in MAY_CHANGE} for run in page["runs"]
        ] == [
            {name: value for name, value in run.items() if name not in MAY_CHANGE}
            for run in reversed(runs.values())
        ]

    async def test_a_run_is_never_missing_while_it_is_drained(self, stage: Stage) -> None:
        producer, environment = stage.producer, new_environment()
        await producer.trip(environment)
        with undrained(stage):
            runs = await mollified(producer, environment, 400)
        places: Counter[bool] = Counter()
        while places[False] < len(runs):
            bodies = [operation("run.retrieve", environment, run_id=run_id) for run_id in runs]
            replies = await producer.operate_all(bodies)
            assert {outcome(reply) for reply in replies} == {"run_details"}
            places = Counter(reply["run"]["is_buffered"] for reply in replies)


class TestG11NoChangeIsLost:
    async def test_50_increments_of_each_of_some_runs_that_are_being_drained(self, stage: Stage) -> None:
        """Two drainers work their way through 400 entries, with those runs among them."""
        producer, environment = stage.producer, new_environment()
        await producer.trip(environment)
        bodies: list[dict[str, Any]] = []
        with undrained(stage):
            runs = (await mollified(producer, environment, 400))[::50]
            for numbers in (range(25), range(25, 50)):
                some = [increment(run_id, environment, number) for run_id in runs for number in numbers]
                bodies += random.Random(7).sample(some, len(some))
            first_half = asyncio.create_task(persistently(producer, bodies[:200]))
            await eventually(lambda: self._has_begun(producer, environment))
        await eventually(lambda: self._is_a_row(stage, environment, runs[0]))
        outcomes = await persistently(producer, bodies[200:]) + await first_half
        rows = {row["friendly_id"]: row for row in await stage.rows(environment, count=400)}
        for run_id in runs:
            metadata = json.loads(rows[run_id]["metadata"])
            assert (metadata["n"], sorted(metadata["done"])) == (50, list(range(50)))
            assert (rows[run_id]["revision"], rows[run_id]["metadata_version"]) == (50, 51)
        assert outcomes["run_details"] == len(bodies)
        assert outcomes.keys() <= {"run_details", "run_busy", "buffered"}
        assert 0 < outcomes["buffered"] < len(bodies), outcomes

    async def _has_begun(self, producer: Producer, environment: str) -> None:
        overlays = Keys("mollifier", 16).environment(environment).overlays
        assert await producer.redis.hlen(overlays) > 0

    async def _is_a_row(self, stage: Stage, environment: str, run_id: str) -> None:
        assert run_id in {row["friendly_id"] for row in await runs_of(stage.database_url, environment)}

    async def test_tags_of_20_clients_while_it_is_drained(self, stage: Stage) -> None:
        producer, environment = stage.producer, new_environment()
        await producer.trip(environment)
        with undrained(stage):
            run_id = (await mollified(producer, environment, 100, tags=["first"]))[50]
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(producing(stage.redis_url)) for _ in range(20)]
            tagging = [
                persistently(
                    client, [operation("run.add_tags", environment, run_id=run_id, tags=[f"t{number}"])]
                )
                for number, client in enumerate(clients)
            ]
            await asyncio.gather(*tagging)
        await stage.rows(environment, count=100)
        shown = (await producer.operate("run.retrieve", environment, run_id=run_id))["run"]
        assert sorted(shown["tags"]) == sorted(["first", *(f"t{number}" for number in range(20))])
        assert shown["tags"][0] == "first"

    @pytest.mark.parametrize(("place", "made"), [("buffered", 50), ("buffered", 240), ("stored", 240)])
    async def test_a_worker_is_killed_between_its_changes_and_their_replies(
        self, stage: Stage, shared_workers: Workers, place: str, made: int
    ) -> None:
        """Of its batch one operation hangs, so none is answered; all of them, or some, are made. Its sibling
        performs the whole batch again, and makes those that are missing."""
        environment, namespace = new_environment(), f"killed-{place}-{made}"
        waits = {"mutate_wait_ms": 20_000, "store_timeout_ms": 30_000}
        settings = {**SETTINGS, **waits, "namespace": namespace}
        redis_url, database_url = stage.redis_url, stage.database_url
        async with staged(
            shared_workers, "triggers operations", redis_url, database_url, **settings
        ) as small:
            producer, victim = small.producer, shared_workers.started[-1]
            hung = (await producer.ask(request(environment, enrolled=False)))["run"]["friendly_id"]
            if place == "buffered":
                await producer.trip(environment)
            replies = await producer.ask_all([request(environment, enrolled=place == "buffered")] * 4)
            runs = [reply["run"]["friendly_id"] for reply in replies]
            bodies = [increment(run_id, environment, number) for number in range(60) for run_id in runs]
            lock = f"SELECT FROM mollifier.runs WHERE friendly_id = '{hung}' FOR UPDATE"
            async with locked(small.database_url, lock):
                bodies.insert(0, increment(hung, environment, 0))
                names = await producer.send_all(bodies, stream=f"{namespace}:operations")
                await eventually(lambda: self._are_made(small, namespace, environment, made))
                victim.kill()
            assert not any(producer.replies[name] for name in names)
            (sibling,) = await shared_workers.start_ready("operations", redis_url, database_url, **settings)
            answers = await producer.all_replies(names)
            assert Counter(outcome(reply) for reply in answers) == {"run_details": len(names)}
            assert await sibling.metric("mollifier_recovered_total", why="holder_gone") == len(names)
            for run_id in runs:
                shown = (await producer.operate("run.retrieve", environment, run_id=run_id))["run"]
                assert shown["is_buffered"] is (place == "buffered")
                assert sorted(shown["metadata"]["done"]) == list(range(60))
                assert (shown["metadata"]["n"], shown["metadata_version"]) == (60, 61)
            shown = (await producer.operate("run.retrieve", environment, run_id=hung))["run"]
            assert shown["metadata"] == {"n": 1, "done": [0]}
            for worker in (*small.triggers, sibling):
                worker.kill()

    async def _are_made(self, small: Stage, namespace: str, environment: str, count: int) -> None:
        overlays = await small.producer.redis.hvals(Keys(namespace, 16).environment(environment).overlays)
        made = sum(decode_overlay(one).revision for one in overlays)
        assert made + sum(row["revision"] for row in await runs_of(small.database_url, environment)) >= count


@asynccontextmanager
async def locked(database_url: str, lock: str) -> AsyncIterator[None]:
    """While the block runs, whoever wants what a statement locks stands still."""
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute(lock, timeout=10)
            yield
    finally:
        await connection.close()


def walls(own: str, run_id: str, organization: str | None = None) -> list[dict[str, Any]]:
    """Every operation on a run, as a tenant asks for it whose it may not be."""
    who: dict[str, Any] = {"environment": own, "organization": organization}
    steps = [{"type": "set", "key": "a", "value": 1}]
    return [
        operation("run.retrieve", **who, run_id=run_id),
        operation("run.cancel", **who, run_id=run_id, reason="mine"),
        operation("run.reschedule", **who, run_id=run_id, delay="1h"),
        operation("run.add_tags", **who, run_id=run_id, tags=["mine"]),
        operation("run.update_metadata", **who, run_id=run_id, metadata={"mine": True}),
        operation("run.update_metadata", **who, run_id=run_id, operations=steps, parent_operations=steps),
        operation("run.replay", **who, run_id=run_id),
        operation("run.list", **who),
        operation("idempotency_key.reset", **who, task="send-email", idempotency_key="secret"),
    ]


class TestG7TenantsAreWalls:
    @pytest.mark.parametrize("whose", ["of another environment", "of another organization"])
    @pytest.mark.parametrize("place", ["buffered", "stored", "materialised", "aliased"])
    async def test_what_is_elsewhere_is_nowhere(
        self, stage: Stage, operators: list[Worker], whose: str, place: str
    ) -> None:
        """To the last byte, in every operation, and in the log."""
        producer, owner, other = stage.producer, new_environment("owner"), new_environment("other")
        asks = (other, None) if whose == "of another environment" else (owner, "org_of_another")
        options = {"idempotency_key": "secret", "tags": ["secret"], "delay": "1h"}
        if place != "stored":
            await producer.trip(owner)
        with undrained(stage) if place == "buffered" else nullcontext():
            triggered = await producer.ask(request(owner, options=options))
            run_id = triggered["run"]["friendly_id"]
            if place != "buffered":
                await stage.rows(owner, count=1)
            if place == "aliased":
                await fetch(
                    stage.database_url,
                    "INSERT INTO mollifier.run_aliases (id, run_id, environment_id) VALUES ($1, $2, $3)",
                    f"alias-{owner}",
                    triggered["run"]["id"],
                    owner,
                )
                run_id = f"run_alias-{owner}"
            before = await producer.operate("run.retrieve", owner, run_id=run_id)
            assert before["type"] == "run_details"
            logged = [worker.text() for worker in operators]
            nowhere, elsewhere = [
                await self._replies(producer, walls(asks[0], asked, asks[1]))
                for asked in ("run_nowhere", run_id)
            ]
            assert elsewhere == nowhere
            codes = [outcome(json.loads(reply)) for reply in elsewhere]
            assert Counter(codes) == {"run_not_found": 8, "run_list": 1}
            assert [worker.text() for worker in operators] == logged
            after = await producer.operate("run.retrieve", owner, run_id=run_id)
            assert after["run"] == before["run"]

    async def _replies(self, producer: Producer, bodies: Sequence[object]) -> list[str]:
        replies = await producer.operate_all(bodies)
        return [json.dumps(reply | {"correlation_id": None}) for reply in replies]

    @pytest.mark.parametrize(
        "run_id",
        [
            "",
            "run_",
            "run_ ",
            "run_a b",
            "run_-a",
            "run_\u00e9",
            "abc",
            "RUN_abc",
            "run_" + "x" * 129,
            "run_../a",
            "%",
            "*",
        ],
    )
    async def test_an_id_that_is_none(self, stage: Stage, run_id: str) -> None:
        bodies = walls(new_environment(), run_id)[:7]
        for reply in await stage.producer.operate_all(bodies):
            assert outcome(reply) in ("invalid_request", "run_not_found")
            assert reply["error"]["message"].startswith("run_id: ")

    @pytest.mark.parametrize(
        "run_id", [None, 7, ["run_a"], {"id": "run_a"}, "run_" + "x" * 300, "x" * 800_000]
    )
    async def test_an_id_of_a_wrong_type_or_size(self, stage: Stage, run_id: Any) -> None:
        for reply in await stage.producer.operate_all(walls(new_environment(), run_id)[:7]):
            assert outcome(reply) == "invalid_request"
            assert reply["error"]["message"].startswith("run_id: ")
            assert len(reply["error"]["message"]) < 200

    async def test_an_id_of_ten_megabytes(self, stage: Stage, operators: list[Worker]) -> None:
        reply = await stage.producer.operate(
            "run.retrieve", new_environment(), run_id="run_" + "x" * 10_000_000
        )
        assert outcome(reply) == "payload_too_large"
        assert [await worker.live() for worker in operators] == [200, 200]


class TestReplay:
    @pytest.mark.parametrize("place", ["buffered", "stored"])
    async def test_a_run_that_has_ended_runs_again(self, stage: Stage, place: str) -> None:
        producer, environment = stage.producer, new_environment()
        if place == "buffered":
            await producer.trip(environment)
        with undrained(stage):
            triggered = await producer.ask(request(environment, options=ALL))
            run_id = triggered["run"]["friendly_id"]
            assert triggered["is_mollified"] is (place == "buffered")
            before = await producer.operate("run.cancel", environment, run_id=run_id, reason="wrong")
            replayed = await producer.operate(
                "run.replay", environment, run_id=run_id, payload={"another": 1}
            )
            assert (replayed["type"], replayed["status"]) == ("run", "QUEUED")
            assert replayed["is_cached"] is False
            new_id = replayed["run"]["friendly_id"]
            shown = (await producer.operate("run.retrieve", environment, run_id=new_id))["run"]
            assert (shown["payload"], shown["replayed_from_run_id"]) == (
                {"another": 1},
                triggered["run"]["id"],
            )
            after = await producer.operate("run.retrieve", environment, run_id=run_id)
            assert after["run"] == before["run"]
        await stage.rows(environment, count=2)

    async def test_handed_out_again_it_is_the_same_run(self, stage: Stage) -> None:
        producer, environment = stage.producer, new_environment()
        original = (await producer.ask(request(environment)))["run"]["friendly_id"]
        for deliveries in (1, 2):
            name = f"replayed {deliveries}"
            body = operation("run.replay", environment, run_id=original)
            await hand_out(producer, name, body, deliveries=deliveries, entry_id="1-1")
        first, second = await producer.all_replies(["replayed 1", "replayed 2"])
        assert first["run"] == second["run"]
        await stage.rows(environment, count=2)


class TestG4ResetKey:
    async def test_in_the_middle_of_the_hand_over(self, stage: Stage) -> None:
        """40 buffered runs with a key each; the keys are reset while two drainers hand the runs over."""
        producer, environment = stage.producer, new_environment()
        await producer.trip(environment)
        keys = [f"k{number}" for number in range(40)]
        bodies = [request(environment, options={"idempotency_key": key}) for key in keys for _ in range(3)]
        with undrained(stage):
            first = await producer.ask_all(bodies)
            assert Counter(reply["is_cached"] for reply in first) == {False: 40, True: 80}
        resets = [
            operation("idempotency_key.reset", environment, task="send-email", idempotency_key=key)
            for key in keys
        ]
        replies = await producer.operate_all(resets)
        assert [reply.get("run_id") for reply in replies] == [reply["run"]["id"] for reply in first[::3]]
        second = await producer.ask_all(bodies)
        assert Counter(reply["is_cached"] for reply in second) == {False: 40, True: 80}
        rows = await stage.rows(environment, count=80)
        found = {row["id"]: row["idempotency_key"] for row in rows}
        assert [found[reply["run"]["id"]] for reply in first[::3]] == [None] * 40
        assert [found[reply["run"]["id"]] for reply in second[::3]] == keys


class TestList:
    async def test_each_run_once_while_2000_are_drained(self, stage: Stage) -> None:
        producer, environment = stage.producer, new_environment()
        await producer.trip(environment)
        with undrained(stage):
            runs = await mollified(producer, environment, 2000)
        places: Counter[bool] = Counter()
        walks = 0
        while not walks or places[True]:
            listed = [run async for run in self._walk(producer, environment, limit=100)]
            assert len(listed) == 2000
            assert {run["friendly_id"] for run in listed} == set(runs)
            order = [(datetime.fromisoformat(run["created_at"]), run["id"]) for run in listed]
            assert order == sorted(order, reverse=True)
            places = Counter(run["is_buffered"] for run in listed)
            walks += 1

    async def _walk(
        self, producer: Producer, environment: str, **asked: Any
    ) -> AsyncIterator[dict[str, Any]]:
        cursor: dict[str, Any] = {}
        while True:
            page = await producer.operate("run.list", environment, task="send-email", **asked, **cursor)
            for run in page["runs"]:
                yield run
            if page["next_cursor"] is None:
                return
            cursor = {"cursor": page["next_cursor"]}


async def hand_out(
    producer: Producer, name: str, body: object, *, deliveries: int, entry_id: str | None = None
) -> str:
    """Make an operation pending as if a consumer had been given it so many times and then died; its id.

    With `entry_id`, under that id, as if it had never been acknowledged.
    """
    fields = plain(json.dumps(body).encode(), producer.channel(name), name)
    ghost = (OPERATIONS, "mollifier", "a-consumer-without-a-heartbeat", 0)
    async with producer.redis.pipeline(transaction=True) as pipeline:
        if entry_id is not None:
            pipeline.delete(OPERATIONS)  # which is empty: no other way to write an id of the past
            pipeline.xadd(OPERATIONS, fields, id=entry_id)
            pipeline.xgroup_create(OPERATIONS, "mollifier", entry_id)
            pipeline.xclaim(*ghost, [entry_id], retrycount=deliveries, force=True, justid=True)
            new_id = entry_id
        else:
            info = await producer.redis.xinfo_stream(OPERATIONS)
            new_id = f"{int(info['last-generated-id'].decode().partition('-')[0]) + 1}-0"
            pipeline.xadd(OPERATIONS, fields, id=new_id)
            pipeline.xreadgroup("mollifier", ghost[2], {OPERATIONS: ">"})
            pipeline.xclaim(*ghost, [new_id], retrycount=deliveries, justid=True)
        await pipeline.execute()
    if entry_id is not None:
        await producer.reply(name)
        await settled(producer)
    return new_id


async def settled(producer: Producer) -> None:
    """Wait until no operation is left, waiting or handed out."""

    async def is_empty() -> None:
        assert await producer.redis.xlen(OPERATIONS) == 0
        assert (await producer.redis.xpending(OPERATIONS, "mollifier"))["pending"] == 0

    await eventually(is_empty)


GOOD: dict[str, Any] = operation("run.retrieve", "env_x", run_id="run_x")

REFUSED: dict[str, tuple[Any, str]] = {
    "no type": ({name: value for name, value in GOOD.items() if name != "type"}, "type: "),
    "unknown type": (GOOD | {"type": "run.delete"}, "type: "),
    "type of a wrong type": (GOOD | {"type": 7}, "type: "),
    "a trigger": (request("env_x"), "type: "),
    "unknown field": (GOOD | {"colour": "red"}, "colour: "),
    "no environment": (GOOD | {"environment": None}, "environment: "),
    "no organization": (GOOD | {"environment": {"id": "env_x"}}, "environment.organization_id: "),
    "no environment id": (GOOD | {"environment": {"organization_id": "o"}}, "environment.id: "),
    "empty environment id": (
        GOOD | {"environment": {"id": "", "organization_id": "o"}},
        "environment.id: ",
    ),
    "unknown field in environment": (
        GOOD | {"environment": {**GOOD["environment"], "x": 1}},
        "environment.x: ",
    ),
    "NUL in environment id": (
        GOOD | {"environment": {"id": "a\0b", "organization_id": "o"}},
        "environment.id: ",
    ),
    "no run id": (operation("run.cancel", "env_x"), "run_id: "),
    "reason too long": (operation("run.cancel", "env_x", run_id="run_x", reason="x" * 1025), "reason: "),
    "reason empty": (operation("run.cancel", "env_x", run_id="run_x", reason=""), "reason: "),
    "NUL in reason": (operation("run.cancel", "env_x", run_id="run_x", reason="\0"), "reason: "),
    "no delay": (operation("run.reschedule", "env_x", run_id="run_x"), "delay: "),
    "delay is none": (operation("run.reschedule", "env_x", run_id="run_x", delay="soon"), "delay: "),
    "delay of a century": (operation("run.reschedule", "env_x", run_id="run_x", delay="5300w"), "delay: "),
    "no tags": (operation("run.add_tags", "env_x", run_id="run_x"), "tags: "),
    "tags no list": (operation("run.add_tags", "env_x", run_id="run_x", tags="a"), "tags: "),
    "an empty tag": (operation("run.add_tags", "env_x", run_id="run_x", tags=["a", ""]), "tags[1]: "),
    "NUL in a tag": (operation("run.add_tags", "env_x", run_id="run_x", tags=["a", "\0"]), "tags[1]: "),
    "neither metadata nor operations": (
        operation("run.update_metadata", "env_x", run_id="run_x"),
        "metadata: ",
    ),
    "no key": (operation("idempotency_key.reset", "env_x", task="t"), "idempotency_key: "),
    "no task": (operation("idempotency_key.reset", "env_x", idempotency_key="k"), "task: "),
    "a list": ([GOOD], "body: "),
    "a null": (None, "body: "),
}


class TestTheWorker:
    """What reaches the operations worker is handled as what reaches the trigger worker. G1, G12, G13."""

    async def test_a_refused_operation_names_its_field(self, stage: Stage) -> None:
        replies = await stage.producer.operate_all([body for body, _ in REFUSED.values()])
        for (case, (_, names)), reply in zip(REFUSED.items(), replies, strict=True):
            assert outcome(reply) == "invalid_request", case
            assert (reply["error"]["status"], reply["error"]["retryable"]) == (400, False)
            assert reply["error"]["message"].startswith(names), f"{case}: {reply['error']['message']}"

    @pytest.mark.parametrize("envelope", ENVELOPES)
    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"\xff", json.dumps(GOOD).encode() + b" and more"],
        ids=["empty", "half", "not UTF-8", "more"],
    )
    async def test_what_is_not_json_is_answered_and_set_aside(
        self, stage: Stage, body: bytes, envelope: Any
    ) -> None:
        (name,) = await stage.producer.send_all([body], envelope=envelope, stream=OPERATIONS)
        assert outcome(await stage.producer.reply(name)) == "invalid_request"
        letter = await stage.producer.dead_letter(stage.producer.entry_ids[name])
        assert (letter["reason"], letter["source"]) == (b"undecodable", OPERATIONS.encode())

    async def test_an_operation_of_a_faststream_program(self, stage: Stage) -> None:
        environment = new_environment()
        run_id = (await stage.producer.ask(request(environment)))["run"]["friendly_id"]
        async with RedisBroker(stage.redis_url) as broker:
            body = operation("run.retrieve", environment, run_id=run_id)
            reply = json.loads((await broker.request(body, stream=OPERATIONS, timeout=10)).body)
        assert (reply["type"], reply["run"]["friendly_id"]) == ("run_details", run_id)
        assert reply["correlation_id"]

    @pytest.mark.parametrize("wrap", [plain, faststream])
    async def test_a_channel_that_may_not_be_replied_on(self, stage: Stage, wrap: Any) -> None:
        """Nothing is said there, and nothing is changed."""
        producer, environment = stage.producer, new_environment()
        run_id = (await producer.ask(request(environment)))["run"]["friendly_id"]
        body = json.dumps(operation("run.cancel", environment, run_id=run_id)).encode()
        async with Redis.from_url(stage.redis_url, protocol=2) as redis, redis.pubsub() as heard:
            await heard.subscribe("mollifier:wake:not")
            assert await heard.get_message(timeout=5)
            entry_id: Any = await redis.xadd(OPERATIONS, wrap(body, "mollifier:wake:not", "1"))
            letter = await producer.dead_letter(entry_id.decode())
            assert letter["reason"] == b"reply_channel"
            await settled(producer)
            assert await heard.get_message(timeout=0.05) is None
        assert (await stage.row(environment))["status"] == "QUEUED"

    async def test_without_a_reply_channel(self, stage: Stage) -> None:
        """What succeeds is done in silence; what fails becomes a dead letter, for nobody can be told."""
        producer, environment = stage.producer, new_environment()
        run_id = (await producer.ask(request(environment)))["run"]["friendly_id"]
        bodies = [
            operation("run.cancel", environment, run_id=run_id),
            operation("run.cancel", environment, run_id="run_nowhere"),
        ]
        cancelled, failed = await producer.send_all(bodies, stream=OPERATIONS, reply=False)
        letter = await producer.dead_letter(producer.entry_ids[failed])
        assert (letter["reason"], letter["detail"][:14]) == (b"unanswerable", b"run_not_found:")
        await settled(producer)
        assert (await stage.row(environment))["status"] == "CANCELED"
        assert producer.replies[cancelled] == producer.replies[failed] == []

    async def test_a_worn_out_operation_is_answered_and_set_aside(self, stage: Stage) -> None:
        """MAX_DELIVERIES is 5: the sixth is one too many."""
        producer, environment = stage.producer, new_environment()
        run_id = (await producer.ask(request(environment)))["run"]["friendly_id"]
        body = operation("run.cancel", environment, run_id=run_id)
        worn_out = await hand_out(producer, "worn out", body, deliveries=5)
        assert outcome(await producer.reply("worn out")) == "internal_error"
        letter = await producer.dead_letter(worn_out)
        assert (letter["reason"], letter["deliveries"]) == (b"deliveries", b"6")
        assert json.loads(letter["body"]) == body
        assert (await stage.row(environment))["status"] == "QUEUED"
        await hand_out(producer, "nearly", body, deliveries=4)
        assert outcome(await producer.reply("nearly")) == "run_details"

    async def test_g13_sigterm_in_a_storm(self, stage: Stage, shared_workers: Workers) -> None:
        """It answers what it was given, leaves the rest to its siblings, and its consumer is gone."""
        producer, environment = stage.producer, new_environment()
        (leaving,) = await shared_workers.start_ready(
            "operations", stage.redis_url, stage.database_url, **SETTINGS
        )
        run_id = (await producer.ask(request(environment)))["run"]["friendly_id"]
        names: list[str] = []
        for number in range(40):
            bodies = [operation("run.retrieve", environment, run_id=run_id)] * 10
            names += await producer.send_all(bodies, stream=OPERATIONS, at_once=False)
            if number == 10:
                leaving.terminate()
        assert {outcome(reply) for reply in await producer.all_replies(names)} == {"run_details"}
        assert await leaving.ended(within_s=10) == 0
        await settled(producer)
        assert {len(producer.replies[name]) for name in names} == {1}
        assert [line for line in leaving.log() if line["level"] not in ("info", "debug")] == []
        consumers = await producer.redis.xinfo_consumers(OPERATIONS, "mollifier")
        assert not [one for one in consumers if f"-{leaving.pid}-" in one["name"].decode()]


class TestOutages:
    """Last, for they disturb the processes that all tests here share."""

    async def test_redis_stands_still(self, stage: Stage, valkey: Valkey) -> None:
        """In the middle of operations, which are answered rightly once it goes on."""
        producer, environment = stage.producer, new_environment()
        stored = (await producer.ask(request(environment, enrolled=False)))["run"]["friendly_id"]
        await producer.trip(environment)
        await eventually(lambda: self._are_rows(stage, environment, 4))
        with undrained(stage):
            (buffered,) = await mollified(producer, environment, 1)
            asked = [stored, buffered, "run_nowhere"] * 20
            bodies = [operation("run.retrieve", environment, run_id=run_id) for run_id in asked]
            async with locked(stage.database_url, "LOCK TABLE mollifier.runs IN ACCESS EXCLUSIVE MODE"):
                names = await producer.send_all(bodies, stream=OPERATIONS)
                await eventually(lambda: self._are_under_way(producer, len(names)))
                valkey.pause()
            await stays_so(lambda: self._are_unanswered(producer, names), for_s=0.5)
            valkey.resume()
            replies = await producer.all_replies(names)
        assert [outcome(reply) for reply in replies] == ["run_details", "run_details", "run_not_found"] * 20

    async def _are_rows(self, stage: Stage, environment: str, count: int) -> None:
        """A drainer that stands still in the middle of a statement would keep its locks."""
        assert len(await runs_of(stage.database_url, environment)) == count

    async def _are_under_way(self, producer: Producer, count: int) -> None:
        assert (await producer.redis.xpending(OPERATIONS, "mollifier"))["pending"] == count

    async def _are_unanswered(self, producer: Producer, names: Sequence[str]) -> None:
        assert not any(producer.replies[name] for name in names)

    async def test_postgres_is_away(self, stage: Stage, postgres: Postgres) -> None:
        """Buffered runs can be read and changed; of what may be a row it is said that nobody knows."""
        producer, environment = stage.producer, new_environment()
        stored = (await producer.ask(request(environment, enrolled=False)))["run"]["friendly_id"]
        await producer.trip(environment)
        with undrained(stage):
            (buffered,) = await mollified(producer, environment, 1)
            postgres.kill()
            for run_id, expected in ((buffered, "run_details"), (stored, "store_unavailable")):
                bodies = [operation("run.retrieve", environment, run_id=run_id)]
                bodies += walls(environment, run_id)[3:5]
                for body in bodies:
                    (reply,) = await producer.operate_all([body])
                    assert outcome(reply) == expected
            unknown = await producer.operate("run.retrieve", environment, run_id="run_nowhere")
            assert outcome(unknown) == "store_unavailable"
            assert outcome(await producer.operate("run.list", environment)) == "store_unavailable"
            postgres.start()
        rows = await stage.rows(environment, count=2)
        assert {row["friendly_id"]: row["tags"] for row in rows} == {stored: [], buffered: ["mine"]}
        shown = await producer.operate("run.retrieve", environment, run_id=buffered)
        assert (shown["run"]["metadata"], shown["run"]["is_buffered"]) == ({"mine": True}, False)

    async def test_a_storm_of_triggers_does_not_delay_operations(
        self, stage: Stage, shared_workers: Workers
    ) -> None:
        producer, environment = stage.producer, new_environment()
        run_id = (await producer.ask(request(environment)))["run"]["friendly_id"]

        async def latency() -> float:
            took = []
            for _ in range(40):
                started = time.perf_counter()
                assert (
                    outcome(await producer.operate("run.retrieve", environment, run_id=run_id))
                    == "run_details"
                )
                took.append(time.perf_counter() - started)
            return median(took)

        idle = await latency()
        bodies = [request(new_environment("storm"))] * 60_000
        await producer.send_all(bodies, reply=False, at_once=False)
        queued = await producer.redis.xlen(producer.stream)
        assert queued > 10_000
        busy = await latency()
        left = await producer.redis.xlen(producer.stream)
        print(f"{idle=:.4f} {busy=:.4f} {queued=} {left=}")
        assert left > 0, "the storm was over too soon"
        assert busy < 10 * idle + 0.1

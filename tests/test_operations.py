"""Operations on runs, through real processes: buffered, stored, aliased, unknown. G7, G10, G11."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.processes import TRIPS_AT_TWO, Stage, Workers, staged
from tests.producer import new_environment, request

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
MAY_CHANGE = {"is_buffered", "materialised_at", "updated_at"}


@pytest.fixture(scope="module")
async def stage(
    shared_redis_url: str, shared_database_url: str, shared_workers: Workers
) -> AsyncIterator[Stage]:
    lines = "triggers operations drainer"
    async with staged(shared_workers, lines, shared_redis_url, shared_database_url, **TRIPS_AT_TWO) as stage:
        yield stage


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
    with undrained(stage):
        triggered = await producer.ask(request(environment, options=options, trace_context=trace))
        run_id = triggered["run"]["friendly_id"]
        before = await producer.operate("run.retrieve", environment, run_id=run_id)
        assert before["type"] == "run_details"
        assert before["run"]["is_buffered"] is True
        assert before["run"]["status"] == "DELAYED"
    await stage.row(environment)
    after = await producer.operate("run.retrieve", environment, run_id=run_id)
    assert after["run"]["is_buffered"] is False
    assert {name for name in after["run"] if after["run"][name] != before["run"][name]} == MAY_CHANGE


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
            {"type": "append", "key": "$.deep.list", "value": "x"},
            {"type": "set", "key": "gone", "value": True},
            {"type": "delete", "key": "gone"},
        ]
        changed = await change("run.update_metadata", operations=operations, metadata={"loses": True})
        assert (changed["metadata"], changed["metadata_version"]) == ({"n": 3, "deep": {"list": ["x"]}}, 3)
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


@pytest.mark.parametrize("run_id", ["run_nowhere", "run_" + "x" * 128])
async def test_what_is_not_there(stage: Stage, run_id: str) -> None:
    reply = await stage.producer.operate("run.retrieve", new_environment(), run_id=run_id)
    assert reply["error"]["code"] == "run_not_found"

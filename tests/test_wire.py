"""The wire, version 1 (DESIGN section 3), spoken to real processes: requests, replies, errors, dead letters.

One set of processes serves the module. An environment passes through when its requests say that it is not
enrolled; it is mollified once it has been tripped, which here takes two triggers and lasts for ever.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from faststream.redis import RedisBroker
from redis.asyncio import Redis

from tests.builders import EVERY_OPTION
from tests.processes import TRIPS_AT_TWO, Stage, Workers, staged
from tests.producer import (
    ENVELOPES,
    TRIGGERS,
    Reply,
    faststream,
    new_environment,
    plain,
    request,
)
from tests.waiting import runs_of

MAX_PAYLOAD = 2_000
MAX_METADATA = 1_000


@pytest.fixture(scope="module")
async def stage(
    shared_redis_url: str, shared_database_url: str, shared_workers: Workers
) -> AsyncIterator[Stage]:
    limits = {"max_payload_bytes": MAX_PAYLOAD, "max_metadata_bytes": MAX_METADATA, "max_tags": 3}
    lines = "triggers triggers drainer"
    async with staged(
        shared_workers, lines, shared_redis_url, shared_database_url, **TRIPS_AT_TWO, **limits
    ) as stage:
        yield stage


def entry_time(entry_id: str) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=int(entry_id.partition("-")[0]))


class TestEnvelopes:
    async def test_the_words_of_redis_cli(self, stage: Stage) -> None:
        """One XADD as `redis-cli` sends it, on a bare socket, and the reply as SUBSCRIBE shows it."""
        address = urlsplit(stage.redis_url)
        channel = f"mollifier:reply:cli:{random.randrange(10**9)}"
        body = json.dumps(request(new_environment(), enrolled=False))
        listening, listener = await asyncio.open_connection(address.hostname, address.port)
        sending, sender = await asyncio.open_connection(address.hostname, address.port)
        async with asyncio.timeout(10):
            listener.write(f"SUBSCRIBE {channel}\r\n".encode())
            assert await _parts(listening) == ["subscribe", channel, 1]
            words = ["XADD", TRIGGERS, "*", "body", body, "reply_to", channel, "correlation_id", "7"]
            command = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
            sender.write(command.encode())
            assert "-" in str(await _part(sending))
            kind, on, message = await _parts(listening)
        listener.close()
        sender.close()
        assert (kind, on) == ("message", channel)
        reply = json.loads(message)
        assert (reply["type"], reply["correlation_id"], reply["status"]) == ("run", "7", "QUEUED")

    async def test_request_of_a_faststream_program(self, stage: Stage) -> None:
        environment = new_environment()
        async with RedisBroker(stage.redis_url) as broker:
            response = await broker.request(request(environment, enrolled=False), stream=TRIGGERS, timeout=10)
            reply = json.loads(response.body)
        assert reply["type"] == "run"
        assert reply["correlation_id"]
        assert (await stage.row(environment))["id"] == reply["run"]["id"]

    async def test_an_error_to_a_faststream_program(self, stage: Stage) -> None:
        async with RedisBroker(stage.redis_url) as broker:
            response = await broker.request({"task": "t"}, stream=TRIGGERS, timeout=10)
        assert json.loads(response.body)["error"]["code"] == "invalid_request"

    @pytest.mark.parametrize("envelope", ENVELOPES)
    async def test_each_by_hand(self, stage: Stage, envelope: Any) -> None:
        environment = new_environment()
        name = await stage.producer.send(request(environment, enrolled=False), envelope=envelope)
        reply = await stage.producer.reply(name)
        assert reply["correlation_id"] == name
        assert (await stage.row(environment))["id"] == reply["run"]["id"]

    async def test_a_reply_without_a_correlation_id(self, stage: Stage) -> None:
        body = json.dumps(request(new_environment(), enrolled=False)).encode()
        await stage.producer.append(plain(body, stage.producer.channel("none"), None))
        assert (await stage.producer.reply("none"))["correlation_id"] is None

    @pytest.mark.parametrize("envelope", ENVELOPES)
    async def test_no_reply_is_sent_when_none_is_asked_for(self, stage: Stage, envelope: Any) -> None:
        environment = new_environment()
        name = await stage.producer.send(request(environment), envelope=envelope, reply=False)
        await stage.row(environment)
        await stage.producer.settled()
        assert stage.producer.replies[name] == []


class TestReplies:
    async def test_of_a_run_that_passed_through(self, stage: Stage) -> None:
        environment = new_environment()
        name = await stage.producer.send(request(environment, enrolled=True))
        reply = await stage.producer.reply(name)
        run_id, span_id = reply["run"]["id"], reply["run"]["span_id"]
        assert reply == {
            "type": "run",
            "correlation_id": name,
            "run": {"id": run_id, "friendly_id": f"run_{run_id}", "span_id": span_id},
            "status": "QUEUED",
            "is_cached": False,
            "is_mollified": False,
        }
        row = await stage.row(environment)
        assert (row["id"], row["friendly_id"], row["span_id"]) == (run_id, f"run_{run_id}", span_id)
        assert row["status"] == "QUEUED"

    async def test_of_a_run_that_was_mollified(self, stage: Stage) -> None:
        environment = new_environment()
        await stage.producer.trip(environment)
        name = await stage.producer.send(request(environment))
        reply = await stage.producer.reply(name)
        run_id, span_id, notice = reply["run"]["id"], reply["run"]["span_id"], reply["notice"]
        assert reply == {
            "type": "run",
            "correlation_id": name,
            "run": {"id": run_id, "friendly_id": f"run_{run_id}", "span_id": span_id},
            "status": "QUEUED",
            "is_cached": False,
            "is_mollified": True,
            "notice": {"code": "mollifier.queued", "message": notice["message"], "docs": notice["docs"]},
        }
        row = await stage.row(environment)
        assert (row["id"], row["friendly_id"], row["span_id"]) == (run_id, f"run_{run_id}", span_id)

    @pytest.mark.parametrize("path", ["passed_through", "mollified"])
    async def test_of_a_delayed_run(self, stage: Stage, path: str) -> None:
        environment = new_environment()
        if path == "mollified":
            await stage.producer.trip(environment)
        reply = await stage.producer.ask(request(environment, options={"delay": "1h"}))
        assert reply["status"] == "DELAYED"
        assert reply["is_mollified"] is (path == "mollified")
        assert (await stage.row(environment))["status"] == "DELAYED"

    async def test_of_an_error(self, stage: Stage) -> None:
        name = await stage.producer.send(request(new_environment(), options={"delay": "soon"}))
        reply = await stage.producer.reply(name)
        message = reply["error"]["message"]
        assert message.startswith("options.delay: ")
        assert reply == {
            "type": "error",
            "correlation_id": name,
            "error": {"code": "invalid_request", "message": message, "status": 400, "retryable": False},
        }


def with_environment(**fields: object) -> dict[str, Any]:
    body = request("env_x")
    body["environment"] |= fields
    return body


def without(name: str, of: str | None = None) -> dict[str, Any]:
    body = request("env_x")
    del (body if of is None else body[of])[name]
    return body


def options(**given: object) -> dict[str, Any]:
    return request("env_x", options=given)


LONG = "x" * 5_000

REFUSED = {
    "unknown field": (request("env_x", colour="red"), "colour:"),
    "unknown field in environment": (with_environment(secret="s"), "environment.secret:"),
    "unknown option": (options(priorty=1), "options.priorty:"),
    "unknown field two levels down": (
        options(debounce={"key": "k", "delay": "1s", "edge": "leading"}),
        "options.debounce.edge:",
    ),
    "task missing": (without("task"), "task:"),
    "environment missing": (without("environment"), "environment:"),
    "environment id missing": (without("id", of="environment"), "environment.id:"),
    "organization missing": (without("organization_id", of="environment"), "environment.organization_id:"),
    "project missing": (without("project_id", of="environment"), "environment.project_id:"),
    "task of a wrong type": (request("env_x", task=7), "task:"),
    "task empty": (request("env_x", task=""), "task:"),
    "environment id empty": (with_environment(id=""), "environment.id:"),
    "environment id null": (with_environment(id=None), "environment.id:"),
    "environment type unknown": (with_environment(type="MOON"), "environment.type:"),
    "flag of a wrong type": (
        with_environment(feature_flags={"mollifier_enabled": "yes"}),
        "environment.feature_flags.mollifier_enabled:",
    ),
    "priority of a wrong type": (options(priority="high"), "options.priority:"),
    "priority too large": (options(priority=2**40), "options.priority:"),
    "max_attempts zero": (options(max_attempts=0), "options.max_attempts:"),
    "max_duration a fraction": (options(max_duration=1.5), "options.max_duration:"),
    "test of a wrong type": (options(test="true"), "options.test:"),
    "tags no list": (options(tags="a"), "options.tags:"),
    "tag of a wrong type": (options(tags=["a", 2]), "options.tags"),
    "batch index negative": (options(batch={"id": "b", "index": -1}), "options.batch.index:"),
    "scope unknown": (
        options(idempotency_key_options={"key": "k", "scope": "moon"}),
        "options.idempotency_key_options.scope:",
    ),
    "delay is no duration": (options(delay="10 minutes"), "options.delay:"),
    "delay out of order": (options(delay="5m2h"), "options.delay:"),
    "delay without a time zone": (options(delay="2030-01-01T00:00:00"), "options.delay:"),
    "delay of a century": (options(delay="5300w"), "options.delay:"),
    "ttl is no duration": (options(ttl="1y"), "options.ttl:"),
    "ttl negative": (options(ttl=-1), "options.ttl:"),
    "ttl zero": (options(ttl=0), "options.ttl:"),
    "key ttl is no duration": (
        options(idempotency_key="k", idempotency_key_ttl="ever"),
        "options.idempotency_key_ttl:",
    ),
    "debounce delay is no duration": (
        options(debounce={"key": "k", "delay": "x"}),
        "options.debounce.delay:",
    ),
    "deadline is no instant": (request("env_x", deadline="tomorrow"), "deadline:"),
    "deadline without a time zone": (request("env_x", deadline="2030-01-01T00:00:00"), "deadline:"),
    "traceparent is none": (
        request("env_x", trace_context={"traceparent": "here"}),
        "trace_context.traceparent:",
    ),
    "run id without its prefix": (options(run_id="abc"), "options.run_id:"),
    "run id with a blank": (options(run_id="run_a b"), "options.run_id:"),
    "parent id without its prefix": (options(parent_run_id="abc"), "options.parent_run_id:"),
    "NUL in task": (request("env_x", task="a\0b"), "task:"),
    "NUL in environment id": (with_environment(id="a\0b"), "environment.id:"),
    "NUL in a tag": (options(tags=["a", "b\0"]), "options.tags"),
    "NUL in a key": (options(idempotency_key="k\0"), "options.idempotency_key:"),
    "NUL in metadata": (options(metadata={"a": ["\0"]}), "options.metadata:"),
    "NUL in a name of metadata": (options(metadata={"\0": 1}), "options.metadata:"),
    "metadata no object": (options(metadata=[1]), "options.metadata:"),
    "task too long": (request("env_x", task=LONG), "task:"),
    "environment id too long": (with_environment(id=LONG), "environment.id:"),
    "payload type too long": (request("env_x", payload_type=LONG), "payload_type:"),
    "queue too long": (options(queue=LONG), "options.queue:"),
    "tag too long": (options(tags=[LONG]), "options.tags"),
    "key too long": (options(idempotency_key=LONG), "options.idempotency_key:"),
    "run id too long": (options(run_id="run_" + "a" * 200), "options.run_id:"),
    "a list": ([1, 2], "body:"),
    "a null": (None, "body:"),
}


class TestErrors:
    """Every code that a trigger can meet here; the others are in test_guarantees and test_failures."""

    async def test_a_refused_request_names_its_field(self, stage: Stage) -> None:
        replies = await stage.producer.ask_all([body for body, _ in REFUSED.values()])
        for (case, (_, names)), reply in zip(REFUSED.items(), replies, strict=True):
            assert reply["type"] == "error", f"{case}: {reply}"
            error = reply["error"]
            assert (error["code"], error["status"], error["retryable"]) == ("invalid_request", 400, False), (
                case
            )
            assert error["message"].startswith(names), f"{case}: {error['message']}"
            assert LONG not in error["message"]
        assert await runs_of(stage.database_url, "env_x") == []

    @pytest.mark.parametrize(
        ("given", "code", "status", "names"),
        [
            ({"payload": "x" * MAX_PAYLOAD}, "payload_too_large", 413, "payload"),
            (
                {"options": {"metadata": {"a": "x" * MAX_METADATA}}},
                "metadata_too_large",
                413,
                "options.metadata",
            ),
            ({"options": {"tags": ["a", "b", "c", "d"]}}, "too_many_tags", 422, "options.tags"),
            ({"deadline": "2020-01-01T00:00:00Z"}, "deadline_exceeded", 408, "deadline"),
        ],
    )
    async def test_limits(self, stage: Stage, given: Any, code: str, status: int, names: str) -> None:
        environment = new_environment()
        error = (await stage.producer.ask(request(environment, **given)))["error"]
        assert (error["code"], error["status"], error["retryable"]) == (code, status, False)
        assert error["message"].startswith(names)
        assert await runs_of(stage.database_url, environment) == []

    async def test_what_just_keeps_the_limits(self, stage: Stage) -> None:
        environment = new_environment()
        given: dict[str, Any] = {
            "payload": "x" * (MAX_PAYLOAD - 2),
            "options": {"metadata": {"a": "x" * (MAX_METADATA - 10)}, "tags": ["a", "b", "c"]},
            "deadline": (datetime.now(UTC) + timedelta(minutes=1)).isoformat(),
        }
        assert (await stage.producer.ask(request(environment, **given)))["type"] == "run"

    async def test_a_body_larger_than_any_request(self, stage: Stage) -> None:
        error = (await stage.producer.ask(request("env_x", payload="x" * 1_000_000)))["error"]
        assert (error["code"], error["status"]) == ("payload_too_large", 413)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"not json",
            b'{"task": "\xff"}',
            json.dumps(request("env_x")).encode() + b" and more",
            b"\x00",
        ],
        ids=["empty", "half", "words", "not UTF-8", "more", "NUL"],
    )
    @pytest.mark.parametrize("envelope", ENVELOPES)
    async def test_what_is_not_json_is_answered_and_set_aside(
        self, stage: Stage, body: bytes, envelope: Any
    ) -> None:
        name = await stage.producer.send(body, envelope=envelope)
        error = (await stage.producer.reply(name))["error"]
        assert (error["code"], error["status"]) == ("invalid_request", 400)
        letter = await stage.producer.dead_letter(stage.producer.entry_ids[name])
        assert letter["reason"] == b"undecodable"

    async def test_an_entry_without_a_body_is_answered(self, stage: Stage) -> None:
        await stage.producer.append({"reply_to": stage.producer.channel("nb"), "correlation_id": "nb"})
        reply = await stage.producer.reply("nb")
        assert reply["error"]["code"] == "invalid_request"
        assert reply["error"]["message"].startswith("body:")

    async def test_a_full_buffer(self, stage: Stage, shared_workers: Workers) -> None:
        environment = new_environment()
        settings = {"namespace": "full", "max_buffered_per_env": 2, **TRIPS_AT_TWO}
        async with staged(
            shared_workers, "triggers", stage.redis_url, stage.database_url, **settings
        ) as small:
            replies = await small.producer.ask_all([request(environment)] * 5)
            small.triggers[0].kill()
        assert [reply.get("is_mollified") for reply in replies] == [False, True, True, None, None]
        error = replies[4]["error"]
        assert (error["code"], error["status"], error["retryable"]) == ("queue_limit_exceeded", 429, True)


class TestDeadLetters:
    """DESIGN section 3.4."""

    async def test_hold_the_entry_and_the_reason(self, stage: Stage) -> None:
        body = json.dumps(options(delay="soon")).encode()
        entry_id = await stage.producer.append({"body": body, "correlation_id": "9", "note": b"\xff\x00"})
        letter = await stage.producer.dead_letter(entry_id)
        assert letter.pop("detail").startswith(b"invalid_request: options.delay: ")
        at = datetime.fromisoformat(letter.pop("at").decode())
        assert timedelta() <= at - entry_time(entry_id) + timedelta(milliseconds=2) < timedelta(seconds=10)
        assert letter == {
            "source": TRIGGERS.encode(),
            "id": entry_id.encode(),
            "reason": b"unanswerable",
            "deliveries": b"1",
            "body": body,
            "correlation_id": b"9",
            "note": b"\xff\x00",
        }

    async def test_leave_nothing_behind(self, stage: Stage) -> None:
        await stage.producer.dead_letter(await stage.producer.append({"body": b"{}"}))
        await stage.producer.settled()

    @pytest.mark.parametrize(
        "binary",
        [
            b"",
            b"\x89BIN\r\n\x1a\n",
            b"\x89BIN\r\n\x1a\n\x00\x01\x00\x00\x00\x12\x00\x00\x00\x14\x00\x05",
            b"\x89BIN\r\n\x1a\n\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x89BIN\r\n\x1a\n\x00\x02\x00\x00\x00\x12\x00\x00\x00\x14\x00\x00{}",
            b'{"data": "{}", "headers": {}}',
        ],
        ids=["empty", "no head", "cut off", "offsets beyond the end", "version 2", "another format"],
    )
    async def test_a_broken_faststream_envelope(self, stage: Stage, binary: bytes) -> None:
        letter = await stage.producer.dead_letter(await stage.producer.append({"__data__": binary}))
        assert letter["reason"] == b"undecodable"
        assert letter["__data__"] == binary

    @pytest.mark.parametrize("wrap", [plain, faststream])
    @pytest.mark.parametrize(
        "channel",
        ["elsewhere", "mollifier:reply:", "mollifier:reply:" + "x" * 201, "mollifier:wake", "a" * 23],
        ids=["other", "prefix only", "too long", "one of ours", "23 letters"],
    )
    async def test_a_channel_that_may_not_be_replied_on(self, stage: Stage, wrap: Any, channel: str) -> None:
        """Nothing is published there, no run is made, and the request is kept."""
        environment = new_environment()
        async with Redis.from_url(stage.redis_url, protocol=2) as redis, redis.pubsub() as heard:
            await heard.subscribe(channel)
            assert await heard.get_message(timeout=5)
            for body in (json.dumps(request(environment)).encode(), b"not json"):
                entry_id = await stage.producer.append(wrap(body, channel, "1"))
                letter = await stage.producer.dead_letter(entry_id)
                assert letter["reason"] in (b"reply_channel", b"undecodable")
            await stage.producer.settled()
            assert await heard.get_message(timeout=0.05) is None
        assert await runs_of(stage.database_url, environment) == []

    async def test_channels_that_may(self, stage: Stage) -> None:
        body = json.dumps(request(new_environment())).encode()
        for channel in ("mollifier:reply:" + "é" * 200, "Ab3" * 7 + "z"):
            async with Redis.from_url(stage.redis_url, protocol=2) as redis, redis.pubsub() as heard:
                await heard.subscribe(channel)
                assert await heard.get_message(timeout=5)
                await stage.producer.append(plain(body, channel, "1"))
                message = await heard.get_message(timeout=5)
                assert message is not None, channel
                assert json.loads(message["data"])["type"] == "run"


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MAY_DIFFER = ("buffered_at", "materialised_at", "updated_at")


class TestRows:
    @pytest.mark.parametrize("path", ["passed_through", "mollified"])
    async def test_every_column(self, stage: Stage, path: str) -> None:
        environment = new_environment()
        if path == "mollified":
            await stage.producer.trip(environment)
        run_id = f"mine-{environment}"
        body = request(
            environment,
            payload={"to": "a@b.c"},
            payload_type="application/super+json",
            options={**EVERY_OPTION, "run_id": f"run_{run_id}"},
            trace_context={"traceparent": TRACEPARENT, "tracestate": "a=1"},
        )
        body["environment"]["type"] = "STAGING"
        name = await stage.producer.send(body)
        reply = await stage.producer.reply(name)
        assert reply["is_mollified"] is (path == "mollified")
        created_at = entry_time(stage.producer.entry_ids[name])

        row = await stage.row(environment)

        buffered_at, materialised_at, updated_at = (row.pop(column) for column in MAY_DIFFER)
        if path == "mollified":
            assert created_at <= buffered_at <= materialised_at
        else:
            assert buffered_at is None
        assert created_at <= materialised_at <= updated_at
        for column in ("metadata", "idempotency_key_options", "trace_context"):
            row[column] = json.loads(row[column])
        assert row == {
            "id": run_id,
            "friendly_id": f"run_{run_id}",
            "organization_id": f"org_of_{environment}",
            "project_id": f"proj_of_{environment}",
            "environment_id": environment,
            "environment_type": "STAGING",
            "task": "send-email",
            "status": "DELAYED",
            "payload": b'{"to": "a@b.c"}',
            "payload_type": "application/super+json",
            "metadata": {"any": ["json", 1, None]},
            "metadata_version": 1,
            "tags": ["b", "a", "é"],
            "idempotency_key": "order-42",
            "idempotency_key_expires_at": created_at + timedelta(hours=24),
            "idempotency_key_options": {"key": "order", "scope": "attempt"},
            "delay_until": created_at + timedelta(hours=2, minutes=30),
            "ttl_seconds": 86_400,
            "expires_at": created_at + timedelta(days=1),
            "queue": "emails",
            "concurrency_key": "user-7",
            "worker_queue": "main",
            "machine": "small-1x",
            "priority": -3,
            "max_attempts": 3,
            "max_duration": 300,
            "locked_to_version": "20260101.1",
            "is_test": True,
            "depth": 0,
            "parent_run_id": None,
            "root_run_id": None,
            "resume_parent_on_completion": False,
            "batch_id": "batch_1",
            "batch_index": 4,
            "debounce_key": None,
            "debounce_until": None,
            "debounced_at": None,
            "revision": 0,
            "applied": [],
            "one_time_use_token": None,
            "replayed_from_run_id": "old",
            "trace_id": TRACEPARENT[3:35],
            "span_id": reply["run"]["span_id"],
            "parent_span_id": TRACEPARENT[36:52],
            "trace_context": {"traceparent": TRACEPARENT, "tracestate": "a=1"},
            "cancelled_at": None,
            "cancel_reason": None,
            "error": None,
            "created_at": created_at,
        }

    @pytest.mark.parametrize("path", ["passed_through", "mollified"])
    async def test_a_request_without_any_option(self, stage: Stage, path: str) -> None:
        environment = new_environment()
        if path == "mollified":
            await stage.producer.trip(environment)
        name = await stage.producer.send(request(environment))
        assert (await stage.producer.reply(name))["is_mollified"] is (path == "mollified")
        row = await stage.row(environment)
        assert row["created_at"] == entry_time(stage.producer.entry_ids[name])
        given = {column: value for column, value in row.items() if value not in (None, False, 0, [])}
        assert given.keys() - set(MAY_DIFFER) == {
            *("id", "friendly_id", "organization_id", "project_id", "environment_id", "environment_type"),
            *("task", "status", "payload_type", "metadata_version", "trace_id", "span_id", "created_at"),
        }
        assert (row["environment_type"], row["status"]) == ("PRODUCTION", "QUEUED")
        assert row["payload_type"] == "application/json"

    @pytest.mark.parametrize("path", ["passed_through", "mollified"])
    @pytest.mark.parametrize(
        "payload",
        [
            b'{ "b" : 1.0,\t"a":[ ], "a": -0, "n":12345678901234567890,\n"e":1e400, "u":"\\u00e9\xc3\xa9" }',
            b'"\\u0000 \\ud83d\\ude00 \xf0\x9f\x98\x80 \\/"',
            b"null",
            b"3.10",
        ],
        ids=["object", "text", "null", "number"],
    )
    async def test_the_payload_is_kept_byte_for_byte(self, stage: Stage, path: str, payload: bytes) -> None:
        environment = new_environment()
        if path == "mollified":
            await stage.producer.trip(environment)
        body = json.dumps(request(environment, payload="HERE")).encode().replace(b'"HERE"', payload)
        reply = await stage.producer.reply(await stage.producer.send(body))
        assert reply.get("is_mollified") is (path == "mollified"), reply
        assert (await stage.row(environment))["payload"] == payload

    @pytest.mark.parametrize(
        ("instant", "expected"),
        [
            ("2031-02-03T04:05:06Z", datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)),
            ("2031-02-03T04:05:06.5+02:00", datetime(2031, 2, 3, 2, 5, 6, 500_000, tzinfo=UTC)),
        ],
    )
    async def test_a_delay_may_be_an_instant(self, stage: Stage, instant: str, expected: datetime) -> None:
        environment = new_environment()
        reply = await stage.producer.ask(request(environment, options={"delay": instant}))
        assert reply["status"] == "DELAYED"
        assert (await stage.row(environment))["delay_until"] == expected

    async def test_a_delay_in_the_past_does_not_delay(self, stage: Stage) -> None:
        environment = new_environment()
        body = request(environment, options={"delay": "2020-01-01T00:00:00Z"})
        assert (await stage.producer.ask(body))["status"] == "QUEUED"
        assert (await stage.row(environment))["status"] == "QUEUED"


class TestBatches:
    """One transaction of a producer reaches a worker as one batch."""

    async def test_bad_entries_disturb_nobody(self, stage: Stage) -> None:
        environment, tripped = new_environment("pass"), new_environment("trip")
        await stage.producer.trip(tripped)
        bodies: list[Any] = []
        for number in range(20):
            bodies.append(request(environment, enrolled=False, task=f"t{number}"))
            bodies.append([b"{", b"", options(delay="x"), options(nope=1), b"[" * 5_000][number % 5])
            bodies.append(request(tripped, task=f"t{number}"))
        before = [await worker.metric("mollifier_recovered_total") for worker in stage.triggers]
        replies = await stage.producer.ask_all(bodies)
        assert [reply["type"] for reply in replies] == ["run", "error", "run"] * 20
        after = [await worker.metric("mollifier_recovered_total") for worker in stage.triggers]
        assert before == after, "somebody had to be handed out again"
        assert {reply["error"]["code"] for reply in replies[1::3]} == {"invalid_request"}
        for one, position in ((environment, 0), (tripped, 2)):
            expected = {reply["run"]["id"]: f"t{n}" for n, reply in enumerate(replies[position::3])}
            rows = await stage.rows(one, count=20)
            assert {row["id"]: row["task"] for row in rows} == expected

    async def test_their_order_changes_nothing(self, stage: Stage) -> None:
        """Whoever is accepted is accepted in any order, and every error stays what it is."""
        kinds: dict[str, Any] = {
            "good": {},
            "good too": {"payload": {"a": 1}},
            "delayed": {"options": {"delay": "1h"}},
            "tagged": {"options": {"tags": ["x"]}},
            "late": {"deadline": "2020-01-01T00:00:00Z"},
            "unknown": {"colour": 1},
            "tags": {"options": {"tags": list("abcd")}},
            "large": {"payload": "x" * MAX_PAYLOAD},
            "ttl": {"options": {"ttl": "never"}},
        }
        orders = [list(kinds), list(reversed(kinds)), *itertools.islice(_shuffled(list(kinds)), 4)]
        outcomes = []
        for order in orders:
            environment = new_environment()
            replies = await stage.producer.ask_all(
                [request(environment, enrolled=False, **kinds[kind]) for kind in order]
            )
            outcomes.append({kind: _outcome(reply) for kind, reply in zip(order, replies, strict=True)})
            rows = await runs_of(stage.database_url, environment)
            assert {row["id"] for row in rows} == {r["run"]["id"] for r in replies if r["type"] == "run"}
        assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
        assert outcomes[0] == {
            "good": "QUEUED",
            "good too": "QUEUED",
            "delayed": "DELAYED",
            "tagged": "QUEUED",
            "late": "deadline_exceeded",
            "unknown": "invalid_request",
            "tags": "too_many_tags",
            "large": "payload_too_large",
            "ttl": "invalid_request",
        }

    async def test_both_envelopes_and_many_producers_at_once(self, stage: Stage) -> None:
        environments = [new_environment() for _ in range(5)]
        bodies = [request(one, enrolled=False) for one in environments for _ in range(40)]
        names = await asyncio.gather(
            stage.producer.send_all(bodies, envelope="plain"),
            stage.producer.send_all(bodies, envelope="faststream"),
        )
        replies = await stage.producer.all_replies([*names[0], *names[1]])
        rows = await runs_of(stage.database_url, *environments)
        assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}
        assert len(rows) == 400
        await stage.producer.settled()
        assert {len(stage.producer.replies[name]) for name in [*names[0], *names[1]]} == {1}


async def _part(reading: asyncio.StreamReader) -> Any:
    """One value of RESP 2: a bulk string or an integer."""
    line = await reading.readline()
    if line.startswith(b":"):
        return int(line[1:])
    return (await reading.readexactly(int(line[1:]) + 2))[:-2].decode()


async def _parts(reading: asyncio.StreamReader) -> list[Any]:
    return [await _part(reading) for _ in range(int((await reading.readline())[1:]))]


def _outcome(reply: Reply) -> str:
    return str(reply["status"] if reply["type"] == "run" else reply["error"]["code"])


def _shuffled(kinds: list[str]) -> Any:
    seeded = random.Random(7)
    while True:
        yield seeded.sample(kinds, len(kinds))

"""The Python client: on real workers, and on a worker that the test plays itself, reply by reply."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from app import errors, run_ids
from app.client import Mollifier, NoReply, new_run_id, request
from app.embedded import Valkey
from app.errors import BufferUnavailable, InvalidRequest, RequestError, StoreUnavailable
from app.postbox import error_of
from schemas.replies import ErrorDetail, RunReply
from schemas.requests import Environment
from tests.processes import Workers
from tests.producer import TRIGGERS, new_environment
from tests.waiting import eventually, fetch, runs_of

Body = dict[str, Any]


def environment() -> Environment:
    return Environment(id=new_environment(), organization_id="org_1", project_id="proj_1")


@pytest.fixture
async def installed(redis_url: str, database_url: str, workers: Workers) -> tuple[str, str]:
    """A real trigger worker and drainer; the URLs of their servers."""
    await workers.start_ready("triggers drainer", redis_url, database_url)
    return redis_url, database_url


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Mollifier]:
    async with Mollifier(redis_url) as one:
        yield one


class ByHand:
    """The test as the worker: it takes requests off the stream and answers as it likes."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._last = "0"

    async def take(self) -> tuple[Body, str]:
        """The next request, and the channel of its reply."""

        async def read() -> tuple[Body, str]:
            found: Any = await self._redis.xread({TRIGGERS: self._last}, count=1)
            assert found, "no request has come"
            entry_id, fields = found[0][1][0]
            self._last = entry_id.decode()
            return json.loads(fields[b"body"]), fields[b"reply_to"].decode()

        return await eventually(read)

    async def answer(self, channel: str, run_id: str) -> None:
        run = {"id": run_id.removeprefix("run_"), "friendly_id": run_id}
        reply = {"type": "run", "correlation_id": "1", "run": run, "status": "QUEUED"}
        await self._publish(channel, {**reply, "is_cached": False, "is_mollified": False})

    async def refuse(self, channel: str, error: type[RequestError]) -> None:
        detail = {"code": error.code, "message": "no", "status": error.status, "retryable": error.retryable}
        await self._publish(channel, {"type": "error", "correlation_id": "1", "error": detail})

    async def _publish(self, channel: str, reply: Body) -> None:
        await self._redis.publish(channel, json.dumps(reply))


@asynccontextmanager
async def calling(client: Mollifier, **options: Any) -> AsyncIterator[asyncio.Task[RunReply]]:
    """A call that is under way; cancelled at the end."""
    call = asyncio.create_task(client.trigger("send-email", environment=environment(), **options))
    try:
        yield call
    finally:
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def eventually_runs(database_url: str, environment_id: str, count: int) -> list[Body]:
    """The rows of an environment, once there are so many."""

    async def all_there() -> list[Body]:
        rows = await runs_of(database_url, environment_id)
        assert len(rows) == count, f"{len(rows)} rows, not {count}"
        return rows

    return await eventually(all_there)


def waiting(client: Mollifier) -> int:
    return len(client._postbox)


async def test_a_trigger_becomes_a_run(client: Mollifier, installed: tuple[str, str]) -> None:
    env = environment()
    reply = await client.trigger(
        "send-email",
        b'{"to":  "ada"}',
        environment=env,
        tags=["a"],
        metadata={"source": "test"},
        trace_context={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
    )
    assert (reply.status, reply.is_cached, reply.is_mollified) == ("QUEUED", False, False)
    (row,) = await eventually_runs(installed[1], env.id, count=1)
    assert row["friendly_id"] == reply.run.friendly_id
    assert row["payload"] == b'{"to":  "ada"}'
    assert (row["tags"], row["trace_id"]) == (["a"], "a" * 32)
    assert json.loads(row["metadata"]) == {"source": "test"}


async def test_an_error_reply_is_raised_as_its_class(client: Mollifier, installed: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest, match=r"^options\.delay: 'tomorrow'"):
        await client.trigger("send-email", environment=environment(), delay="tomorrow")
    with pytest.raises(InvalidRequest, match=r"^environment\.organization_id: required"):
        await client.trigger("send-email", environment={"id": "env_1"})
    assert waiting(client) == 0


async def test_a_thousand_calls_at_once(client: Mollifier, installed: tuple[str, str]) -> None:
    env = environment()
    replies = await asyncio.gather(
        *(client.trigger("send-email", {"n": n}, environment=env, timeout=30) for n in range(1000))
    )
    answered = {reply.run.id for reply in replies}
    assert len(answered) == 1000
    assert {row["id"] for row in await eventually_runs(installed[1], env.id, count=1000)} == answered
    assert waiting(client) == 0


async def test_many_in_one_go(client: Mollifier, installed: tuple[str, str]) -> None:
    env = environment()
    requests = [
        request("send-email", n, environment=env, delay="tomorrow" if n == 7 else None) for n in range(400)
    ]
    deliveries = [delivery async for delivery in client.trigger_many(requests)]
    assert sorted(delivery.position for delivery in deliveries) == list(range(400))
    assert all(0 < delivery.latency_s < 10 for delivery in deliveries)
    assert [(one.position, type(one.error)) for one in deliveries if one.reply is None] == [
        (7, InvalidRequest)
    ]
    assert len(await eventually_runs(installed[1], env.id, count=399)) == 399
    assert waiting(client) == 0


async def test_it_survives_a_restart_of_redis(
    client: Mollifier, installed: tuple[str, str], valkey: Valkey
) -> None:
    env = environment()
    await client.trigger("send-email", environment=env)
    valkey.kill()
    async with calling(client, timeout=20) as call:
        valkey.start()
        assert (await call).status == "QUEUED"
    assert (await client.trigger("send-email", environment=env, timeout=20)).status == "QUEUED"
    assert len(await fetch(installed[1], "SELECT FROM mollifier.runs")) == 3


async def test_a_retryable_error_is_tried_again_under_the_same_run_id(
    client: Mollifier, redis: Redis
) -> None:
    worker = ByHand(redis)
    async with calling(client) as call:
        first, channel = await worker.take()
        await worker.refuse(channel, StoreUnavailable)
        second, channel = await worker.take()
        await worker.answer(channel, second["options"]["run_id"])
        assert (await call).run.friendly_id == first["options"]["run_id"] == second["options"]["run_id"]


async def test_what_cannot_be_retried_is_raised_at_once(redis_url: str, redis: Redis) -> None:
    worker = ByHand(redis)
    async with Mollifier(redis_url, retry=False) as client, calling(client) as call:
        body, channel = await worker.take()
        assert "run_id" not in body["options"]
        await worker.refuse(channel, StoreUnavailable)
        with pytest.raises(StoreUnavailable, match=r"^no$"):
            await call


async def test_a_retry_that_would_come_too_late_is_not_made(client: Mollifier, redis: Redis) -> None:
    worker = ByHand(redis)
    async with calling(client, timeout=1.0) as call:
        while not call.done():
            taking = asyncio.create_task(worker.take())
            await asyncio.wait([call, taking], return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                await worker.refuse((await taking)[1], StoreUnavailable)
            else:
                taking.cancel()
        with pytest.raises((StoreUnavailable, NoReply)):
            await call
    assert waiting(client) == 0


async def test_replies_missed_while_disconnected_are_asked_for_again(client: Mollifier, redis: Redis) -> None:
    worker = ByHand(redis)
    async with calling(client, run_id="run_mine") as call:
        first, _ = await worker.take()
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
        second, channel = await worker.take()
        assert first == second
        await worker.answer(channel, "run_mine")
        assert (await call).run.id == "mine"


async def test_no_reply_in_time(client: Mollifier, redis: Redis) -> None:
    with pytest.raises(NoReply, match=r"^no reply within 0\.2 s: is a trigger worker running"):
        await client.trigger("send-email", environment=environment(), timeout=0.2)
    requests = [request("send-email", environment=environment())] * 3
    late = [delivery async for delivery in client.trigger_many(requests, timeout=0.2)]
    assert [(one.position, type(one.error)) for one in late] == [(n, NoReply) for n in range(3)]
    assert waiting(client) == 0


async def test_a_cancelled_call_leaves_nothing_behind(client: Mollifier, redis: Redis) -> None:
    worker = ByHand(redis)
    async with calling(client):
        _, channel = await worker.take()
        assert waiting(client) == 1
    assert waiting(client) == 0
    await worker.answer(channel, "run_late")  # disturbs nobody
    async with calling(client) as call:
        _, channel = await worker.take()
        await worker.answer(channel, "run_next")
        assert (await call).run.friendly_id == "run_next"


async def test_it_can_be_left_at_any_moment(redis_url: str) -> None:
    for turns in range(100):
        async with asyncio.timeout(5), Mollifier(redis_url):
            for _ in range(turns % 40):
                await asyncio.sleep(0)


async def test_redis_that_is_away_is_named() -> None:
    async with Mollifier("redis://127.0.0.1:1/0") as client:
        with pytest.raises(NoReply, match=r"^no reply within 0\.5 s: Redis: "):
            await client.trigger("send-email", environment=environment(), timeout=0.5)


async def test_redis_that_refuses(redis_url: str, redis: Redis) -> None:
    async with Mollifier(redis_url, retry=False) as client:
        await redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(BufferUnavailable, match=r"^Redis refused the request: .*maxmemory"):
                await client.trigger("send-email", environment=environment())
        finally:
            await redis.config_set("maxmemory", 0)


async def test_an_option_that_does_not_exist(client: Mollifier) -> None:
    with pytest.raises(TypeError, match="no such option: tag"):
        await client.trigger("send-email", environment=environment(), tag="a")


def codes() -> Iterable[type[RequestError]]:
    return [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, RequestError) and "code" in vars(one)
    ]


@pytest.mark.parametrize("error", codes(), ids=lambda error: error.code)
def test_every_code_has_its_class(error: type[RequestError]) -> None:
    detail = ErrorDetail(code=error.code, message="why", status=error.status, retryable=error.retryable)
    assert type(error_of(detail)) is error
    assert str(error_of(detail)) == "why"


@pytest.mark.parametrize("retryable", [True, False])
def test_a_code_from_a_newer_service(retryable: bool) -> None:
    error = error_of(ErrorDetail(code="on_strike", message="why", status=418, retryable=retryable))
    assert (error.retryable, str(error)) == (retryable, "on_strike: why")


def test_run_ids_of_the_clients_choice() -> None:
    first, second = new_run_id(), new_run_id()
    assert first != second
    assert re.fullmatch(r"run_[0-9a-f]{32}", first)
    assert not run_ids.is_derived(run_ids.parse_friendly(first))
    assert first[:16] <= second[:16]

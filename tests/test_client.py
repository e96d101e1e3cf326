"""The Python client: on real workers, and on a worker that the test plays itself, reply by reply."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pytest
from redis.asyncio import Redis

from app import errors, run_ids
from app.client import Mollifier, NoReply, new_run_id, request
from app.embedded import Valkey
from app.errors import (
    BufferUnavailable,
    InternalError,
    InvalidRequest,
    RequestError,
    RunBusy,
    RunFinished,
    RunNotFound,
    StoreUnavailable,
)
from app.read_reply import UnreadableReply, error_of
from schemas.operations import Append, Increment
from schemas.replies import ErrorDetail, KeyResetReply, RunListReply, RunReply
from schemas.requests import Environment
from schemas.run import RunDetails
from tests.processes import TRIPS_AT_TWO, Workers
from tests.producer import TRIGGERS, new_environment
from tests.waiting import eventually, fetch, runs_of

pytestmark = pytest.mark.one_redis

OPERATIONS = "mollifier:operations"

Body = dict[str, Any]
Call = Coroutine[Any, Any, Any]
Operation = Callable[[Mollifier], Call]


def environment() -> Environment:
    return Environment(id=new_environment(), organization_id="org_1", project_id="proj_1")


@pytest.fixture
async def installed(redis_url: str, database_url: str, workers: Workers) -> tuple[str, str]:
    """Real workers of each kind; the URLs of their servers."""
    await workers.start_ready("triggers operations drainer", redis_url, database_url)
    return redis_url, database_url


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Mollifier]:
    async with Mollifier(redis_url) as one:
        yield one


class Address(NamedTuple):
    """Where a reply goes."""

    channel: str
    correlation_id: str


class ByHand:
    """The test as the worker: it takes requests off a stream and answers as it likes."""

    def __init__(self, redis: Redis, stream: str = TRIGGERS) -> None:
        self._redis = redis
        self._stream = stream
        self._last = "0"

    async def take(self) -> tuple[Body, Address]:
        """The next request, and where its reply goes."""

        async def read() -> tuple[Body, Address]:
            found: Any = await self._redis.xread({self._stream: self._last}, count=1)
            assert found, "no request has come"
            entry_id, fields = found[0][1][0]
            self._last = entry_id.decode()
            address = Address(fields[b"reply_to"].decode(), fields[b"correlation_id"].decode())
            return json.loads(fields[b"body"]), address

        return await eventually(read)

    async def answer(self, address: Address, run_id: str) -> None:
        run = {"id": run_id.removeprefix("run_"), "friendly_id": run_id}
        await self.reply(address, type="run", run=run, status="QUEUED", is_cached=False, is_mollified=False)

    async def refuse(self, address: Address, error: type[RequestError]) -> None:
        detail = {"code": error.code, "message": "no", "status": error.status, "retryable": error.retryable}
        await self.reply(address, type="error", error=detail)

    async def reply(self, address: Address, **reply: Any) -> None:
        body = {"correlation_id": address.correlation_id, **reply}
        await self._redis.publish(address.channel, json.dumps(body))


@asynccontextmanager
async def under_way(call: Call) -> AsyncIterator[asyncio.Task[Any]]:
    """A call that is under way; cancelled at the end."""
    task = asyncio.create_task(call)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def calling(client: Mollifier, **options: Any) -> AsyncIterator[asyncio.Task[RunReply]]:
    """A trigger that is under way; cancelled at the end."""
    async with under_way(client.trigger("send-email", environment=environment(), **options)) as call:
        yield call


async def deafen(client: Mollifier, redis: Redis) -> None:
    """Cut the connection on which the client hears its replies; returns once it hears them again."""

    await redis.client_kill_filter(_type="pubsub")

    async def hears_again() -> None:
        assert await redis.pubsub_numsub(client._postbox._channel) == [(client._postbox._channel.encode(), 1)]
        assert client._postbox._listening.is_set()

    await eventually(hears_again)


async def eventually_runs(database_url: str, environment_id: str, count: int) -> list[Body]:
    """The rows of an environment, once there are so many."""

    async def all_there() -> list[Body]:
        rows = await runs_of(database_url, environment_id)
        assert len(rows) == count, f"{len(rows)} rows, not {count}"
        return rows

    return await eventually(all_there)


def waiting(client: Mollifier) -> int:
    """How many requests the client knows of, in one place or another."""
    return len(client._postbox) + len(client._postbox._outbox)


WHERE: Body = {"environment": {"id": "env_1", "organization_id": "org_1"}}
REPEATED: dict[str, Operation] = {
    "retrieve": lambda client: client.retrieve("run_1", **WHERE),
    "cancel": lambda client: client.cancel("run_1", "why", **WHERE),
    "add_tags": lambda client: client.add_tags("run_1", ["a"], **WHERE),
    "list_runs": lambda client: client.list_runs(limit=7, **WHERE),
    "reset_key": lambda client: client.reset_key("send-email", "key", **WHERE),
}
NOT_REPEATED: dict[str, Operation] = {
    "reschedule": lambda client: client.reschedule("run_1", "1h", **WHERE),
    "update_metadata": lambda client: client.update_metadata("run_1", {"n": 1}, **WHERE),
    "replay": lambda client: client.replay("run_1", **WHERE),
}
EVERY = REPEATED | NOT_REPEATED

each_operation = pytest.mark.parametrize("operation", EVERY.values(), ids=EVERY)


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


async def test_many_that_are_left_early(client: Mollifier, installed: tuple[str, str]) -> None:
    requests = [request("send-email", n, environment=environment()) for n in range(100)]
    async with aclosing(client.trigger_many(requests)) as deliveries:
        assert (await anext(deliveries)).error is None
        assert 0 < waiting(client) < 100
    assert waiting(client) == 0


@pytest.mark.parametrize("settings", [{}, TRIPS_AT_TWO], ids=["passed_through", "buffered"])
async def test_every_operation(
    workers: Workers, client: Mollifier, redis_url: str, database_url: str, settings: dict[str, object]
) -> None:
    """Through real workers; without a drainer, so that what is buffered stays there."""
    await workers.start_ready("triggers operations", redis_url, database_url, **settings)
    is_buffered = bool(settings)
    env = environment()
    for n in range(2):
        await client.trigger("other", n, environment=env, idempotency_key=f"key-{n}")
    payload = {"to": "ada"}
    triggered = await client.trigger("send-email", payload, environment=env, delay="1h", idempotency_key="k")
    assert triggered.is_mollified is is_buffered
    run_id = triggered.run.friendly_id

    run = await client.retrieve(run_id, environment=env)
    assert isinstance(run, RunDetails)
    assert (run.friendly_id, run.status, run.is_buffered) == (run_id, "DELAYED", is_buffered)
    assert run.payload is not None
    assert msgspec.json.decode(run.payload) == payload
    assert (await client.add_tags(run_id, ("a", "b"), environment=env)).tags == ["a", "b"]
    replaced = await client.update_metadata(run_id, {"n": 1}, environment=env)
    assert msgspec.json.decode(replaced.metadata or b"") == {"n": 1}
    changed = await client.update_metadata(
        run_id,
        operations=[Increment(key="n", value=2), {"type": "set", "key": "s", "value": "x"}],
        root_operations=[Append(key="list", value=None)],
        environment=env,
    )
    assert changed.metadata is not None
    assert msgspec.json.decode(changed.metadata) == {"n": 3, "s": "x", "list": [None]}
    later = datetime.now(UTC) + timedelta(days=2)
    assert (await client.reschedule(run_id, later, environment=env)).delay_until == later
    assert (await client.reschedule(run_id, "2h", environment=env)).is_buffered is is_buffered

    replayed = await client.replay(run_id, {"to": "eve"}, environment=env)
    assert type(replayed) is RunReply
    assert replayed.run.id != triggered.run.id
    again = await client.retrieve(replayed.run.friendly_id, environment=env)
    assert (again.replayed_from_run_id, again.tags) == (run.id, ["a", "b"])
    assert msgspec.json.decode(again.payload or b"") == {"to": "eve"}

    page = await client.list_runs(environment=env, limit=1, tag="a", since=run.created_at)
    assert isinstance(page, RunListReply)
    assert [one.id for one in page.runs] == [replayed.run.id]
    rest = await client.list_runs(environment=env, limit=1, tag="a", cursor=page.next_cursor)
    assert ([one.id for one in rest.runs], rest.next_cursor) == ([run.id], None)

    reset = await client.reset_key("send-email", "k", environment=env)
    assert type(reset) is KeyResetReply
    assert (reset.task, reset.idempotency_key, reset.run_id) == ("send-email", "k", run.id)
    with pytest.raises(RunNotFound):
        await client.reset_key("send-email", "k", environment=env)

    assert (await client.cancel(run_id, "first", environment=env)).cancel_reason == "first"
    cancelled = await client.cancel(run_id, environment=env)
    assert (cancelled.status, cancelled.cancel_reason) == ("CANCELED", "first")
    with pytest.raises(RunFinished):
        await client.reschedule(run_id, "1h", environment=env)
    with pytest.raises(RunNotFound):
        await client.retrieve(run_id, environment=environment())
    assert waiting(client) == 0


async def test_all_runs_page_by_page(client: Mollifier, installed: tuple[str, str]) -> None:
    env = environment()
    requests = [request("send-email", n, environment=env, tags=["t"] if n % 2 else None) for n in range(90)]
    made = {one.reply.run.id async for one in client.trigger_many(requests) if one.reply is not None}
    listed = [run async for run in client.all_runs(environment=env)]
    assert {run.id for run in listed} == made
    assert len(listed) == 90
    assert listed == sorted(listed, key=lambda run: (run.created_at, run.id), reverse=True)
    for limit in (1, 40, 41, 45, 50):
        tagged = [run.id async for run in client.all_runs(environment=env, limit=limit, tag="t")]
        assert tagged == [run.id for run in listed if run.tags][:limit]
    assert [run async for run in client.all_runs(environment=env, until=listed[-1].created_at)] == []
    assert waiting(client) == 0


async def test_a_thousand_operations_at_once(client: Mollifier, installed: tuple[str, str]) -> None:
    """Half of them changes that meet others on the same run: each is made once."""
    env = environment()
    requests = [request("send-email", n, environment=env, delay="1h") for n in range(50)]
    made = [one.reply.run.friendly_id async for one in client.trigger_many(requests) if one.reply is not None]
    more = Increment(key="count", value=1)
    calls: list[Call] = []
    for run_id in made * 10:
        calls.append(client.retrieve(run_id, environment=env, timeout=60))
        calls.append(client.update_metadata(run_id, operations=[more], environment=env, timeout=60))
    assert len(calls) == 1000
    answered = await asyncio.gather(*calls)
    assert [run.friendly_id for run in answered[::2]] == made * 10
    counts = [json.loads(row["metadata"]) for row in await eventually_runs(installed[1], env.id, count=50)]
    assert counts == [{"count": 10}] * 50
    assert waiting(client) == 0


MISTAKES: dict[str, tuple[Operation, str]] = {
    "no organization": (
        lambda client: client.retrieve("run_1", environment={"id": "env_1"}),
        "environment.organization_id: required",
    ),
    "a field too many": (
        lambda client: client.retrieve("run_1", environment={**WHERE["environment"], "typ": "STAGING"}),
        "environment.typ: unknown field",
    ),
    "no environment": (
        lambda client: client.retrieve("run_1", environment=None),  # type: ignore[arg-type]
        "environment: Expected `object`",
    ),
    "a run that is none": (lambda client: client.cancel(7, **WHERE), "run_id: Expected `str`, got `int`"),  # type: ignore[arg-type]
    "a long reason": (
        lambda client: client.cancel("run_1", "x" * 1025, **WHERE),
        "reason: Expected `str` of",
    ),
    "a delay that is none": (
        lambda client: client.reschedule("run_1", 10, **WHERE),  # type: ignore[arg-type]
        "delay: Expected `str`, got `int`",
    ),
    "one tag for a list": (lambda client: client.add_tags("run_1", "a", **WHERE), "tags: Expected `array`"),
    "an empty tag": (
        lambda client: client.add_tags("run_1", ["a", ""], **WHERE),
        r"tags\[1\]: Expected `str` of",
    ),
    "a NUL": (lambda client: client.add_tags("run_1", ["a", "\0"], **WHERE), r"tags\[1\]: contains a NUL"),
    "an operation that is none": (
        lambda client: client.update_metadata("run_1", operations=[{"type": "double", "key": "n"}], **WHERE),
        r"operations\[0\].type: Invalid value 'double'",
    ),
    "nothing that JSON can hold": (
        lambda client: client.update_metadata("run_1", {"a": object()}, **WHERE),
        "metadata: Encoding objects of type object is unsupported",
    ),
    "a payload that is no JSON": (lambda client: client.replay("run_1", b"{", **WHERE), "body: not JSON: "),
    "a page too long": (lambda client: client.list_runs(limit=101, **WHERE), "limit: Expected `int` <= 100"),
    "no such status": (
        lambda client: client.list_runs(status="DONE", **WHERE),  # type: ignore[arg-type]
        "status: Invalid enum value 'DONE'",
    ),
    "no time zone": (
        lambda client: client.list_runs(since=datetime(2026, 1, 1), **WHERE),
        "since: Expected `datetime` with a timezone",
    ),
    "an empty key": (
        lambda client: client.reset_key("send-email", "", **WHERE),
        "idempotency_key: Expected `str`",
    ),
}


@pytest.mark.parametrize(("operation", "message"), MISTAKES.values(), ids=MISTAKES)
async def test_mistakes_are_named_before_anything_is_sent(
    client: Mollifier, redis: Redis, operation: Operation, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        await operation(client)
    assert waiting(client) == 0
    assert next(client._postbox._numbers) == 1


async def test_what_is_sent(client: Mollifier, redis: Redis) -> None:
    """Mappings of any kind, structs, `None` as left out, JSON's null as a payload."""
    worker = ByHand(redis, OPERATIONS)
    tenant = WHERE["environment"]
    async with under_way(client.replay("run_1", None, environment=MappingProxyType(tenant))):
        assert (await worker.take())[0] == {
            "type": "run.replay",
            "environment": tenant,
            "run_id": "run_1",
            "payload": None,
        }
    async with under_way(client.list_runs(environment=Environment(**tenant, project_id="p"), task="t")):
        body, _ = await worker.take()
        assert {name: body["environment"][name] for name in tenant} == tenant
        assert body.keys() == {"type", "environment", "task"}


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


async def test_redis_restarts_while_calls_are_under_way(
    client: Mollifier, installed: tuple[str, str], valkey: Valkey
) -> None:
    """All that may be repeated is answered. Of the others each is made at most once, and once if answered."""
    env = environment()
    run_id = (await client.trigger("send-email", environment=env, delay="1h")).run.friendly_id
    more = Increment(key="count", value=1)
    calls: list[asyncio.Task[Any]] = []
    changes: list[asyncio.Task[Any]] = []
    for n in range(100):
        calls.append(asyncio.create_task(client.trigger("other", n, environment=env, timeout=30)))
        calls.append(asyncio.create_task(client.retrieve(run_id, environment=env, timeout=30)))
        change = client.update_metadata(run_id, operations=[more], environment=env, timeout=10)
        changes.append(asyncio.create_task(change))
    await asyncio.wait(calls + changes, return_when=asyncio.FIRST_COMPLETED)
    valkey.kill()
    valkey.start()
    replies = await asyncio.gather(*calls)
    assert len({reply.run.id for reply in replies if isinstance(reply, RunReply)}) == 100
    outcomes = await asyncio.gather(*changes, return_exceptions=True)
    answered = sum(isinstance(outcome, RunDetails) for outcome in outcomes)
    assert all(isinstance(outcome, RunDetails | NoReply) for outcome in outcomes)
    metadata = (await client.retrieve(run_id, environment=env)).metadata
    count = (msgspec.json.decode(metadata) or {"count": 0})["count"]
    assert answered <= count <= 100
    assert len(await eventually_runs(installed[1], env.id, count=101)) == 101
    assert waiting(client) == 0


async def test_a_trigger_whose_reply_is_lost_is_one_run(
    client: Mollifier, installed: tuple[str, str], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G3: the client asks again, the worker answers again, and there is one run."""
    env = environment()
    first = asyncio.Event()
    monkeypatch.setattr(client._postbox, "_take", lambda message: first.set())
    async with under_way(client.trigger("send-email", environment=env)) as call:
        await first.wait()
        monkeypatch.undo()
        await deafen(client, redis)
        reply = await call
    assert (reply.is_cached, reply.is_mollified) == (False, False)
    (row,) = await eventually_runs(installed[1], env.id, count=1)
    assert row["id"] == reply.run.id
    stream: Any = await redis.xinfo_stream(TRIGGERS)
    assert stream["entries-added"] == 2


async def test_a_retryable_error_is_tried_again_under_the_same_run_id(
    client: Mollifier, redis: Redis
) -> None:
    worker = ByHand(redis)
    async with calling(client) as call:
        first, address = await worker.take()
        await worker.refuse(address, StoreUnavailable)
        second, address = await worker.take()
        await worker.answer(address, second["options"]["run_id"])
        assert (await call).run.friendly_id == first["options"]["run_id"] == second["options"]["run_id"]


@each_operation
async def test_a_retryable_error_of_an_operation_is_tried_again(
    client: Mollifier, redis: Redis, operation: Operation
) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with under_way(operation(client)) as call:
        first, address = await worker.take()
        await worker.refuse(address, RunBusy)
        second, address = await worker.take()
        assert first == second
        await worker.refuse(address, RunNotFound)
        with pytest.raises(RunNotFound, match=r"^no$"):
            await call
    assert waiting(client) == 0


@pytest.mark.parametrize("operation", NOT_REPEATED.values(), ids=NOT_REPEATED)
async def test_a_change_that_may_have_been_made_is_not_tried_again(
    client: Mollifier, redis: Redis, operation: Operation
) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with under_way(operation(client)) as call:
        _, address = await worker.take()
        await worker.refuse(address, InternalError)
        with pytest.raises(InternalError, match=r"^no$"):
            await call


@pytest.mark.parametrize("error", [RunFinished, RunBusy], ids=lambda error: error.code)
@each_operation
async def test_without_retries_every_error_is_raised_at_once(
    redis_url: str, redis: Redis, operation: Operation, error: type[RequestError]
) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with Mollifier(redis_url, retry=False) as client, under_way(operation(client)) as call:
        _, address = await worker.take()
        await worker.refuse(address, error)
        with pytest.raises(error, match=r"^no$"):
            await call


async def test_what_cannot_be_retried_is_raised_at_once(redis_url: str, redis: Redis) -> None:
    worker = ByHand(redis)
    async with Mollifier(redis_url, retry=False) as client, calling(client) as call:
        body, address = await worker.take()
        assert "run_id" not in body["options"]
        await worker.refuse(address, StoreUnavailable)
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
        await deafen(client, redis)
        second, address = await worker.take()
        assert first == second
        await worker.answer(address, "run_mine")
        assert (await call).run.id == "mine"


@pytest.mark.parametrize("operation", REPEATED.values(), ids=REPEATED)
async def test_what_does_no_harm_twice_is_asked_for_again(
    client: Mollifier, redis: Redis, operation: Operation
) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with under_way(operation(client)) as call:
        first, _ = await worker.take()
        await deafen(client, redis)
        second, address = await worker.take()
        assert first == second
        await worker.refuse(address, RunNotFound)
        with pytest.raises(RunNotFound):
            await call


@pytest.mark.parametrize("operation", NOT_REPEATED.values(), ids=NOT_REPEATED)
async def test_what_could_be_done_twice_is_waited_for(
    client: Mollifier, redis: Redis, operation: Operation
) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with under_way(operation(client)) as call:
        first, address = await worker.take()
        await deafen(client, redis)
        async with under_way(client.retrieve("run_next", **WHERE)):
            following, _ = await worker.take()
            assert following["run_id"] == "run_next"  # had the first been sent again, it would be before this
        await worker.refuse(address, RunNotFound)
        with pytest.raises(RunNotFound):
            await call
    assert first["run_id"] == "run_1"


@asynccontextmanager
async def cut_off(redis: Redis, call: Call) -> AsyncIterator[asyncio.Task[Any]]:
    """A call that is under way, whose connection broke before Redis had appended its request."""

    async def held_back() -> str:
        found = [
            one["id"] for one in await redis.client_list() if (one["cmd"], one["flags"]) == ("xadd", "b")
        ]
        assert len(found) == 1
        return str(found[0])

    await redis.client_pause(60_000, all=False)
    async with under_way(call) as task:
        try:
            await redis.client_kill_filter(_id=await eventually(held_back))
        finally:
            await redis.client_unpause()
        yield task


async def test_a_read_is_sent_again_when_the_connection_breaks(client: Mollifier, redis: Redis) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with cut_off(redis, client.retrieve("run_1", **WHERE)) as call:
        _, address = await worker.take()
        await worker.refuse(address, RunNotFound)
        with pytest.raises(RunNotFound):
            await call


async def test_a_change_is_not_sent_again_when_the_connection_breaks(client: Mollifier, redis: Redis) -> None:
    change = client.update_metadata("run_1", {"n": 1}, timeout=1, **WHERE)
    async with cut_off(redis, change) as call:
        with pytest.raises(
            NoReply, match=r"^no reply within 1 s: the connection broke while the request was"
        ):
            await call
    assert await redis.exists(OPERATIONS) == 0
    assert waiting(client) == 0


async def test_a_reply_that_cannot_be_read(client: Mollifier, redis: Redis) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with under_way(client.retrieve("run_1", **WHERE)) as call:
        _, address = await worker.take()
        await worker.reply(address, type="run_details", run={"id": "1"})
        with pytest.raises(
            UnreadableReply, match=r"^the reply cannot be read: Object missing required field"
        ):
            await call
    async with under_way(client.retrieve("run_1", **WHERE)) as call:
        _, address = await worker.take()
        await worker.answer(address, "run_1")
        with pytest.raises(UnreadableReply, match=r"^the reply is another's: RunReply"):
            await call
    async with under_way(client.retrieve("run_1", **WHERE)) as call:
        _, address = await worker.take()
        for nobodys in (b"not JSON", b"[" * 5000, b'{"type": "run"}', b'{"correlation_id": "another\'s"}'):
            await redis.publish(address.channel, nobodys)
        await worker.refuse(address, RunNotFound)
        with pytest.raises(RunNotFound):
            await call
    assert waiting(client) == 0


async def test_no_reply_in_time(client: Mollifier, redis: Redis) -> None:
    with pytest.raises(NoReply, match=r"^no reply within 0\.2 s: is a trigger worker running"):
        await client.trigger("send-email", environment=environment(), timeout=0.2)
    requests = [request("send-email", environment=environment())] * 3
    late = [delivery async for delivery in client.trigger_many(requests, timeout=0.2)]
    assert [(one.position, type(one.error)) for one in late] == [(n, NoReply) for n in range(3)]
    assert waiting(client) == 0


@each_operation
async def test_an_operation_without_a_reply_leaves_nothing_behind(
    client: Mollifier, redis: Redis, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with under_way(operation(client)):
        _, address = await worker.take()
        assert waiting(client) == 1
    assert waiting(client) == 0  # it was cancelled
    await worker.refuse(address, RunNotFound)  # disturbs nobody
    with monkeypatch.context() as patched:
        patched.setitem(WHERE, "timeout", 0.2)
        with pytest.raises(
            NoReply, match=r"^no reply within 0\.2 s: is an operations worker running on this "
        ):
            await operation(client)
    assert waiting(client) == 0


async def test_calls_that_end_while_redis_is_away_leave_nothing_behind() -> None:
    async with Mollifier("redis://127.0.0.1:1/0") as client:
        calls: list[Call] = [client.retrieve("run_1", timeout=0.3, **WHERE) for _ in range(100)]
        calls += [client.replay("run_1", timeout=0.3, **WHERE) for _ in range(100)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {str(outcome) for outcome in outcomes if isinstance(outcome, NoReply)}
        assert all(isinstance(outcome, NoReply) for outcome in outcomes)
        assert waiting(client) == 0
        async with under_way(client.retrieve("run_1", **WHERE)):
            await asyncio.sleep(0)
            assert waiting(client) == 2
        assert waiting(client) == 0


async def test_a_cancelled_call_leaves_nothing_behind(client: Mollifier, redis: Redis) -> None:
    worker = ByHand(redis)
    async with calling(client):
        _, address = await worker.take()
        assert waiting(client) == 1
    assert waiting(client) == 0
    await worker.answer(address, "run_late")  # disturbs nobody
    async with calling(client) as call:
        _, address = await worker.take()
        await worker.answer(address, "run_next")
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


async def test_every_code_is_raised_as_its_class(redis_url: str, redis: Redis) -> None:
    worker = ByHand(redis, OPERATIONS)
    async with Mollifier(redis_url, retry=False) as client:
        for error in codes():
            async with under_way(client.retrieve("run_1", **WHERE)) as call:
                _, address = await worker.take()
                await worker.refuse(address, error)
                with pytest.raises(error) as raised:
                    await call
                assert type(raised.value) is error


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
    mine = Environment(id="env_1", organization_id="org_1", project_id="proj_1")
    environments = (mine, {"id": "env_1", "organization_id": "org_1"}, {"id": 7})
    ids = [run_ids.parse_friendly(new_run_id(environment)) for environment in environments]
    assert len(set(ids)) == 3
    assert [one[:13] for one in ids] == sorted(one[:13] for one in ids), "they sort by time"
    assert all(map(run_ids.is_bound, ids))
    assert [run_ids.is_foreign(one, "org_1", "env_1") for one in ids] == [False, False, True]

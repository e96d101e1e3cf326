"""One run per key, with real processes that race, crash, hang and forget. G4; requests that come again: G3.

One set of processes serves the tests in which nothing breaks; the others have their own, in a namespace of
their own, on the same servers.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from itertools import product
from typing import Any, ClassVar
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis.asyncio import Redis

from app.keys import Keys
from app.operator_changes import OperatorChanges
from app.settings import Settings
from tests.builders import run
from tests.processes import ROOT, Stage, Worker, Workers, staged
from tests.producer import Producer, Reply, new_environment, request
from tests.test_guarantees import paused
from tests.waiting import eventually, fetch, stays_so

PATHS = ("passed_through", "mollified")

ROOM = 30
ROOMY: Mapping[str, object] = {"trip_window_ms": 10_000, "trip_threshold": ROOM, "hold_ms": 600_000}
"""Settings with which an environment passes through until `fill`, then is mollified for ever."""

SWITCHING: Mapping[str, object] = {"trip_window_ms": 50, "trip_threshold": ROOM, "hold_ms": 100}
"""Settings with which an environment trips and comes to rest again all the time."""


@pytest.fixture(scope="module")
async def stage(
    shared_redis_url: str, shared_database_url: str, shared_workers: Workers
) -> AsyncIterator[Stage]:
    lines = "triggers triggers triggers drainer"
    settings = {"trigger_batch_size": 20, **ROOMY}
    async with staged(shared_workers, lines, shared_redis_url, shared_database_url, **settings) as stage:
        yield stage


@asynccontextmanager
async def apart(stage: Stage, workers: Workers, lines: str, **settings: object) -> AsyncIterator[Stage]:
    """Processes in a namespace of their own, which end with the block."""
    settings = {"namespace": new_environment("apart"), **settings}
    async with staged(workers, lines, stage.redis_url, stage.database_url, **settings) as own:
        try:
            yield own
        finally:
            for worker in own.all:
                worker.kill()


def body(environment: str, task: str = "send-email", **options: Any) -> dict[str, Any]:
    """The body of a request; all environments are one organization's, which takes any length of them."""
    fields = request(environment, task=task, options=options)
    fields["environment"] |= {"organization_id": "org_keys", "project_id": "proj_keys"}
    return fields


def keyed(environment: str, key: str = "k", task: str = "send-email", **options: Any) -> dict[str, Any]:
    """The body of a request with an idempotency key."""
    return body(environment, task, idempotency_key=key, **options)


def named(replies: Iterable[Reply]) -> tuple[set[str], int]:
    """The ids that replies name, and how many of them are of a new run."""
    known = list(replies)
    assert {reply["type"] for reply in known} == {"run"}, known
    return {reply["run"]["id"] for reply in known}, sum(not reply["is_cached"] for reply in known)


async def fill(producer: Producer, environment: str) -> None:
    """Have an environment mollified for the hold time."""
    replies = await producer.ask_all([body(environment, "trip")] * (2 * ROOM))
    assert any(reply["is_mollified"] for reply in replies)


async def switch(producer: Producer, environment: str, *, mollified: bool) -> None:
    """Go on triggering without a key until an environment's gate has tripped, or has come to rest."""
    bodies = [body(environment, "trip")] * (2 * ROOM if mollified else 1)

    async def has_switched() -> None:
        assert any(one["is_mollified"] for one in await producer.ask_all(bodies)) is mollified

    await eventually(has_switched)


async def aliases_of(stage: Stage, environment: str) -> dict[str, str]:
    """The ids that stand for another run, and which."""
    query = "SELECT id, run_id FROM mollifier.run_aliases WHERE environment_id = $1"
    return {alias["id"]: alias["run_id"] for alias in await fetch(stage.database_url, query, environment)}


async def claims_of(producer: Producer) -> list[str]:
    """What the claims of a producer's namespace hold."""
    names = await producer.redis.keys(f"{producer.group}:*:claim:*")
    values = await producer.redis.mget(names) if names else []
    return [value.decode() for value in values if value is not None]


async def no_claim_is_pending(producer: Producer) -> None:
    assert [value for value in await claims_of(producer) if value.startswith("pending:")] == []


async def all_took_part(processes: Sequence[Worker]) -> None:
    assert 0 not in [await worker.metric("mollifier_replies_total", code="run") for worker in processes]


class TestStorms:
    async def test_g4_10000_requests_with_one_key(self, stage: Stage, shared_workers: Workers) -> None:
        """Over four workers and a drainer, while the gate switches: one of them made the run."""
        environment = new_environment()
        lines = "triggers triggers triggers triggers drainer"
        async with apart(stage, shared_workers, lines, trigger_batch_size=100, **SWITCHING) as own:
            sent = []
            for number in range(10):
                await switch(own.producer, environment, mollified=number % 2 == 0)
                sent.append(await own.producer.send_all([keyed(environment)] * 1000, at_once=False))
            replies = [reply for names in sent for reply in await own.producer.all_replies(names)]
            await own.producer.settled()
            await no_claim_is_pending(own.producer)
            row = await own.row(environment)
            assert named(replies) == ({row["id"]}, 1)
            assert {len(own.producer.replies[name]) for names in sent for name in names} == {1}
            assert row["idempotency_key"] == "k"
            assert await aliases_of(own, environment) == {}
            await all_took_part(own.triggers)

    async def test_g4_many_keys_that_are_hot_while_the_gate_switches(
        self, stage: Stage, shared_workers: Workers
    ) -> None:
        """Each key is asked for in two rounds, on either side of a switch."""
        environment = new_environment()
        rounds: list[list[str]] = [[] for _ in range(11)]
        for number, key in product(range(10), range(20)):
            for one in rounds[number : number + 2]:
                one += [f"key-{number}-{key}"] * 5
        lines = "triggers triggers triggers drainer"
        async with apart(stage, shared_workers, lines, trigger_batch_size=50, **SWITCHING) as own:
            sent: list[tuple[str, str]] = []
            for number, keys in enumerate(rounds):
                random.Random(number).shuffle(keys)
                await switch(own.producer, environment, mollified=number % 2 == 0)
                bodies = [keyed(environment, key) for key in keys]
                sent += zip(keys, await own.producer.send_all(bodies, at_once=False), strict=True)
            replies = by_key(sent, await own.producer.all_replies([name for _, name in sent]))
            await no_claim_is_pending(own.producer)
            rows = {row["idempotency_key"]: row for row in await own.rows(environment, count=200)}
            assert {key: (len(some), *named(some)) for key, some in replies.items()} == {
                key: (10, {row["id"]}, 1) for key, row in rows.items()
            }
            assert await aliases_of(own, environment) == {}
            assert {row["buffered_at"] is None for row in rows.values()} == {True, False}, "it did not switch"
            await all_took_part(own.triggers)

    async def test_g4_claims_that_redis_loses(self, stage: Stage, shared_workers: Workers) -> None:
        """Then a key may get several ids; but one row, and every id that was replied leads to it."""
        environment, keys = new_environment(), [f"key-{number}" for number in range(40)]
        lines = "triggers triggers triggers drainer"
        settings = {**SWITCHING, "hold_ms": 500, "trigger_batch_size": 50}
        async with apart(stage, shared_workers, lines, **settings) as own:
            sent: list[tuple[str, str]] = []

            async def storm(number: int) -> None:
                await switch(own.producer, environment, mollified=number % 3 < 2)
                bodies = [keyed(environment, key) for key in keys * 5]
                names = await own.producer.send_all(bodies, at_once=False)
                sent.extend(zip(keys * 5, names, strict=True))
                await lose_claims(own.producer)
                await own.producer.all_replies(names[-10:])
                await lose_claims(own.producer)

            with paused(own.drainers):
                for number in range(4):
                    await storm(number)
            for number in range(4):
                await storm(number)
            replies = by_key(sent, await own.producer.all_replies([name for _, name in sent]))
            await no_claim_is_pending(own.producer)
            rows = {row["idempotency_key"]: row["id"] for row in await own.rows(environment, count=40)}
            await eventually(lambda: is_drained(own.producer))
            aliases = await aliases_of(own, environment)
            for key, some in replies.items():
                accepted = [reply for reply in some if reply["type"] == "run"]
                errors = {reply["error"]["code"] for reply in some if reply["type"] == "error"}
                assert errors <= {"claim_timed_out"}
                assert {aliases.get(id, id) for id in named(accepted)[0]} == {rows[key]}
            assert rows.keys() == replies.keys()
            assert aliases.keys().isdisjoint(rows.values())
            assert aliases, "no claim was lost in time"

    async def test_g4_while_operators_switch(self, stage: Stage, shared_workers: Workers) -> None:
        """In bursts of a tripped environment. Switched off, nobody looks at claims or buffer; so a key may
        get several ids, but one row, and every id that was replied leads to it."""
        environment, keys = new_environment(), [f"key-{number}" for number in range(72)]
        lines = "triggers triggers triggers drainer"
        async with (
            apart(stage, shared_workers, lines, trigger_batch_size=50, **ROOMY) as own,
            deciding(own.database_url, "org_keys") as operators,
        ):
            sent: list[tuple[str, str]] = []

            async def burst(number: int, decision: Awaitable[object]) -> None:
                some = keys[3 * number :][:20] * 5
                bodies = [keyed(environment, key) for key in some]
                names = await own.producer.send_all(bodies, at_once=False)
                await decision
                names += await own.producer.send_all(bodies, at_once=False)
                sent.extend(zip(some * 2, names, strict=True))
                await own.producer.all_replies(names[-20:])

            async def bursts(first: int) -> None:
                await burst(first, operators.set("switch", "on"))
                await burst(first + 1, operators.set("switch", "off"))
                await burst(first + 2, operators.set("switch", "on"))
                await burst(first + 3, operators.enrol("org_keys", False))
                await burst(first + 4, operators.enrol("org_keys", True))
                await burst(first + 5, operators.set("switch", "shadow"))

            await fill(own.producer, environment)
            with paused(own.drainers):
                await bursts(0)
            for number in (6, 12, 18):
                await bursts(number)
            replies = by_key(sent, await own.producer.all_replies([name for _, name in sent]))
            await own.producer.settled()
            rows = {row["idempotency_key"]: row["id"] for row in await own.rows(environment, count=72)}
            await eventually(lambda: is_drained(own.producer))
            aliases = await aliases_of(own, environment)
            assert rows.keys() == replies.keys() == {*keys}
            for key, of_key in replies.items():
                assert {aliases.get(id, id) for id in named(of_key)[0]} == {rows[key]}
            assert aliases, "it was never switched off while a key was buffered"
            assert aliases.keys().isdisjoint(rows.values())
            await eventually(lambda: no_claim_is_pending(own.producer))
            for labels in ({"reason": "disabled"}, {"reason": "not_enrolled"}, {"outcome": "shadow"}):
                counts = [await one.metric("mollifier_decisions_total", **labels) for one in own.triggers]
                assert sum(counts), f"none was {labels}"
            await all_took_part(own.triggers)


@asynccontextmanager
async def deciding(database_url: str, organization: str) -> AsyncIterator[OperatorChanges]:
    """An operator, who leaves all to the defaults again when the block ends."""
    connection = await asyncpg.connect(database_url)
    operators = OperatorChanges(connection, "somebody@somewhere")
    try:
        yield operators
    finally:
        await operators.set("switch", None)
        await operators.reset_organization(organization)
        await connection.close()


def by_key(sent: Sequence[tuple[str, str]], replies: Sequence[Reply]) -> dict[str, list[Reply]]:
    """Replies by the key that they are about."""
    found: defaultdict[str, list[Reply]] = defaultdict(list)
    for (key, _), reply in zip(sent, replies, strict=True):
        found[key].append(reply)
    return found


async def lose_claims(producer: Producer) -> None:
    """Delete the claims of a producer's namespace."""
    names = await producer.redis.keys(f"{producer.group}:*:claim:*")
    if names:
        await producer.redis.delete(*names)


async def is_drained(producer: Producer) -> None:
    for name in await producer.redis.keys(f"{producer.group}:*:ready"):
        assert await producer.redis.zcard(name) == 0


class TestEndsOfAKey:
    @pytest.mark.parametrize("path", PATHS)
    async def test_g4_a_key_that_outlived_its_time_is_free(self, stage: Stage, path: str) -> None:
        """Also while its run is still buffered: that one materialises without it."""
        producer, environment = stage.producer, new_environment()
        if path == "mollified":
            await fill(producer, environment)
        with paused(stage.drainers):
            first = await producer.ask(keyed(environment, idempotency_key_ttl="1s"))
            assert (first["is_mollified"], first["is_cached"]) == (path == "mollified", False)

            async def is_free() -> Reply:
                reply = await producer.ask(keyed(environment))
                assert not reply["is_cached"]
                return reply

            second = await eventually(is_free)
            third = await producer.ask(keyed(environment))
        assert second["run"]["id"] != first["run"]["id"]
        assert (third["run"], third["is_cached"]) == (second["run"], True)
        rows = await stage.rows(environment, count=2)
        assert {row["id"]: row["idempotency_key"] for row in rows} == {
            first["run"]["id"]: None,
            second["run"]["id"]: "k",
        }
        assert await aliases_of(stage, environment) == {}

    @pytest.mark.parametrize("path", PATHS)
    async def test_g4_a_run_that_failed_frees_its_key(self, stage: Stage, path: str) -> None:
        """The next use makes exactly one new run, also when twenty race for it; other ends keep the key."""
        producer = stage.producer
        ends = ("FAILED", "EXPIRED", "SYSTEM_FAILURE", "CANCELED", "COMPLETED")
        environments = {status: new_environment(status.lower()) for status in ends}
        firsts = {}
        for status, environment in environments.items():
            if path == "mollified":
                await fill(producer, environment)
            firsts[status] = await producer.ask(keyed(environment))
            assert firsts[status]["is_mollified"] is (path == "mollified")
            await stage.row(environment)
            await eventually(lambda: is_drained(producer))
            query = "UPDATE mollifier.runs SET status = $2 WHERE environment_id = $1"
            await fetch(stage.database_url, query, environment, status)
        with paused(stage.triggers):
            bodies = [keyed(environment) for environment in environments.values()] * 20
            names = await producer.send_all(bodies, at_once=False)
        replies = by_key(list(zip([*ends] * 20, names, strict=True)), await producer.all_replies(names))
        for status, environment in environments.items():
            ids, new = named(replies[status])
            is_free = status not in ("CANCELED", "COMPLETED")
            assert (status, len(ids), new) == (status, 1, int(is_free))
            rows = await stage.rows(environment, count=2 if is_free else 1)
            assert {row["id"] for row in rows} == ids | {firsts[status]["run"]["id"]}
            assert [row["id"] for row in rows if row["idempotency_key"] == "k"] == list(ids)
            assert (firsts[status]["run"]["id"] in ids) is not is_free


TEXTS = (
    "plain",
    "Plain",
    "plain ",
    " plain",
    "a:b",
    "a::b",
    "pending:a",
    "'single' \"double\" `back`",
    "line\nbreak\r\n\ttab",
    "\x01\x7f",
    "{1}*?[a]\\",
    "%s $1 {} ; --",
    "e\u0301",
    "\u00e9",
    "\U0001f40d",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u202eright to left \u05d0",
)
LONGEST = 2048
"""Of environment ids, tasks and idempotency keys, in characters."""


class TestAnyCharacters:
    @pytest.mark.parametrize("path", PATHS)
    async def test_g4_no_two_keys_collide(self, stage: Stage, path: str) -> None:
        """Each triple of environment, task and key has its own run, and each repetition is given that one."""
        producer, base = stage.producer, new_environment()
        triples = [
            *((base, "t", text) for text in TEXTS),
            *((f"{base}2", text, "k") for text in TEXTS),
            *((base + text, "t", "k") for text in TEXTS),
            *((f"{base}3", "t", character * LONGEST) for character in ("k", "\U0001f40d")),
            (f"{base}3", "t", "k" * (LONGEST - 1)),
            (f"{base}3", "\U0001f40d" * LONGEST, "k"),
            ((base + "\U0001f40d" * LONGEST)[:LONGEST], "t", "k"),
            (f"{base}:a", "b", "c"),
            (base, "a:b", "c"),
            (base, "a", "b:c"),
            (f"{base}:a:b", "c", "d"),
            (f"{base}:a", "b:c", "d"),
        ]
        assert len(set(triples)) == len(triples)
        environments = sorted({environment for environment, _, _ in triples})
        if path == "mollified":
            for environment in environments:
                await fill(producer, environment)
        bodies = [keyed(environment, key, task) for environment, task, key in triples]
        with paused(stage.drainers):
            firsts = await producer.ask_all(bodies)
            again = await producer.ask_all(bodies)
        assert {(one["is_cached"], one["is_mollified"]) for one in firsts} == {(False, path == "mollified")}
        ids = [reply["run"]["id"] for reply in firsts]
        assert [(reply["run"]["id"], reply["is_cached"]) for reply in again] == [(id, True) for id in ids]
        rows = await stage.rows(*environments, count=len(triples))
        found = {row["id"]: (row["environment_id"], row["task"], row["idempotency_key"]) for row in rows}
        assert found == dict(zip(ids, triples, strict=True))
        later = await producer.ask_all(bodies)
        assert [(reply["run"]["id"], reply["is_cached"]) for reply in later] == [(id, True) for id in ids]


class TestOneTimeUseTokens:
    async def test_100_racing_requests_with_one_token_make_one_run(self, stage: Stage) -> None:
        producer, environment = stage.producer, new_environment()
        bodies = [body(environment, one_time_use_token=f"token of {environment}")] * 100
        with paused(stage.triggers):
            names = await producer.send_all(bodies, at_once=False)
        replies = await producer.all_replies(names)
        outcomes = Counter(reply.get("error", {}).get("code", "run") for reply in replies)
        assert outcomes == {"run": 1, "one_time_use_token_used": 99}
        (winner,) = (reply for reply in replies if reply["type"] == "run")
        assert (winner["is_cached"], winner["run"]["id"]) == (False, (await stage.row(environment))["id"])


BEFORE, AFTER = "before", "after"


@dataclass(eq=False)
class Stop:
    """Where a wire stops: before a command that has all of `marks` in it, or after it, before its answer."""

    where: str
    marks: tuple[bytes, ...]
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> None:
        """Return once the command, or its answer, has come here."""
        async with asyncio.timeout(10):
            await self.reached.wait()

    async def hold(self) -> None:
        self.reached.set()
        await self.go_on.wait()


class Wire:
    """One worker's way to Redis. It leads through the test, which can stop it at a command."""

    def __init__(self, redis_url: str) -> None:
        self._target = urlsplit(redis_url)
        self._stops: list[Stop] = []
        self._directions: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = self._target._replace(netloc=f"127.0.0.1:{port}").geturl()

    def cut(self) -> None:
        """End every connection, and let none be made; what was stopped never gets through."""
        self._server.close()
        for direction in self._directions:
            direction.cancel()

    def stop(self, where: str, command: str, mark: str = "") -> Stop:
        """Stop once, at a script of `app/lua` (or a plain command) that has a mark in it."""
        script = ROOT / "app" / "lua" / f"{command}.lua"
        name = sha1(script.read_bytes()).hexdigest() if script.exists() else command
        self._stops.append(Stop(where, (name.encode(), mark.encode())))
        return self._stops[-1]

    def forget(self, stop: Stop) -> None:
        """Do not stop there, after all."""
        self._stops.remove(stop)

    def _met(self, data: bytes) -> Stop | None:
        for stop in self._stops:
            if all(mark in data for mark in stop.marks):
                self.forget(stop)
                return stop
        return None

    async def _link(self, worker: asyncio.StreamReader, to_worker: asyncio.StreamWriter) -> None:
        redis, to_redis = await asyncio.open_connection(self._target.hostname, self._target.port)
        after: list[Stop] = []

        async def requests() -> None:
            while data := await worker.read(1 << 20):
                stop = self._met(data)
                if stop is not None and stop.where == BEFORE:
                    await stop.hold()
                elif stop is not None:
                    after.append(stop)
                to_redis.write(data)

        async def answers() -> None:
            while data := await redis.read(1 << 20):
                if after:
                    await after.pop().hold()
                to_worker.write(data)

        directions = {asyncio.create_task(requests()), asyncio.create_task(answers())}
        self._directions |= directions
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        self._directions -= directions
        to_redis.close()
        to_worker.close()


@asynccontextmanager
async def wired(redis_url: str) -> AsyncIterator[Wire]:
    """A wire for one worker, and all scripts loaded, so that none is sent in vain first."""
    async with Redis.from_url(redis_url) as redis:
        for script in (ROOT / "app" / "lua").glob("*.lua"):
            await redis.script_load(script.read_bytes())
    wire = Wire(redis_url)
    await wire.open()
    try:
        yield wire
    finally:
        wire.cut()


def claim_of(producer: Producer, environment: str) -> str:
    """The Redis key of the claim of `keyed(environment)`."""
    partitions = Settings.model_fields["partitions"].default
    organization = keyed(environment)["environment"]["organization_id"]
    named = run(environment, organization_id=organization, idempotency_key="k")
    return Keys(producer.group, partitions).claim(named)


def mark_of(step: str, producer: Producer, environment: str) -> str:
    """What a step's command has in it that is about `keyed(environment)`, sent under the environment's id."""
    if step == "gate":
        return environment
    return producer.channel(environment) if step == "respond" else claim_of(producer, environment)


async def writers(database_url: str, count: int) -> None:
    """Asserts how many inserts wait for the table (that of a killed process stays)."""
    query = """SELECT FROM pg_stat_activity WHERE datname = current_database()
        AND wait_event_type = 'Lock' AND query LIKE '%INSERT INTO mollifier.runs%'"""
    assert len(await fetch(database_url, query)) == count


Point = tuple[str, str]


def around(*steps: str) -> list[Point]:
    """The points before and after some steps."""
    return [(where, step) for step in steps for where in (BEFORE, AFTER)]


# What a worker tells Redis on the way of one request. A row is written before its claim is settled.
CRASHES = {
    "passed_through": [*around("claim", "gate"), (AFTER, "settle_claims"), *around("respond")],
    "mollified": around("claim", "gate", "accept", "respond"),
}


@pytest.mark.one_redis
class TestCrashes:
    TAKEOVER: ClassVar[Mapping[str, object]] = {"heartbeat_ttl_ms": 600, "claim_wait_ms": 20_000, **ROOMY}
    """Another worker takes over within a second or so; a claim would live for half a minute."""

    @pytest.mark.parametrize("path", PATHS)
    async def test_g4_a_worker_dies_between_any_two_steps(
        self, stage: Stage, shared_workers: Workers, path: str
    ) -> None:
        await self._a_worker_dies(stage, shared_workers, path, CRASHES[path])

    async def test_g4_a_worker_dies_between_its_row_and_its_claim(
        self, stage: Stage, shared_workers: Workers
    ) -> None:
        point = (BEFORE, "settle_claims")
        await self._a_worker_dies(stage, shared_workers, "passed_through", [point])

    async def _a_worker_dies(
        self, stage: Stage, workers: Workers, path: str, points: Sequence[Point]
    ) -> None:
        """It is killed with a request at each point. Another ends them, and others with their keys."""
        settings = {**self.TAKEOVER, "trigger_inflight_batches": 32}
        async with apart(stage, workers, "drainer", **settings) as own, wired(stage.redis_url) as wire:
            producer = own.producer
            settings["namespace"] = producer.group
            victim = await workers.start("triggers", wire.url, own.database_url, **settings).wait_ready()
            environments = {f"{where} {step}": new_environment() for where, step in points}
            for where, step in points:
                environment = environments[f"{where} {step}"]
                if path == "mollified":
                    await fill(producer, environment)
                stop = wire.stop(where, step, mark_of(step, producer, environment))
                await producer.send(keyed(environment), correlation_id=environment)
                await stop.wait()
            bodies = [keyed(environment) for environment in environments.values()]
            early = await producer.send_all(bodies)
            (sibling,) = await workers.start_ready("triggers", own.redis_url, own.database_url, **settings)
            victim.kill()
            wire.cut()
            late = await producer.send_all(bodies)
            await producer.all_replies([*environments.values(), *early, *late], within=5)

            rows = await own.rows(*environments.values(), count=len(points))
            ids = {row["environment_id"]: row["id"] for row in rows}
            names = zip(environments.items(), early, late, strict=True)
            assert {
                point: named(producer.replies[name][0] for name in (environment, *others))
                for (point, environment), *others in names
            } == {point: ({ids[environment]}, 1) for point, environment in environments.items()}
            assert {len({reply["run"]["id"] for reply in some}) for some in producer.replies.values()} == {1}
            await eventually(lambda: no_claim_is_pending(producer))
            sibling.kill()

    async def test_g4_a_worker_dies_while_its_row_is_written(
        self, stage: Stage, shared_workers: Workers
    ) -> None:
        """Postgres goes on writing; the next attempt, under the same claim, meets that row."""
        environment, settings = new_environment(), {**self.TAKEOVER, "store_timeout_ms": 30_000}
        async with apart(stage, shared_workers, "triggers", **settings) as own:
            connection = await asyncpg.connect(own.database_url)
            async with connection.transaction():
                await connection.execute("LOCK TABLE mollifier.runs IN SHARE MODE")
                first = await own.producer.send(keyed(environment))
                await eventually(lambda: writers(own.database_url, 1))
                settings["namespace"] = own.producer.group
                (sibling,) = await shared_workers.start_ready(
                    "triggers", own.redis_url, own.database_url, **settings
                )
                own.triggers[0].kill()
                second = await own.producer.send(keyed(environment))
                await eventually(lambda: writers(own.database_url, 2))
            await connection.close()
            replies = await own.producer.all_replies([first, second], within=5)
            assert [reply["is_cached"] for reply in replies] == [False, True]
            assert named(replies) == ({(await own.row(environment))["id"]}, 1)
            await no_claim_is_pending(own.producer)
            sibling.kill()

    async def test_g4_a_drainer_dies_between_a_row_and_its_claim(
        self, stage: Stage, shared_workers: Workers
    ) -> None:
        """The claim holds the key until another drainer has ended it; from then on the row does."""
        environment, settings = new_environment(), dict(self.TAKEOVER)
        async with (
            apart(stage, shared_workers, "triggers", **settings) as own,
            wired(stage.redis_url) as wire,
        ):
            await fill(own.producer, environment)
            first = await own.producer.ask(keyed(environment))
            stop = wire.stop(BEFORE, "settle", claim_of(own.producer, environment))
            settings["namespace"] = own.producer.group
            victim = shared_workers.start("drainer", wire.url, own.database_url, **settings)
            await stop.wait()
            row = await own.row(environment)
            replies = [first, await own.producer.ask(keyed(environment))]
            victim.kill()
            wire.cut()
            (sibling,) = await shared_workers.start_ready(
                "drainer", own.redis_url, own.database_url, **settings
            )
            await eventually(lambda: is_drained(own.producer))
            assert await claims_of(own.producer) == []
            replies += await own.producer.ask_all([keyed(environment)] * 3)
            assert named(replies) == ({row["id"]}, 1)
            await own.row(environment)
            assert await aliases_of(own, environment) == {}
            sibling.kill()


@dataclass(frozen=True)
class Pair:
    """Two workers on wires of their own, whose claims live for a second, and a drainer."""

    stage: Stage
    workers: Sequence[Worker]
    wires: Sequence[Wire]


@dataclass(frozen=True)
class Hang:
    """A worker that stands still in the middle of `keyed(environment)`, and another that goes on."""

    stage: Stage
    environment: str
    frozen: Worker
    stop: Stop
    wire: Wire

    @property
    def producer(self) -> Producer:
        return self.stage.producer

    async def claim(self) -> str | None:
        value = await self.producer.redis.get(claim_of(self.producer, self.environment))
        return None if value is None else value.decode()

    def is_claimed_by(self, claim: str) -> Callable[[], Awaitable[None]]:
        """Asserts that the key is still claimed so."""

        async def assertion() -> None:
            assert await self.claim() == claim

        return assertion

    def go_on(self) -> None:
        """Let the frozen worker go on."""
        self.frozen.resume()
        self.stop.go_on.set()

    async def end(self) -> Reply:
        """Let the frozen worker go on; its reply."""
        before = len(self.producer.replies[self.environment])
        self.go_on()

        async def replied() -> Reply:
            replies = self.producer.replies[self.environment]
            assert len(replies) == before + 1
            return replies[-1]

        return await eventually(replied)

    async def leads_to_one_row(self, *replies: Reply) -> None:
        """Asserts that every id that was replied is that of the one row, or an alias of it."""
        row = await self.stage.row(self.environment)
        await eventually(lambda: is_drained(self.producer))
        aliases, (ids, _) = await aliases_of(self.stage, self.environment), named(replies)
        assert {aliases.get(id, id) for id in ids} == {row["id"]}
        assert aliases.keys() == ids - {row["id"]}
        later = await self.producer.ask(keyed(self.environment))
        assert (later["run"]["id"], later["is_cached"]) == (row["id"], True)
        await no_claim_is_pending(self.producer)


@asynccontextmanager
async def hanging(pair: Pair, path: str, where: str, step: str) -> AsyncIterator[Hang]:
    """Freeze the worker that has `keyed(environment)` once it has come to a step."""
    environment, producer = new_environment(), pair.stage.producer
    if path == "mollified":
        await fill(producer, environment)
    mark = mark_of(step, producer, environment)
    stops = [wire.stop(where, step, mark) for wire in pair.wires]
    await producer.send(keyed(environment), correlation_id=environment)

    async def stopped() -> int:
        reached = [index for index, stop in enumerate(stops) if stop.reached.is_set()]
        assert len(reached) == 1
        return reached[0]

    index = await eventually(stopped)
    pair.wires[1 - index].forget(stops[1 - index])
    reads = pair.wires[index].stop(BEFORE, "XREADGROUP")
    await reads.wait()
    frozen = pair.workers[index]
    frozen.pause()
    try:
        yield Hang(pair.stage, environment, frozen, stops[index], pair.wires[1 - index])
    finally:
        frozen.resume()
        stops[index].go_on.set()
        reads.go_on.set()
        await producer.settled()


@pytest.fixture(scope="module")
async def pair(stage: Stage, shared_workers: Workers) -> AsyncIterator[Pair]:
    settings = {"heartbeat_ttl_ms": 20_000, "claim_ttl_s": 1, "claim_min_ttl_s": 1, **ROOMY}
    async with (
        apart(stage, shared_workers, "drainer", **settings) as own,
        wired(stage.redis_url) as one,
        wired(stage.redis_url) as other,
    ):
        settings |= {"namespace": own.producer.group, "claim_wait_ms": 20_000}
        workers = [
            shared_workers.start("triggers", wire.url, own.database_url, **settings) for wire in (one, other)
        ]
        for worker in workers:
            await worker.wait_ready()
        yield Pair(own, workers, [one, other])
        for worker in workers:
            worker.kill()


@pytest.mark.one_redis
class TestHangs:
    @pytest.mark.parametrize(
        ("path", "where", "step"),
        [
            ("passed_through", AFTER, "gate"),
            ("passed_through", BEFORE, "settle_claims"),
            ("mollified", AFTER, "gate"),
        ],
    )
    async def test_g4_past_the_end_of_its_claim(self, pair: Pair, path: str, where: str, step: str) -> None:
        """Another claims the key and comes to its end. The first then names the same run."""
        async with hanging(pair, path, where, step) as hang:
            with paused(pair.stage.drainers):
                second = await hang.producer.ask(keyed(hang.environment))
                first = await hang.end()
                assert first["run"]["id"] == second["run"]["id"]
                has_written = step == "settle_claims"
                assert (first["is_cached"], second["is_cached"]) == (not has_written, has_written)
            await hang.leads_to_one_row(first, second)

    @pytest.mark.parametrize("path", PATHS)
    async def test_g4_past_the_end_of_its_claim_while_its_successor_is_under_way(
        self, pair: Pair, path: str
    ) -> None:
        """It can neither publish over the successor's claim nor release it."""
        async with hanging(pair, path, AFTER, "gate") as hang:
            stop = hang.wire.stop(AFTER, "gate", hang.environment)
            name = await hang.producer.send(keyed(hang.environment))
            await stop.wait()
            await hang.producer.redis.pexpire(claim_of(hang.producer, hang.environment), 60_000)
            claim = await hang.claim()
            assert claim is not None
            assert claim.startswith("pending:")
            if path == "mollified":
                # It finds that it lost its claim, and waits for its successor.
                hang.go_on()
                await stays_so(hang.is_claimed_by(claim), for_s=0.3)
                stop.go_on.set()
                second = await hang.producer.reply(name)
                first = await hang.producer.reply(hang.environment)
            else:
                first = await hang.end()
                assert await hang.claim() == claim
                stop.go_on.set()
                second = await hang.producer.reply(name)
            assert first["run"]["id"] == second["run"]["id"]
            has_won = path == "passed_through"
            assert (first["is_cached"], second["is_cached"]) == (not has_won, has_won)
            await hang.leads_to_one_row(first, second)

    async def test_g4_until_its_successor_is_a_row(self, pair: Pair) -> None:
        """No claim tells it of the successor by then. It claims again, and finds the row."""
        async with hanging(pair, "mollified", AFTER, "gate") as hang:
            second = await hang.producer.ask(keyed(hang.environment))

            async def claim_is_gone() -> None:
                assert await hang.claim() is None

            await hang.stage.row(hang.environment)
            await eventually(claim_is_gone)
            first = await hang.end()
            assert (first["run"]["id"], first["is_cached"]) == (second["run"]["id"], True)
            await hang.leads_to_one_row(first, second)

    async def test_g4_while_its_environment_trips(self, pair: Pair) -> None:
        """It was let through and its successor is buffered: the row wins, the other becomes an alias."""
        async with hanging(pair, "passed_through", AFTER, "gate") as hang:
            await fill(hang.producer, hang.environment)
            with paused(pair.stage.drainers):
                second = await hang.producer.ask(keyed(hang.environment))
                assert second["is_mollified"]
                first = await hang.end()
            await hang.leads_to_one_row(first, second)
            assert (await hang.stage.row(hang.environment))["id"] == first["run"]["id"]

    @pytest.mark.parametrize("path", PATHS)
    async def test_g3_while_another_takes_its_request_over(self, pair: Pair, path: str) -> None:
        """Both handle the same request, one after the other: both name the same run."""
        async with hanging(pair, path, AFTER, "gate") as hang:
            (started,) = hang.frozen.log("started")
            heartbeat = f"{hang.producer.group}:heartbeat:{started['consumer']}"
            await hang.producer.redis.delete(heartbeat)
            second = await hang.producer.reply(hang.environment)
            await hang.producer.redis.set(heartbeat, "1", px=20_000)
            first = await hang.end()
            assert first == second
            assert not first["is_cached"]
            await hang.leads_to_one_row(first, second)

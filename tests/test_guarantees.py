"""The guarantees that hold while nothing breaks, or little does (DESIGN section 4); each class cites its own.

One set of processes serves the module; what must not be shared has a namespace of its own.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.embedded import Valkey
from tests.processes import TRIPS_AT_TWO, Stage, Worker, Workers, staged
from tests.producer import TRIGGERS, Producer, new_environment, plain, request
from tests.waiting import eventually, fetch, runs_of

HEARTBEAT_MS = 600
GHOST = "a-consumer-without-a-heartbeat"

# Rows in the order in which they came, and a row that Postgres refuses.
PREPARE = """
CREATE TABLE public.arrivals (position bigserial, id text);
CREATE FUNCTION public.arrive() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.arrivals (id) VALUES (NEW.id); RETURN NULL; END $$;
CREATE TRIGGER arrive AFTER INSERT ON mollifier.runs FOR EACH ROW EXECUTE FUNCTION public.arrive();
ALTER TABLE mollifier.runs ADD CHECK (task <> 'refused-by-postgres' OR status = 'SYSTEM_FAILURE');
"""


@pytest.fixture(scope="module")
async def stage(
    shared_redis_url: str, shared_database_url: str, shared_workers: Workers
) -> AsyncIterator[Stage]:
    for statement in PREPARE.split(";\n"):
        await fetch(shared_database_url, statement)
    settings = {"drain_batch_size": 20, "heartbeat_ttl_ms": HEARTBEAT_MS, **TRIPS_AT_TWO}
    lines = "triggers triggers drainer drainer"
    async with staged(shared_workers, lines, shared_redis_url, shared_database_url, **settings) as stage:
        yield stage


@contextmanager
def paused(processes: list[Worker]) -> Iterator[None]:
    """Some processes stand still while the block runs."""
    for worker in processes:
        worker.pause()
    try:
        yield
    finally:
        for worker in processes:
            worker.resume()


async def gate_and_buffer(producer: Producer, environment: str) -> dict[str, Any]:
    """What gate and buffer hold of an environment, by key, without what drainers note there."""
    names = sorted(name.decode() for name in await producer.redis.keys(f"*{environment}*"))
    names = [name for name in names if ":drain:" not in name and ":{turns}:" not in name]
    return {name: await producer.redis.dump(name) for name in names}


async def hand_out_again(
    producer: Producer, name: str, body: object, *, entry_id: str | None = None, deliveries: int = 1
) -> None:
    """Make a request pending as if a consumer had been given it so many times and then died.

    With `entry_id`, a request that was answered: the entry comes back as if it had never been acknowledged.
    """
    text = json.dumps(body).encode()
    fields = plain(text, producer.channel(name), name)
    held_by_ghost = (TRIGGERS, "mollifier", GHOST, 0)
    info = await producer.redis.xinfo_stream(TRIGGERS)
    async with producer.redis.pipeline(transaction=True) as pipeline:
        if entry_id is not None:
            pipeline.delete(TRIGGERS)  # which is empty: no other way to write an id of the past
            pipeline.xadd(TRIGGERS, fields, id=entry_id)
            pipeline.xgroup_create(TRIGGERS, "mollifier", entry_id)
            pipeline.xclaim(*held_by_ghost, [entry_id], retrycount=deliveries, force=True, justid=True)
            pipeline.execute_command("XSETID", TRIGGERS, info["last-generated-id"])
        else:
            new_id = f"{int(info['last-generated-id'].decode().partition('-')[0]) + 1}-0"
            pipeline.xadd(TRIGGERS, fields, id=new_id)
            pipeline.xreadgroup("mollifier", GHOST, {TRIGGERS: ">"})
            pipeline.xclaim(*held_by_ghost, [new_id], retrycount=deliveries, justid=True)
        answers = await pipeline.execute()
    if entry_id is None:
        producer.entry_ids[name] = answers[0].decode()


@asynccontextmanager
async def commands_seen(producer: Producer) -> AsyncIterator[list[str]]:
    """Every command that the server was given while the block ran; complete once it has ended."""
    commands: list[str] = []
    done = f"done-{random.randrange(10**9)}"

    async def watch() -> None:
        async for one in monitor.listen():
            commands.append(one["command"])
            if done in one["command"]:
                return

    async with producer.redis.monitor() as monitor:
        watching = asyncio.create_task(watch())
        try:
            yield commands
        finally:
            await producer.redis.execute_command("ECHO", done)
            await asyncio.wait_for(watching, 5)


class TestG1OneOutcome:
    async def test_every_request_ends_as_exactly_one_thing(self, stage: Stage) -> None:
        """A run, an error reply, or a dead letter; and nothing stays behind."""
        producer = stage.producer
        environment, tripped = new_environment("pass"), new_environment("trip")
        await producer.trip(tripped)
        kinds: list[tuple[str, Any, bool]] = [
            ("run", request(environment, enrolled=False), True),
            ("run", request(tripped), True),
            ("silent run", request(environment, enrolled=False, task="silent"), False),
            ("error", request(environment, options={"delay": "x"}), True),
            ("error", b"not json", True),
            ("letter", request(environment, colour=1), False),
            ("letter", b"not json", False),
        ]
        sent = [random.Random(number).choice(kinds) for number in range(400)]
        letters_before = await producer.redis.xlen("mollifier:dead-letters")
        names: list[str] = []
        for start in range(0, len(sent), 50):
            some = sent[start : start + 50]
            names += await producer.send_all([body for _, body, reply in some if reply], at_once=False)
            await producer.send_all([body for _, body, reply in some if not reply], reply=False)
        await producer.settled()

        counts = Counter(kind for kind, _, _ in sent)
        not_json = sum(body == b"not json" for _, body, reply in sent if reply)
        outcomes = Counter(reply["type"] for name in names for reply in producer.replies[name])
        assert outcomes == {"run": counts["run"], "error": counts["error"]}
        assert {len(producer.replies[name]) for name in names} == {1}
        rows = await stage.rows(environment, tripped, count=counts["run"] + counts["silent run"])
        assert sum(row["task"] == "silent" for row in rows) == counts["silent run"]
        letters = await producer.redis.xlen("mollifier:dead-letters") - letters_before
        assert letters == counts["letter"] + not_json


class TestG2AcceptedMeansKept:
    async def test_accepted_runs_outlive_a_crash_of_redis(self, stage: Stage, valkey: Valkey) -> None:
        environment = new_environment()
        await stage.producer.trip(environment)
        with paused(stage.drainers):
            replies = await stage.producer.ask_all([request(environment)] * 50)
            valkey.kill()
            valkey.start()
        rows = await stage.rows(environment, count=50)
        assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}
        for worker in stage.all:
            await worker.wait_ready()
        assert (await stage.producer.ask(request(new_environment())))["type"] == "run"


class TestG3OneRunPerRequest:
    @pytest.mark.parametrize("path", ["passed_through", "mollified"])
    async def test_what_a_dead_consumer_held_is_handled(self, stage: Stage, path: str) -> None:
        environment = new_environment()
        if path == "mollified":
            await stage.producer.trip(environment)
        await hand_out_again(stage.producer, f"held_{path}", request(environment))
        reply = await stage.producer.reply(f"held_{path}")
        assert reply["is_mollified"] is (path == "mollified")
        assert (await stage.row(environment))["id"] == reply["run"]["id"]

    @pytest.mark.parametrize("deliveries", [1, 50])
    @pytest.mark.parametrize("path", ["passed_through", "buffered", "materialised"])
    async def test_the_same_run_and_reply_when_handed_out_again(
        self, stage: Stage, path: str, deliveries: int
    ) -> None:
        """Whatever its deadline and its count of deliveries say by then."""
        producer, environment = stage.producer, new_environment()
        if path != "passed_through":
            await producer.trip(environment)
        deadline = datetime.now(UTC) + timedelta(milliseconds=300)
        body = request(environment, deadline=deadline.isoformat(), options={"delay": "1h"})
        with paused(stage.drainers if path == "buffered" else []):
            name = await producer.send(body)
            first = await producer.reply(name)
            assert first["type"] == "run", first
            if path == "materialised":
                await stage.row(environment)
            await producer.settled()
            await eventually(lambda: _has_passed(deadline))
            await hand_out_again(
                producer, name, body, entry_id=producer.entry_ids[name], deliveries=deliveries
            )
            await producer.settled()
            await eventually(lambda: _replied(producer, name, 2))
        assert producer.replies[name][1] == first
        assert (await stage.row(environment))["id"] == first["run"]["id"]

    async def test_ids_sort_by_time(self, stage: Stage) -> None:
        environment = new_environment()
        ids = [(await stage.producer.ask(request(environment)))["run"]["id"] for _ in range(10)]
        assert ids == sorted(ids)
        assert len(set(ids)) == 10

    @pytest.mark.parametrize("path", ["passed_through", "buffered", "materialised"])
    async def test_a_caller_may_repeat_its_own_id(self, stage: Stage, path: str) -> None:
        producer, environment = stage.producer, new_environment()
        if path != "passed_through":
            await producer.trip(environment)
        body = request(environment, options={"run_id": f"run_own-{environment}"})
        with paused(stage.drainers if path == "buffered" else []):
            first = await producer.ask(body)
            if path == "materialised":
                await stage.row(environment)
            again = await producer.ask_all([body, body])
        assert first["run"]["id"] == f"own-{environment}"
        assert [reply["run"] for reply in again] == [first["run"]] * 2
        assert (await stage.row(environment))["id"] == f"own-{environment}"

    async def test_a_worn_out_request_is_answered_and_set_aside(self, stage: Stage) -> None:
        """MAX_DELIVERIES is 5: the sixth is one too many."""
        producer, environment = stage.producer, new_environment()
        await hand_out_again(producer, "fifth", request(environment), deliveries=4)
        assert (await producer.reply("fifth"))["type"] == "run"
        await hand_out_again(producer, "sixth", request(environment), deliveries=5)
        error = (await producer.reply("sixth"))["error"]
        assert (error["code"], error["status"], error["retryable"]) == ("internal_error", 500, True)
        letter = await producer.dead_letter(producer.entry_ids["sixth"])
        assert (letter["reason"], letter["deliveries"]) == (b"deliveries", b"6")
        assert json.loads(letter["body"]) == request(environment)
        await stage.rows(environment, count=1)


class TestG5OffMeansOff:
    async def test_no_key_of_gate_claims_or_buffer_is_touched(
        self, stage: Stage, shared_workers: Workers
    ) -> None:
        settings = {"namespace": "off", "enabled": 0, **TRIPS_AT_TWO}
        environment = new_environment()
        async with staged(shared_workers, "triggers", stage.redis_url, stage.database_url, **settings) as off:
            bodies = [
                *[request(environment, enrolled=True)] * 50,
                *[request(environment, options={"idempotency_key": f"k{n}"}) for n in range(5)],
                request(environment, options={"run_id": f"run_off-{environment}"}),
            ]
            async with commands_seen(off.producer) as commands:
                for _ in range(2):
                    replies = await off.producer.ask_all(bodies)
                    assert {(reply["type"], reply["is_mollified"]) for reply in replies} == {("run", False)}
            assert any("off:triggers" in command for command in commands)
            assert [command for command in commands if "off:{" in command or "off:gate" in command] == []
            names = {name.decode() for name in await off.producer.redis.keys("off:*")}
            others = {name for name in names if not name.startswith("off:heartbeat:")}
            assert others == {"off:triggers", "off:processes"}
            off.triggers[0].kill()


BYPASSES: dict[str, dict[str, Any]] = {
    "debounce": {"debounce": {"key": "k", "delay": "1h"}},
    "one_time_use_token": {"one_time_use_token": "PER_TEST"},
    "parent that waits": {"parent_run_id": "PER_TEST", "resume_parent_on_completion": True},
}


class TestG6Bypasses:
    @pytest.mark.parametrize("bypass", BYPASSES)
    @pytest.mark.parametrize("tripped", [False, True], ids=["calm", "tripped"])
    async def test_are_not_counted_and_not_buffered(self, stage: Stage, bypass: str, tripped: bool) -> None:
        producer, environment = stage.producer, new_environment()
        parent = (await producer.ask(request(environment, enrolled=False, task="trip")))["run"]["friendly_id"]
        if tripped:
            await producer.trip(environment)
            await eventually(lambda: _count(stage.database_url, environment, 4))
        before = await gate_and_buffer(producer, environment)
        assert bool(before) is tripped
        options = dict(BYPASSES[bypass])
        if "one_time_use_token" in options:
            options["one_time_use_token"] = f"token of {environment}"
        if "parent_run_id" in options:
            options["parent_run_id"] = parent

        reply = await producer.ask(request(environment, enrolled=True, options=options))

        assert (reply["type"], reply["is_mollified"]) == ("run", False)
        assert (await stage.row(environment))["buffered_at"] is None
        assert await gate_and_buffer(producer, environment) == before

    async def test_1000_triggers_of_one_debounce_key_leave_one_delayed_run(self, stage: Stage) -> None:
        environment = new_environment()
        debounce = {"key": "user-7", "delay": "1h", "max_delay": "2h"}
        bodies = [request(environment, options={"debounce": debounce}, payload=n) for n in range(1000)]
        replies = await stage.producer.ask_all(bodies)
        row = await stage.row(environment)
        assert (row["status"], row["debounce_key"]) == ("DELAYED", "user-7")
        assert {reply["run"]["id"] for reply in replies} == {row["id"]}
        assert Counter(reply["is_cached"] for reply in replies) == {False: 1, True: 999}
        assert {(reply["status"], reply["is_mollified"]) for reply in replies} == {("DELAYED", False)}
        last = await stage.producer.ask(request(environment, options={"debounce": debounce}, payload="last"))
        assert last["run"]["id"] == row["id"]
        assert (await stage.row(environment))["payload"] == b'"last"'

    async def test_a_parent_that_waits_is_given_the_buffered_run_of_the_key(self, stage: Stage) -> None:
        producer, environment = stage.producer, new_environment()
        parent = (await producer.ask(request(environment, enrolled=False, task="trip")))["run"]
        await producer.trip(environment)
        keyed = {"idempotency_key": "k"}
        waiting = {**keyed, "parent_run_id": parent["friendly_id"], "resume_parent_on_completion": True}
        with paused(stage.drainers):
            buffered = await producer.ask(request(environment, options=keyed))
            assert buffered["is_mollified"]
            reply = await producer.ask(request(environment, options=waiting))
        assert (reply["run"]["id"], reply["is_cached"]) == (buffered["run"]["id"], True)
        waitpoints = await fetch(
            stage.database_url,
            "SELECT child_run_id, parent_run_id, status FROM mollifier.waitpoints WHERE environment_id = $1",
            environment,
        )
        assert [tuple(waitpoint) for waitpoint in waitpoints] == [
            (buffered["run"]["id"], parent["id"], "PENDING")
        ]
        await stage.row(environment)

    async def test_a_parent_that_does_not_wait_is_no_bypass(self, stage: Stage) -> None:
        producer, environment = stage.producer, new_environment()
        parent = (await producer.ask(request(environment, enrolled=False, task="trip")))["run"]["friendly_id"]
        await producer.trip(environment)
        reply = await producer.ask(request(environment, options={"parent_run_id": parent}))
        assert reply["is_mollified"] is True


class TestG7TenantsAreWalls:
    @pytest.mark.parametrize("path", ["passed_through", "buffered", "materialised"])
    async def test_the_id_of_another_environment(self, stage: Stage, path: str) -> None:
        producer, owner, other = stage.producer, new_environment("owner"), new_environment("other")
        if path != "passed_through":
            await producer.trip(owner)
        run_id = f"taken-{random.randrange(10**9)}"
        mine = request(owner, task="secret-task", options={"run_id": f"run_{run_id}", "delay": "1h"})
        with paused(stage.drainers if path == "buffered" else []):
            first = await producer.ask(mine)
            assert first["run"]["id"] == run_id
            if path == "materialised":
                await stage.row(owner)

            bodies = [request(other, options={"run_id": f"run_{run_id}"}), request(other)]
            refused, accepted = await producer.ask_all(bodies)

            assert accepted["type"] == "run"
            error = refused["error"]
            assert error == {
                "code": "run_id_conflict",
                "message": error["message"],
                "status": 409,
                "retryable": False,
            }
            assert not any(word in json.dumps(refused) for word in (run_id, owner, "secret-task", "DELAYED"))
            assert (await producer.ask(mine))["run"] == first["run"]
        row = await stage.row(owner)
        assert (row["id"], row["task"], row["status"]) == (run_id, "secret-task", "DELAYED")
        assert {row["id"] for row in await runs_of(stage.database_url, other)} == {accepted["run"]["id"]}

    async def test_the_error_does_not_tell_where_the_other_is(self, stage: Stage) -> None:
        producer, other = stage.producer, new_environment("other")
        messages = set()
        for is_tripped in (False, True):
            owner = new_environment("owner")
            if is_tripped:
                await producer.trip(owner)
            with paused(stage.drainers):
                await producer.ask(request(owner, options={"run_id": f"run_of-{owner}"}))
                reply = await producer.ask(request(other, options={"run_id": f"run_of-{owner}"}))
            messages.add(json.dumps(reply["error"]))
        assert len(messages) == 1

    @pytest.mark.parametrize("order", ["owner first", "other first"])
    @pytest.mark.parametrize("path", ["passed_through", "buffered", "materialised"])
    async def test_another_cannot_keep_an_owner_from_its_run(
        self, stage: Stage, path: str, order: str
    ) -> None:
        """Owner and another ask for a run's id in one batch: the owner has its answer, in either order."""
        producer, owner, other = stage.producer, new_environment("owner"), new_environment("other")
        if path != "passed_through":
            await producer.trip(owner)
        options = {"run_id": f"run_of-{owner}"}
        with paused(stage.drainers if path == "buffered" else []):
            first = await producer.ask(request(owner, options=options))
            if path == "materialised":
                await stage.row(owner)
            bodies = [request(owner, options=options), request(other, options=options)]
            replies = await producer.ask_all(bodies if order == "owner first" else bodies[::-1])
            mine, theirs = replies if order == "owner first" else replies[::-1]
        assert theirs["error"]["code"] == "run_id_conflict"
        assert mine.get("run") == first["run"], mine

    @pytest.mark.parametrize("at_once", [True, False], ids=["one batch", "many batches"])
    async def test_two_environments_ask_for_one_id_at_once(self, stage: Stage, at_once: bool) -> None:
        """One of them has it, in one batch or in many, on either way in."""
        producer = stage.producer
        for trip in ((False, False), (True, False), (False, True), (True, True)):
            environments = [new_environment() for _ in trip]
            for environment, is_tripped in zip(environments, trip, strict=True):
                if is_tripped:
                    await producer.trip(environment)
            options = {"run_id": f"run_race-{environments[0]}"}
            bodies = [request(environment, options=options) for environment in environments * 10]
            names = await producer.send_all(bodies, at_once=at_once)
            replies = await producer.all_replies(names)
            won = {
                body["environment"]["id"]
                for body, reply in zip(bodies, replies, strict=True)
                if reply["type"] == "run"
            }
            codes = {reply["error"]["code"] for reply in replies if reply["type"] == "error"}
            assert (len(won), codes) == (1, {"run_id_conflict"})
            (row,) = await stage.rows(*environments, count=1)
            assert row["environment_id"] in won

    async def test_a_derived_id_cannot_be_invented(self, stage: Stage) -> None:
        """Else a caller could sit on the id that another's request is going to have."""
        producer, owner, other = stage.producer, new_environment("owner"), new_environment("other")
        taken = (await producer.ask(request(owner)))["run"]["friendly_id"]
        invented = taken[:-1] + ("0" if taken[-1] != "0" else "1")
        replies = await producer.ask_all(
            [request(other, options={"run_id": one}) for one in (taken, invented)]
        )
        assert [reply["type"] for reply in replies] == ["error", "error"]
        assert await runs_of(stage.database_url, other) == []


class TestG8NoSilentFallback:
    async def test_a_buffer_without_memory_is_an_error(self, stage: Stage, shared_workers: Workers) -> None:
        """The environment is tripped; then Redis refuses every write. Nothing may reach Postgres for it."""
        environment, settings = new_environment(), {"namespace": "oom", **TRIPS_AT_TWO}
        async with staged(
            shared_workers, "triggers", stage.redis_url, stage.database_url, **settings
        ) as small:
            await small.producer.trip(environment)
            with paused(small.triggers):
                names = await small.producer.send_all([request(environment)] * 20)
                await small.producer.redis.config_set("maxmemory", 1)
            try:
                replies = await small.producer.all_replies(names)
            finally:
                await small.producer.redis.config_set("maxmemory", 0)
            assert [reply["type"] for reply in replies] == ["error"] * 20, replies[0]
            assert {
                (one["error"]["code"], one["error"]["status"], one["error"]["retryable"]) for one in replies
            } == {("buffer_unavailable", 503, True)}
            assert (await small.producer.ask(request(environment)))["is_mollified"] is True
            await small.producer.settled()
            drainer = shared_workers.start("drainer", stage.redis_url, stage.database_url, **settings)
            await stage.rows(environment, count=1)
            small.triggers[0].kill()
            drainer.kill()

    async def test_a_buffer_that_cannot_be_written_is_an_error(
        self, stage: Stage, shared_workers: Workers
    ) -> None:
        """The same, where only this environment's buffer refuses: neighbours in the batch do not notice."""
        broken, well = new_environment("broken"), new_environment("well")
        settings = {"namespace": "broken", "partitions": 1, **TRIPS_AT_TWO}
        lines = "triggers drainer"
        async with staged(shared_workers, lines, stage.redis_url, stage.database_url, **settings) as small:
            for environment in (broken, well):
                await small.producer.trip(environment)
            await stage.rows(broken, well, count=0)
            await eventually(lambda: _count(stage.database_url, broken, 3))
            (entries,) = await small.producer.redis.keys(f"*entries:{broken}")
            await small.producer.redis.set(entries, "no stream")
            replies = await small.producer.ask_all([request(broken), request(well)] * 5)
            assert {reply["error"]["code"] for reply in replies[::2]} == {"buffer_unavailable"}
            assert {reply["is_mollified"] for reply in replies[1::2]} == {True}
            await stage.rows(well, count=5)
            await stage.rows(broken, count=0)
            for worker in small.all:
                worker.kill()


class TestG9Order:
    async def test_entries_materialise_in_the_order_accepted(self, stage: Stage) -> None:
        """Over two drainers and batches of 20, with others' entries between."""
        environments = [new_environment() for _ in range(3)]
        for environment in environments:
            await stage.producer.trip(environment)
        accepted: dict[str, list[str]] = {environment: [] for environment in environments}
        with paused(stage.drainers):
            for _ in range(70):
                for environment in environments:
                    reply = await stage.producer.ask(request(environment))
                    assert reply["is_mollified"]
                    accepted[environment].append(reply["run"]["id"])
        await stage.rows(*environments, count=210)
        for environment in environments:
            assert await self._arrivals(stage, environment) == accepted[environment]

    async def _arrivals(self, stage: Stage, environment: str) -> list[str]:
        query = """SELECT arrivals.id FROM public.arrivals JOIN mollifier.runs USING (id)
            WHERE environment_id = $1 AND task <> 'trip' ORDER BY position"""
        return [record["id"] for record in await fetch(stage.database_url, query, environment)]


class TestG12PoisonIsSetAside:
    @pytest.mark.parametrize("path", ["passed_through", "mollified"])
    async def test_a_row_that_postgres_refuses(self, stage: Stage, path: str) -> None:
        environment = new_environment()
        if path == "mollified":
            await stage.producer.trip(environment)
        tasks = ["before", "refused-by-postgres", "between", "refused-by-postgres", *["after"] * 30]
        bodies = [
            request(environment, enrolled=path == "mollified", task=task, payload={"task": task})
            for task in tasks
        ]
        replies = await stage.producer.ask_all(bodies)
        good = [reply for task, reply in zip(tasks, replies, strict=True) if task != "refused-by-postgres"]
        poison = [reply for task, reply in zip(tasks, replies, strict=True) if task == "refused-by-postgres"]
        assert {reply["type"] for reply in good} == {"run"}
        if path == "passed_through":
            assert {reply["type"] for reply in poison} == {"error"}
            await stage.rows(environment, count=len(good))
            return
        rows = {row["id"]: row for row in await stage.rows(environment, count=len(tasks))}
        for reply in poison:
            row = rows.pop(reply["run"]["id"])
            assert (row["status"], row["task"]) == ("SYSTEM_FAILURE", "refused-by-postgres")
            assert row["error"] is not None
        assert rows.keys() == {reply["run"]["id"] for reply in good}
        assert {row["status"] for row in rows.values()} == {"QUEUED"}

    async def test_a_snapshot_that_nobody_can_read(self, stage: Stage) -> None:
        """Written into the buffer by something else: it blocks neither its neighbours nor its environment."""
        producer, environment = stage.producer, new_environment()
        await producer.trip(environment)
        with paused(stage.drainers):
            before = await producer.ask_all([request(environment)] * 5)
            (entries,) = await producer.redis.keys(f"*entries:{environment}")
            poison = await producer.redis.xadd(entries, {"run_id": "poison", "snapshot": b"\xc1 no snapshot"})
            await producer.redis.hincrby(entries.replace(b":entries:", b":drain:"), "queued", 1)
            after = await producer.ask_all([request(environment)] * 5)
        rows = await stage.rows(environment, count=10)
        assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in [*before, *after]}
        letter = await producer.dead_letter(poison.decode())
        assert (letter["source"], letter["reason"]) == (entries, b"undecodable")
        assert letter["snapshot"] == b"\xc1 no snapshot"


@pytest.mark.one_redis
class TestG13CleanExit:
    async def test_sigterm_under_load(self, stage: Stage, shared_workers: Workers) -> None:
        """A trigger worker and a drainer leave in the middle; their siblings answer and drain the rest."""
        producer = stage.producer
        small = {"trigger_batch_size": 20, "drain_batch_size": 20, "shutdown_timeout_s": 10}
        leaving = await shared_workers.start_ready(
            "triggers drainer", stage.redis_url, stage.database_url, **small, **TRIPS_AT_TWO
        )
        calm, tripped = new_environment("calm"), new_environment("tripped")
        await producer.trip(tripped)
        names: list[str] = []
        for number in range(60):
            bodies = [request(calm, enrolled=False)] * 20 + [request(tripped)] * 20
            names += await producer.send_all(bodies, at_once=False)
            if number == 20:
                for worker in leaving:
                    worker.terminate()
        replies = await producer.all_replies(names, within=20)

        assert [await worker.ended(within_s=12) for worker in leaving] == [0, 0]
        assert [len(worker.log("stopped")) for worker in leaving] == [1, 1]
        assert {reply["type"] for reply in replies} == {"run"}
        await producer.settled()
        rows = await stage.rows(calm, tripped, count=2400, within_s=20)
        assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}
        assert {len(producer.replies[name]) for name in names} == {1}
        consumers = await producer.redis.xinfo_consumers(TRIGGERS, "mollifier")
        assert not [one for one in consumers if f"-{leaving[0].pid}-" in one["name"].decode()]

    async def test_what_arrives_while_a_worker_leaves(self, stage: Stage, shared_workers: Workers) -> None:
        """It is answered by the leaving one, or left untouched for the next: never read and then let lie."""
        environment = new_environment()
        place = (stage.redis_url, stage.database_url)
        async with staged(shared_workers, "triggers", *place, namespace="leaving") as small:
            (leaving,) = small.triggers
            names: list[str] = []

            async def send_until_it_has_gone() -> None:
                names.append(await small.producer.send(request(environment, enrolled=False)))
                assert not leaving.is_running

            leaving.terminate()
            await eventually(send_until_it_has_gone, within_s=5)
            assert await leaving.ended() == 0
            pending = await small.producer.redis.xpending("leaving:triggers", "leaving")
            assert pending["pending"] == 0, "requests were read and neither answered nor given back"
            (sibling,) = await shared_workers.start_ready("triggers", *place, namespace="leaving")
            replies = await small.producer.all_replies(names)
            rows = await stage.rows(environment, count=len(names))
            assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}
            assert {len(small.producer.replies[name]) for name in names} == {1}
            sibling.kill()

    @pytest.mark.parametrize("line", ["triggers", "drainer"])
    async def test_sigterm_when_idle(self, stage: Stage, shared_workers: Workers, line: str) -> None:
        (worker,) = await shared_workers.start_ready(line, stage.redis_url, stage.database_url)
        worker.terminate()
        assert await worker.ended(within_s=5) == 0
        assert [entry["level"] for entry in worker.log() if entry["level"] not in ("info", "debug")] == []


async def _has_passed(instant: datetime) -> None:
    assert datetime.now(UTC) > instant


async def _replied(producer: Producer, name: str, times: int) -> None:
    assert len(producer.replies[name]) == times


async def _count(database_url: str, environment: str, count: int) -> None:
    assert len(await runs_of(database_url, environment)) == count

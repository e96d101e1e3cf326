"""What happens when things break (DESIGN section 11): processes, Redis and Postgres killed, frozen, away.

Nothing is restarted that was not killed by the test: processes have to come back by themselves.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.embedded import Postgres, Valkey
from app.settings import Settings
from app.telemetry import Telemetry
from app.wiring import World
from tests.processes import TRIPS_AT_TWO, Stage, Worker, Workers, staged
from tests.producer import TRIGGERS, Producer, new_environment, request
from tests.waiting import eventually, fetch, runs_of, stays_so
from workers.triggers import Triggers

TTL_MS = 600
TAKEN_OVER_WITHIN_S = TTL_MS / 1000 + 1


@asynccontextmanager
async def table_locked(database_url: str) -> AsyncIterator[None]:
    """While the block runs, no row can be written: whoever writes one stands in the middle of its batch."""
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE mollifier.runs IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await connection.close()


async def holds(producer: Producer, worker: Worker, count: int) -> None:
    """Asserts that a trigger worker, and nobody else, has been handed so many requests."""
    pending = await producer.redis.xpending(TRIGGERS, "mollifier")
    held = {one["name"].decode(): one["pending"] for one in pending["consumers"]}
    assert [f"-{worker.pid}-" in name for name in held] == [True], held
    assert pending["pending"] == count


async def all_say(started: Sequence[Worker], *, ready: int, within_s: float = 10) -> None:
    """Wait until `/health/ready` of each has the given status."""

    async def say() -> None:
        for worker in started:
            status, body = await worker.get("/health/ready")
            assert status == ready, f"/health/ready of {worker.line}: {status} {body}"

    await eventually(say, within_s)


async def lapsed(worker: Worker, entries: int) -> None:
    """Fails until a worker has let go of so many entries of an earlier life."""
    assert sum(line["entries"] for line in worker.log("heartbeat.lapsed")) == entries


@asynccontextmanager
async def all_live(started: Sequence[Worker]) -> AsyncIterator[None]:
    """Every process stays up and says that it is alive, all through the block."""
    async with AsyncExitStack() as stack:
        for worker in started:
            await stack.enter_async_context(worker.stays_live())
        yield


class TestProcesses:
    async def test_a_killed_trigger_worker_is_replaced_by_its_sibling(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """In time, and not a moment before it is dead: slow is not dead."""
        settings = {"heartbeat_ttl_ms": TTL_MS, "store_timeout_ms": 30_000}
        environment = new_environment()
        async with staged(workers, "triggers", redis_url, database_url, **settings) as stage:
            (victim,) = stage.triggers
            async with table_locked(database_url):
                names = await stage.producer.send_all([request(environment, enrolled=False)] * 50)
                await eventually(lambda: holds(stage.producer, victim, 50))
                (sibling,) = await workers.start_ready("triggers", redis_url, database_url, **settings)
                await stays_so(lambda: holds(stage.producer, victim, 50), for_s=2 * TTL_MS / 1000)
                victim.kill()
                killed = time.monotonic()
                await eventually(lambda: holds(stage.producer, sibling, 50), within_s=TAKEN_OVER_WITHIN_S)
                assert time.monotonic() - killed < TAKEN_OVER_WITHIN_S
            replies = await stage.producer.all_replies(names)
            rows = await stage.rows(environment, count=50)
            assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}
            assert await sibling.metric("mollifier_recovered_total", why="holder_gone") == 50
            await stage.producer.settled()
            assert {len(stage.producer.replies[name]) for name in names} == {1}

    async def test_a_short_freeze_costs_nothing(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """A worker that stands still for less than its heartbeat keeps what it holds, and answers it."""
        settings = {"heartbeat_ttl_ms": 2_000, "store_timeout_ms": 30_000}
        environment = new_environment()
        async with staged(workers, "triggers", redis_url, database_url, **settings) as stage:
            (frozen,) = stage.triggers
            async with table_locked(database_url):
                names = await stage.producer.send_all([request(environment, enrolled=False)] * 20)
                await eventually(lambda: holds(stage.producer, frozen, 20))
                (sibling,) = await workers.start_ready("triggers", redis_url, database_url, **settings)
                frozen.pause()
                await stays_so(lambda: holds(stage.producer, frozen, 20), for_s=1)
                frozen.resume()
            await stage.producer.all_replies(names)
            await stage.producer.settled()
            await stage.rows(environment, count=20)
            assert {len(stage.producer.replies[name]) for name in names} == {1}
            for worker in (frozen, sibling):
                assert await worker.metric("mollifier_recovered_total") == 0

    async def test_g3_what_a_worker_was_given_while_it_stood_still_it_leaves_to_who_took_it_over(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """It comes to read what was handed out to it only after its heartbeat had ended."""
        settings = {"heartbeat_ttl_ms": TTL_MS}
        async with staged(workers, "triggers", redis_url, database_url, **settings) as stage:
            (frozen,) = stage.triggers
            environment = new_environment()
            await stage.producer.ask(request(environment))  # so the read that follows has just begun
            frozen.pause()
            names = await stage.producer.send_all([request(environment)] * 20)
            await eventually(lambda: holds(stage.producer, frozen, 20))
            (sibling,) = await workers.start_ready("triggers", redis_url, database_url, **settings)
            await stage.producer.all_replies(names)
            frozen.resume()
            await eventually(lambda: lapsed(frozen, 20))
            await stage.producer.settled()
            assert {len(stage.producer.replies[name]) for name in names} == {1}
            assert await sibling.metric("mollifier_recovered_total", why="holder_gone") == 20

    async def test_a_worker_that_wakes_up_after_it_was_replaced(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """Frozen for longer than its heartbeat, its batch is done by another; waking up, it does no harm."""
        settings = {"heartbeat_ttl_ms": TTL_MS, "store_timeout_ms": 30_000}
        environment = new_environment()
        async with staged(workers, "triggers", redis_url, database_url, **settings) as stage:
            (frozen,) = stage.triggers
            async with table_locked(database_url):
                names = await stage.producer.send_all([request(environment, enrolled=False)] * 20)
                await eventually(lambda: holds(stage.producer, frozen, 20))
                (sibling,) = await workers.start_ready("triggers", redis_url, database_url, **settings)
                frozen.pause()
                await eventually(lambda: holds(stage.producer, sibling, 20), within_s=TAKEN_OVER_WITHIN_S)
            await stage.producer.all_replies(names)
            frozen.resume()
            await stage.producer.settled()
            assert (await stage.producer.ask(request(environment)))["type"] == "run"
            await stage.rows(environment, count=21)
            for name in names:
                assert len({reply["run"]["id"] for reply in stage.producer.replies[name]}) == 1
            await frozen.wait_ready()

    async def test_a_killed_drainer_is_replaced_by_its_sibling(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        settings = {
            "heartbeat_ttl_ms": TTL_MS,
            "store_timeout_ms": 30_000,
            "drain_batch_size": 20,
            "trigger_batch_size": 20,
            **TRIPS_AT_TWO,
        }
        environment = new_environment()
        async with staged(workers, "triggers", redis_url, database_url, **settings) as stage:
            await stage.producer.trip(environment)
            replies = await stage.producer.ask_all([request(environment)] * 60)
            async with table_locked(database_url):
                (victim,) = await workers.start_ready("drainer", redis_url, database_url, **settings)
                await eventually(lambda: self._is_writing(database_url, 1))
                (sibling,) = await workers.start_ready("drainer", redis_url, database_url, **settings)
                await stays_so(lambda: self._is_writing(database_url, 1), for_s=2 * TTL_MS / 1000)
                victim.kill()
                await eventually(lambda: self._is_writing(database_url, 2), within_s=TAKEN_OVER_WITHIN_S)
            rows = await stage.rows(environment, count=60)
            assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}
            assert await sibling.metric("mollifier_drained_total") > 0
            assert await sibling.metric("mollifier_recovered_total", why="holder_gone") > 0

    async def _is_writing(self, database_url: str, writers: int) -> None:
        """Asserts how many connections stand before the locked table (a killed process' one stays)."""
        query = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        assert len(await fetch(database_url, query)) == writers


class TestRedis:
    async def test_is_killed_and_comes_back(
        self, workers: Workers, redis_url: str, database_url: str, valkey: Valkey
    ) -> None:
        lines = "triggers triggers drainer"
        environment, tripped = new_environment(), new_environment()
        async with staged(workers, lines, redis_url, database_url, **TRIPS_AT_TWO) as stage:
            await stage.producer.trip(tripped)
            async with all_live(stage.all):
                names = await stage.producer.send_all(
                    [request(environment, enrolled=False), request(tripped)] * 100, at_once=False
                )
                valkey.kill()
                await all_say(stage.all, ready=503)
                valkey.start()
                await all_say(stage.all, ready=200)
                after = await stage.producer.ask_all([request(environment), request(tripped)] * 10)
            assert {reply["type"] for reply in after} == {"run"}
            await stage.producer.settled()
            rows = await stage.rows(environment, tripped, count=220)
            known = {row["id"] for row in rows}
            assert {r["run"]["id"] for name in names for r in stage.producer.replies[name]} <= known

    async def test_is_away_when_processes_start(
        self, workers: Workers, redis_url: str, database_url: str, valkey: Valkey
    ) -> None:
        valkey.stop()
        started = [workers.start(line, redis_url, database_url) for line in ("triggers", "drainer")]
        await all_say(started, ready=503)
        assert [await worker.live() for worker in started] == [200, 200]
        valkey.start()
        async with Redis.from_url(redis_url) as redis:
            await redis.ping()
        for worker in started:
            await worker.wait_ready()
        producer = Producer(redis_url)
        await producer.start()
        assert (await producer.ask(request(new_environment())))["type"] == "run"
        await producer.stop()

    @pytest.mark.parametrize("loss", ["group destroyed", "stream deleted", "everything flushed"])
    async def test_loses_the_consumer_group(
        self, workers: Workers, redis_url: str, database_url: str, loss: str
    ) -> None:
        """What is in the stream is handled, also what a consumer had been handed when the group was lost."""
        environment = new_environment()
        async with staged(workers, "triggers triggers drainer", redis_url, database_url) as stage:
            producer = stage.producer
            assert (await producer.ask(request(environment)))["type"] == "run"
            async with all_live(stage.all):
                if loss == "group destroyed":
                    await producer.redis.xgroup_destroy(TRIGGERS, "mollifier")
                elif loss == "stream deleted":
                    await producer.redis.delete(TRIGGERS)
                else:
                    await producer.redis.flushall()
                replies = await producer.ask_all([request(environment)] * 5, within=5)
                assert {reply["type"] for reply in replies} == {"run"}
                replies = [await producer.ask(request(environment)) for _ in range(10)]
            assert {reply["type"] for reply in replies} == {"run"}
            await stage.rows(environment, count=16)
            await all_say(stage.all, ready=200)

    async def test_what_was_pending_in_a_destroyed_group_is_handled(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        environment = new_environment()
        async with staged(workers, "triggers", redis_url, database_url, store_timeout_ms=30_000) as stage:
            async with table_locked(database_url):
                names = await stage.producer.send_all([request(environment, enrolled=False)] * 10)
                await eventually(lambda: holds(stage.producer, stage.triggers[0], 10))
                stage.triggers[0].kill()
                await stage.producer.redis.xgroup_destroy(TRIGGERS, "mollifier")
            await workers.start_ready("triggers", redis_url, database_url)
            replies = await stage.producer.all_replies(names)
            rows = await stage.rows(environment, count=10)
            assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}

    async def test_forgets_its_scripts(self, workers: Workers, redis_url: str, database_url: str) -> None:
        environment = new_environment()
        lines = "triggers drainer"
        async with staged(workers, lines, redis_url, database_url, **TRIPS_AT_TWO) as stage:
            await stage.producer.trip(environment)
            for number in range(1, 6):
                await stage.producer.redis.script_flush()
                reply = await stage.producer.ask(request(environment))
                assert reply["is_mollified"]
                await stage.producer.redis.script_flush()
                await stage.rows(environment, count=number)

    async def test_refuses_writes_for_a_while(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """A replica for a moment, as in a failover: nothing is lost, and nobody has to be restarted."""
        environment = new_environment()
        lines = "triggers drainer"
        async with staged(workers, lines, redis_url, database_url, **TRIPS_AT_TWO) as stage:
            await stage.producer.trip(environment)
            async with all_live(stage.all):
                names = await stage.producer.send_all([request(environment)] * 50, at_once=False)
                await stage.producer.redis.execute_command("REPLICAOF", "127.0.0.1", "9")
                with pytest.raises(RedisError, match="read only"):
                    await stage.producer.send(request(environment))
                await stays_so(lambda: stage.producer.redis.ping(), for_s=1)
                await stage.producer.redis.execute_command("REPLICAOF", "NO", "ONE")
                replies = await stage.producer.all_replies(names)
            accepted = {reply["run"]["id"] for reply in replies if reply["type"] == "run"}
            assert {r["error"]["code"] for r in replies if r["type"] == "error"} <= {"buffer_unavailable"}
            rows = await stage.rows(environment, count=len(accepted))
            assert {row["id"] for row in rows} == accepted
            assert (await stage.producer.ask(request(environment)))["is_mollified"] is True


BYPASS = {"one_time_use_token": "a token of this test"}


@pytest.mark.one_redis
class TestPostgres:
    @pytest.mark.parametrize("outage", ["killed", "paused"])
    async def test_is_away_and_comes_back(
        self, workers: Workers, redis_url: str, database_url: str, postgres: Postgres, outage: str
    ) -> None:
        """What may be buffered is; what may not is told so; all of it drains; every run is there once."""
        settings = {"store_timeout_ms": 500, "trip_threshold": 1_000_000}
        lines = "triggers triggers drainer"
        calm, bypassing, outside = new_environment("calm"), new_environment("bypass"), new_environment("out")
        async with staged(workers, lines, redis_url, database_url, **settings) as stage:
            producer = stage.producer
            before = await producer.ask_all([request(calm)] * 10)
            assert {reply["is_mollified"] for reply in before} == {False}
            async with all_live(stage.all):
                if outage == "killed":
                    postgres.kill()
                else:
                    postgres.pause()
                during = await producer.ask_all(
                    [request(calm), request(bypassing, options=BYPASS), request(outside, enrolled=False)] * 20
                )
                later = await producer.ask_all([request(calm)] * 20)
                await all_say(stage.all, ready=503)
                assert {reply.get("is_mollified") for reply in [*during[::3], *later]} == {True}
                for refused in (during[1::3], during[2::3]):
                    errors = {
                        (r["error"]["code"], r["error"]["status"], r["error"]["retryable"]) for r in refused
                    }
                    assert errors == {("store_unavailable", 503, True)}
                diverted = [
                    await worker.metric(
                        "mollifier_decisions_total", outcome="mollify", reason="store_unavailable"
                    )
                    for worker in stage.triggers
                ]
                assert sum(diverted) == 40
                if outage == "killed":
                    postgres.start()
                else:
                    postgres.resume()
                await all_say(stage.all, ready=200)
                rows = await stage.rows(calm, count=50, within_s=15)
            assert {row["id"] for row in rows} == {r["run"]["id"] for r in [*before, *during[::3], *later]}
            await eventually(lambda: self._passes_again(producer))
            assert await runs_of(database_url, outside) == [] or outage == "paused"

    async def _passes_again(self, producer: Producer) -> None:
        assert (await producer.ask(request(new_environment())))["is_mollified"] is False

    async def test_is_away_when_processes_start(
        self, workers: Workers, redis_url: str, database_url: str, postgres: Postgres
    ) -> None:
        postgres.stop()
        environment = new_environment()
        started = [workers.start(line, redis_url, database_url) for line in ("triggers", "drainer")]
        producer = Producer(redis_url)
        await producer.start()
        await all_say(started, ready=503)
        assert [await worker.live() for worker in started] == [200, 200]
        replies = await producer.ask_all([request(environment)] * 10)
        assert {reply.get("is_mollified") for reply in replies} == {True}
        postgres.start()
        for worker in started:
            await worker.wait_ready()
        stage = Stage(redis_url, database_url, producer, started[:1], started[1:])
        await stage.rows(environment, count=10)
        await producer.stop()

    async def test_without_diverting_every_request_is_told(
        self, workers: Workers, redis_url: str, database_url: str, postgres: Postgres
    ) -> None:
        environment = new_environment()
        settings = {"divert_on_store_failure": 0, "store_timeout_ms": 500}
        async with staged(workers, "triggers", redis_url, database_url, **settings) as stage:
            postgres.kill()
            replies = await stage.producer.ask_all([request(environment)] * 5)
            assert {reply["error"]["code"] for reply in replies} == {"store_unavailable"}
            postgres.start()
            await eventually(lambda: TestPostgres._passes_again(self, stage.producer))
            assert await runs_of(database_url, environment) == []


class TestDurability:
    async def test_a_reply_waits_for_the_disk(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """With WAITAOF, on a server that never syncs until it is told to."""
        redis: Any
        async with Redis.from_url(redis_url) as redis:
            if not await redis.execute_command("COMMAND LIST", "FILTERBY", "PATTERN", "waitaof"):
                pytest.skip("this server has no WAITAOF: it came with Redis 7.2")
        settings = {"buffer_wait_aof": 1, "max_deliveries": 2, **TRIPS_AT_TWO}
        environment = new_environment()
        async with staged(workers, "triggers drainer", redis_url, database_url, **settings) as stage:
            names = await stage.producer.send_all([request(environment)] * 5)
            await self._are_held_back(stage.producer, names[1:])
            await stage.producer.redis.config_set("appendfsync", "always")
            try:
                replies = await stage.producer.all_replies(names)
            finally:
                await stage.producer.redis.config_set("appendfsync", "no")
            await self._became_runs(stage, environment, replies)

    async def test_a_reply_waits_for_a_replica(
        self, workers: Workers, redis_url: str, database_url: str, valkey: Valkey, tmp_path: Path
    ) -> None:
        settings = {"buffer_wait_replicas": 1, "max_deliveries": 2, **TRIPS_AT_TWO}
        environment = new_environment()
        async with staged(workers, "triggers drainer", redis_url, database_url, **settings) as stage:
            names = await stage.producer.send_all([request(environment)] * 5)
            await self._are_held_back(stage.producer, names[1:])
            await stage.producer.redis.config_set("repl-diskless-sync-delay", 0)
            options = {"replicaof": f"127.0.0.1 {valkey.port}", "appendonly": "no"}
            with Valkey(tmp_path / "replica", options=options):
                replies = await stage.producer.all_replies(names)
            await self._became_runs(stage, environment, replies)

    async def _are_held_back(self, producer: Producer, names: list[str]) -> None:
        """For longer than one wait takes, so that the requests have come again meanwhile."""

        async def no_reply() -> None:
            assert [producer.replies[name] for name in names if producer.replies[name]] == []

        await stays_so(no_reply, for_s=4.5)

    async def _became_runs(self, stage: Stage, environment: str, replies: list[Any]) -> None:
        assert [reply.get("is_mollified") for reply in replies] == [False, True, True, True, True]
        rows = await stage.rows(environment, count=5)
        assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies}


@pytest.mark.redis
class TestCluster:
    async def test_one_node_takes_the_whole_way(
        self, workers: Workers, database_url: str, tmp_path: Path
    ) -> None:
        """A server in cluster mode refuses a script whose keys lie in two slots, however few nodes it has."""
        options = {"cluster-enabled": "yes", "appendfsync": "no"}
        with Valkey(tmp_path / "node", options=options) as node:
            redis: Any = Redis.from_url(node.url)
            await redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await eventually(lambda: self._is_whole(redis))
            await redis.aclose()
            settings = {"ack_grace_ttl_s": 1, "global_trip_threshold": 1_000, **TRIPS_AT_TWO}
            lines = "triggers triggers drainer drainer"
            async with staged(workers, lines, node.url, database_url, **settings) as stage:
                environments = [new_environment() for _ in range(40)]
                bodies = [request(environment) for environment in environments for _ in range(5)]
                bodies += [
                    request(environment, options={"run_id": f"run_chosen-{environment}", "delay": "1h"})
                    for environment in environments
                ]
                replies = await stage.producer.ask_all([*bodies, {"no": "request"}])
                assert {reply["type"] for reply in replies[:-1]} == {"run"}, replies
                assert replies[-1]["type"] == "error"
                assert sum(reply["is_mollified"] for reply in replies[:-1]) >= 40 * 5 - 40
                rows = await stage.rows(*environments, count=240)
                assert {row["id"] for row in rows} == {reply["run"]["id"] for reply in replies[:-1]}
                await stage.producer.settled()
                await eventually(lambda: self._is_forgotten(stage.producer))

    async def _is_whole(self, redis: Any) -> None:
        assert (await redis.execute_command("CLUSTER INFO"))["cluster_state"] == "ok"

    async def _is_forgotten(self, producer: Producer) -> None:
        assert await producer.redis.keys("*:entries:*") == []


@pytest.mark.one_redis
class TestStorm:
    async def test_every_request_is_a_run_whatever_breaks_meanwhile(
        self, workers: Workers, redis_url: str, database_url: str, valkey: Valkey, postgres: Postgres
    ) -> None:
        """G1, G2 and G3 at once: a producer that repeats what is not answered, and everything else dying."""
        settings = {"heartbeat_ttl_ms": TTL_MS, "trigger_batch_size": 50, "drain_batch_size": 50}
        gate = {"trip_threshold": 20, "hold_ms": 300, "store_timeout_ms": 1_000}
        lines = "triggers triggers drainer drainer"
        environments = [new_environment() for _ in range(8)]
        bodies = {
            f"storm-{environment}-{number}": request(
                environment, options={"run_id": f"run_storm-{environment}-{number}"}
            )
            for number in range(150)
            for environment in environments
        }
        async with staged(workers, lines, redis_url, database_url, **settings, **gate) as stage:

            async def send_missing() -> None:
                missing = [name for name in bodies if not answered(name)]
                for start in range(0, len(missing), 100):
                    some = missing[start : start + 100]
                    await stage.producer.send_all(
                        [bodies[name] for name in some], correlation_ids=some, at_once=False
                    )
                assert not missing, f"{len(missing)} are not answered"

            def answered(name: str) -> bool:
                return any(reply["type"] == "run" for reply in stage.producer.replies[name])

            sending = asyncio.create_task(eventually(send_missing, within_s=40, every_s=0.5))
            await eventually(lambda: self._some_answered(stage.producer, 200))
            stage.triggers[0].kill()
            stage.drainers[0].kill()
            valkey.kill()
            valkey.start()
            await eventually(lambda: self._some_answered(stage.producer, 400))
            postgres.kill()
            await eventually(lambda: self._some_answered(stage.producer, 600))
            valkey.kill()
            postgres.start()
            valkey.start()
            await sending
            await stage.producer.settled(within=20)
            rows = await stage.rows(*environments, count=len(bodies), within_s=20)
            assert {row["id"] for row in rows} == set(bodies)
            assert {
                reply["run"]["id"] == name
                for name in bodies
                for reply in stage.producer.replies[name]
                if reply["type"] == "run"
            } == {True}

    async def _some_answered(self, producer: Producer, count: int) -> None:
        assert sum(bool(replies) for replies in producer.replies.values()) >= count


async def test_a_group_that_the_reader_creates_starts_at_the_beginning(redis_url: str, redis: Redis) -> None:
    """Whoever is first, the supervisor or FastStream's own start: what was queued before is not skipped."""
    settings = Settings.model_validate({"REDIS_URL": redis_url, "port": 0})
    await redis.xadd(TRIGGERS, {"body": "queued before the first start"})
    world = await World.open(settings, Telemetry("triggers"))
    process = Triggers(world)
    await process.broker().start()
    try:

        async def is_read() -> None:
            (group,) = await redis.xinfo_groups(TRIGGERS)
            assert (group["entries-read"], group["pending"]) == (1, 0)

        await eventually(is_read)
    finally:
        process.retry.close()
        await process.retry.closed.wait()
        await process.broker().stop()
        await world.close()

"""The sweeper: true figures or none, stale entries reported, only what is dead put away. DESIGN section 9."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
from redis.asyncio import Redis

from app import census, leftovers
from app.buffer import RedisBuffer
from app.census import RedisCensus
from app.claims import RedisClaims
from app.embedded import Postgres, Valkey
from app.errors import Unreachable
from app.heartbeat import Heartbeat
from app.keys import Keys
from app.lease import Lease
from app.leftovers import PostgresRows, RedisLeftovers
from app.ports import Settlement, StreamFigures
from app.redis_client import Call, Scripts
from app.rows import Row
from app.settings import Settings
from app.store import PostgresStore
from app.streams import RequestStream
from app.sweep import Sweep
from app.telemetry import Telemetry
from app.turns import RedisTurns
from schemas.snapshot import Snapshot
from tests.adapters import Pool
from tests.builders import run
from tests.processes import Worker, Workers
from tests.producer import new_environment
from tests.waiting import eventually, stays_so

KEYS = Keys("mollifier", 16)
OLD_MS = 3_600_000
TTL_MS = 600
FIGURES = ("depth", "oldest_dwell_seconds", "draining", "stale")

MakeBuffer = Callable[..., RedisBuffer]
MakeTurns = Callable[..., RedisTurns]


class CountingScripts(Scripts):
    """Counts what travels to Redis and back: round trips, and the calls in them."""

    trips = 0
    calls = 0

    async def _send(self, calls: Sequence[Call]) -> list[Any]:
        self.trips += 1
        self.calls += len(calls)
        return await super()._send(calls)


class BrokenScripts(Scripts):
    """A Redis that does not answer while it is told to be `broken`, at the call of that name or at any."""

    broken = ""

    async def _send(self, calls: Sequence[Call]) -> list[Any]:
        if self.broken and any(self.broken in ("any", call.name) for call in calls):
            raise Unreachable("Redis: gone")
        return await super()._send(calls)


@pytest.fixture
async def counted(client: Redis) -> CountingScripts:
    """Counting, with all scripts of a pass loaded."""
    return CountingScripts(client)


def make_census(client: Redis, **changes: Any) -> RedisCensus:
    return RedisCensus(Scripts(client), KEYS, Settings.model_validate(changes))


def make_leftovers(client: Redis, **changes: Any) -> RedisLeftovers:
    return RedisLeftovers(Scripts(client), KEYS, Settings.model_validate(changes))


def make_sweep(
    scripts: Scripts,
    pool: Pool,
    telemetry: Telemetry | None = None,
    clock: Callable[[], float] = time.monotonic,
    **changes: Any,
) -> Sweep:
    settings = Settings.model_validate(changes)
    return Sweep(
        census=RedisCensus(scripts, KEYS, settings),
        leftovers=RedisLeftovers(scripts, KEYS, settings),
        rows=PostgresRows(pool, settings),
        settings=settings,
        telemetry=telemetry or Telemetry("test"),
        clock=clock,
    )


def figures(telemetry: Telemetry) -> dict[str, float]:
    """The buffer's gauges as they are."""
    return {name: telemetry.registry.get_sample_value(f"mollifier_buffer_{name}") or 0.0 for name in FIGURES}


def are_unknown(shown: dict[str, float]) -> bool:
    return all(math.isnan(value) for value in shown.values())


def counted_by(telemetry: Telemetry, metric: str, **labels: str) -> float:
    return telemetry.registry.get_sample_value(f"mollifier_{metric}_total", labels) or 0.0


async def accept(make_buffer: MakeBuffer, *environments: str, **changes: Any) -> list[Snapshot]:
    runs = [run(environment, **changes) for environment in environments]
    await make_buffer().accept(runs, [None] * len(runs))
    return runs


async def age(client: Any, environment: str, by_ms: int = OLD_MS) -> None:
    """Have all that an environment has buffered, queued and not yet taken, be older than it is."""
    names, partition = KEYS.environment(environment), KEYS.partition(environment)
    entries = await client.xrange(names.entries)
    await client.delete(names.entries)
    async with client.pipeline(transaction=False) as pipeline:
        for entry, fields in entries:
            ms, _, sequence = entry.decode().partition("-")
            old = f"{int(ms) - by_ms}-{sequence}"
            pipeline.xadd(names.entries, fields, id=old)
            pipeline.hset(names.index, fields[b"run_id"], old)
        pipeline.zincrby(KEYS.ready(partition), -by_ms, environment)
        for member in await client.zrange(KEYS.arrivals(partition), 0, -1):
            generation, _, rest = member.decode().partition(" ")
            if rest.endswith(environment):
                old_generation = int(generation) - by_ms * 1000
                pipeline.zrem(KEYS.arrivals(partition), member)
                pipeline.zadd(KEYS.arrivals(partition), {f"{old_generation} {rest}": old_generation})
        await pipeline.execute()


async def beat(client: Redis, consumer: str) -> Heartbeat:
    heart = Heartbeat(Scripts(client), KEYS, consumer, 60_000, Telemetry("test"))
    await heart.beat()
    return heart


class TestFigures:
    async def test_an_empty_buffer_counts_nothing(self, client: Redis) -> None:
        assert await make_census(client).count() == (0, 0.0, 0, 0, [])

    async def test_entries_are_counted_until_they_are_settled(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        await accept(make_buffer, "env_1", "env_1", "env_1", "env_2", "é:*")
        turns, one = make_turns(), make_census(client)
        found = await one.count()
        assert (found.depth, found.draining, found.stale) == (5, 0, 0)
        taken = await turns.take(4)
        assert (await one.count())[:1] == (5,)
        assert (await one.count()).draining == 4
        await turns.settle(taken, [])
        await turns.schedule.flush()
        found = await one.count()
        assert (found.depth, found.draining) == (1, 0)

    async def test_the_oldest_dwell_is_that_of_the_oldest_entry(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        """Also while it is being drained; once it is settled, that of the next."""
        await accept(make_buffer, "env_1")
        await age(client, "env_1")
        await accept(make_buffer, "env_1", "env_2")
        turns, one = make_turns(), make_census(client)
        assert OLD_MS <= (await one.count()).oldest_dwell_s * 1000 < OLD_MS + 60_000
        taken = [some for some in await turns.take(1) if some.environment_id == "env_1"]
        assert OLD_MS <= (await one.count()).oldest_dwell_s * 1000 < OLD_MS + 60_000
        await turns.settle(taken, [])
        assert (await one.count()).oldest_dwell_s < 60

    async def test_stale_entries_are_counted_queued_or_draining(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        await accept(make_buffer, *["env_1"] * 3, *["env_2"] * 2)
        for environment in ("env_1", "env_2"):
            await age(client, environment)
        await accept(make_buffer, "env_1", "env_2", "env_3")
        turns, one = make_turns(), make_census(client)
        assert (await one.count())[3:] == (5, [("env_1", 3), ("env_2", 2)])
        taken = await turns.take(9)
        handed_out = sum(len(some.entries) for some in taken)
        assert handed_out >= 5
        assert (await one.count())[2:] == (handed_out, 5, [("env_1", 3), ("env_2", 2)])
        await turns.settle([some for some in taken if some.environment_id == "env_1"], [])
        assert (await one.count())[3:] == (2, [("env_2", 2)])

    async def test_what_was_settled_is_only_remembered(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        await accept(make_buffer, *["env_1"] * 5)
        await age(client, "env_1")
        turns = make_turns()
        await turns.settle(await turns.take(3), [])
        await accept(make_buffer, *["env_1"] * 4)
        found = await make_census(client).count()
        assert (found.depth, found.stale) == (6, 2)

    async def test_stale_entries_of_a_large_buffer_are_reckoned(
        self, client: Redis, make_buffer: MakeBuffer
    ) -> None:
        await accept(make_buffer, *["env_1"] * 4000)
        await age(client, "env_1")
        assert (await make_census(client).count()).stale == 4000
        await accept(make_buffer, *["env_1"] * 4000)
        assert (await make_census(client).count()).stale == pytest.approx(4000, rel=0.3)

    async def test_stale_environments_beyond_the_bound_count_as_one_entry(
        self, client: Redis, make_buffer: MakeBuffer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        environments = [f"env_{number}" for number in range(64)]
        await accept(make_buffer, *environments, *environments)
        for environment in environments:
            await age(client, environment)
        assert (await make_census(client).count()).stale == 128
        monkeypatch.setattr(census, "_LOOK_AT_ENVIRONMENTS", 16)
        found = await make_census(client).count()
        assert found.stale == 128 - (64 - 16)
        assert len(found.stalest) == 10


class TestLostEnvironments:
    """The schedule's keys are lost: nobody would drain what is ready."""

    @staticmethod
    async def lose_schedule(client: Redis) -> None:
        await client.delete(*await client.keys("mollifier:{turns}*"))

    async def test_they_are_drained_again(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        environments = ["env_1", "env with spaces", "é:*", ""]
        runs = await accept(make_buffer, *environments, *environments, organization_id="org 1")
        turns = make_turns()
        await turns.take(1)
        await turns.put_back(await turns.take(0), apart=False)
        await self.lose_schedule(client)
        for environment in environments:
            await age(client, environment)
        assert await make_turns("drainer-2").take(99) == []
        assert await make_census(client).announce_lost() == 4
        assert await make_census(client).announce_lost() == 0, "it is enough to say it once"
        taken = await make_turns("drainer-2").take(99)
        assert {some.environment_id: len(some.entries) for some in taken} == dict.fromkeys(environments, 2)
        assert len(runs) == 8

    async def test_a_drainer_that_holds_one_goes_on(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        await accept(make_buffer, "env_1")
        await age(client, "env_1")
        turns = make_turns()
        await beat(client, "drainer-1")
        taken = await turns.take(9)
        await self.lose_schedule(client)
        assert await make_census(client).announce_lost() == 1
        assert await make_turns("drainer-2").take(9) == []
        await turns.settle(taken, [])
        assert (await make_census(client).count()).depth == 0

    async def test_what_is_known_or_announced_or_new_is_left_alone(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        await accept(make_buffer, "known")
        await age(client, "known")
        await make_turns().schedule.next(0)
        await accept(make_buffer, "announced")
        await age(client, "announced")
        await accept(make_buffer, "new")
        await client.delete(KEYS.arrivals(KEYS.partition("new")))
        one = make_census(client)
        arrivals = await client.zrange(KEYS.arrivals(KEYS.partition("announced")), 0, -1)
        assert await one.announce_lost() == 0
        assert await client.zrange(KEYS.arrivals(KEYS.partition("announced")), 0, -1) == arrivals

    async def test_one_that_moved_on_meanwhile_is_left_alone(
        self, client: Redis, make_buffer: MakeBuffer, make_turns: MakeTurns
    ) -> None:
        """It was drained, and became ready anew, between the look and the announcement."""
        await accept(make_buffer, "env_1")
        await age(client, "env_1")
        turns = make_turns()
        taken = await turns.take(9)
        await self.lose_schedule(client)
        one = make_census(client)
        found = await one._find_ready()
        assert [environment for some in found.values() for environment, _ in some] == ["env_1"]
        await turns.settle(taken, [])
        await accept(make_buffer, "env_1")
        with pytest.MonkeyPatch.context() as patch:

            async def what_it_was() -> dict[int, list[tuple[str, str]]]:
                return found

            patch.setattr(one, "_find_ready", what_it_was)
            assert await one.announce_lost() == 0

    async def test_all_are_found_a_few_at_a_time(
        self,
        client: Redis,
        make_buffer: MakeBuffer,
        make_turns: MakeTurns,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Those that the schedule knows are passed over, however many they are."""
        monkeypatch.setattr(census, "_SEARCH_ENVIRONMENTS", 16)
        environments = [f"env_{number}" for number in range(96)]
        await accept(make_buffer, *environments)
        await make_turns().schedule.next(0)
        for environment in environments:
            await age(client, environment)
        lost = environments[-1]
        await client.hdel(f"{KEYS.turns}:states", lost)
        one, passes = make_census(client), 0
        while not await one.announce_lost():
            passes += 1
            assert passes < 96
        members: Any = await client.zrange(KEYS.arrivals(KEYS.partition(lost)), 0, -1)
        assert [member.decode().endswith(lost) for member in members] == [True]


class TestConsumers:
    STREAM = KEYS.triggers

    @pytest.fixture
    async def group(self, client: Redis) -> Redis:
        """Consumers: `busy` has something pending, `idle` has not."""
        await client.xgroup_create(self.STREAM, KEYS.group, id="0", mkstream=True)
        await client.xadd(self.STREAM, {"body": "{}"})
        await self.read(client, "busy")
        # Redis 7.0 makes no consumer that reads and finds nothing.
        await client.xgroup_createconsumer(self.STREAM, KEYS.group, "idle")
        return client

    async def read(self, client: Redis, consumer: str, count: int = 10) -> int:
        """Read as a trigger worker does; how many entries were new."""
        read: Any = await client.xreadgroup(KEYS.group, consumer, {self.STREAM: ">"}, count=count)
        return sum(len(entries) for _, entries in read or ())

    async def names(self, client: Redis) -> set[str]:
        consumers: Any = await client.xinfo_consumers(self.STREAM, KEYS.group)
        return {one["name"].decode() for one in consumers}

    async def all_are_idle(self, client: Redis, for_ms: int = 1) -> None:
        consumers: Any = await client.xinfo_consumers(self.STREAM, KEYS.group)
        assert min(one["idle"] for one in consumers) > for_ms

    async def drops(self, client: Redis, count: int) -> None:
        assert await make_leftovers(client, reclaim_idle_ms=1).drop_consumers() == count

    async def test_without_streams_there_are_none(self, client: Redis) -> None:
        await self.drops(client, 0)

    async def test_only_a_dead_one_with_nothing_pending_is_dropped(self, group: Redis) -> None:
        heart = await beat(group, "idle")
        await stays_so(lambda: self.drops(group, 0), for_s=0.1)
        await heart.remove()
        assert await make_leftovers(group).drop_consumers() == 0, "not before it was idle for long"
        await self.drops(group, 1)
        assert await self.names(group) == {"busy"}
        await self.drops(group, 0)
        assert (await group.xpending(self.STREAM, KEYS.group))["pending"] == 1

    async def test_those_of_the_operations_stream_too(self, client: Redis) -> None:
        await client.xgroup_create(KEYS.operations, KEYS.group, id="0", mkstream=True)
        await client.xgroup_createconsumer(KEYS.operations, KEYS.group, "idle")
        await eventually(lambda: self.drops(client, 1))

    async def test_a_bounded_number_at_once(self, client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leftovers, "_DROP_AT_ONCE", 10)
        await client.xgroup_create(self.STREAM, KEYS.group, id="0", mkstream=True)
        for number in range(25):
            await client.xgroup_createconsumer(self.STREAM, KEYS.group, f"dead-{number}")
        await eventually(lambda: self.all_are_idle(client))
        for count in (10, 10, 5, 0):
            await self.drops(client, count)

    @pytest.mark.parametrize("is_finished", [False, True])
    async def test_one_that_comes_back_at_the_last_moment_is_kept(
        self, group: Redis, is_finished: bool
    ) -> None:
        """Between the look at its heartbeat and the drop it is given an entry, or has even finished it."""
        one = make_leftovers(group, reclaim_idle_ms=50 if is_finished else 1)
        without_heartbeat = one._without_heartbeat

        async def comes_back(consumers: Sequence[str]) -> set[str]:
            dead = await without_heartbeat(consumers)
            assert dead == {"idle"}
            entry_id: Any = await group.xadd(self.STREAM, {"body": "{}"})
            assert await self.read(group, "idle") == 1
            if is_finished:
                await group.xack(self.STREAM, KEYS.group, entry_id)
            else:
                await eventually(lambda: self.all_are_idle(group))
            return dead

        await eventually(lambda: self.all_are_idle(group, for_ms=50))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one, "_without_heartbeat", comes_back)
            assert await one.drop_consumers() == 0
        assert await self.names(group) == {"busy", "idle"}
        pending = (await group.xpending(self.STREAM, KEYS.group))["pending"]
        assert pending == (1 if is_finished else 2)

    async def test_nothing_pending_is_lost_to_a_drop_in_a_race(self, client: Redis) -> None:
        """Consumers without heartbeats read and acknowledge while they are dropped as fast as it goes."""
        await client.xgroup_create(self.STREAM, KEYS.group, id="0", mkstream=True)
        one = make_leftovers(client, reclaim_idle_ms=1)

        async def works(name: str) -> None:
            """Read one entry at a time and acknowledge it; leave the last one."""
            for number in range(40):
                await client.xadd(self.STREAM, {"body": "{}"})
                read: Any = await client.xreadgroup(KEYS.group, name, {self.STREAM: ">"}, count=1)
                if number < 39:
                    await client.xack(self.STREAM, KEYS.group, read[0][1][0][0])

        async def drops() -> int:
            dropped = 0
            while not working.done():
                dropped += await one.drop_consumers()
            return dropped

        working = asyncio.gather(*(works(f"worker-{number}") for number in range(24)))
        _, dropped = await asyncio.gather(working, drops())
        assert (await client.xpending(self.STREAM, KEYS.group))["pending"] == 24
        assert dropped > 0


class TestStreams:
    FIGURES = ("consumers", "requests_waiting", "requests_pending")

    async def test_without_streams_there_is_nobody_and_nothing(self, client: Redis) -> None:
        nothing = StreamFigures(0, 0, 0)
        assert await make_census(client).count_streams() == ({"triggers": nothing, "operations": nothing}, 0)

    async def test_who_is_alive_what_waits_and_what_is_at_work(self, client: Any) -> None:
        """A consumer that has not read anything counts too; one without a heartbeat does not."""
        for name in ("idle", "busy", "dead"):
            await RequestStream(client, KEYS, KEYS.triggers, name, 60_000).ensure_group()
        await beat(client, "idle")
        await beat(client, "busy")
        await RequestStream(client, KEYS, KEYS.operations, "busy", 60_000).ensure_group()
        for _ in range(10):
            await client.xadd(KEYS.triggers, {"body": "{}"})
        for name, count in (("busy", 3), ("dead", 2)):
            await client.xreadgroup(KEYS.group, name, {KEYS.triggers: ">"}, count=count)
        (entry_id, _), *_ = await client.xrange(KEYS.triggers, count=1)
        await client.xack(KEYS.triggers, KEYS.group, entry_id)
        await client.xdel(KEYS.triggers, entry_id)
        for _ in range(4):
            await client.xadd(KEYS.dead_letters, {"reason": "undecodable"})
        streams, dead_letters = await make_census(client).count_streams()
        assert streams == {"triggers": StreamFigures(2, 5, 4), "operations": StreamFigures(1, 0, 0)}
        assert dead_letters == 4

    async def test_they_are_shown_until_a_pass_fails(self, client: Any, pool: Pool) -> None:
        telemetry, scripts = Telemetry("test"), BrokenScripts(client)
        one = make_sweep(scripts, pool, telemetry)

        def shown(name: str, **labels: str) -> float:
            return telemetry.registry.get_sample_value(f"mollifier_{name}", labels) or 0.0

        await RequestStream(client, KEYS, KEYS.triggers, "mine", 60_000).ensure_group()
        await beat(client, "mine")
        await client.xadd(KEYS.triggers, {"body": "{}"})
        await client.xadd(KEYS.dead_letters, {"reason": "undecodable"})
        await one.make_pass()
        assert shown("dead_letters_held") == 1
        of_triggers = [shown(name, stream="triggers") for name in self.FIGURES]
        assert of_triggers == [1, 1, 0]
        scripts.broken = "EXISTS"
        with pytest.raises(Unreachable):
            await one.make_pass()
        assert math.isnan(shown("dead_letters_held"))
        assert all(math.isnan(shown(name, stream="triggers")) for name in self.FIGURES)


class TestClaimsAndReservations:
    KINDS = ("claim", "reservation")

    @staticmethod
    def keyed(environment: str = "env_1", key: str = "key", **changes: Any) -> Snapshot:
        now = datetime.now(UTC)
        return run(
            environment,
            idempotency_key=key,
            idempotency_key_expires_at=now + timedelta(hours=1),
            buffered_at=now,
            **changes,
        )

    @staticmethod
    async def buffer(make_buffer: MakeBuffer, *runs: Snapshot) -> None:
        await make_buffer().accept(runs, [None] * len(runs))

    @staticmethod
    async def write(store: PostgresStore, *runs: Snapshot) -> None:
        await store.materialise([Row(one, "QUEUED") for one in runs], datetime.now(UTC))

    @staticmethod
    async def claims(client: Redis) -> set[str]:
        names: Any = await client.keys("*:claim:*")
        return {name.decode() for name in names}

    async def test_a_claim_ends_when_its_run_is_a_row(
        self, client: Redis, pool: Pool, store: PostgresStore, make_buffer: MakeBuffer
    ) -> None:
        """One whose run is still buffered stays, and so does one that a request works on."""
        stored, queued, asked = self.keyed(), self.keyed(key="other"), self.keyed("env_2")
        await self.buffer(make_buffer, stored, queued)
        await RedisClaims(Scripts(client), KEYS, Settings()).claim([asked], datetime.now(UTC))
        elsewhere = Keys("mollifier-2", 16).claim(stored)
        await client.set(elsewhere, stored.id)
        await self.write(store, stored)
        telemetry = Telemetry("test")
        await make_sweep(Scripts(client), pool, telemetry).make_pass()
        assert await self.claims(client) == {KEYS.claim(queued), KEYS.claim(asked), elsewhere}
        assert counted_by(telemetry, "swept", what="claim") == 1
        assert await store.look_up_keys([stored], datetime.now(UTC)) != [None], "the index guards the key"

    async def test_a_claim_ends_when_its_run_became_an_alias(
        self, client: Redis, pool: Pool, store: PostgresStore, make_buffer: MakeBuffer
    ) -> None:
        winner, loser = self.keyed(), self.keyed()
        await self.buffer(make_buffer, loser)
        await self.write(store, winner)
        await self.write(store, loser)
        await make_sweep(Scripts(client), pool).make_pass()
        assert await self.claims(client) == set()

    async def test_a_claim_that_has_another_winner_by_now_stays(
        self, client: Redis, store: PostgresStore
    ) -> None:
        stored, other = self.keyed(), self.keyed()
        await client.set(KEYS.claim(stored), stored.id)
        one = make_leftovers(client)
        kept = await one.find()
        claims = RedisClaims(Scripts(client), KEYS, Settings())
        await claims.settle([Settlement(stored, stored.id, other.id)], datetime.now(UTC))
        assert await one.retire(kept) == (0, 0)
        assert await self.claims(client) == {KEYS.claim(stored)}

    async def test_a_reservation_ends_when_its_run_is_a_row_of_its_environment(
        self, client: Redis, pool: Pool, store: PostgresStore, make_buffer: MakeBuffer
    ) -> None:
        stored, absent, foreign = run(id="stored"), run(id="absent"), run(id="foreign")
        await make_buffer().recall([], [stored, absent, foreign])
        await self.write(store, stored, run("env_2", id="foreign"))
        telemetry = Telemetry("test")
        await make_sweep(Scripts(client), pool, telemetry).make_pass()
        left = [await client.hgetall(KEYS.chosen(partition)) for partition in range(16)]
        assert {name for one in left for name in one} == {b"absent", b"foreign"}
        assert counted_by(telemetry, "swept", what="reservation") == 1

    async def test_a_reservation_without_a_run_ends_once_no_request_can_be_at_work_on_it(
        self, client: Redis, pool: Pool, make_buffer: MakeBuffer
    ) -> None:
        """Its worker was taken for dead between reserving and writing. What is buffered keeps its id."""
        buffered, abandoned = run(id="buffered"), run(id="abandoned")
        await make_buffer().recall([], [buffered, abandoned])
        await make_buffer().accept([buffered], [None])
        now = 0.0
        sweep = make_sweep(Scripts(client), pool, clock=lambda: now, claim_ttl_s=30)
        left = []
        for _ in range(3):
            await sweep.make_pass()
            chosen = [await client.hgetall(KEYS.chosen(partition)) for partition in range(16)]
            left.append({name for one in chosen for name in one})
            now += 30.5
        assert left == [{b"buffered", b"abandoned"}, {b"buffered"}, {b"buffered"}]

    async def test_the_search_goes_on_where_it_was(
        self,
        client: Redis,
        pool: Pool,
        store: PostgresStore,
        make_buffer: MakeBuffer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """However many keys there are, a pass looks at a few; in the end all were looked at."""
        monkeypatch.setattr(leftovers, "_SCANS", 2)
        monkeypatch.setattr(leftovers, "_SCAN_KEYS", 50)
        monkeypatch.setattr(leftovers, "_SCAN_RESERVATIONS", 16 * 10)
        stored, absent = (
            [
                # So long an id that Redis does not hand out its hash all at once.
                self.keyed(key=f"{what} {number}", id=f"{what}-{number:0100}")
                for number in range(1500)
            ]
            for what in ("stored", "absent")
        )
        await make_buffer().recall([], [*stored, *absent])
        await client.mset({KEYS.claim(one): one.id for one in (*stored, *absent)})
        await self.write(store, *stored)
        telemetry, passes = Telemetry("test"), 0
        one, ended = make_sweep(Scripts(client), pool, telemetry), 0.0
        while ended < 3000:
            await one.make_pass()
            passes += 1
            before, ended = ended, sum(counted_by(telemetry, "swept", what=what) for what in self.KINDS)
            assert ended - before <= 400
            assert passes < 200
        assert passes > 10
        assert await self.claims(client) == {KEYS.claim(one) for one in absent}

    async def test_without_postgres_only_this_step_waits(
        self,
        client: Redis,
        postgres: Postgres,
        pool: Pool,
        store: PostgresStore,
        make_buffer: MakeBuffer,
    ) -> None:
        stored = self.keyed()
        await self.buffer(make_buffer, stored)
        await self.write(store, stored)
        telemetry = Telemetry("test")
        one = make_sweep(Scripts(client), pool, telemetry)
        postgres.stop()
        await one.make_pass()
        assert figures(telemetry)["depth"] == 1
        assert counted_by(telemetry, "sweeper_passes", result="without_store") == 1
        assert await self.claims(client) == {KEYS.claim(stored)}
        postgres.start()
        await one.make_pass()
        assert await self.claims(client) == set()
        assert counted_by(telemetry, "sweeper_passes", result="complete") == 1


class TestPass:
    async def test_figures_are_not_known_before_the_first(self) -> None:
        assert are_unknown(figures(Telemetry("test")))

    @pytest.mark.parametrize("broken", ["any", "count_buffered", "find_ready", "XINFO", "SCAN"])
    async def test_one_that_fails_leaves_no_figures(
        self, client: Redis, pool: Pool, make_buffer: MakeBuffer, broken: str
    ) -> None:
        telemetry, scripts = Telemetry("test"), BrokenScripts(client)
        one = make_sweep(scripts, pool, telemetry)
        await accept(make_buffer, "env_1")
        await one.make_pass()
        assert figures(telemetry)["depth"] == 1
        scripts.broken = broken
        with pytest.raises(Unreachable):
            await one.make_pass()
        assert are_unknown(figures(telemetry))
        assert counted_by(telemetry, "sweeper_passes", result="failed") == 1
        await accept(make_buffer, "env_1")
        scripts.broken = ""
        await one.make_pass()
        assert figures(telemetry)["depth"] == 2

    async def test_one_that_breaks_leaves_no_figures(
        self, client: Redis, pool: Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        telemetry = Telemetry("test")
        one = make_sweep(Scripts(client), pool, telemetry)
        await one.make_pass()

        async def breaks(_: object) -> int:
            raise ZeroDivisionError

        monkeypatch.setattr(RedisLeftovers, "drop_consumers", breaks)
        with pytest.raises(ZeroDivisionError):
            await one.make_pass()
        assert are_unknown(figures(telemetry))

    async def test_stale_entries_are_logged(
        self, client: Redis, pool: Pool, make_buffer: MakeBuffer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        await accept(make_buffer, "env_1", "env_1", "env_2")
        await make_sweep(Scripts(client), pool).make_pass()
        assert "stale" not in capsys.readouterr().out
        await age(client, "env_1")
        await make_sweep(Scripts(client), pool).make_pass()
        assert "'env_1': 2" in capsys.readouterr().out

    async def test_it_is_made_while_redis_is_full(
        self, client: Redis, pool: Pool, make_buffer: MakeBuffer
    ) -> None:
        """What it brings back can be drained, and that empties Redis."""
        await accept(make_buffer, "env_1")
        await age(client, "env_1")
        await client.delete(KEYS.arrivals(KEYS.partition("env_1")))
        telemetry = Telemetry("test")
        await client.config_set("maxmemory", "1")
        try:
            assert await Lease(Scripts(client), KEYS, KEYS.sweeper, "me").hold()
            await make_sweep(Scripts(client), pool, telemetry).make_pass()
        finally:
            await client.config_set("maxmemory", "0")
        assert figures(telemetry)["stale"] == 1
        assert counted_by(telemetry, "swept", what="environment") == 1

    async def test_it_costs_the_same_whatever_is_buffered(
        self, counted: CountingScripts, client: Redis, pool: Pool, make_buffer: MakeBuffer
    ) -> None:
        """Round trips, and calls in them, with 30 environments and with 3,000; all stale, none scheduled."""
        one, costs = make_sweep(counted, pool), []
        await client.xgroup_create(KEYS.triggers, KEYS.group, id="0", mkstream=True)
        for environments in (30, 300, 3000):
            names = [new_environment() for _ in range(environments)]
            await accept(make_buffer, *names)
            for start in range(0, environments, 100):  # of all at once some would get no connection
                async with asyncio.TaskGroup() as group:
                    for name in names[start : start + 100]:
                        group.create_task(age(client, name))
            for partition in range(16):
                await client.delete(KEYS.arrivals(partition))
            await one.make_pass()
            counted.trips = counted.calls = 0
            for partition in range(16):
                await client.delete(KEYS.arrivals(partition))
            await one.make_pass()
            costs.append((counted.trips, counted.calls))
        assert max(trips for trips, _ in costs) <= 20
        assert max(calls for _, calls in costs) <= 6 * 16 + 20


class TestLease:
    async def test_one_has_it_while_it_lives(self, client: Redis) -> None:
        one, two = (Lease(Scripts(client), KEYS, KEYS.sweeper, name) for name in ("one", "two"))
        heart = await beat(client, "one")
        await beat(client, "two")
        assert [await one.hold(), await two.hold(), await one.hold()] == [True, False, True]
        await two.let_go()
        assert [await two.hold(), await one.hold()] == [False, True]
        await heart.remove()
        assert [await two.hold(), await one.hold()] == [True, False]
        await two.let_go()
        assert await one.hold()

    async def test_of_many_that_want_it_one_gets_it(self, client: Redis) -> None:
        await client.set(KEYS.sweeper, "dead")
        names = [f"sweeper-{number}" for number in range(20)]
        for name in names:
            await beat(client, name)
        held = await asyncio.gather(
            *(Lease(Scripts(client), KEYS, KEYS.sweeper, name).hold() for name in names)
        )
        assert sum(held) == 1


class TestProcesses:
    SETTINGS: Mapping[str, object] = MappingProxyType(
        {"heartbeat_ttl_ms": TTL_MS, "stale_sweep_interval_s": 1}
    )
    TAKEN_OVER_WITHIN_S = TTL_MS / 1000 + 2

    async def shown(self, worker: Worker) -> dict[str, float]:
        return {name: await worker.metric(f"mollifier_buffer_{name}") for name in FIGURES}

    async def works(self, worker: Worker, depth: int) -> None:
        assert await worker.metric("mollifier_sweeper_active") == 1
        assert (await self.shown(worker))["depth"] == depth

    async def stands_by(self, worker: Worker) -> None:
        assert await worker.metric("mollifier_sweeper_active") == 0
        assert are_unknown(await self.shown(worker))

    async def test_one_works_and_another_takes_over(
        self, workers: Workers, redis_url: str, database_url: str, make_buffer: MakeBuffer
    ) -> None:
        """When the first is killed, frozen for too long, or leaves."""
        await accept(make_buffer, "env_1", "env_1")

        async def start() -> Worker:
            (worker,) = await workers.start_ready("sweeper", redis_url, database_url, **self.SETTINGS)
            return worker

        first, second = await start(), await start()
        await eventually(lambda: self.works(first, 2), within_s=2)
        await stays_so(lambda: self.stands_by(second), for_s=1.5)
        first.kill()
        await eventually(lambda: self.works(second, 2), self.TAKEN_OVER_WITHIN_S)

        third = await start()
        await self.stands_by(third)
        second.pause()
        await accept(make_buffer, "env_2")
        await eventually(lambda: self.works(third, 3), self.TAKEN_OVER_WITHIN_S)
        second.resume()
        await eventually(lambda: self.stands_by(second), within_s=2)

        third.terminate()
        assert await third.ended() == 0
        await eventually(lambda: self.works(second, 3), within_s=2)
        assert len(second.log("sweeper.active")) == 2

    async def test_of_many_that_start_at_once_one_works(
        self, workers: Workers, redis_url: str, database_url: str
    ) -> None:
        """Its first pass is made at once, whatever the interval."""
        sweepers = [
            workers.start("sweeper", redis_url, database_url, stale_sweep_interval_s=600) for _ in range(3)
        ]

        async def one_works() -> None:
            active = [await worker.metric("mollifier_sweeper_active") for worker in sweepers]
            assert sorted(active) == [0, 0, 1]
            await self.works(sweepers[active.index(1)], 0)

        await eventually(one_works, within_s=20)
        await stays_so(one_works, for_s=1.5)

    async def test_while_redis_is_away_nothing_is_known(
        self,
        workers: Workers,
        valkey: Valkey,
        redis_url: str,
        database_url: str,
        make_buffer: MakeBuffer,
    ) -> None:
        settings = {**self.SETTINGS, "stale_sweep_interval_s": 600}
        (sweeper,) = await workers.start_ready("sweeper", redis_url, database_url, **settings)
        await eventually(lambda: self.works(sweeper, 0), within_s=2)
        async with sweeper.stays_live():
            valkey.stop()
            await eventually(lambda: self.stands_by(sweeper), within_s=3)
            valkey.start()
            await eventually(lambda: accept(make_buffer, "env_1"), within_s=3)
            await eventually(lambda: self.works(sweeper, 1), within_s=3)
        assert await sweeper.metric("mollifier_unreachable_total", what="sweep") > 0

    async def test_it_brings_lost_environments_back_to_a_drainer(
        self,
        workers: Workers,
        redis_url: str,
        database_url: str,
        client: Redis,
        make_buffer: MakeBuffer,
    ) -> None:
        runs = await accept(make_buffer, *["env_1"] * 5)
        await age(client, "env_1")
        await client.delete(KEYS.arrivals(KEYS.partition("env_1")))
        lines = "drainer sweeper"
        _, sweeper = await workers.start_ready(lines, redis_url, database_url, **self.SETTINGS)

        async def is_drained() -> None:
            found = await make_census(client).count()
            assert found.depth == 0

        await eventually(is_drained, within_s=5)
        assert len(runs) == 5
        assert await sweeper.metric("mollifier_swept_total", what="environment") == 1
        assert [line["entries"] for line in sweeper.log("stale")] == [5]

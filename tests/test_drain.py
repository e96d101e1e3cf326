"""The drain on real servers, turn by turn: shares, order, what is refused, what fails. G2, G9, G10, G12.

Shares are counted in batches, never in time. Tests of processes are in `test_drain_crash.py`.
"""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import asyncpg
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from app.batch import Answer
from app.buffer import RedisBuffer
from app.drain import Drain
from app.embedded import Postgres
from app.errors import StoreUnavailable, Unreachable
from app.keys import Keys
from app.ports import Taken
from app.postgres import create_pool
from app.replies import RedisDesk
from app.rows import Materialised, Row
from app.settings import Settings
from app.store import PostgresStore
from app.telemetry import Telemetry
from app.turns import RedisTurns
from app.wiring import World
from schemas.overlay import Overlay, encode_overlay
from schemas.snapshot import Snapshot, encode_snapshot
from tests.adapters import Pool, silence_after
from tests.builders import run
from tests.test_turns import alive
from tests.waiting import eventually, stays_so
from workers.drainer import GATHER_S, LANES, Drainer

KEYS = Keys("mollifier", 16)
HEAVY = 20_000
BATCH = 500
QUANTA = 25


# Rows in the order in which they came; and tasks that have something happen to their rows. Of all tries so
# far `fails:<state>:<n>` fails the first n, `stumbles:<state>:<n>` the nth; `flaky:<state>:<p>` fails by
# chance. `slow:<s>` takes so long, and `hangs` longer than anybody waits. `refused` cannot be written as it
# is, and `impossible` not at all.
MEDDLING = """
CREATE TABLE public.arrivals (position bigserial, id text);
CREATE FUNCTION public.arrive() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.arrivals (id) VALUES (NEW.id); RETURN NULL; END $$;
CREATE TRIGGER arrive AFTER INSERT ON mollifier.runs FOR EACH ROW EXECUTE FUNCTION public.arrive();
CREATE SEQUENCE public.tries;
CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    words text[] := string_to_array(NEW.task, ':');
    try int;
BEGIN
    IF words[1] IN ('fails', 'stumbles') AND NEW.status <> 'SYSTEM_FAILURE' THEN
        try := nextval('public.tries');
        IF try = words[3]::int OR try < words[3]::int AND words[1] = 'fails' THEN
            IF words[2] = 'gone' THEN
                PERFORM pg_terminate_backend(pg_backend_pid());
            ELSE
                RAISE EXCEPTION 'meddled with' USING ERRCODE = words[2];
            END IF;
        END IF;
    ELSIF words[1] = 'flaky' AND random() < words[3]::float THEN
        RAISE EXCEPTION 'meddled with' USING ERRCODE = words[2];
    ELSIF words[1] = 'hangs' THEN
        PERFORM pg_sleep(30);
    ELSIF words[1] = 'slow' THEN
        PERFORM pg_sleep(words[2]::float);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER meddle BEFORE INSERT ON mollifier.runs FOR EACH ROW EXECUTE FUNCTION public.meddle();
ALTER TABLE mollifier.runs ADD CHECK (task <> 'refused' OR status = 'SYSTEM_FAILURE');
ALTER TABLE mollifier.runs ADD CHECK (task <> 'impossible');
"""
EMPTY = """
TRUNCATE mollifier.runs, mollifier.run_aliases, public.arrivals RESTART IDENTITY;
ALTER SEQUENCE public.tries RESTART;
"""


@dataclass(frozen=True)
class Bench:
    """The way of a drainer, without its process."""

    turns: RedisTurns
    drain: Drain
    telemetry: Telemetry
    pool: Pool

    async def dry(self) -> list[int]:
        """Turns until there is nothing to do; how many entries each had."""
        sizes = []
        while size := await self.drain.turn():
            sizes.append(size)
        return sizes

    async def try_turn(self) -> int | None:
        """One turn; None when Postgres failed it."""
        try:
            return await self.drain.turn()
        except StoreUnavailable:
            return None

    def metric(self, name: str, **labels: str) -> float | None:
        return self.telemetry.registry.get_sample_value(f"mollifier_{name}", labels)


@dataclass(frozen=True)
class Place:
    """An empty Redis, a database without rows, and what tests do with them."""

    redis: Any
    database_url: str
    pool: Pool
    store: PostgresStore
    buffer: RedisBuffer
    turns: Callable[..., RedisTurns]
    pools: list[Pool] = field(default_factory=list)

    async def bench(self, consumer: str = "drainer-1", **changes: Any) -> Bench:
        """A drainer's way to the rows, with some settings changed."""
        settings, telemetry = Settings.model_validate(changes), Telemetry("drainer")
        pool = await create_pool(self.database_url, settings.store_timeout_ms / 1000, size=2)
        self.pools.append(pool)
        turns = self.turns(consumer, **changes)
        drain = Drain(
            turns=turns,
            materialiser=PostgresStore(pool, settings),
            graveyard=RedisDesk(turns._scripts, KEYS, KEYS.triggers),
            reservations=self.buffer,
            settings=settings,
            telemetry=telemetry,
        )
        return Bench(turns, drain, telemetry, pool)

    async def accept(
        self, environment: str, count: int = 1, organization: str | None = None, **changes: Any
    ) -> list[Snapshot]:
        """Buffer new runs of one environment."""
        runs = new_runs(environment, count, organization, **changes)
        for start in range(0, count, 5000):
            await self.accept_all(runs[start : start + 5000])
        return runs

    async def accept_all(self, runs: Sequence[Snapshot]) -> None:
        """Buffer runs in one call."""
        answers = await self.buffer.accept(runs, [None] * len(runs))
        assert all(isinstance(answer, Answer) for answer in answers), answers

    async def append(self, environment: str, fields: Mapping[str, bytes]) -> str:
        """Append an entry that no run was accepted as, to an environment that has some; its id."""
        names = KEYS.environment(environment)
        entry: bytes = await self.redis.xadd(names.entries, dict(fields))
        await self.redis.hincrby(names.drain, "queued", 1)
        await self.redis.hincrby(KEYS.totals(names.partition), "queued", 1)
        return entry.decode()

    async def change(self, changed: Snapshot, **overlay: Any) -> None:
        """Change a buffered run."""
        overlays = KEYS.environment(changed.environment_id).overlays
        await self.redis.hset(overlays, changed.id, encode_overlay(Overlay(revision=1, **overlay)))

    async def rows(self) -> dict[str, asyncpg.Record]:
        """All rows, by id."""
        return {row["id"]: row for row in await self.pool.fetch("SELECT * FROM mollifier.runs")}

    async def arrived(self, environment: str) -> list[str]:
        """The ids of an environment's rows in the order in which they were written, failures left out."""
        query = """
            SELECT id FROM public.arrivals JOIN mollifier.runs AS run USING (id)
            WHERE environment_id = $1 AND status <> 'SYSTEM_FAILURE' ORDER BY position
        """
        return [record["id"] for record in await self.pool.fetch(query, environment)]

    async def tries(self) -> int:
        """How many times a row that `fails` or `stumbles` was tried."""
        tries: int = await self.pool.fetchval("SELECT last_value FROM public.tries")
        return tries

    async def letters(self) -> list[dict[str, bytes]]:
        """All dead letters."""
        return [
            {name.decode(): value for name, value in fields.items()}
            for _, fields in await self.redis.xrange(KEYS.dead_letters)
        ]

    async def used_memory(self) -> int:
        return int((await self.redis.info("memory"))["used_memory"])

    async def is_drained(self, bench: Bench, count: int) -> None:
        """A turn; then asserts that there are so many rows, none of them a failure."""
        await bench.try_turn()
        assert Counter(row["status"] for row in (await self.rows()).values()) == {"QUEUED": count}

    async def is_forgotten(self, bench: Bench) -> None:
        """Asserts that nothing of what was drained is left, once it is reported and its grace is over."""
        await bench.turns.schedule.flush()
        while await bench.turns.forget():
            pass
        assert {name.decode() for name in await self.redis.keys("*")} <= {KEYS.dead_letters}

    async def is_rested(self) -> None:
        """Asserts that every environment that failed may be tried again by now."""
        seconds, us = await self.redis.time()
        resting = await self.redis.zrange(f"{KEYS.turns}:resting", 0, -1, withscores=True)
        assert all(until <= seconds * 1000 + us / 1000 for _, until in resting)

    async def nothing_is_held(self) -> None:
        """Asserts that no drainer holds an environment, in the schedule or in its drain hash."""
        assert await self.redis.keys("mollifier:{turns}:held:*") == []
        assert await self.redis.exists("mollifier:{turns}:takers") == 0
        for drain in await self.redis.keys("mollifier:{*}:drain:*"):
            assert await self.redis.hmget(drain, "holder", "taken") == [None, None], drain


@pytest.fixture(scope="module")
async def meddled_url(shared_database_url: str) -> str:
    """The database of this module's tests."""
    connection = await asyncpg.connect(shared_database_url)
    await connection.execute(MEDDLING)
    await connection.close()
    return shared_database_url


@pytest.fixture
async def place(
    client: Redis,
    meddled_url: str,
    make_buffer: Callable[..., RedisBuffer],
    make_turns: Callable[..., RedisTurns],
) -> AsyncIterator[Place]:
    pool = await create_pool(meddled_url, 5.0)
    await pool.execute(EMPTY)
    store = PostgresStore(pool, Settings.model_validate({}))
    place = Place(client, meddled_url, pool, store, make_buffer(), make_turns)
    yield place
    for one in (pool, *place.pools):
        one.terminate()


def new_runs(environment: str, count: int, organization: str | None = None, **changes: Any) -> list[Snapshot]:
    """New runs of one environment, whose organization is its own unless one is named."""
    organization = organization or f"org_of_{environment}"
    now = datetime.now(UTC)
    return [run(environment, organization_id=organization, buffered_at=now, **changes) for _ in range(count)]


def keyed(key: str, for_s: float = 86_400) -> dict[str, Any]:
    """What a run has that holds an idempotency key for so long."""
    expires_at = datetime.now(UTC) + timedelta(seconds=for_s)
    return {"idempotency_key": key, "idempotency_key_expires_at": expires_at}


def ids(runs: Sequence[Snapshot]) -> list[str]:
    return [one.id for one in runs]


def shares_of(taken: Sequence[Taken]) -> Counter[str]:
    return Counter({one.environment_id: len(one.entries) for one in taken})


async def batches(turns: RedisTurns, most: int = BATCH) -> AsyncIterator[Counter[str]]:
    """Batch by batch, how many entries of each environment it has; settled when the next is asked for."""
    while taken := await turns.take(most):
        yield shares_of(taken)
        await turns.settle(taken, [])


async def next_batch(turns: RedisTurns, most: int = BATCH) -> Counter[str]:
    taken = await turns.take(most)
    await turns.settle(taken, [])
    return shares_of(taken)


class TestG9Shares:
    @pytest.mark.parametrize("environments", [1, 100], ids=["one environment", "100 environments"])
    async def test_a_heavy_tenant_costs_others_two_batches_at_most(
        self, place: Place, environments: int
    ) -> None:
        """One organization with 20,000 entries, 50 others with 20 each that come while it is drained."""

        async def batches_until_all_others_are_drained(heavy: int) -> int:
            await place.redis.flushall()
            turns = place.turns()
            for number in range(environments if heavy else 0):
                await place.accept(f"heavy_{number}", heavy // environments, "heavy")
            for _ in range(3):
                await next_batch(turns)
            left = Counter({f"light_{number}": 20 for number in range(50)})
            for environment in left:
                await place.accept(environment, 20)
            turns.schedule.stir()
            count = 0
            async for shares in batches(turns):
                count += 1
                left -= shares
                if not left:
                    return count
            raise AssertionError(f"never drained: {left}")

        alone = await batches_until_all_others_are_drained(heavy=0)
        beside = await batches_until_all_others_are_drained(heavy=HEAVY)
        assert alone == 2
        assert beside <= alone + 2

    @pytest.mark.parametrize("environments", [1, 100], ids=["one environment", "100 environments"])
    async def test_a_single_entry_is_in_the_very_next_batch(self, place: Place, environments: int) -> None:
        turns = place.turns()
        for number in range(environments):
            await place.accept(f"heavy_{number}", HEAVY // environments, "heavy")
        for number in range(10):
            await next_batch(turns)
            await place.accept(f"single_{number}")
            turns.schedule.stir()
            shares = await next_batch(turns)
            assert shares[f"single_{number}"] == 1
            assert shares.total() == BATCH

    async def test_a_crowd_that_arrives_at_once_does_not_wait_for_a_heavy_tenant(self, place: Place) -> None:
        """200 single entries, all of one partition: at 64 environments a batch they need four batches."""
        turns = place.turns()
        await place.accept("heavy", HEAVY)
        await next_batch(turns)
        names = [name for number in range(5000) if KEYS.partition(name := f"single_{number}") == 0][:200]
        await place.accept_all([one for name in names for one in new_runs(name, 1)])
        turns.schedule.stir()
        singles = 0
        for _ in range(6):
            shares = await next_batch(turns)
            singles += shares.total() - shares["heavy"]
        assert singles == 200

    @pytest.mark.parametrize("environments", [1, 10], ids=["one environment", "ten environments"])
    async def test_weight_3_gets_three_times_the_share(self, place: Place, environments: int) -> None:
        """At every moment, to within one quantum times the weight."""
        turns = place.turns()
        await turns.schedule.set_weights({"gold": 3})
        for number in range(environments):
            await place.accept(f"gold_{number}", 3000 // environments, "gold")
        await place.accept("plain", 3000)
        got: Counter[str] = Counter()
        async for shares in batches(turns, 100):
            for environment, count in shares.items():
                got[environment.partition("_")[0]] += count
            if got["gold"] == 3000:
                break
            assert shares.total() == 100
            assert abs(got["gold"] - 3 * got["plain"]) <= 3 * 100 // QUANTA
        assert got["plain"] == pytest.approx(1000, abs=100)

    async def test_a_weight_counts_from_when_it_is_set_until_it_is_gone(self, place: Place) -> None:
        turns = place.turns()
        await place.accept("gold", 5000, "gold")
        await place.accept("plain", 5000)
        for weights, factor in (({}, 1), ({"gold": 3}, 3), ({"gold": 9}, 9), ({}, 1)):
            await turns.schedule.set_weights(weights)
            got: Counter[str] = Counter()
            for _ in range(10):
                got += await next_batch(turns, 100)
            assert got["gold"] == pytest.approx(factor * got["plain"], abs=2 * factor * 100 // QUANTA)

    async def test_weights_hold_with_two_batches_under_way(self, place: Place) -> None:
        """The second organization arrives while the first one's batch is being written."""
        turns = place.turns()
        await turns.schedule.set_weights({"gold": 3})
        await place.accept("gold", 8000, "gold")
        lanes = [await turns.take(BATCH)]
        await place.accept("plain", 8000)
        turns.schedule.stir()
        lanes.append(await turns.take(BATCH))
        got: Counter[str] = Counter()
        for _ in range(20):
            done = lanes.pop(0)
            got += shares_of(done)
            await turns.settle(done, [])
            lanes.append(await turns.take(BATCH))
        assert got["gold"] > 2 * got["plain"], got

    async def test_a_lone_tenant_gets_whole_batches(self, place: Place) -> None:
        await place.accept("lone", 2200)
        sizes = [shares.total() async for shares in batches(place.turns())]
        assert sizes == [500, 500, 500, 500, 200]

    async def test_what_light_ones_cannot_use_goes_to_the_heavy_one(self, place: Place) -> None:
        turns = place.turns()
        await place.accept("heavy", 2000)
        for number in range(40):
            await place.accept(f"light_{number}", 2)
        shares = await next_batch(turns)
        assert shares.total() == BATCH
        assert [shares[f"light_{number}"] for number in range(40)] == [2] * 40

    @pytest.mark.parametrize("was_there", [True, False], ids=["comes back", "is new"])
    async def test_who_was_away_has_no_credit(self, place: Place, was_there: bool) -> None:
        """While 10,000 entries of another were drained. As that one had last, it has one batch to come."""
        turns = place.turns()
        await place.accept("heavy", HEAVY)
        if was_there:
            await place.accept("idle", 10)
        drained: Counter[str] = Counter()
        while drained["heavy"] < 10_000:
            drained += await next_batch(turns)
        await place.accept("idle", 3000)
        turns.schedule.stir()
        got: Counter[str] = Counter()
        for _ in range(8):
            got += await next_batch(turns)
            assert got["idle"] - got["heavy"] <= BATCH

    async def test_who_leaves_and_comes_back_all_the_time_gets_no_more_than_its_share(
        self, place: Place
    ) -> None:
        """One batch's worth, gone, and back in the same moment: half of each batch, not more."""
        turns = place.turns()
        await place.accept("steady", 8000)
        await next_batch(turns, 100)
        got: Counter[str] = Counter()
        returns = 0
        for _ in range(60):
            if not int(await place.redis.hget(KEYS.environment("restless").drain, "queued") or 0):
                await place.accept("restless", 40)
                turns.schedule.stir()
                returns += 1
            got += await next_batch(turns, 100)
        assert returns > 20
        assert got["restless"] <= got["steady"] + 100 // QUANTA

    async def test_what_a_tenant_had_while_alone_is_not_forgotten_by_leaving(self, place: Place) -> None:
        """It had a whole batch when another came. Gone and back, it waits until that one had as much."""
        turns = place.turns()
        await place.accept("quick", BATCH)
        whole = await turns.take(BATCH)
        await place.accept("steady", 5000)
        turns.schedule.stir()
        quarter = await turns.take(BATCH // 4)
        await turns.settle(whole, [])
        await turns.settle(quarter, [])
        await turns.schedule.flush()
        await place.accept("quick", 5000)
        turns.schedule.stir()
        got = shares_of(quarter)
        while "quick" not in (shares := await next_batch(turns, BATCH // 4)):
            got += shares
        assert got["steady"] == pytest.approx(BATCH, abs=BATCH // 4)

    async def test_environments_share_the_turns_of_their_organization(self, place: Place) -> None:
        """However many there are, they have no more than an organization with one."""
        turns = place.turns()
        for number in range(4):
            await place.accept(f"many_{number}", 2000, "many")
        await place.accept("one", 4000)
        got: Counter[str] = Counter()
        for _ in range(20):
            got += await next_batch(turns, 200)
            quantum = 200 // QUANTA
            many = [got[f"many_{number}"] for number in range(4)]
            assert abs(sum(many) - got["one"]) <= quantum
            assert max(many) - min(many) <= quantum

    async def test_several_drainers_share_one_schedule(self, place: Place) -> None:
        """Each takes batches in turn; together they give each tenant its share."""
        drainers = [place.turns(f"drainer-{number}") for number in range(3)]
        for number in range(3):
            await alive(place.redis, f"drainer-{number}")
        await drainers[0].schedule.set_weights({"gold": 3})
        await place.accept("gold", 3000, "gold")
        await place.accept("plain", 3000)
        got: Counter[str] = Counter()
        for number in range(30):
            turns = drainers[number % 3]
            got += await next_batch(turns, 100)
            await turns.schedule.flush()
            assert abs(got["gold"] - 3 * got["plain"]) <= 3 * 100 // QUANTA

    async def test_what_is_tried_apart_gets_its_turn_while_others_have_work(self, place: Place) -> None:
        """Five organizations with work; the last of them also has an environment that failed once."""
        turns = place.turns()
        await place.accept("failed", 5, "org_4")
        for number in range(5):
            await place.accept(f"busy_{number}", 2000, f"org_{number}")
        turns.schedule.stir()
        taken = await turns.take(QUANTA)
        while "failed" not in shares_of(taken):
            await turns.settle(taken, [])
            taken = await turns.take(QUANTA)
        await turns.put_back([one for one in taken if one.environment_id == "failed"], apart=True)
        await turns.settle([one for one in taken if one.environment_id != "failed"], [])
        for _ in range(20):
            assert "failed" not in await next_batch(turns, QUANTA)
        await eventually(place.is_rested)
        seen = [await next_batch(turns, QUANTA) for _ in range(50)]
        assert any("failed" in shares for shares in seen)


class TestG9Order:
    async def test_entries_become_rows_in_the_order_accepted(self, place: Place) -> None:
        """Of two drainers, in small batches, put back now and then, while more is accepted."""
        accepted: dict[str, list[Snapshot]] = {f"env_{number}": [] for number in range(5)}
        benches = [await place.bench(f"drainer-{number}", drain_batch_size=7) for number in range(2)]
        for number in range(40):
            for environment, runs in accepted.items():
                runs += await place.accept(environment, number % 4)
            bench = benches[number % 2]
            taken = await bench.drain.take()
            if number % 3:
                await bench.drain.handle(taken)
            else:
                await bench.turns.put_back(taken, apart=False)
            await bench.turns.schedule.flush()
        await benches[0].dry()
        for environment, runs in accepted.items():
            assert await place.arrived(environment) == ids(runs)

    @pytest.mark.parametrize("failures", [1, 2, 6])
    async def test_a_row_that_fails_at_first_comes_before_those_behind_it(
        self, place: Place, failures: int
    ) -> None:
        """Also in a batch with another environment, and when several batches follow."""
        bench = await place.bench(drain_batch_size=16)
        first = await place.accept("env_1", 5)
        first += await place.accept("env_1", 1, task=f"fails:P0001:{failures}")
        first += await place.accept("env_1", 30)
        other = await place.accept("env_2", 30)
        await bench.dry()
        assert await place.arrived("env_1") == ids(first)
        assert await place.arrived("env_2") == ids(other)

    async def test_rows_with_keys_come_in_order_when_one_is_there_already(self, place: Place) -> None:
        bench = await place.bench()
        runs = [
            *(one for key in "zyx" for one in new_runs("env_1", 1, **keyed(key))),
            *new_runs("env_1", 1),
            *new_runs("env_1", 1, **keyed("w")),
        ]
        await place.accept_all(runs)
        await place.store.insert(await place.accept("env_2"), datetime.now(UTC))
        await bench.dry()
        assert await place.arrived("env_1") == ids(runs)

    async def test_what_was_put_back_comes_first(self, place: Place) -> None:
        one, two = await place.bench("drainer-1"), await place.bench("drainer-2")
        runs = await place.accept("env_1", 30, task="fails:40001:3")
        assert await one.try_turn() is None
        runs += await place.accept("env_1", 30)
        await one.turns.schedule.flush()
        assert await two.try_turn() is None
        await two.turns.schedule.flush()
        await eventually(lambda: place.is_drained(one, len(runs)))
        assert await place.arrived("env_1") == ids(runs)


class TestG12Refused:
    async def test_a_refused_run_becomes_a_failure_and_its_neighbours_rows(self, place: Place) -> None:
        """It keeps who it is and what it belongs to, and says why."""
        bench = await place.bench(ack_grace_ttl_s=0)
        links: dict[str, Any] = {
            "batch_id": "batch_1",
            "batch_index": 7,
            "parent_run_id": "parent",
            "root_run_id": "root",
            "depth": 2,
            "replayed_from_run_id": "original",
            "queue": "emails",
            "tags": ("a",),
            "metadata": b'{"m": 1}',
        }
        before = await place.accept("env_1", 5)
        (refused,) = await place.accept("env_1", 1, task="refused", **links)
        after = await place.accept("env_1", 5)
        other = await place.accept("env_2", 5)
        assert sum(await bench.dry()) == 16
        rows = await place.rows()
        assert rows.keys() == set(ids([*before, refused, *after, *other]))
        failure = rows.pop(refused.id)
        assert {row["status"] for row in rows.values()} == {"QUEUED"}
        assert await place.arrived("env_1") == ids([*before, *after])
        assert (failure["status"], failure["task"]) == ("SYSTEM_FAILURE", "refused")
        for name in ("organization_id", "project_id", "trace_id", "span_id", "created_at", "buffered_at"):
            assert failure[name] == getattr(refused, name), name
        for name in ("batch_id", "batch_index", "parent_run_id", "root_run_id", "depth", "queue"):
            assert failure[name] == links[name], name
        assert bench.metric("drained_total", result="inserted") == 15
        assert bench.metric("drained_total", result="system_failure") == 1
        assert bench.metric("dwell_seconds_count") == 16
        error = json.loads(failure["error"])
        assert error["code"] == "materialisation_failed"
        assert "23514" in error["message"]
        assert (failure["payload"], failure["metadata"], failure["tags"]) == (None, None, [])
        assert await place.letters() == []
        await place.is_forgotten(bench)

    @pytest.mark.parametrize("changes", [{"metadata": b'{"a": "\\u0000"}'}, {"queue": "a\x00b"}])
    async def test_values_that_no_column_can_hold(self, place: Place, changes: Any) -> None:
        """Where the failure's row can be written it is; where not, the entry is set aside."""
        bench = await place.bench()
        (refused,) = await place.accept("env_1", 1, **changes)
        good = await place.accept("env_1", 3)
        await bench.dry()
        rows = await place.rows()
        assert rows.keys() >= set(ids(good))
        if "metadata" in changes:
            assert rows[refused.id]["status"] == "SYSTEM_FAILURE"
        else:
            (letter,) = await place.letters()
            assert letter["snapshot"] == encode_snapshot(refused)

    async def test_a_failure_that_is_refused_too_is_set_aside(self, place: Place) -> None:
        """With its snapshot, as it came."""
        bench = await place.bench(ack_grace_ttl_s=0)
        before = await place.accept("env_1", 3)
        (impossible,) = await place.accept("env_1", 1, task="impossible")
        after = await place.accept("env_1", 3)
        entry = await place.redis.hget(KEYS.environment("env_1").index, impossible.id)
        await bench.dry()
        rows = await place.rows()
        assert rows.keys() == set(ids([*before, *after]))
        assert {row["status"] for row in rows.values()} == {"QUEUED"}
        (letter,) = await place.letters()
        assert (letter["source"], letter["id"]) == (KEYS.environment("env_1").entries.encode(), entry)
        assert (letter["reason"], letter["snapshot"]) == (b"refused", encode_snapshot(impossible))
        assert b"23514" in letter["detail"]
        await place.is_forgotten(bench)

    @pytest.mark.parametrize(
        "fields",
        [
            {"run_id": b"poison", "snapshot": b"\xc1 no snapshot"},
            {"run_id": b"poison", "snapshot": b""},
            {"run_id": b"\xff", "snapshot": encode_snapshot(run())[:-9]},
            {"run_id": b"poison", "snapshot": b"\x80"},
            {"colour": b"blue"},
        ],
        ids=["garbage", "empty", "cut off", "no run", "other fields"],
    )
    async def test_what_cannot_be_read_is_set_aside(self, place: Place, fields: Mapping[str, bytes]) -> None:
        bench = await place.bench(ack_grace_ttl_s=0)
        before = await place.accept("env_1", 3)
        poison = await place.append("env_1", fields)
        after = await place.accept("env_1", 3)
        other = await place.accept("env_2", 3)
        await bench.dry()
        assert (await place.rows()).keys() == set(ids([*before, *after, *other]))
        assert await place.arrived("env_1") == ids([*before, *after])
        (letter,) = await place.letters()
        assert (letter["id"], letter["reason"]) == (poison.encode(), b"undecodable")
        if "snapshot" in fields:
            assert letter["snapshot"] == fields["snapshot"]
        await place.is_forgotten(bench)

    async def test_an_overlay_that_cannot_be_read_is_the_trouble_of_its_run(self, place: Place) -> None:
        runs = await place.accept("env_1", 3)
        await place.redis.hset(KEYS.environment("env_1").overlays, runs[1].id, b"\xc1")
        await (await place.bench()).dry()
        assert (await place.rows()).keys() == {runs[0].id, runs[2].id}
        (letter,) = await place.letters()
        assert letter["snapshot"] == encode_snapshot(runs[1])

    @pytest.mark.parametrize("attempts", [1, 3, 5])
    async def test_a_row_is_tried_so_many_times(self, place: Place, attempts: int) -> None:
        """COPY, which says nothing about a single row, and then DRAIN_MAX_ATTEMPTS."""
        (refused,) = await place.accept("env_1", 1, task="fails:P0001:1000")
        await (await place.bench(drain_max_attempts=attempts)).dry()
        assert await place.tries() == 1 + attempts
        row = (await place.rows())[refused.id]
        assert row["status"] == "SYSTEM_FAILURE"
        assert json.loads(row["error"])["code"] == "materialisation_failed"

    async def test_a_row_that_heals_is_a_row(self, place: Place) -> None:
        """It fails with COPY and the first time on its own, and is well the second time."""
        (heals,) = await place.accept("env_1", 1, task="fails:P0001:2")
        await (await place.bench(drain_max_attempts=2)).dry()
        assert await place.tries() == 3
        assert (await place.rows())[heals.id]["status"] == "QUEUED"

    async def test_a_row_that_heals_after_its_key_was_freed_is_a_row(self, place: Place) -> None:
        """It meets a key that is free by now, and fails the first time that it could have it."""
        heals = run(task="stumbles:P0001:3", **keyed("k"))
        now = datetime.now(UTC)
        await place.store.insert([replace(heals, id="outlived", idempotency_key_expires_at=now)], now)
        await place.pool.execute("ALTER SEQUENCE public.tries RESTART")
        assert await place.store.materialise([Row(heals, "QUEUED")], now) == [Materialised("inserted")]

    async def test_rows_that_are_tried_again_do_not_hold_up_those_of_others(self, place: Place) -> None:
        """20 of one environment that are tried three times, in one batch with another environment."""
        bench = await place.bench()
        await place.accept("bad", 20, task="fails:P0001:1000000")
        (good,) = await place.accept("good")
        started = datetime.now(UTC)
        await bench.dry()
        row = (await place.rows())[good.id]
        assert row["materialised_at"] - started < timedelta(seconds=1)

    async def test_without_memory_for_a_letter_the_others_are_settled(self, place: Place) -> None:
        """Only settling makes room in a Redis that is full."""
        bench = await place.bench()
        await place.accept("poisoned", 3, task="impossible")
        await place.accept("good", 50)
        await place.redis.config_set("maxmemory", 1)
        try:
            for _ in range(10):
                with suppress(Unreachable):
                    await bench.drain.turn()
            assert await place.redis.hget(KEYS.environment("good").drain, "queued") == b"0"
        finally:
            await place.redis.config_set("maxmemory", 0)

    async def test_a_dead_letter_is_counted(self, place: Place) -> None:
        bench = await place.bench()
        await place.accept("env_1", 1, task="impossible")
        await bench.dry()
        assert bench.metric("dead_letters_total", reason="refused") == 1


@asynccontextmanager
async def killed(postgres: Postgres, pool: Pool) -> AsyncIterator[None]:
    postgres.kill()
    try:
        yield
    finally:
        postgres.start()


@asynccontextmanager
async def stopped(postgres: Postgres, pool: Pool) -> AsyncIterator[None]:
    postgres.stop()
    try:
        yield
    finally:
        postgres.start()


@asynccontextmanager
async def frozen(postgres: Postgres, pool: Pool) -> AsyncIterator[None]:
    postgres.pause()
    try:
        yield
    finally:
        postgres.resume()


@asynccontextmanager
async def full(postgres: Postgres, pool: Pool) -> AsyncIterator[None]:
    """Others have all connections of the server, also the one that the pool had."""
    others = [await asyncpg.connect(postgres.url)]

    async def is_full() -> None:
        with suppress(asyncpg.TooManyConnectionsError):
            while True:
                others.append(await asyncpg.connect(postgres.url))
        query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        limit = await others[0].fetchval("SHOW max_connections")
        assert await others[0].fetchval(query) == int(limit)

    try:
        async with pool.acquire() as own:
            await own.close()
        await eventually(is_full)
        yield
    finally:
        for one in others:
            await one.close()


@asynccontextmanager
async def exhausted(postgres: Postgres, pool: Pool) -> AsyncIterator[None]:
    """Others have all connections of the pool."""
    async with pool.acquire(), pool.acquire():
        yield


@asynccontextmanager
async def locked(postgres: Postgres, pool: Pool) -> AsyncIterator[None]:
    """Another has locked the table."""
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE mollifier.runs IN ACCESS EXCLUSIVE MODE")
        yield


Trouble = Callable[[Postgres, Pool], AbstractAsyncContextManager[None]]


@pytest.mark.one_redis
class TestG2TroubleOfPostgres:
    @pytest.mark.parametrize("trouble", [killed, stopped, frozen, full, exhausted, locked])
    async def test_puts_the_batch_back_until_it_is_over(
        self, place: Place, postgres: Postgres, trouble: Trouble
    ) -> None:
        """In its place, with no attempt used up: a single one would make failures of all rows."""
        bench = await place.bench(store_timeout_ms=300, drain_max_attempts=1, drain_batch_size=20)
        runs = {environment: await place.accept(environment, 30) for environment in ("env_1", "env_2")}
        assert await bench.drain.turn() == 20
        async with trouble(postgres, bench.pool):
            for _ in range(4):
                assert not await bench.try_turn()
                for environment in runs:
                    state = await place.redis.hmget(KEYS.environment(environment).drain, "holder", "queued")
                    assert state == [None, b"20"]
        for environment in runs:
            runs[environment] += await place.accept(environment, 5)
        await eventually(lambda: place.is_drained(bench, 70))
        for environment, accepted in runs.items():
            assert await place.arrived(environment) == ids(accepted)
        await bench.turns.schedule.flush()
        await place.nothing_is_held()
        put_back = [bench.metric("put_back_total", why=why) for why in ("store_unavailable", "timed_out")]
        assert sum(one or 0 for one in put_back) > 0
        assert bench.metric("dwell_seconds_count") == 70

    @pytest.mark.parametrize("state", ["40001", "40P01", "53200", "55P03", "57P01", "57014", "XX000", "gone"])
    async def test_in_the_middle_of_a_batch_costs_no_attempt(self, place: Place, state: str) -> None:
        """Twice. `gone`: the connection is lost."""
        bench = await place.bench(drain_max_attempts=1)
        runs = await place.accept("env_1", 5)
        runs += await place.accept("env_1", 1, task=f"fails:{state}:2")
        runs += await place.accept("env_1", 5)
        await eventually(lambda: place.is_drained(bench, 11))
        assert await place.tries() == 3
        assert await place.arrived("env_1") == ids(runs)

    async def test_what_hangs_is_tried_apart_and_holds_up_nobody(self, place: Place) -> None:
        """Of 21 environments in one batch 20 are rows; the other, too, in order, once it hangs no more."""
        bench = await place.bench(store_timeout_ms=300)
        hung = await place.accept("hung", 10, task="hangs")
        others = [one for number in range(20) for one in await place.accept(f"env_{number}", 10)]

        async def others_are_rows() -> None:
            await bench.try_turn()
            assert (await place.rows()).keys() == set(ids(others))

        await eventually(others_are_rows, within_s=3)
        for number in range(3):
            others += await place.accept(f"late_{number}")
            bench.turns.schedule.stir()
            await eventually(others_are_rows, within_s=1)
        await place.pool.execute("ALTER TABLE mollifier.runs DISABLE TRIGGER meddle")
        try:
            await eventually(lambda: place.is_drained(bench, len(others) + 10))
        finally:
            await place.pool.execute("ALTER TABLE mollifier.runs ENABLE TRIGGER meddle")
        assert await place.arrived("hung") == ids(hung)

    async def test_a_batch_that_takes_too_long_is_tried_in_smaller_ones(self, place: Place) -> None:
        """100 rows take half a second and are cut off after 0.3 s; for 50 of them that is enough."""
        bench = await place.bench(store_timeout_ms=300, drain_batch_size=100)
        await place.accept("env_1", 100, task="slow:0.005")
        await eventually(lambda: place.is_drained(bench, 100), within_s=3)

    async def test_the_batch_size_follows_the_time_of_commits(self, place: Place) -> None:
        bench = await place.bench(drain_batch_size=100, drain_target_latency_ms=50)
        await place.accept("env_1", 300, task="slow:0.004")
        await place.accept("env_1", 1500)
        sizes = await bench.dry()
        assert sizes[0] == 100
        assert 5 <= min(sizes[:-1]) <= 20, "12 rows take 50 ms"
        assert (sizes[-2], bench.metric("drain_batch_size")) == (100, 100)


class TestG10CancelWins:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"delay_until": timedelta(hours=1)},
            {"expires_at": timedelta(hours=-1)},
            {"expires_at": timedelta(hours=-1), "delay_until": timedelta(hours=1)},
        ],
        ids=["queued", "delayed", "expired", "expired and delayed"],
    )
    async def test_over_everything_else(self, place: Place, changes: dict[str, timedelta]) -> None:
        now = datetime.now(UTC)
        times: dict[str, Any] = {name: now + change for name, change in changes.items()}
        cancelled, kept = await place.accept("env_1", 2, **times)
        await place.change(cancelled, cancelled_at=now, cancel_reason="no longer wanted")
        await (await place.bench()).dry()
        rows = await place.rows()
        row = rows[cancelled.id]
        assert (row["status"], row["cancelled_at"]) == ("CANCELED", now)
        assert row["cancel_reason"] == "no longer wanted"
        assert rows[kept.id]["status"] != "CANCELED"
        assert rows[kept.id]["cancelled_at"] is None

    async def test_over_a_row_that_was_there_without_it(self, place: Place) -> None:
        """A drainer committed it and died; then the run was cancelled, which Redis still let it be."""
        now = datetime.now(UTC)
        runs = await place.accept("env_1", 3)
        await place.store.materialise([Row(one, "QUEUED") for one in runs], now)
        await place.change(runs[1], cancelled_at=now, cancel_reason="late")
        await (await place.bench()).dry()
        rows = await place.rows()
        assert [rows[one.id]["status"] for one in runs] == ["QUEUED", "CANCELED", "QUEUED"]
        assert rows[runs[1].id]["cancel_reason"] == "late"

    async def test_in_its_place_though_another_has_its_key(self, place: Place) -> None:
        """G9, G10: what lost its key is a row of its own, in the order in which all were accepted."""
        now = datetime.now(UTC)
        await place.store.insert(new_runs("env_1", 1, **keyed("k")), now)
        (before,) = await place.accept("env_1")
        (cancelled,) = await place.accept("env_1", **keyed("k"))
        (after,) = await place.accept("env_1")
        await place.change(cancelled, cancelled_at=now, cancel_reason="no longer wanted")
        await (await place.bench()).dry()
        assert (await place.arrived("env_1"))[1:] == ids([before, cancelled, after])
        assert (await place.rows())[cancelled.id]["status"] == "CANCELED"

    async def test_over_a_refusal(self, place: Place) -> None:
        now = datetime.now(UTC)
        (cancelled,) = await place.accept("env_1", 1, metadata=b'{"a": "\\u0000"}')
        await place.change(cancelled, cancelled_at=now, cancel_reason="no longer wanted")
        await (await place.bench()).dry()
        row = (await place.rows())[cancelled.id]
        assert row["cancelled_at"] == now

    async def test_changes_are_in_the_row(self, place: Place) -> None:
        """G11: each in its own; what is not changed stays as it was accepted."""
        later = datetime.now(UTC) + timedelta(hours=1)
        plain, tagged, described, delayed = await place.accept("env_1", 4, tags=("a",), metadata=b'{"m": 1}')
        await place.change(tagged, tags=("a", "b"))
        await place.change(described, metadata=b'{"m": 2}', metadata_version=2)
        await place.change(delayed, delay_until=later)
        await (await place.bench()).dry()
        columns = ("status", "tags", "metadata", "metadata_version", "delay_until", "revision")
        rows = {id: tuple(row[name] for name in columns) for id, row in (await place.rows()).items()}
        assert rows == {
            plain.id: ("QUEUED", ["a"], '{"m": 1}', 1, None, 0),
            tagged.id: ("QUEUED", ["a", "b"], '{"m": 1}', 1, None, 1),
            described.id: ("QUEUED", ["a"], '{"m": 2}', 2, None, 1),
            delayed.id: ("DELAYED", ["a"], '{"m": 1}', 1, later, 1),
        }

    async def test_an_overlay_is_forgotten_with_its_entry(self, place: Place) -> None:
        """Not before, and not that of an entry which is still queued."""
        bench = await place.bench(ack_grace_ttl_s=0, drain_batch_size=2)
        runs = await place.accept("env_1", 3)
        for one in runs:
            await place.change(one, tags=("a",))
        overlays = KEYS.environment("env_1").overlays
        await bench.drain.turn()
        assert await place.redis.hlen(overlays) == 3
        await bench.turns.forget()
        assert await place.redis.hkeys(overlays) == [runs[2].id.encode()]
        await bench.dry()
        await place.is_forgotten(bench)


class TestKeysAndTimes:
    async def test_an_entry_past_its_time_to_live_is_expired(self, place: Place) -> None:
        now = datetime.now(UTC)
        (expired,) = await place.accept("env_1", 1, expires_at=now - timedelta(seconds=1))
        (alive,) = await place.accept("env_1", 1, expires_at=now + timedelta(hours=1))
        await (await place.bench()).dry()
        rows = await place.rows()
        assert (rows[expired.id]["status"], rows[alive.id]["status"]) == ("EXPIRED", "QUEUED")

    async def test_a_key_past_its_time_is_dropped(self, place: Place) -> None:
        """Another may have it by now, and keeps it."""
        (outlived,) = await place.accept("env_1", 1, **keyed("k", for_s=-1))
        (another,) = new_runs("env_1", 1, **keyed("k"))
        await place.store.insert([another], datetime.now(UTC))
        await (await place.bench()).dry()
        rows = await place.rows()
        assert rows[outlived.id]["idempotency_key"] is None
        assert rows[another.id]["idempotency_key"] == "k"

    async def test_a_run_that_outlived_a_key_which_it_had_beside_another_is_its_alias(
        self, place: Place
    ) -> None:
        """G4: without claims, one was buffered and one inserted, while the key of either counted.

        Told of twice, it is an alias still; and one that is a row already stays one.
        """
        now = datetime.now(UTC)
        outlived: dict[str, Any] = {
            "idempotency_key": "k",
            "idempotency_key_expires_at": now - timedelta(seconds=1),
            "created_at": now - timedelta(seconds=3),
        }
        (row,) = new_runs("env_1", 1, **outlived)
        (winner,) = new_runs("env_1", 1, **keyed("k"))
        await place.store.materialise([Row(row, "QUEUED")], now)
        await place.store.insert([replace(winner, buffered_at=None)], now)
        accepted = "UPDATE mollifier.runs SET materialised_at = $1"
        await place.pool.execute(accepted, now - timedelta(seconds=2))
        (before,) = await place.accept("env_1")
        (alias,) = await place.accept("env_1", **outlived)
        await place.redis.delete(KEYS.claim(alias))
        (cancelled,) = await place.accept("env_1", **outlived)
        await place.change(cancelled, cancelled_at=now, cancel_reason="no longer wanted")
        (after,) = await place.accept("env_1")
        await (await place.bench()).dry()
        rows = await place.rows()
        assert rows.keys() == set(ids([row, winner, before, cancelled, after]))
        assert rows[winner.id]["idempotency_key"] == "k"
        assert rows[cancelled.id]["status"] == "CANCELED"
        query = "SELECT id, run_id FROM mollifier.run_aliases"
        assert [tuple(one) for one in await place.pool.fetch(query)] == [(alias.id, winner.id)]
        again = await place.store.materialise([Row(row, "QUEUED"), Row(alias, "QUEUED")], now)
        assert [one.result for one in again] == ["present", "alias"]
        assert (await place.rows()).keys() == rows.keys()

    async def test_a_run_that_outlived_its_key_is_none_of_one_accepted_after_that(self, place: Place) -> None:
        """Both were requested at once; the other was handled when this one's key had ended."""
        now = datetime.now(UTC)
        created = {"created_at": now - timedelta(seconds=3), "idempotency_key": "k"}
        (later,) = new_runs(
            "env_1", 1, idempotency_key_expires_at=now + timedelta(hours=1), **dict[str, Any](created)
        )
        await place.store.insert([later], now)
        ended: dict[str, Any] = {"idempotency_key_expires_at": now - timedelta(seconds=1), **created}
        (first,) = await place.accept("env_1", **ended)
        await (await place.bench()).dry()
        assert (await place.rows()).keys() == {first.id, later.id}

    @pytest.mark.parametrize("after_s", [-1, 1], ids=["while the key counted", "after it had ended"])
    async def test_a_key_is_judged_as_of_when_its_run_was_accepted(self, place: Place, after_s: int) -> None:
        """G4: it was buffered while Postgres was away, and nobody knew of the row that has its key, which has
        outlived it by now.
        """
        now = datetime.now(UTC)
        ended = now - timedelta(seconds=5)
        (row,) = new_runs("env_1", 1, idempotency_key="k", idempotency_key_expires_at=ended)
        await place.store.insert([row], ended - timedelta(seconds=9))
        (late,) = new_runs("env_1", 1, **keyed("k"))
        late = replace(late, buffered_at=ended + timedelta(seconds=after_s))
        await place.accept_all([late])
        await (await place.bench()).dry()
        assert (late.id in await place.rows()) == (after_s > 0)

    async def test_a_run_whose_key_is_taken_becomes_an_alias(self, place: Place) -> None:
        bench = await place.bench(ack_grace_ttl_s=0)
        before = await place.accept("env_1", 2)
        (loser,) = await place.accept("env_1", 1, **keyed("k"))
        after = await place.accept("env_1", 2)
        (winner,) = new_runs("env_1", 1, **keyed("k"))
        await place.store.insert([winner], datetime.now(UTC))
        await bench.dry()
        assert (await place.rows()).keys() == set(ids([*before, *after, winner]))
        (alias,) = await place.pool.fetch("SELECT id, run_id, environment_id FROM mollifier.run_aliases")
        assert tuple(alias) == (loser.id, winner.id, "env_1")
        assert await place.redis.keys("*:claim:*") == []
        await place.is_forgotten(bench)

    async def test_a_claim_ends_in_the_script_that_settles_the_entry(self, place: Place) -> None:
        """So not before the row is there, and not after the entry has gone."""
        bench = await place.bench()
        (mine,) = await place.accept("env_1", 1, **keyed("k"))
        assert await place.redis.get(KEYS.claim(mine)) == mine.id.encode()
        taken = await bench.drain.take()
        assert await place.redis.exists(KEYS.claim(mine))
        with silence_after(bench.turns._scripts, "settle"), pytest.raises(Unreachable):
            await bench.drain.handle(taken)
        assert not await place.redis.exists(KEYS.claim(mine))
        done = await place.redis.hget(KEYS.environment("env_1").drain, "done")
        assert done.decode() == taken[0].entries[0][0]

    async def test_the_claim_of_another_stays(self, place: Place) -> None:
        (mine,) = await place.accept("env_1", 1, **keyed("k"))
        await place.redis.set(KEYS.claim(mine), "pending:another's")
        await (await place.bench()).dry()
        assert await place.redis.get(KEYS.claim(mine)) == b"pending:another's"

    @pytest.mark.parametrize("task", ["refused", "impossible"])
    async def test_the_key_of_a_refused_run_is_free_at_once(self, place: Place, task: str) -> None:
        """Else triggers are answered with a run that failed; or with one that is nowhere, for 30 days."""
        (mine,) = await place.accept("env_1", 1, task=task, **keyed("k"))
        await (await place.bench()).dry()
        assert not await place.redis.exists(KEYS.claim(mine))

    async def test_chosen_ids_are_released_once_they_are_rows(self, place: Place) -> None:
        bench = await place.bench()
        chosen = new_runs("env_1", 1, id="chosen")
        await place.buffer.recall(chosen, chosen)
        await place.accept_all(chosen)
        assert await place.redis.keys("*:chosen") != []
        await bench.dry()
        assert await place.redis.keys("*:chosen") == []


class TestG2Nothing:
    """Nothing goes without a row, an alias or a dead letter."""

    @pytest.mark.parametrize("script", ["schedule", "take", "settle", "bury"])
    async def test_is_lost_with_an_answer_of_redis(self, place: Place, script: str) -> None:
        """The script runs, and nobody hears of it; three times."""
        bench = await place.bench(drain_batch_size=10, ack_grace_ttl_s=0)
        runs = await place.accept("env_1", 15)
        await place.accept("env_1", 1, task="impossible")
        runs += await place.accept("env_1", 15)
        for _ in range(3):
            with silence_after(bench.turns._scripts, script), suppress(Unreachable):
                await bench.drain.turn()
        await bench.dry()
        assert await place.arrived("env_1") == ids(runs)
        assert await place.letters() != []
        await place.redis.delete(KEYS.dead_letters)
        await place.is_forgotten(bench)

    @pytest.mark.parametrize("seed", range(3))
    async def test_is_lost_whatever_it_is(self, place: Place, seed: int) -> None:
        """All kinds of entries in any order, while Postgres and Redis fail now and then."""
        choose = Random(seed)
        kinds: list[dict[str, Any]] = [
            {},
            {"task": "refused"},
            {"task": "impossible"},
            {"task": "fails:P0001:40"},
            {"task": "fails:40001:40"},
            {"expires_at": datetime.now(UTC)},
            {"delay_until": datetime.now(UTC) + timedelta(hours=1)},
            {"metadata": b'{"a": "\\u0000"}'},
        ]
        bench = await place.bench(drain_batch_size=8, ack_grace_ttl_s=0)
        (winner,) = new_runs("env_0", 1, **keyed("taken"))
        await place.store.insert([winner], datetime.now(UTC))
        runs: list[Snapshot] = []
        poison: set[str] = set()
        for number in range(100):
            environment = f"env_{choose.randrange(6)}"
            runs += await place.accept(environment, 1, **choose.choice(kinds))
            if number % 20 == 0:
                runs += new_runs("env_0", 1, **keyed("taken"))
                await place.redis.delete(KEYS.claim(runs[-1]))
                await place.accept_all(runs[-1:])
                poison.add(await place.append(environment, {"run_id": b"?", "snapshot": b"\xc1"}))
            if number % 10 == 0:
                with (
                    suppress(Unreachable),
                    silence_after(bench.turns._scripts, choose.choice(["schedule", "take", "settle"])),
                ):
                    await bench.try_turn()

        async def nothing_is_queued() -> None:
            bench.turns.schedule.stir()
            await bench.try_turn()
            assert await place.redis.keys("*:totals") == []

        await eventually(nothing_is_queued, within_s=20)
        rows = await place.rows()
        aliases = {record["id"] for record in await place.pool.fetch("SELECT id FROM mollifier.run_aliases")}
        buried = await place.letters()
        snapshots = {letter["snapshot"] for letter in buried}
        for one in runs:
            places = [one.id in rows, one.id in aliases, encode_snapshot(one) in snapshots]
            assert sum(places) == 1, (one.task, places)
        assert {letter["id"].decode() for letter in buried if letter["reason"] == b"undecodable"} == poison
        for number in range(6):
            mine = [one.id for one in runs if one.environment_id == f"env_{number}" and one.id in rows]
            failures = {id for id in mine if rows[id]["status"] == "SYSTEM_FAILURE"}
            written = [id for id in await place.arrived(f"env_{number}") if id != winner.id]
            assert written == [id for id in mine if id not in failures]
        await bench.turns.schedule.flush()
        await place.nothing_is_held()

    async def test_is_stranded_by_a_heartbeat_that_failed_for_a_while(self, place: Place) -> None:
        """A drainer looks dead, another gives back what it holds, and it is the one that takes it again."""
        await place.accept("env_1", 60)
        slow, other = place.turns("slow"), place.turns("other")
        first = await slow.take(20)
        await other.schedule._return_of_the_dead()
        await alive(place.redis, "slow")
        again = await slow.take(20)
        assert again[0].entries == first[0].entries
        await self._settle_in_turn(place, slow, first, again)

    async def test_is_stranded_by_an_answer_that_comes_late(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Settling fails, and putting back takes so long that the entries have been taken again by then."""
        await place.accept("env_1", 80)
        turns = place.turns()
        first = await turns.take(20)
        demand = turns._scripts.demand
        monkeypatch.setattr(turns._scripts, "demand", cut_off)
        with pytest.raises(Unreachable):
            await turns.settle(first, [])
        monkeypatch.setattr(turns._scripts, "demand", demand)
        second = await turns.take(20)
        await turns.put_back(first, apart=False)
        drain = KEYS.environment("env_1").drain
        assert await place.redis.hget(drain, "holder") == b"drainer-1", "the second hold goes on"
        third = await turns.take(20)
        await self._settle_in_turn(place, turns, second, third)

    async def _settle_in_turn(
        self, place: Place, turns: RedisTurns, one: Sequence[Taken], two: Sequence[Taken]
    ) -> None:
        """Two lanes end, a third was begun between them; then all is drained, to the last entry."""
        await turns.settle(one, [])
        between = await turns.take(20)
        await turns.settle(two, [])
        await turns.settle(between, [])
        async for _ in batches(turns, 20):
            pass
        names = KEYS.environment("env_1")
        entries = await place.redis.xrange(names.entries)
        assert await place.redis.hmget(names.drain, "done", "queued") == [entries[-1][0], b"0"]


async def cut_off(calls: object) -> None:
    raise Unreachable("Redis: gone")


@pytest.fixture
async def drainer(place: Place, redis_url: str) -> AsyncIterator[Drainer]:
    """The drainer itself, in this process; a test starts it."""
    servers = {"REDIS_URL": redis_url, "DATABASE_URL": place.database_url}
    world = await World.open(Settings.model_validate(servers), Telemetry("drainer"))
    drainer = Drainer(world)
    yield drainer
    await drainer.close()


class TestDrainer:
    async def test_it_drains_nothing_if_it_is_started_while_the_drain_is_paused(
        self, place: Place, drainer: Drainer
    ) -> None:
        await place.accept("env_1", 100)
        await place.pool.execute("INSERT INTO mollifier.settings VALUES ('drain.paused', 'true')")
        await drainer.start()
        try:
            await eventually(lambda: self._knows_of_the_pause(drainer))
        finally:
            await drainer.stop()
            await place.pool.execute("DELETE FROM mollifier.settings")
        assert len(await place.rows()) == 0

    async def test_it_drains_nothing_before_it_knows_whether_it_may(
        self, place: Place, drainer: Drainer
    ) -> None:
        """Everything in Postgres can be written, but what operators have decided cannot be read."""
        await place.accept("env_1")
        async with place.pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE mollifier.audit IN ACCESS EXCLUSIVE MODE")
            await drainer.start()
            await stays_so(lambda: self._has_no_row(place), for_s=0.5)
        try:
            await eventually(lambda: self._has_a_row(place))
        finally:
            await drainer.stop()

    async def _has_no_row(self, place: Place) -> None:
        assert len(await place.rows()) == 0

    async def _knows_of_the_pause(self, drainer: Drainer) -> None:
        assert drainer.world.switchboard.is_known
        assert drainer.world.switches().decided.drain_paused

    async def test_weights_are_there_again_after_redis_lost_them(
        self, place: Place, drainer: Drainer
    ) -> None:
        await place.pool.execute("INSERT INTO mollifier.organization_settings VALUES ('gold', NULL, 3)")
        await drainer.start()
        try:
            await eventually(lambda: self._weighs_3(place))
            await place.redis.flushall()
            await eventually(lambda: self._weighs_3(place), within_s=2.5)
        finally:
            await drainer.stop()
            await place.pool.execute("DELETE FROM mollifier.organization_settings")

    async def _weighs_3(self, place: Place) -> None:
        assert await place.redis.hget(f"{KEYS.turns}:weights", "gold") == b"3"

    async def test_what_trickles_in_is_gathered(
        self, place: Place, drainer: Drainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each commit would delay those that pass through."""
        handle, sizes = drainer._drain.handle, []

        async def counting(taken: Sequence[Taken]) -> int:
            sizes.append(sum(len(one.entries) for one in taken))
            return await handle(taken)

        monkeypatch.setattr(drainer._drain, "handle", counting)
        await drainer.start()
        started = time.monotonic()
        try:
            for _ in range(150):
                await place.accept("env_1")
            await eventually(lambda: self._has_rows(place, 150))
            took_s = time.monotonic() - started
        finally:
            await drainer.stop()
        assert len(sizes) <= 2 + took_s / GATHER_S

    async def test_a_backlog_is_not_gathered(
        self, place: Place, drainer: Drainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pause, gathered = drainer.pause, []

        async def noting(seconds: float) -> None:
            if seconds == GATHER_S:
                gathered.append(len(await place.rows()))
            await pause(seconds)

        monkeypatch.setattr(drainer, "pause", noting)
        await place.accept("env_1", 4_000)
        await drainer.start()
        try:
            await eventually(lambda: self._has_rows(place, 4_000))
        finally:
            await drainer.stop()
        assert not [rows for rows in gathered if 0 < rows < 4_000]

    async def _has_rows(self, place: Place, count: int) -> None:
        assert len(await place.rows()) == count

    async def test_errors_that_nobody_expected_cost_no_lanes(
        self, place: Place, drainer: Drainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such as a reply of Redis that cannot be read, once for each lane."""
        take, surprises = drainer._drain.take, iter(range(LANES))

        async def surprising() -> Sequence[Taken]:
            if next(surprises, None) is not None:
                raise ZeroDivisionError
            return await take()

        monkeypatch.setattr(drainer._drain, "take", surprising)
        await drainer.start()
        try:
            await place.accept("env_1")
            await eventually(lambda: self._has_a_row(place))
        finally:
            await drainer.stop()

    async def _has_a_row(self, place: Place) -> None:
        assert len(await place.rows()) == 1


class TestMemory:
    async def test_what_went_through_leaves_nothing(self, place: Place) -> None:
        """20,000 entries of 200 environments, in and out; the first round is there to warm up."""
        turns = place.turns(ack_grace_ttl_s=0)

        async def go_through() -> int:
            for number in range(200):
                await place.accept(f"env_{number}", 100, f"org_{number % 50}")
            most = await place.used_memory()
            turns.schedule.stir()
            async for _ in batches(turns):
                pass
            await turns.schedule.flush()
            while await turns.forget():
                pass
            assert await place.redis.dbsize() == 0
            return most

        await go_through()
        before = await place.used_memory()
        most = await go_through()
        after = await place.used_memory()
        print(f"used_memory: {before:,} before, {most:,} with all of it, {after:,} after")
        assert after <= 1.05 * before

    async def test_a_buffered_run_costs_little_more_than_its_snapshot(self, place: Place) -> None:
        """10,000 runs with 1 KB of payload each."""
        await place.accept("env_1", 1)
        await place.redis.flushall()
        before = await place.used_memory()
        runs = await place.accept("env_1", 10_000, payload=b'"' + b"x" * 1022 + b'"')
        ratio = (await place.used_memory() - before) / sum(len(encode_snapshot(one)) for one in runs)
        print(f"bytes in Redis for each byte of snapshot: {ratio:.2f}")
        assert ratio <= 1.6

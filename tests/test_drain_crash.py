"""Drainers as processes: killed at every step, beside one another, slowed down, paused, cut off. G2, G9, G12.

One Redis and one database serve the module; each fleet of drainers has a namespace of its own.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, NamedTuple

import asyncpg
import pytest

from app.batch import Answer
from app.buffer import RedisBuffer
from app.embedded import Postgres
from app.keys import Keys
from app.postgres import create_pool
from app.redis_client import Scripts
from app.redis_connection import connect
from app.settings import Settings
from schemas.snapshot import Snapshot, encode_snapshot
from tests.adapters import Pool
from tests.crash_points import Crash
from tests.crashing import Nursery
from tests.processes import Worker, Workers
from tests.producer import new_environment
from tests.test_drain import MEDDLING, ids, new_runs
from tests.waiting import eventually, stays_so

TTL_MS = 600
TAKEN_OVER_WITHIN_S = TTL_MS / 1000 + 1


@dataclass(frozen=True)
class Fleet:
    """The buffer of one namespace, and drainers on it."""

    namespace: str
    redis: Any
    redis_url: str
    database_url: str
    pool: Pool
    workers: Workers
    drainers: list[Worker] = field(default_factory=list)

    @property
    def keys(self) -> Keys:
        return Keys(self.namespace, 16)

    @property
    def buffer(self) -> RedisBuffer:
        return RedisBuffer(Scripts(self.redis), self.keys, Settings.model_validate({}))

    async def start(self, count: int, **settings: object) -> list[Worker]:
        """So many drainers, ready."""
        started = await self.workers.start_ready(
            "drainer " * count, self.redis_url, self.database_url, namespace=self.namespace, **settings
        )
        self.drainers.extend(started)
        return started

    async def accept(self, environment: str, count: int = 1, **changes: Any) -> list[Snapshot]:
        """Buffer new runs of one environment."""
        runs = new_runs(environment, count, **changes)
        await self.accept_all(runs)
        return runs

    async def accept_all(self, runs: list[Snapshot]) -> None:
        """Buffer runs in one call."""
        answers = await self.buffer.accept(runs, [None] * len(runs))
        assert all(isinstance(answer, Answer) for answer in answers), answers

    async def append(self, environment: str, fields: dict[str, Any]) -> str:
        """Append an entry that no run was accepted as, to an environment that has some; its id."""
        names = self.keys.environment(environment)
        entry: bytes = await self.redis.xadd(names.entries, fields)
        await self.redis.hincrby(names.drain, "queued", 1)
        await self.redis.hincrby(self.keys.totals(names.partition), "queued", 1)
        return entry.decode()

    async def rows(self, *environments: str) -> list[asyncpg.Record]:
        """The rows of some environments."""
        query = "SELECT * FROM mollifier.runs WHERE environment_id = ANY ($1::text[])"
        return list(await self.pool.fetch(query, environments))

    async def count(self, *environments: str) -> int:
        """How many rows some environments have in all."""
        query = "SELECT count(*) FROM mollifier.runs WHERE environment_id = ANY ($1::text[])"
        count: int = await self.pool.fetchval(query, environments)
        return count

    async def have_rows(self, count: int, *environments: str) -> None:
        """Asserts that some environments have so many rows in all."""
        assert await self.count(*environments) == count

    async def have_some_rows(self, count: int, *environments: str) -> None:
        """Asserts that some environments have so many rows in all, or more."""
        assert await self.count(*environments) >= count

    async def arrived(self, environment: str) -> list[str]:
        """The ids of an environment's rows in the order in which they were written, failures left out."""
        query = """
            SELECT id FROM public.arrivals JOIN mollifier.runs AS run USING (id)
            WHERE environment_id = $1 AND status <> 'SYSTEM_FAILURE' ORDER BY position
        """
        return [record["id"] for record in await self.pool.fetch(query, environment)]

    async def is_at_rest(self) -> None:
        """Asserts that nothing is buffered, and that no drainer holds anything."""
        partitions = range(self.keys.partitions)
        buffered = [name(part) for part in partitions for name in (self.keys.ready, self.keys.totals)]
        held = [f"{self.keys.turns}:{part}" for part in ("organizations", "states", "takers", "resting")]
        assert await self.redis.exists(*buffered, *held) == 0


@pytest.fixture(scope="module")
async def meddled_url(shared_database_url: str) -> str:
    connection = await asyncpg.connect(shared_database_url)
    await connection.execute(MEDDLING)
    await connection.close()
    return shared_database_url


@pytest.fixture(scope="module")
async def shared_client(shared_redis_url: str) -> AsyncIterator[Any]:
    client = connect(shared_redis_url)
    yield client
    await client.aclose()


@pytest.fixture(scope="module")
async def shared_pool(meddled_url: str) -> AsyncIterator[Pool]:
    pool = await create_pool(meddled_url, 10.0)
    yield pool
    pool.terminate()


@pytest.fixture(scope="module")
def make_fleet(
    shared_client: Any, shared_redis_url: str, meddled_url: str, shared_pool: Pool, shared_workers: Workers
) -> Callable[[str], Fleet]:
    """The fleet of a namespace."""

    def make(namespace: str) -> Fleet:
        return Fleet(namespace, shared_client, shared_redis_url, meddled_url, shared_pool, shared_workers)

    return make


@pytest.fixture
def fleet(make_fleet: Callable[[str], Fleet]) -> Iterator[Fleet]:
    """A namespace of the test's own; its drainers are killed when it ends."""
    fleet = make_fleet(new_environment("fleet"))
    yield fleet
    for drainer in fleet.drainers:
        drainer.kill()


@asynccontextmanager
async def unmeddled(pool: Pool) -> AsyncIterator[None]:
    """Whatever happened to rows so far happens no more."""
    await pool.execute("ALTER TABLE mollifier.runs DISABLE TRIGGER meddle")
    try:
        yield
    finally:
        await pool.execute("ALTER TABLE mollifier.runs ENABLE TRIGGER meddle")


CRASHES = [
    Crash(when, point, call)
    for point, call in (
        ("take", 1),
        ("materialise", 1),
        ("materialise", 2),  # of the failure's row
        ("bury-letters", 1),
        ("settle-entries", 1),
        ("release", 1),
        ("take", 2),  # which reports on the first batch
        ("materialise", 3),
        ("settle-entries", 3),  # of the last batch
    )
    for when in ("before", "after")
]


class Aftermath(NamedTuple):
    """What there is once another drainer has done what a killed one left."""

    fleet: Fleet
    good: list[Snapshot]
    refused: Snapshot
    impossible: Snapshot
    poison: str
    rows: dict[str, asyncpg.Record]
    arrived: list[str]
    letters: list[dict[bytes, bytes]]
    took_s: float
    usual_s: float


@pytest.fixture(scope="module")
async def aftermaths(
    make_fleet: Callable[[str], Fleet],
    shared_client: Any,
    shared_redis_url: str,
    meddled_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Crash, Aftermath]:
    """All crashes, a few at a time, each in its namespace: one environment, 30 entries, three batches."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), shared_redis_url, meddled_url)
    settings: dict[str, Any] = {"drain_batch_size": 10, "heartbeat_ttl_ms": TTL_MS, "ack_grace_ttl_s": 60}
    few = asyncio.Semaphore(6)

    async def drain(fleet: Fleet) -> float:
        """Have a new drainer do all there is; how long that took, its start included."""
        started = time.monotonic()
        survivor = nursery.start("drainer", namespace=fleet.namespace, **settings)
        with suppress(AssertionError):
            await eventually(fleet.is_at_rest)
        survivor.kill()
        return time.monotonic() - started

    async def drain_without_a_crash() -> float:
        fleet = make_fleet("no-crash")
        await fleet.accept(new_environment(), 30)
        async with few:
            return await drain(fleet)

    async def crash_and_recover(crash: Crash) -> Aftermath:
        fleet, environment = make_fleet(str(crash).replace(" ", "-")), new_environment()
        refused, impossible = (
            new_runs(environment, 1, task=task, batch_id="batch_1")[0] for task in ("refused", "impossible")
        )
        chosen = new_runs(environment, 1, id=f"chosen-{environment}")
        good = [*new_runs(environment, 4), *chosen, *new_runs(environment, 22)]
        await fleet.buffer.recall(chosen, chosen)
        await fleet.accept_all([*good[:3], refused, *good[3:6], impossible, *good[6:]])
        poison = await fleet.append(environment, {"run_id": "poison", "snapshot": b"\xc1"})
        async with few:
            await nursery.start("drainer", crash, namespace=fleet.namespace, **settings).crashed()
            took_s = await drain(fleet)
        rows = {row["id"]: row for row in await fleet.rows(environment)}
        letters = [fields for _, fields in await shared_client.xrange(fleet.keys.dead_letters)]
        arrived = await fleet.arrived(environment)
        return Aftermath(
            fleet, good, refused, impossible, poison, rows, arrived, letters, took_s, await usual_s
        )

    usual_s = asyncio.create_task(drain_without_a_crash())
    try:
        results = await asyncio.gather(*(crash_and_recover(crash) for crash in CRASHES))
    finally:
        nursery.close()
    return dict(zip(CRASHES, results, strict=True))


@pytest.mark.parametrize("crash", CRASHES, ids=str)
class TestG2Crash:
    """A drainer is killed; another, started then, does the rest."""

    async def test_every_entry_is_one_row_or_a_dead_letter(
        self, crash: Crash, aftermaths: dict[Crash, Aftermath]
    ) -> None:
        after = aftermaths[crash]
        assert {id: row["status"] for id, row in after.rows.items()} == {
            **dict.fromkeys(ids(after.good), "QUEUED"),
            after.refused.id: "SYSTEM_FAILURE",
        }
        assert after.rows[after.refused.id]["batch_id"] == "batch_1"
        buried = {(letter[b"reason"], letter[b"snapshot"]) for letter in after.letters}
        assert buried == {(b"undecodable", b"\xc1"), (b"refused", encode_snapshot(after.impossible))}
        assert after.poison.encode() in {letter[b"id"] for letter in after.letters}
        assert len(after.letters) <= 3, "the one that was being buried may be there twice"

    async def test_rows_come_in_the_order_accepted(
        self, crash: Crash, aftermaths: dict[Crash, Aftermath]
    ) -> None:
        assert aftermaths[crash].arrived == ids(aftermaths[crash].good)

    async def test_it_is_soon_over_and_leaves_nothing_held(
        self, crash: Crash, aftermaths: dict[Crash, Aftermath]
    ) -> None:
        after = aftermaths[crash]
        await after.fleet.is_at_rest()
        print(f"{crash}: over after {after.took_s:.2f} s, without a crash {after.usual_s:.2f} s")
        assert after.took_s <= TAKEN_OVER_WITHIN_S + 5 * after.usual_s


class TestG9Order:
    async def test_with_drainers_that_are_killed_and_statements_that_fail(self, fleet: Fleet) -> None:
        """Three drainers, 30 environments. Rows fail now and then, by themselves or with their connection."""
        settings = {"drain_batch_size": 10, "heartbeat_ttl_ms": TTL_MS, "drain_max_attempts": 100}
        first, second, _ = await fleet.start(3, **settings)
        accepted: dict[str, list[Snapshot]] = {new_environment(): [] for _ in range(30)}

        async def accept_more() -> None:
            for number, (environment, runs) in enumerate(accepted.items()):
                runs += await fleet.accept(environment, 6, task="slow:0.002")
                if number % 5 == 0:
                    runs += await fleet.accept(environment, 1, task="flaky:P0001:0.7")
                if number % 10 == 0:
                    runs += await fleet.accept(environment, 1, task="flaky:40001:0.5")
                runs += await fleet.accept(environment, 3, task="slow:0.002")

        await accept_more()
        await eventually(lambda: fleet.have_some_rows(50, *accepted))
        first.kill()
        await accept_more()
        await eventually(lambda: fleet.have_some_rows(200, *accepted))
        await fleet.pool.execute(CUT_OFF)
        await accept_more()
        await eventually(lambda: fleet.have_some_rows(400, *accepted))
        second.kill()
        await accept_more()
        (fourth,) = await fleet.start(1, **settings)
        total = sum(map(len, accepted.values()))
        await eventually(lambda: fleet.have_rows(total, *accepted), within_s=20)
        for environment, runs in accepted.items():
            assert await fleet.arrived(environment) == ids(runs)
        await eventually(fleet.is_at_rest)
        assert fourth.is_running


# Every connection that is in the middle of a statement is lost.
CUT_OFF = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()
"""


class TestControl:
    RATE = 300

    async def test_rate_and_weights_over_two_drainers(self, fleet: Fleet) -> None:
        """Two organizations with work, one of weight 3, and 300 rows a second for both drainers together."""
        gold, plain = new_environment("gold"), new_environment("plain")
        await fleet.pool.execute(
            "INSERT INTO mollifier.organization_settings (organization_id, weight) VALUES ($1, 3)",
            f"org_of_{gold}",
        )
        drainers = await fleet.start(2, drain_max_rate=self.RATE)
        await eventually(lambda: self._weighs(fleet, f"org_of_{gold}", 3))
        for drainer in drainers:
            drainer.pause()
        await fleet.accept(gold, 500)
        await fleet.accept(plain, 500)
        for drainer in drainers:
            drainer.resume()

        await eventually(lambda: fleet.have_some_rows(400, gold, plain))
        counted = Counter(row["environment_id"] for row in await fleet.rows(gold, plain))
        print(f"weight 3 to weight 1, when both had work: {dict(counted)}")
        assert max(counted.values()) < 500
        assert abs(counted[gold] - 3 * counted[plain]) <= 120, "two quanta of 20, times the weight"

        await eventually(lambda: fleet.have_rows(1000, gold, plain))
        times = sorted(row["materialised_at"] for row in await fleet.rows(gold, plain))
        most = max(sum(time <= one < time + timedelta(seconds=1) for one in times) for time in times)
        took_s = (times[-1] - times[0]).total_seconds()
        print(f"at most {most} rows in any second; 1000 rows in {took_s:.1f} s")
        assert most <= 1.25 * self.RATE + self.RATE / 10, "commits come up to a quarter of a second late"
        assert took_s <= 1.3 * 1000 / self.RATE

    async def _weighs(self, fleet: Fleet, organization: str, weight: int) -> None:
        assert await fleet.redis.hget(f"{fleet.keys.turns}:weights", organization) == str(weight).encode()

    async def test_pause_and_resume(self, fleet: Fleet) -> None:
        """Within two seconds, by a row of Postgres."""
        environment = new_environment()
        await fleet.start(1, drain_max_rate=100)
        await fleet.accept(environment, 600)
        await eventually(lambda: fleet.have_some_rows(50, environment))
        async with paused(fleet.pool):
            asked = datetime.now(UTC)
            await eventually(lambda: self._stands_still(fleet, environment))
            rows = await fleet.rows(environment)
            latest = max(row["materialised_at"] for row in rows)
            print(f"paused after {(latest - asked).total_seconds():.2f} s")
            assert latest - asked < timedelta(seconds=2)
            assert len(rows) < 400
            assert await fleet.redis.keys(f"{fleet.keys.turns}:held:*") == []
        asked = datetime.now(UTC)
        await eventually(lambda: fleet.have_some_rows(len(rows) + 1, environment))
        resumed = min(
            row["materialised_at"] for row in await fleet.rows(environment) if row["materialised_at"] > latest
        )
        print(f"resumed after {(resumed - asked).total_seconds():.2f} s")
        assert resumed - asked < timedelta(seconds=2)

    async def _stands_still(self, fleet: Fleet, environment: str) -> None:
        """Asserts that no row comes for a second."""
        count = len(await fleet.rows(environment))
        await stays_so(lambda: fleet.have_rows(count, environment), for_s=1)


@asynccontextmanager
async def paused(pool: Pool) -> AsyncIterator[None]:
    """The drain is paused while the block runs."""
    query = """
        INSERT INTO mollifier.settings (name, value) VALUES ('drain.paused', $1::jsonb)
        ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value
    """
    await pool.execute(query, "true")
    try:
        yield
    finally:
        await pool.execute(query, "false")


@pytest.mark.one_redis
class TestOneDrainer:
    async def test_an_idle_drainer_wakes_at_once(self, fleet: Fleet) -> None:
        """From acceptance to the row, for runs that come one by one."""
        await fleet.start(1)
        dwells_s = []
        for _ in range(15):
            environment = new_environment()
            await fleet.accept(environment)
            await eventually(lambda: fleet.have_rows(1, environment), every_s=0.01)  # noqa: B023
            await eventually(fleet.is_at_rest)
            (row,) = await fleet.rows(environment)
            dwells_s.append((row["materialised_at"] - row["buffered_at"]).total_seconds())
        print(f"dwell of a lone run: median {median(dwells_s):.3f} s, most {max(dwells_s):.3f} s")
        assert median(dwells_s) < 0.1

    async def test_what_hangs_holds_up_nobody(self, fleet: Fleet) -> None:
        """One environment whose statements hang, 20 others, and some that come later; then it is well."""
        await fleet.start(1, store_timeout_ms=500)
        hung = await fleet.accept("hung", 30, task="hangs")
        others = [new_environment() for _ in range(20)]
        for other in others:
            await fleet.accept(other, 20)
        await eventually(lambda: fleet.have_rows(400, *others), within_s=4)
        for _ in range(5):
            late = new_environment()
            await fleet.accept(late)
            await eventually(lambda: fleet.have_rows(1, late), within_s=1)  # noqa: B023
        await fleet.have_rows(0, "hung")
        async with unmeddled(fleet.pool):
            await eventually(lambda: fleet.have_rows(30, "hung"))
        assert await fleet.arrived("hung") == ids(hung)

    @pytest.mark.parametrize("outage", ["killed", "paused"])
    async def test_without_postgres_it_waits_and_does_not_spin(
        self, fleet: Fleet, postgres: Postgres, outage: str
    ) -> None:
        """Gone in the middle of batches, for two seconds."""
        (drainer,) = await fleet.start(1, store_timeout_ms=500, drain_batch_size=20)
        accepted: dict[str, list[Snapshot]] = {new_environment(): [] for _ in range(30)}
        for environment, runs in accepted.items():
            runs += await fleet.accept(environment, 30, task="slow:0.002")
        await eventually(lambda: fleet.have_some_rows(100, *accepted))
        async with drainer.stays_live():
            if outage == "killed":
                postgres.kill()
            else:
                postgres.pause()
            before = await self._scripts_run(fleet)
            await stays_so(fleet.redis.ping, for_s=2)
            ran = await self._scripts_run(fleet) - before
            if outage == "killed":
                postgres.start()
            else:
                postgres.resume()
        print(f"{outage}: {ran} scripts in two seconds, {len(drainer.log())} log lines")
        assert ran < 200
        assert len(drainer.log()) < 20
        await eventually(lambda: fleet.have_rows(900, *accepted), within_s=15)
        for environment, runs in accepted.items():
            assert await fleet.arrived(environment) == ids(runs)
            assert {row["status"] for row in await fleet.rows(environment)} == {"QUEUED"}
        await eventually(fleet.is_at_rest)

    async def _scripts_run(self, fleet: Fleet) -> int:
        statistics = await fleet.redis.info("commandstats")
        return int(statistics["cmdstat_evalsha"]["calls"])

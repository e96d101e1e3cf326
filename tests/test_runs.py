"""Operations in process, on the real stores: finding, changing and listing runs wherever they are.

Guarantees G2, G4, G7, G10, G11. A test stands between any two steps of an operation, and of the drain. What
real processes make of it is in `test_operations.py`.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app import changes
from app.batch import Entry
from app.buffer import RedisBuffer
from app.buffered_runs import RedisBufferedRuns
from app.decode import decode_trigger
from app.drain import Drain, unpack
from app.errors import RequestError, RunBusy, StoreUnavailable, Unreachable
from app.keys import Keys
from app.ports import Taken
from app.postgres import create_pool, statement
from app.redis_client import Call, Scripts
from app.redis_connection import connect
from app.rows import Row
from app.run_ids import friendly
from app.runs import BufferedRun, Runs, StoredRun, Tenancy
from app.settings import Settings
from app.store import PostgresStore
from app.stored_runs import PostgresStoredRuns
from app.turns import RedisTurns
from app.validate import build_run
from schemas.overlay import Overlay
from schemas.snapshot import Snapshot
from tests import builders
from tests.adapters import Operator, Pool, silence_after
from tests.waiting import eventually

ENV, ORG, TASK = "env_1", "org_1", "send-email"
TENANCY = Tenancy(ORG, ENV)
HOUR = timedelta(hours=1)
KEYS = Keys("mollifier", 16)
GONE = "run_nowhere"

Reply = dict[str, Any]
Act = Callable[[], Awaitable[object]]


def now() -> datetime:
    """The present, as exact as an entry's time is."""
    time = datetime.now(UTC)
    return time.replace(microsecond=time.microsecond // 1000 * 1000)


def new_run(environment: str = ENV, **changes: Any) -> Snapshot:
    """A run that was requested just now."""
    return builders.run(environment, **{"created_at": now(), **changes})


def keyed_run(**changes: Any) -> Snapshot:
    return new_run(idempotency_key="k", idempotency_key_expires_at=now() + 24 * HOUR, **changes)


def step(kind: str, key: str = "n", **fields: Any) -> dict[str, Any]:
    """One operation on metadata."""
    return {"type": kind, "key": key, **fields}


class Stage:
    """The stores, with one drainer that the test takes through its steps."""

    def __init__(
        self,
        redis: Redis,
        pool: Pool,
        buffer: RedisBuffer,
        store: PostgresStore,
        drain: Drain,
        turns: RedisTurns,
    ) -> None:
        self.redis = redis
        self.pool = pool
        self.buffer = buffer
        self.store = store
        self.drain = drain
        self.turns = turns

    async def accept(self, *runs: Snapshot) -> None:
        """Have runs accepted into the buffer."""
        accepted = [replace(run, buffered_at=now()) for run in runs]
        answers = await self.buffer.accept(accepted, [None] * len(runs))
        assert [type(answer).__name__ for answer in answers] == ["Answer"] * len(runs)

    async def insert(self, *runs: Snapshot) -> None:
        """Have runs pass through."""
        answers = await self.store.insert(runs, now())
        assert [type(answer).__name__ for answer in answers] == ["Answer"] * len(runs)

    async def take(self) -> Sequence[Taken]:
        """Entries that are DRAINING from now on."""
        self.turns.schedule.stir()
        taken = await self.drain.take()
        assert taken
        return taken

    async def put_back(self, taken: Sequence[Taken]) -> None:
        await self.turns.put_back(taken, apart=False)

    async def write(self, taken: Sequence[Taken]) -> None:
        """Make rows of what was taken, and settle nothing: the drainer dies just then, or hears no answer."""
        rows = [load.row for load in unpack(taken, datetime.now(UTC)) if load.row is not None]
        await self.store.materialise(rows, datetime.now(UTC))

    async def drain_all(self) -> None:
        """Materialise what is buffered."""
        self.turns.schedule.stir()
        while await self.drain.turn():
            self.turns.schedule.stir()

    async def hand_over(self) -> None:
        """Materialise what is buffered, and forget at once that it was."""
        await self.drain_all()
        while await self.turns.forget():
            pass

    async def rows(self) -> list[dict[str, Any]]:
        return [dict(one) for one in await self.pool.fetch("SELECT * FROM mollifier.runs ORDER BY id")]

    async def row(self, run: Snapshot) -> dict[str, Any]:
        (row,) = [row for row in await self.rows() if row["id"] == run.id]
        return row

    async def overlays(self) -> dict[bytes, bytes]:
        found: Any = await self.redis.hgetall(KEYS.environment(ENV).overlays)
        return dict(found)


@pytest.fixture(scope="module")
async def shared_pool(shared_database_url: str) -> AsyncIterator[Pool]:
    pool = await create_pool(shared_database_url, 5.0)
    yield pool
    await pool.close()


@pytest.fixture
async def pool(shared_pool: Pool) -> Pool:
    """Connections to a database that is emptied, which takes less than a new one."""
    for table in ("runs", "run_aliases", "waitpoints"):
        await shared_pool.execute(f"DELETE FROM mollifier.{table}")
    return shared_pool


@pytest.fixture
def stage(
    client: Redis,
    pool: Pool,
    make_buffer: Callable[..., RedisBuffer],
    store: PostgresStore,
    make_drain: Callable[..., Drain],
    make_turns: Callable[..., RedisTurns],
) -> Stage:
    turns = make_turns(ack_grace_ttl_s=0)
    return Stage(client, pool, make_buffer(), store, make_drain(turns), turns)


@pytest.fixture
def operator(make_operator: Callable[..., Operator]) -> Operator:
    return make_operator(max_tags=5, max_metadata_bytes=200, mutate_wait_ms=5_000)


@pytest.fixture
async def no_store() -> AsyncIterator[PostgresStoredRuns]:
    """A Postgres that is away."""
    pool = await create_pool("postgresql://postgres@127.0.0.1:1/postgres", 0.5)
    yield PostgresStoredRuns(pool, Settings.model_validate({}))
    await pool.close()


@pytest.fixture
async def no_buffer() -> AsyncIterator[RedisBufferedRuns]:
    """A Redis that is away."""
    redis = connect("redis://127.0.0.1:1/0")
    yield RedisBufferedRuns(Scripts(redis), KEYS)
    await redis.aclose()


def paced(real: Any, moment: str, act: Act) -> Any:
    """`real`, except that the test acts once: at the first moment such as `before find` or `after change`."""
    waiting = [act]

    class Paced:
        def __getattr__(self, name: str) -> Any:
            method = getattr(real, name)

            async def call(*arguments: Any) -> Any:
                if moment == f"before {name}" and waiting:
                    await waiting.pop()()
                answer = await method(*arguments)
                if moment == f"after {name}" and waiting:
                    await waiting.pop()()
                return answer

            return call

    return Paced()


def noting(real: Any, name: str, calls: list[str]) -> Any:
    """`real`, which notes its name in a list whenever it is called."""

    class Noting:
        def __getattr__(self, method: str) -> Any:
            calls.append(name)
            return getattr(real, method)

    return Noting()


@contextmanager
def statements() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The statements that Postgres is given while the block runs, with their arguments."""
    given: list[tuple[str, tuple[Any, ...]]] = []

    def noting(method: Any) -> Any:
        async def call(connection: Any, query: str, *arguments: Any, **options: Any) -> Any:
            if not query.startswith("SET "):  # of the pool's own, when a connection is new
                given.append((query, arguments))
            return await method(connection, query, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):
            patch.setattr(asyncpg.Connection, name, noting(getattr(asyncpg.Connection, name)))
        yield given


async def lose_the_answer() -> None:
    """Of a statement that was under way: nobody hears how it ended."""
    error = StoreUnavailable()
    error.may_be_done = True
    raise error


async def has_length(calls: Sequence[str], at_least: int) -> None:
    assert len(calls) >= at_least


async def ask(operator: Operator, kind: str, run: Snapshot | str | None = None, **fields: Any) -> Reply:
    """One operation of the tenant of these tests."""
    if run is not None:
        fields["run_id"] = run if isinstance(run, str) else friendly(run.id)
    return await operator(kind, ENV, ORG, **fields)


async def changed(operator: Operator, kind: str, run: Snapshot, **fields: Any) -> dict[str, Any]:
    """The run as a change answers it."""
    reply = await ask(operator, kind, run, **fields)
    assert reply["type"] == "run_details", reply
    return dict(reply["run"])


def code(reply: Reply) -> str:
    """What a reply comes to: its type, or its error's code."""
    return str(reply["error"]["code"] if reply["type"] == "error" else reply["type"])


KINDS: dict[str, dict[str, Any]] = {
    "run.retrieve": {},
    "run.add_tags": {"tags": ["b"]},
    "run.update_metadata": {"operations": [step("increment", value=1)]},
    "run.reschedule": {"delay": "3h"},
    "run.replay": {},
    "run.cancel": {"reason": "late"},
}
CHANGE_KINDS = [kind for kind in KINDS if kind not in ("run.retrieve", "run.replay")]


class TestEveryPlace:
    """Each operation on a run in each place that it can be in."""

    async def put(self, stage: Stage, operator: Operator, place: str, run: Snapshot) -> Snapshot:
        """Put a run there; the run that it is then."""
        where, _, how = place.partition(", ")
        if where == "aliased":
            winner = replace(run, id=f"winner{run.id}")
            await stage.insert(winner)
            await stage.redis.delete(KEYS.claim(run))
            await stage.accept(run)
            await stage.hand_over()
            return winner
        await (stage.insert if where == "stored" else stage.accept)(run)
        if how == "cancelled":
            await changed(operator, "run.cancel", run, reason="first")
        if how == "failed":
            await stage.pool.execute("UPDATE mollifier.runs SET status = 'FAILED' WHERE id = $1", run.id)
        if where == "materialised":
            await stage.drain_all()
        return run

    @pytest.mark.parametrize("place", ["stored", "buffered", "materialised", "aliased"])
    async def test_a_delayed_run(self, stage: Stage, operator: Operator, place: str) -> None:
        accepted = keyed_run(delay_until=now() + HOUR, tags=("a",), metadata=b'{"n":1}')
        run = await self.put(stage, operator, place, accepted)
        for kind, fields in KINDS.items():
            reply = await ask(operator, kind, accepted, **fields)
            if kind != "run.replay":
                assert (reply["run"]["id"], reply["run"]["is_buffered"]) == (run.id, place == "buffered")
        shown = (await ask(operator, "run.retrieve", accepted))["run"]
        assert (shown["tags"], shown["metadata"], shown["status"]) == (["a", "b"], {"n": 2}, "CANCELED")
        assert datetime.fromisoformat(shown["delay_until"]) > now() + 2 * HOUR
        assert [one["options"]["replayed_from_run_id"] for one in operator.triggered] == [friendly(run.id)]
        page = await ask(operator, "run.list")
        assert [one["id"] for one in page["runs"]] == [run.id]
        reset = await ask(operator, "idempotency_key.reset", task=TASK, idempotency_key="k")
        assert (code(reset), reset["run_id"]) == ("idempotency_key_reset", run.id)
        await stage.drain_all()
        row = await stage.row(run)
        assert (row["tags"], row["status"], row["idempotency_key"]) == (["a", "b"], "CANCELED", None)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("end", ["settled", "put back"])
    async def test_a_run_that_is_being_drained(
        self, stage: Stage, operator: Operator, kind: str, end: str
    ) -> None:
        """It is read at once. A change waits until the entry has moved, and is made where the run is then."""
        run = keyed_run(delay_until=now() + HOUR, tags=("a",), metadata=b'{"n":1}')
        await stage.accept(run)
        taken = await stage.take()
        looks: list[str] = []
        operator.runs = Runs(
            noting(operator.stored, "Postgres", looks), noting(operator.buffered, "Redis", looks), wait_s=5
        )
        asking = asyncio.create_task(ask(operator, kind, run, **KINDS[kind]))
        if kind in CHANGE_KINDS:
            await eventually(lambda: has_length(looks, 5))
            assert looks[:5] == ["Postgres", "Redis", "Redis", "Redis", "Redis"], "waiting is for Redis alone"
            assert not asking.done()
            assert await stage.overlays() == {}
            await (stage.drain.handle(taken) if end == "settled" else stage.put_back(taken))
        reply = await asking
        if kind != "run.replay":
            assert reply["run"]["is_buffered"] is (end == "put back" or kind == "run.retrieve")
        if kind not in CHANGE_KINDS:
            await stage.drain.handle(taken)
        await stage.drain_all()
        row = await stage.row(run)
        shown = (await ask(operator, "run.retrieve", run))["run"]
        if kind in CHANGE_KINDS:
            assert reply["run"] | {"is_buffered": 0, "updated_at": 0, "materialised_at": 0} == shown | {
                "is_buffered": 0,
                "updated_at": 0,
                "materialised_at": 0,
            }
        assert row["revision"] == (kind in CHANGE_KINDS)

    @pytest.mark.parametrize(
        "place",
        [
            "stored, cancelled",
            "buffered, cancelled",
            "stored, failed",
            "stored, expired",
            "buffered, expired",
        ],
    )
    async def test_a_run_that_has_ended(self, stage: Stage, operator: Operator, place: str) -> None:
        ended = place.partition(", ")[2]
        times: dict[str, Any] = {"created_at": now() - 2 * HOUR}
        if ended == "expired":
            times |= {"ttl_seconds": 3600, "expires_at": now() - HOUR}
        run = await self.put(stage, operator, place, keyed_run(**times, tags=("a",)))
        before = await ask(operator, "run.retrieve", run)
        status = {"cancelled": "CANCELED", "failed": "FAILED", "expired": "EXPIRED"}[ended]
        assert before["run"]["status"] == status
        assert before["run"]["cancel_reason"] == ("first" if ended == "cancelled" else None)
        for kind, fields in KINDS.items():
            reply = await ask(operator, kind, run, **fields)
            if kind in ("run.retrieve", "run.cancel"):
                assert reply == before
            elif kind != "run.replay":
                assert code(reply) == "run_finished"
        assert operator.triggered[0]["options"]["replayed_from_run_id"] == friendly(run.id)
        reset = await ask(operator, "idempotency_key.reset", task=TASK, idempotency_key="k")
        assert reset["run_id"] == run.id
        await stage.drain_all()
        assert (await stage.row(run))["status"] == status

    async def test_a_run_that_nobody_knows(self, stage: Stage, operator: Operator) -> None:
        for kind, fields in KINDS.items():
            assert code(await ask(operator, kind, GONE, **fields)) == "run_not_found"
        reset = await ask(operator, "idempotency_key.reset", task=TASK, idempotency_key="k")
        assert code(reset) == "run_not_found"
        assert (await ask(operator, "run.list"))["runs"] == []
        assert (operator.triggered, await stage.rows()) == ([], [])


class TestFinding:
    @pytest.mark.parametrize("is_forgotten", [False, True], ids=["in its grace time", "forgotten"])
    @pytest.mark.parametrize("moment", ["before find", "after find"])
    async def test_g2_handed_over_between_two_looks(
        self, stage: Stage, operator: Operator, moment: str, is_forgotten: bool
    ) -> None:
        """The first look at Postgres comes too early, the one at the buffer too late."""
        run = new_run()
        await stage.accept(run)
        hand_over = stage.hand_over if is_forgotten else stage.drain_all
        operator.runs = Runs(paced(operator.stored, moment, hand_over), operator.buffered, 1)
        found = await operator.runs.find(TENANCY, run.id, now())
        assert isinstance(found, StoredRun)

    async def test_g2_a_run_is_never_missing_while_it_is_handed_over(
        self, stage: Stage, operator: Operator
    ) -> None:
        """Thousands of looks at the runs that are just being taken, written, settled and forgotten."""
        runs = [new_run() for _ in range(400)]
        await stage.accept(*runs)
        drained = looks = 0
        seen = {BufferedRun: 0, StoredRun: 0}

        async def look() -> None:
            nonlocal looks
            while drained < len(runs):
                run = runs[min(len(runs) - 1, max(0, drained + random.randrange(-4, 8)))]
                found = await operator.runs.find(TENANCY, run.id, now())
                assert found.row.run.id == run.id
                seen[type(found)] += 1
                looks += 1

        looking = [asyncio.create_task(look()) for _ in range(8)]
        while drained < len(runs):
            stage.turns.schedule.stir()
            taken = await stage.turns.take(4)
            await stage.drain.handle(taken)
            await stage.turns.forget()
            drained += sum(len(one.entries) for one in taken)
        await asyncio.gather(*looking)
        assert looks > 1000
        assert min(seen.values()) > 100, seen

    async def test_without_postgres_what_is_buffered_is_found_and_changed(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        stored, buffered = new_run(), new_run()
        await stage.insert(stored)
        await stage.accept(buffered)
        operator.runs = Runs(no_store, operator.buffered, 0.2)
        for kind, fields in KINDS.items():
            assert code(await ask(operator, kind, stored, **fields)) == "store_unavailable"
            assert code(await ask(operator, kind, GONE, **fields)) == "store_unavailable"
        for kind in ("run.retrieve", "run.add_tags", "run.update_metadata", "run.cancel"):
            assert (await changed(operator, kind, buffered, **KINDS[kind]))["is_buffered"] is True
        taken = await stage.take()
        assert code(await ask(operator, "run.retrieve", buffered)) == "run_details"
        await stage.drain.handle(taken)
        assert code(await ask(operator, "run.retrieve", buffered)) == "store_unavailable", "not as it was"
        assert (await stage.row(buffered))["tags"] == ["b"]

    async def test_without_redis_what_is_stored_is_found_and_changed(
        self, stage: Stage, operator: Operator, no_buffer: RedisBufferedRuns
    ) -> None:
        stored, buffered = new_run(), new_run()
        await stage.insert(stored)
        await stage.accept(buffered)
        operator.runs = Runs(operator.stored, no_buffer, 0.2)
        for kind in ("run.retrieve", "run.add_tags", "run.update_metadata", "run.cancel"):
            assert (await changed(operator, kind, stored, **KINDS[kind]))["is_buffered"] is False
        for kind, fields in KINDS.items():
            assert code(await ask(operator, kind, buffered, **fields)) == "buffer_unavailable"
            assert code(await ask(operator, kind, GONE, **fields)) == "buffer_unavailable"

    @pytest.mark.parametrize("snapshot", [b"", b"\xc1", b"\x80", b"\x81\xa2id\xa2\xff\xfe", b"\x91" * 5000])
    async def test_g12_an_entry_that_nobody_can_read_does_not_hide_the_others(
        self, stage: Stage, operator: Operator, snapshot: bytes
    ) -> None:
        run = new_run()
        await stage.accept(run)
        await stage.redis.xadd(KEYS.environment(ENV).entries, {"run_id": "poison", "snapshot": snapshot})
        page = await ask(operator, "run.list")
        assert [one["id"] for one in page.get("runs", [])] == [run.id], page


BAD_DATES = [
    "yesterday",
    "2030-01-01T00:00:00",
    "2030-02-31T00:00:00Z",
    "0000-00-00T00:00:00Z",
    7,
    float("nan"),
    msgspec.msgpack.Ext(-1, b"\xff" * 12),
]
SNAPSHOT_DATES = [
    name for name in Snapshot.__struct_fields__ if name.endswith(("_at", "_until")) and name != "buffered_at"
]
OVERLAY_DATES = [name for name in Overlay.__struct_fields__ if name.endswith(("_at", "_until"))]


class TestBadDates:
    """Whatever a date in stored data is, it never makes a run CANCELED, DELAYED, EXPIRED or anything else."""

    @pytest.mark.parametrize("bad", BAD_DATES, ids=range(len(BAD_DATES)))
    @pytest.mark.parametrize("name", [*SNAPSHOT_DATES, *(f"overlay {name}" for name in OVERLAY_DATES)])
    async def test_of_a_buffered_run(self, stage: Stage, operator: Operator, name: str, bad: Any) -> None:
        run, good = new_run(), new_run()
        raw: dict[str, Any] = msgspec.to_builtins(run, builtin_types=(datetime, bytes))
        where, _, field = name.rpartition(" ")
        with pytest.MonkeyPatch.context() as patch:
            if not where:
                raw[field] = bad
                patch.setattr("app.buffer.encode_snapshot", lambda _: msgspec.msgpack.encode(raw))
            await stage.accept(run)
        if where:
            overlay = msgspec.msgpack.encode({"revision": 1, field: bad})
            await stage.redis.hset(KEYS.environment(ENV).overlays, run.id, overlay)
        await stage.accept(good)
        stored = await stage.overlays()
        with capture_logs() as logged:
            for kind, fields in KINDS.items():
                assert code(await ask(operator, kind, run, **fields)) == "internal_error"
        assert [one["event"] for one in logged] == ["operation.failed"] * len(KINDS)
        assert [one["id"] for one in (await ask(operator, "run.list"))["runs"]] == [good.id]
        for status in ("CANCELED", "DELAYED", "EXPIRED"):
            assert (await ask(operator, "run.list", status=status))["runs"] == []
        assert (await stage.overlays(), operator.triggered) == (stored, [])

    @pytest.mark.parametrize("bad", ["infinity", "-infinity"])
    @pytest.mark.parametrize("name", ["delay_until", "expires_at", "cancelled_at", "debounce_until"])
    async def test_of_a_row(self, stage: Stage, operator: Operator, name: str, bad: str) -> None:
        run = new_run()
        await stage.insert(run)
        await stage.pool.execute(f"UPDATE mollifier.runs SET {name} = '{bad}'")
        assert (await ask(operator, "run.retrieve", run))["run"]["status"] == "QUEUED"
        assert [one["status"] for one in (await ask(operator, "run.list"))["runs"]] == ["QUEUED"]
        assert (await changed(operator, "run.add_tags", run, tags=["a"]))["status"] == "QUEUED"


class Clock:
    """A time that only sleeping moves."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


class Drained:
    """Both stores in memory: a run that is DRAINING for so many looks, and then moves."""

    def __init__(self, run: Snapshot, looks: int, then: str) -> None:
        self.row = Row(run, "QUEUED")
        self.looks = looks
        self.then = then
        self.calls: list[str] = []

    @property
    def stored(self) -> Any:
        return self._Store(self)

    @property
    def buffered(self) -> Any:
        return self._Buffer(self)

    class _Store(NamedTuple):
        world: "Drained"

        async def find(self, tenancy: Tenancy, run_id: str) -> StoredRun | None:
            self.world.calls.append("Postgres: find")
            is_there = self.world.looks <= 0 and self.world.then == "a row"
            return StoredRun(self.world.row, now(), now()) if is_there else None

        async def change(self, before: StoredRun, after: Row) -> StoredRun:
            self.world.calls.append("Postgres: change")
            return before._replace(row=after)

    class _Buffer(NamedTuple):
        world: "Drained"

        async def find(self, tenancy: Tenancy, run_id: str, at: datetime) -> BufferedRun | None:
            self.world.calls.append("Redis: find")
            self.world.looks -= 1
            if self.world.looks <= 0 and self.world.then == "a row":
                return None
            state: Any = "DRAINING" if self.world.looks > 0 else "QUEUED"
            return BufferedRun(self.world.row, state, now(), None)

        async def change(self, before: BufferedRun, after: Row, at: datetime) -> BufferedRun:
            self.world.calls.append("Redis: change")
            return before._replace(row=after)


class TestG11Waiting:
    """A change that meets a run being drained, step by step."""

    async def change(self, world: Drained, wait_s: float) -> tuple[Clock, Any]:
        clock = Clock()
        runs = Runs(world.stored, world.buffered, wait_s, lambda: clock.time)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.runs.asyncio", SimpleNamespace(sleep=clock.sleep))
            found = await runs.change(TENANCY, world.row.run.id, changes.cancel(None, now()), now())
        return clock, found

    async def test_only_redis_is_read_until_the_row_is_there_and_then_postgres_once(self) -> None:
        world = Drained(new_run(), 9, "a row")
        _, found = await self.change(world, 60)
        assert world.calls == ["Postgres: find", *["Redis: find"] * 9, "Postgres: find", "Postgres: change"]
        assert (type(found), found.row.status) == (StoredRun, "CANCELED")

    async def test_on_the_buffer_if_the_entry_went_back(self) -> None:
        world = Drained(new_run(), 9, "put back")
        _, found = await self.change(world, 60)
        assert [one for one in world.calls if one != "Redis: find"] == ["Postgres: find"] * 2 + [
            "Redis: change"
        ]
        assert (type(found), found.row.status) == (BufferedRun, "CANCELED")

    async def test_longer_each_time_up_to_a_quarter_of_a_second_and_never_in_step(self) -> None:
        waits = [(await self.change(Drained(new_run(), 40, "a row"), 60))[0].slept for _ in range(2)]
        for slept in waits:
            longest = [min(0.25, 0.01 * 1.7**number) for number in range(len(slept))]
            assert all(most / 2 <= one <= most for one, most in zip(slept, longest, strict=True))
        assert waits[0] != waits[1]

    @pytest.mark.parametrize("wait_s", [0, 0.1, 2])
    async def test_busy_past_the_time_to_wait_and_not_before(self, wait_s: float) -> None:
        world = Drained(new_run(), 10_000, "a row")
        clock = Clock()
        runs = Runs(world.stored, world.buffered, wait_s, lambda: clock.time)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.runs.asyncio", SimpleNamespace(sleep=clock.sleep))
            with pytest.raises(RunBusy):
                await runs.change(TENANCY, world.row.run.id, changes.cancel(None, now()), now())
        assert wait_s - 0.25 <= clock.time <= wait_s
        assert [one for one in world.calls if one != "Redis: find"] == ["Postgres: find"]


class TestChanging:
    @pytest.mark.parametrize("kind", CHANGE_KINDS)
    async def test_g11_a_row_is_changed_by_a_single_statement(
        self, stage: Stage, operator: Operator, kind: str
    ) -> None:
        """After the one that reads it; not in a transaction, which could hold others up."""
        run = keyed_run(delay_until=now() + HOUR)
        await stage.insert(run)
        with statements() as given:
            await changed(operator, kind, run, **KINDS[kind])
        assert [query for query, _ in given] == [statement("read_run"), statement("change_run")]

    @pytest.mark.parametrize(
        "other",
        [
            {"status": "EXECUTING"},
            {"delay_until": now() + 9 * HOUR},
            {"idempotency_key": "other"},
            {"metadata_version": 7},
            {"revision": 7},
        ],
        ids=str,
    )
    async def test_g11_and_only_if_it_is_as_it_was(
        self, stage: Stage, operator: Operator, other: dict[str, Any]
    ) -> None:
        """Whatever anyone has changed in between, by whatever statement."""
        run = keyed_run(delay_until=now() + HOUR)
        await stage.insert(run)
        before = await operator.stored.find(TENANCY, run.id)
        assert before is not None
        ((name, value),) = other.items()
        await stage.pool.execute(f"UPDATE mollifier.runs SET {name} = $1", value)
        after = changes.add_tags(["late"], 5)(before.row)
        assert await operator.stored.change(before, after) is None
        row = await stage.row(run)
        assert (row[name], row["tags"]) == (value, [])

    @pytest.mark.parametrize("place", ["buffered", "stored", "drained meanwhile"])
    async def test_the_first_reason_of_20_that_race_is_everyones(
        self, stage: Stage, operator: Operator, place: str
    ) -> None:
        run = new_run()
        await (stage.insert if place == "stored" else stage.accept)(run)
        asking = [
            asyncio.create_task(changed(operator, "run.cancel", run, reason=f"reason {number}"))
            for number in range(20)
        ]
        if place == "drained meanwhile":
            await stage.drain_all()
        answers = await asyncio.gather(*asking)
        await stage.drain_all()
        row = await stage.row(run)
        assert row["status"] == "CANCELED"
        assert {(one["cancel_reason"], datetime.fromisoformat(one["cancelled_at"])) for one in answers} == {
            (row["cancel_reason"], row["cancelled_at"])
        }

    @pytest.mark.parametrize("place", ["buffered", "stored"])
    async def test_tags_are_added_in_order_and_once_or_not_at_all(
        self, stage: Stage, operator: Operator, place: str
    ) -> None:
        """The limit of five is on all of them together."""
        run = new_run(tags=("z", "a"))
        await (stage.accept if place == "buffered" else stage.insert)(run)
        after = await changed(operator, "run.add_tags", run, tags=["y", "a", "b", "y", "z"])
        assert after["tags"] == ["z", "a", "y", "b"]
        for tags in (["c", "d"], ["d", "a", "c", "e"]):
            reply = await ask(operator, "run.add_tags", run, tags=tags)
            assert (code(reply), reply["error"]["status"]) == ("too_many_tags", 422)
        assert (await ask(operator, "run.retrieve", run))["run"] == after
        assert (await changed(operator, "run.add_tags", run, tags=["a", "c"]))["tags"] == [*"zaybc"]
        await stage.drain_all()
        row = await stage.row(run)
        assert (row["tags"], row["revision"]) == ([*"zaybc"], 2)

    async def test_g11_50_changes_while_the_entry_comes_and_goes(
        self, stage: Stage, make_operator: Callable[..., Operator]
    ) -> None:
        """It is taken and put back a few times, and settled in the end; three operators change it."""
        run = new_run()
        await stage.accept(run)
        operators = [make_operator(mutate_wait_ms=20_000) for _ in range(3)]
        batches = [increments(operators[number % 3], run, 1, first=number) for number in range(50)]
        asking = [
            asyncio.create_task(operators[number % 3].handle(batch)) for number, batch in enumerate(batches)
        ]
        for made in (5, 15, 30):

            async def are_made(made: int = made) -> None:
                assert len(await self._done(operators[0], run)) >= made

            await eventually(are_made)
            await stage.put_back(await stage.take())
        await stage.drain_all()
        await asyncio.gather(*asking)
        replies = [reply for operator in operators for reply in operator.replies.values()]
        assert [code(reply) for reply in replies] == ["run_details"] * 50
        metadata = json.loads((await stage.row(run))["metadata"])
        assert (metadata["n"], sorted(metadata["done"])) == (50, list(range(50)))

    async def _done(self, operator: Operator, run: Snapshot) -> list[int]:
        metadata = (await operator.runs.find(TENANCY, run.id, now())).row.run.metadata
        return [] if metadata is None else list(json.loads(metadata)["done"])

    @pytest.mark.parametrize("place", ["buffered", "stored"])
    async def test_g11_of_two_that_race_one_is_told_to_look_again(
        self, stage: Stage, operator: Operator, place: str
    ) -> None:
        run = new_run(tags=("a",))
        await (stage.accept if place == "buffered" else stage.insert)(run)

        async def another() -> None:
            await changed(operator_2, "run.add_tags", run, tags=["theirs"])

        operator_2 = Operator(stage.redis, stage.pool, operator.settings)
        if place == "buffered":
            operator.runs = Runs(operator.stored, paced(operator.buffered, "before change", another), 5)
        else:
            operator.runs = Runs(paced(operator.stored, "before change", another), operator.buffered, 5)
        mine = await changed(operator, "run.add_tags", run, tags=["mine"])
        assert mine["tags"] == ["a", "theirs", "mine"]

    async def test_g11_taken_between_reading_and_changing(self, stage: Stage, operator: Operator) -> None:
        """The drainer has read the overlay by then: a change to it would be lost."""
        run = new_run()
        await stage.accept(run)
        taken: list[Taken] = []

        async def take() -> None:
            taken.extend(await stage.take())

        async def settle() -> None:
            await stage.drain.handle(taken)

        buffered = paced(operator.buffered, "before change", take)
        operator.runs = Runs(operator.stored, paced(buffered, "after change", settle), 5)
        assert (await changed(operator, "run.add_tags", run, tags=["x"]))["is_buffered"] is False
        assert (await stage.row(run))["tags"] == ["x"]

    @pytest.mark.parametrize("is_forgotten", [False, True], ids=["in its grace time", "forgotten"])
    async def test_g10_handed_over_between_reading_and_changing(
        self, stage: Stage, operator: Operator, is_forgotten: bool
    ) -> None:
        run = new_run()
        await stage.accept(run)
        hand_over = stage.hand_over if is_forgotten else stage.drain_all
        operator.runs = Runs(operator.stored, paced(operator.buffered, "before change", hand_over), 5)
        assert (await changed(operator, "run.cancel", run))["is_buffered"] is False
        assert (await stage.row(run))["status"] == "CANCELED"
        assert (await stage.redis.keys("*env_1*") == []) is is_forgotten

    @pytest.mark.parametrize("kind", CHANGE_KINDS)
    async def test_busy_for_too_long_and_nothing_was_changed(
        self, stage: Stage, make_operator: Callable[..., Operator], kind: str
    ) -> None:
        run = keyed_run(delay_until=now() + HOUR, tags=("a",), metadata=b'{"n":1}')
        await stage.accept(run)
        taken = await stage.take()
        operator = make_operator(mutate_wait_ms=40)
        reply = await ask(operator, kind, run, **KINDS[kind])
        assert (code(reply), reply["error"]["status"], reply["error"]["retryable"]) == ("run_busy", 503, True)
        reset = await ask(operator, "idempotency_key.reset", task=TASK, idempotency_key="k")
        assert code(reset) == "run_busy"
        assert await stage.overlays() == {}
        await stage.drain.handle(taken)
        row = await stage.row(run)
        assert (row["revision"], row["tags"], row["status"], row["idempotency_key"]) == (
            0,
            ["a"],
            "DELAYED",
            "k",
        )
        assert code(await ask(operator, kind, run, **KINDS[kind])) == "run_details"

    @pytest.mark.xfail(strict=True, reason="a batch is answered when its slowest operation is done")
    async def test_a_change_that_waits_delays_nobody_else(self, stage: Stage, operator: Operator) -> None:
        drained, other = new_run(), new_run()
        await stage.accept(drained)
        taken = await stage.take()
        await stage.insert(other)
        waiting = operator.entry("run.cancel", ENV, ORG, run_id=friendly(drained.id))
        reading = operator.entry("run.retrieve", ENV, ORG, run_id=friendly(other.id))
        handling = asyncio.create_task(operator.handle([waiting, reading]))

        async def is_answered() -> None:
            assert operator.replies.keys() == {reading.id}

        try:
            await eventually(is_answered, within_s=0.3)
        finally:
            await stage.drain.handle(taken)
            await handling

    async def test_an_executor_is_quicker(self, stage: Stage, operator: Operator) -> None:
        """It starts the run, and writes its metadata, between reading and changing: both are kept."""
        run = new_run(delay_until=now() + HOUR)
        await stage.insert(run)

        async def execute() -> None:
            await stage.pool.execute(
                "UPDATE mollifier.runs SET status = 'EXECUTING', metadata = '{\"n\": 10}', "
                "metadata_version = metadata_version + 1"
            )

        operator.runs = Runs(paced(operator.stored, "before change", execute), operator.buffered, 5)
        after = await changed(operator, "run.update_metadata", run, operations=[step("increment", value=1)])
        assert (after["status"], after["metadata"], after["metadata_version"]) == ("EXECUTING", {"n": 11}, 3)
        assert code(await ask(operator, "run.reschedule", run, delay="1h")) == "run_not_delayed"

    async def test_g11_a_debounced_trigger_is_quicker(self, stage: Stage, operator: Operator) -> None:
        """A run that a trigger has pushed back is not pulled forward by a change that had read it before."""
        debounced: dict[str, Any] = {"debounce_key": "d", "idempotency_key": None}
        run = new_run(delay_until=now() + HOUR, **debounced)
        await stage.insert(run)

        async def push_back() -> None:
            await stage.insert(new_run(delay_until=now() + 2 * HOUR, **debounced))

        operator.runs = Runs(paced(operator.stored, "before change", push_back), operator.buffered, 5)
        await changed(operator, "run.add_tags", run, tags=["x"])
        row = await stage.row(run)
        assert row["tags"] == ["x"]
        assert row["delay_until"] > now() + HOUR + HOUR / 2

    async def test_a_rescheduled_run_is_not_pulled_forward_by_a_debounced_trigger(
        self, stage: Stage, operator: Operator
    ) -> None:
        until = now() + 2 * HOUR
        run = new_run(delay_until=now() + HOUR, debounce_key="d", debounce_until=until)
        await stage.insert(run)
        await changed(operator, "run.reschedule", run, delay="5h")
        await stage.insert(new_run(delay_until=now() + HOUR, debounce_key="d", debounce_until=until))
        assert (await stage.row(run))["delay_until"] > now() + 4 * HOUR

    async def test_g4_a_key_that_was_freed_stays_free(self, stage: Stage, operator: Operator) -> None:
        """A change that had read the key before does not bring it back beside its new run."""
        run = new_run(idempotency_key="k", idempotency_key_expires_at=now() - HOUR)
        await stage.insert(run)

        async def trigger() -> None:
            await stage.insert(keyed_run())

        operator.runs = Runs(paced(operator.stored, "before change", trigger), operator.buffered, 5)
        after = await changed(operator, "run.add_tags", run, tags=["x"])
        assert after["idempotency_key"] is None

    async def test_who_waits_for_a_cancelled_run_waits_no_longer(
        self, stage: Stage, operator: Operator
    ) -> None:
        stored, buffered = new_run(), new_run()
        await stage.insert(stored)
        await stage.accept(buffered)
        for run in (stored, buffered):
            await stage.pool.execute(
                "INSERT INTO mollifier.waitpoints (child_run_id, parent_run_id, environment_id) "
                "VALUES ($1, 'parent', $2)",
                run.id,
                ENV,
            )
            await changed(operator, "run.cancel", run)
        await stage.drain_all()
        waiting = await stage.pool.fetch("SELECT status FROM mollifier.waitpoints")
        assert [one["status"] for one in waiting] == ["COMPLETED", "COMPLETED"]

    async def test_g10_a_cancelled_run_that_lost_its_key(self, stage: Stage, operator: Operator) -> None:
        run = keyed_run()
        await stage.accept(run)
        assert (await changed(operator, "run.cancel", run))["status"] == "CANCELED"
        await stage.insert(keyed_run())
        await stage.drain_all()
        assert (await ask(operator, "run.retrieve", run))["run"]["status"] == "CANCELED"

    @pytest.mark.parametrize("value", ["\0", {"a": "\0"}, {"\0": 1}, [[{"a": ["b\0"]}]]])
    @pytest.mark.parametrize("name", ["operations", "parent_operations", "root_operations"])
    async def test_g12_a_change_does_not_poison_a_run(
        self, stage: Stage, operator: Operator, name: str, value: Any
    ) -> None:
        """Postgres' jsonb holds no NUL: the run would end as SYSTEM_FAILURE."""
        run = new_run()
        await stage.accept(run)
        bodies = [step("set", value=1), step("append", value=value)]
        reply = await ask(operator, "run.update_metadata", run, **{name: bodies})
        assert code(reply) == "invalid_request"
        assert reply["error"]["message"].startswith(f"{name}[1]")
        assert await stage.overlays() == {}
        await stage.drain_all()
        assert (await stage.row(run))["status"] == "QUEUED"


def increments(operator: Operator, run: Snapshot, count: int, first: int = 0) -> list[Entry]:
    """Entries of operations that each leave their number behind."""
    return [
        operator.entry(
            "run.update_metadata",
            ENV,
            ORG,
            run_id=friendly(run.id),
            operations=[step("increment", value=1), step("append", "done", value=number)],
        )
        for number in range(first, first + count)
    ]


class TestHandedOutAgain:
    """An operation whose worker died, or heard no answer, is handed out again: it is made once. G11."""

    @pytest.mark.parametrize("place", ["buffered", "stored", "materialised meanwhile"])
    @pytest.mark.parametrize(
        "count",
        [
            1,
            100,
        ],
    )
    async def test_a_batch_that_was_never_answered(
        self, stage: Stage, make_operator: Callable[..., Operator], place: str, count: int
    ) -> None:
        operator = make_operator(mutate_wait_ms=30_000)
        run = new_run()
        await (stage.insert if place == "stored" else stage.accept)(run)
        batch = increments(operator, run, count)
        operator.silent = True
        with pytest.raises(Unreachable):
            await operator.handle(batch)
        if place == "materialised meanwhile":
            await stage.hand_over()
        operator.silent = False
        await operator.handle([replace(entry, deliveries=2) for entry in batch])
        assert {code(reply) for reply in operator.replies.values()} == {"run_details"}
        shown = (await ask(operator, "run.retrieve", run))["run"]["metadata"]
        assert (shown["n"], sorted(shown["done"])) == (count, list(range(count)))

    async def test_a_change_of_which_nobody_knows_whether_it_was_made(
        self, stage: Stage, operator: Operator
    ) -> None:
        run = new_run()
        await stage.accept(run)
        (entry,) = increments(operator, run, 1)
        with silence_after(operator.scripts, "change"):
            await operator.handle([entry])
        assert operator.replies == {}, "it was answered although nobody knew"
        await operator.handle([replace(entry, deliveries=2)])
        assert operator.replies[entry.id]["run"]["metadata"] == {"n": 1, "done": [0]}

    async def test_a_change_of_a_row_of_which_nobody_knows_whether_it_was_made(
        self, stage: Stage, operator: Operator
    ) -> None:
        """Told to try again, the producer would send another operation, and both would be made."""
        run = new_run()
        await stage.insert(run)
        (entry,) = increments(operator, run, 1)
        runs = operator.runs
        operator.runs = Runs(paced(operator.stored, "after change", lose_the_answer), operator.buffered, 1)
        await operator.handle([entry])
        assert (await stage.row(run))["revision"] == 1
        assert operator.replies == {}
        operator.runs = runs
        await operator.handle([replace(entry, deliveries=2)])
        assert operator.replies[entry.id]["run"]["metadata"] == {"n": 1, "done": [0]}

    @pytest.mark.parametrize("kind", KINDS)
    async def test_the_same_answer(self, stage: Stage, operator: Operator, kind: str) -> None:
        run = keyed_run(delay_until=now() + HOUR)
        await stage.accept(run)
        entry = operator.entry(kind, ENV, ORG, run_id=friendly(run.id), **KINDS[kind])
        await operator.handle([entry])
        first = operator.replies.pop(entry.id, None)
        await operator.handle([replace(entry, deliveries=2)])
        assert operator.replies.get(entry.id) == first
        assert len({one["options"]["run_id"] for one in operator.triggered}) == (kind == "run.replay")

    @pytest.mark.parametrize("place", ["buffered", "stored", "nowhere"])
    async def test_a_reset_finds_nothing_to_do(self, stage: Stage, operator: Operator, place: str) -> None:
        """It is done, perhaps by its first attempt: nobody knows whose key it was."""
        run = keyed_run()
        if place != "nowhere":
            await (stage.accept if place == "buffered" else stage.insert)(run)
        entry = operator.entry("idempotency_key.reset", ENV, ORG, task=TASK, idempotency_key="k")
        for deliveries in (1, 2):
            await operator.handle([replace(entry, deliveries=deliveries)])
            reply = operator.replies.pop(entry.id)
            if deliveries == 1 and place == "nowhere":
                assert code(reply) == "run_not_found"
            else:
                assert reply["type"] == "idempotency_key_reset"
                assert reply["run_id"] == (run.id if deliveries == 1 else None)
        await stage.drain_all()
        assert [row["idempotency_key"] for row in await stage.rows()] == [None] * (place != "nowhere")

    @pytest.mark.parametrize("place", ["buffered", "stored", "draining"])
    @pytest.mark.parametrize("was_done", [True, False], ids=["done", "not done"])
    async def test_g4_a_reset_does_not_strip_the_next_run(
        self, stage: Stage, operator: Operator, was_done: bool, place: str
    ) -> None:
        """Nor does one that comes late: it is about those that were requested before it."""
        if was_done:
            await stage.accept(keyed_run())
        entry = operator.entry("idempotency_key.reset", ENV, ORG, task=TASK, idempotency_key="k")
        if was_done:
            await operator.handle([entry])
            assert code(operator.replies.pop(entry.id)) == "idempotency_key_reset"
            await stage.drain_all()
        second = replace(keyed_run(), created_at=now() + timedelta(milliseconds=5))
        await (stage.insert if place == "stored" else stage.accept)(second)
        taken = await stage.take() if place == "draining" else ()
        handling = asyncio.create_task(operator.handle([replace(entry, deliveries=2)]))
        if taken:
            await stage.drain.handle(taken)
        await handling
        assert operator.replies[entry.id]["run_id"] is None
        assert (await ask(operator, "run.retrieve", second))["run"]["idempotency_key"] == "k"
        if place == "buffered":
            assert await stage.redis.get(KEYS.claim(second)) == second.id.encode()


class TestAmending:
    """The row is there already, and the entry is in the buffer again: nobody heard of its commit. G2, G11."""

    @pytest.mark.parametrize("is_made", [True, False], ids=["made", "not made"])
    async def test_an_entry_that_may_be_a_row_is_not_changed_in_the_buffer(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns, is_made: bool
    ) -> None:
        """It can be read, and a change waits: where it would have to be made is not known."""
        run = new_run(tags=("a",))
        await stage.accept(run)
        taken = await stage.take()
        materialise = stage.store.materialise

        async def lossy(*arguments: Any) -> Any:
            if is_made:
                await materialise(*arguments)
            await lose_the_answer()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage.store, "materialise", lossy)
            with pytest.raises(StoreUnavailable):
                await stage.drain.handle(taken)
        operator.runs = Runs(no_store, operator.buffered, 0.05)
        assert (await ask(operator, "run.retrieve", run))["run"]["is_buffered"] is True
        for kind in CHANGE_KINDS:
            assert code(await ask(operator, kind, run, **KINDS[kind])) == "run_busy"
        operator.runs = Runs(operator.stored, operator.buffered, 0.05)
        tagging = await ask(operator, "run.add_tags", run, tags=["b"])
        assert code(tagging) == ("run_details" if is_made else "run_busy")
        await stage.drain_all()
        assert (await stage.row(run))["tags"] == (["a", "b"] if is_made else ["a"])
        later = new_run()
        await stage.accept(later)
        assert (await changed(operator, "run.cancel", later))["is_buffered"] is True

    async def write_late(self, stage: Stage, run: Snapshot) -> None:
        """A statement that was taken for failed is committed after its entry was put back."""
        await stage.accept(run)
        taken = await stage.take()
        await stage.put_back(taken)
        await stage.write(taken)

    @pytest.mark.parametrize("kind", CHANGE_KINDS)
    async def test_the_row_is_given_what_was_changed_meanwhile(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns, kind: str
    ) -> None:
        run = new_run(delay_until=now() + HOUR, tags=("a",), metadata=b'{"n":1}')
        await self.write_late(stage, run)
        operator.runs = Runs(no_store, operator.buffered, 1)
        reply = await changed(operator, kind, run, **KINDS[kind])
        assert reply["is_buffered"] is True
        operator.runs = Runs(operator.stored, operator.buffered, 1)
        await stage.drain_all()
        shown = (await ask(operator, "run.retrieve", run))["run"]
        same = [name for name in reply if name not in ("is_buffered", "materialised_at", "updated_at")]
        assert {name: shown[name] for name in same} == {name: reply[name] for name in same}
        row = await stage.row(run)
        assert (row["revision"], len(row["applied"])) == (1, 1)

    async def test_a_key_that_was_reset_meanwhile(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        """Whether a row has the key cannot be found out, so nothing is done; tried again, all of it is."""
        run = keyed_run()
        await self.write_late(stage, run)
        reset = {"task": TASK, "idempotency_key": "k"}
        stored, operator.stored = operator.stored, no_store
        operator.runs = Runs(no_store, operator.buffered, 1)
        assert code(await ask(operator, "idempotency_key.reset", **reset)) == "store_unavailable"
        assert await stage.overlays() == {}
        operator.stored, operator.runs = stored, Runs(stored, operator.buffered, 1)
        assert code(await ask(operator, "idempotency_key.reset", **reset)) == "idempotency_key_reset"
        second = keyed_run()
        await stage.accept(second)
        await stage.drain_all()
        keys = {row["id"]: row["idempotency_key"] for row in await stage.rows()}
        assert keys == {run.id: None, second.id: "k"}

    async def test_a_key_that_was_taken_off_in_the_buffer_meanwhile(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        run = keyed_run()
        await self.write_late(stage, run)
        await Runs(no_store, operator.buffered, 1).change(TENANCY, run.id, changes.reset_key, now())
        assert (await stage.row(run))["idempotency_key"] == "k"
        await stage.drain_all()
        assert (await stage.row(run))["idempotency_key"] is None

    async def test_what_was_changed_on_the_row_stays(self, stage: Stage, operator: Operator) -> None:
        run = new_run()
        await self.write_late(stage, run)
        assert (await changed(operator, "run.add_tags", run, tags=["x"]))["is_buffered"] is False
        await stage.drain_all()
        assert (await stage.row(run))["tags"] == ["x"]

    @pytest.mark.parametrize("kind", CHANGE_KINDS)
    async def test_g11_what_was_changed_on_the_row_and_then_in_the_buffer(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns, kind: str
    ) -> None:
        """Found in Postgres first, and in the buffer while Postgres was away: both changes are kept."""
        run = new_run(delay_until=now() + HOUR, tags=("a",), metadata=b'{"n":1}')
        await self.write_late(stage, run)
        for tag in ("x", "y"):
            assert (await changed(operator, "run.add_tags", run, tags=[tag]))["is_buffered"] is False
        setting = [{"type": "set", "key": "row", "value": 1}]
        await changed(operator, "run.update_metadata", run, operations=setting)
        operator.runs = Runs(no_store, operator.buffered, 1)
        in_buffer = await changed(operator, kind, run, **KINDS[kind])
        assert in_buffer["is_buffered"] is True
        operator.runs = Runs(operator.stored, operator.buffered, 1)
        await stage.drain_all()
        shown = (await ask(operator, "run.retrieve", run))["run"]
        assert shown["tags"][:3] == ["a", "x", "y"]
        assert set(in_buffer["tags"]) <= set(shown["tags"])
        assert shown["metadata"] == {"row": 1, **in_buffer["metadata"]}
        same = ("status", "delay_until", "cancelled_at", "cancel_reason")
        assert {name: shown[name] for name in same} == {name: in_buffer[name] for name in same}

    async def test_g11_what_was_changed_apart_is_brought_together_once(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        run = new_run()
        await self.write_late(stage, run)
        await changed(operator, "run.add_tags", run, tags=["x"])
        operator.runs = Runs(no_store, operator.buffered, 1)
        await changed(operator, "run.add_tags", run, tags=["y"])
        await stage.put_back(taken := await stage.take())
        await stage.write(taken)
        first = await stage.row(run)
        await stage.drain_all()
        assert await stage.row(run) == first
        assert (first["tags"], first["revision"], len(first["applied"])) == (["x", "y"], 2, 2)

    async def test_a_run_that_has_started_is_left_alone(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        run = new_run()
        await self.write_late(stage, run)
        operator.runs = Runs(no_store, operator.buffered, 1)
        await changed(operator, "run.add_tags", run, tags=["x"])
        await stage.pool.execute("UPDATE mollifier.runs SET status = 'EXECUTING'")
        await stage.drain_all()
        assert (await stage.row(run))["status"] == "EXECUTING"


class TestUpdateMetadata:
    @pytest.mark.parametrize(
        ("metadata", "expected"),
        [
            (b'{"a":"' + b"x" * 192 + b'"}', None),
            (b'{"a":"' + b"x" * 193 + b'"}', "metadata_too_large"),
            (b'{"a":"' + "\u00e9".encode() * 97 + b'"}', "metadata_too_large"),
            (b"{}" + b" " * 199, None),
            (b"[]", "invalid_request"),
            (b"null", "invalid_request"),
            (b'"{}"', "invalid_request"),
            (b'{"a":"\\u0000"}', "invalid_request"),
            (b'{"a":"\\\\u0000"}', None),
            (b'{"a":' + b"[" * 90 + b"]" * 90 + b"}", None),
        ],
        ids=lambda value: value[:20].decode(errors="replace") if isinstance(value, bytes) else str(value),
    )
    async def test_what_a_trigger_may_have_it_may_be_given(
        self, stage: Stage, operator: Operator, metadata: bytes, expected: str | None
    ) -> None:
        """The limits are those of triggers, to the byte."""
        trigger = json.dumps(builders.body(options={"metadata": "here"})).encode()
        try:
            taken: str | None = None
            accepted(operator, trigger.replace(b'"here"', metadata))
        except RequestError as error:
            taken = error.code
        run = new_run(metadata=b'{"before":1}')
        await stage.accept(run)
        entry = operator.entry("run.update_metadata", ENV, ORG, run_id=friendly(run.id), metadata="here")
        body = entry.fields[b"body"].replace(b'"here"', metadata)
        await operator.handle([replace(entry, fields={**entry.fields, b"body": body})])
        reply = operator.replies[entry.id]
        assert (taken, code(reply)) == (expected, expected or "run_details")
        await stage.drain_all()
        row = await stage.row(run)
        assert json.loads(row["metadata"]) == ({"before": 1} if expected else json.loads(metadata))

    async def test_without_either_is_refused_by_name(self, stage: Stage, operator: Operator) -> None:
        run = new_run()
        await stage.accept(run)
        reply = await ask(operator, "run.update_metadata", run)
        assert (code(reply), reply["error"]["message"][:9]) == ("invalid_request", "metadata:")

    @pytest.mark.parametrize("operations", [[], [step("set", "b", value=2)]])
    async def test_operations_win_even_if_there_are_none(
        self, stage: Stage, operator: Operator, operations: Any
    ) -> None:
        run = new_run(metadata=b'{"a":1}')
        await stage.accept(run)
        after = await changed(
            operator, "run.update_metadata", run, metadata={"loses": 1}, operations=operations
        )
        assert after["metadata"] == {"a": 1, **({"b": 2} if operations else {})}
        assert after["metadata_version"] == 1 + len(operations)

    @pytest.mark.parametrize(
        ("fields", "names"),
        [
            ({"metadata": [1]}, "metadata"),
            ({"metadata": None}, "metadata"),
            ({"metadata": {"a": "\0"}}, "metadata"),
            ({"operations": [step("set", "$.", value=1)]}, "operations[0].key"),
            ({"operations": [step("set", "", value=1)]}, "operations[0].key"),
            ({"operations": [step("nope", value=1)]}, "operations[0].type"),
            ({"operations": [{"type": "set", "key": "a"}]}, "operations[0].value"),
            ({"operations": [step("increment", value="1")]}, "operations[0].value"),
            ({"operations": [step("set", value=1, extra=2)]}, "operations[0].extra"),
            ({"operations": [{"type": "update", "value": [1]}]}, "operations[0].value"),
            ({"operations": [step("set", value=1)] * 1001}, "operations"),
            ({"operations": [], "parent_operations": [step("nope")]}, "parent_operations[0].type"),
        ],
    )
    async def test_a_mistake_is_named_and_nothing_written(
        self, stage: Stage, operator: Operator, fields: Any, names: str
    ) -> None:
        run = new_run()
        await stage.accept(run)
        reply = await ask(operator, "run.update_metadata", run, **fields)
        assert code(reply) == "invalid_request"
        assert reply["error"]["message"].startswith(f"{names}: ")
        assert await stage.overlays() == {}

    @pytest.mark.parametrize("place", ["buffered", "stored"])
    @pytest.mark.parametrize(
        "fields",
        [
            {"metadata": {"a": "x" * 200}},
            {"operations": [step("set", "a", value="x" * 200)]},
            {"operations": [{"type": "update", "value": {"a": "x" * 200}}]},
        ],
    )
    async def test_the_limit_is_looked_at_before_anything_is_written(
        self, stage: Stage, operator: Operator, place: str, fields: Any
    ) -> None:
        """Also before the parent's are: all of it, or nothing."""
        parent = new_run()
        run = new_run(parent_run_id=parent.id, root_run_id=parent.id, depth=1)
        await (stage.accept if place == "buffered" else stage.insert)(parent, run)
        others = {"parent_operations": [step("set", value=1)], "root_operations": [step("set", value=1)]}
        reply = await ask(operator, "run.update_metadata", run, **fields, **others)
        assert code(reply) == "metadata_too_large"
        await stage.drain_all()
        assert {(row["metadata"], row["revision"]) for row in await stage.rows()} == {(None, 0)}

    @pytest.mark.parametrize("place", ["buffered", "stored", "draining"])
    async def test_parent_and_root(self, stage: Stage, operator: Operator, place: str) -> None:
        root = new_run()
        parent = new_run(parent_run_id=root.id, root_run_id=root.id, depth=1)
        run = new_run(parent_run_id=parent.id, root_run_id=root.id, depth=2)
        await stage.insert(root)
        await (stage.insert if place == "stored" else stage.accept)(parent)
        taken = await stage.take() if place == "draining" else None
        await stage.accept(run)
        asking = asyncio.create_task(
            changed(
                operator,
                "run.update_metadata",
                run,
                operations=[step("set", value="own")],
                parent_operations=[step("append", value=1), step("append", value=2)],
                root_operations=[step("increment", value=3)],
            )
        )
        if taken:
            await eventually(lambda: self._has_changed(stage))
            await stage.drain.handle(taken)
        assert (await asking)["metadata"] == {"n": "own"}
        await stage.drain_all()
        found = {row["id"]: json.loads(row["metadata"]) for row in await stage.rows()}
        assert found == {run.id: {"n": "own"}, parent.id: {"n": [1, 2]}, root.id: {"n": 3}}

    async def _has_changed(self, stage: Stage) -> None:
        assert await stage.overlays() != {}

    @pytest.mark.parametrize("place", ["buffered", "stored"])
    async def test_a_run_without_a_parent_is_its_own(
        self, stage: Stage, operator: Operator, place: str
    ) -> None:
        run = new_run(metadata=b'{"n":1}')
        await (stage.accept if place == "buffered" else stage.insert)(run)
        others = {name: [step("increment", value=1)] for name in ("parent_operations", "root_operations")}
        after = await changed(operator, "run.update_metadata", run, **others)
        assert (after["metadata"], after["metadata_version"]) == ({"n": 3}, 3)

    @pytest.mark.parametrize("fate", ["gone", "finished", "too large"])
    async def test_what_is_impossible_on_the_parent_is_left_out(
        self, stage: Stage, operator: Operator, fate: str
    ) -> None:
        parent = new_run()
        if fate != "gone":
            await stage.insert(parent)
        if fate == "finished":
            await changed(operator, "run.cancel", parent)
        run = new_run(parent_run_id=parent.id, root_run_id=parent.id, depth=1)
        await stage.accept(run)
        value = "x" * 200 if fate == "too large" else 1
        after = await changed(
            operator,
            "run.update_metadata",
            run,
            metadata={"n": 1},
            parent_operations=[step("set", value=value)],
        )
        assert after["metadata"] == {"n": 1}
        if fate != "gone":
            assert (await stage.row(parent))["metadata"] is None

    async def test_a_parent_that_cannot_be_reached_gets_its_change_later(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        """The operation is not answered, and comes again; its own change is made once all the same."""
        parent = new_run()
        await stage.insert(parent)
        run = new_run(parent_run_id=parent.id, root_run_id=parent.id, depth=1)
        await stage.accept(run)
        both = {name: [step("increment", value=1)] for name in ("operations", "parent_operations")}
        entry = operator.entry("run.update_metadata", ENV, ORG, run_id=friendly(run.id), **both)
        runs, operator.runs = operator.runs, Runs(no_store, operator.buffered, 0.1)
        for deliveries in (1, 2):
            await operator.handle([replace(entry, deliveries=deliveries)])
            assert operator.replies == {}
        operator.runs = runs
        await operator.handle([replace(entry, deliveries=3)])
        assert operator.replies[entry.id]["run"]["metadata"] == {"n": 1}
        assert json.loads((await stage.row(parent))["metadata"]) == {"n": 1}


OWN: dict[str, Any] = {
    "task": "other-task",
    "environment_type": "STAGING",
    "payload": b'{ "kept":  [1.0, "\\u00e9"] }',
    "payload_type": "application/x",
    "metadata": b'{"m":1}',
    "tags": ("a", "b"),
    "ttl_seconds": 7200,
    "queue": "q",
    "concurrency_key": "c",
    "worker_queue": "w",
    "machine": "m",
    "priority": 7,
    "max_attempts": 2,
    "max_duration": 60,
    "locked_to_version": "v",
    "is_test": True,
}
NOT_COPIED: dict[str, Any] = {
    "idempotency_key": "k",
    "idempotency_key_options": b'{"key":"k","scope":"run"}',
    "parent_run_id": "p",
    "root_run_id": "r",
    "depth": 2,
    "batch_id": "b",
    "batch_index": 1,
    "replayed_from_run_id": "before",
}


class TestReplay:
    """What is put before the front door; that it becomes a run is in `test_operations.py`."""

    @pytest.mark.parametrize("place", ["buffered", "stored", "buffered, cancelled", "stored, cancelled"])
    async def test_the_request_of_a_run(self, stage: Stage, operator: Operator, place: str) -> None:
        """Everything that is the run's own, byte for byte; nothing that only this one may have."""
        later = now() + 2 * HOUR
        run = new_run(**OWN, **NOT_COPIED, expires_at=later, idempotency_key_expires_at=later)
        await (stage.accept if place.startswith("buffered") else stage.insert)(run)
        if place.endswith("cancelled"):
            await changed(operator, "run.cancel", run)
        before = await ask(operator, "run.retrieve", run)
        sent: list[tuple[bytes, str | None, str | None]] = []

        async def trigger(*arguments: Any) -> None:
            sent.append(arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator, "trigger", trigger)
            assert code(await ask(operator, "run.replay", run)) == "triggered"
        ((body, reply_to, correlation_id),) = sent
        assert (reply_to, correlation_id) == ("mollifier:reply:test", None)
        assert OWN["payload"] in body
        asked = json.loads(body)
        assert asked["options"].pop("run_id").startswith("run_replay")
        assert asked.pop("environment") == {
            "id": ENV,
            "organization_id": ORG,
            "project_id": "proj_1",
            "type": "STAGING",
            "feature_flags": {"mollifier_enabled": None},
        }
        asked["options"] = {
            name: value for name, value in asked["options"].items() if value not in (None, False)
        }
        assert {name: value for name, value in asked.items() if value is not None} == {
            "task": "other-task",
            "payload": json.loads(OWN["payload"]),
            "payload_type": "application/x",
            "options": {
                "ttl": 7200,
                "queue": "q",
                "concurrency_key": "c",
                "worker_queue": "w",
                "machine": "m",
                "priority": 7,
                "max_attempts": 2,
                "max_duration": 60,
                "lock_to_version": "v",
                "test": True,
                "tags": ["a", "b"],
                "metadata": {"m": 1},
                "replayed_from_run_id": friendly(run.id),
            },
        }
        assert await ask(operator, "run.retrieve", run) == before

    @pytest.mark.parametrize("payload", [{"another": 1}, None, "text"])
    async def test_with_another_payload(self, stage: Stage, operator: Operator, payload: Any) -> None:
        run = new_run()
        await stage.accept(run)
        await ask(operator, "run.replay", run, payload=payload)
        assert operator.triggered[0]["payload"] == payload

    async def test_what_was_within_the_limits_is_so_again(self, stage: Stage, operator: Operator) -> None:
        """Although jsonb's text of it is longer than what was accepted."""
        metadata = b'{"a":[' + b",".join([b"1"] * 92) + b'],"bcd":2}'
        assert len(metadata) == operator.settings.max_metadata_bytes - 1
        run = new_run(metadata=metadata, tags=tuple("abcde"))
        await stage.insert(run)
        sent: list[bytes] = []

        async def trigger(body: bytes, *_: Any) -> None:
            sent.append(body)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator, "trigger", trigger)
            await ask(operator, "run.replay", run)
        assert accepted(operator, sent[0]).metadata == metadata


def accepted(operator: Operator, body: bytes) -> Snapshot:
    """The run that the front door makes of a request; RequestError when it refuses it."""
    return build_run(Entry("1-1", {}), decode_trigger(body, 1_000_000), operator.settings)


class TestResetKey:
    async def reset(self, operator: Operator, task: str = TASK, key: str = "k") -> Reply:
        return await ask(operator, "idempotency_key.reset", task=task, idempotency_key=key)

    @pytest.mark.parametrize("place", ["buffered", "stored", "draining, settled", "draining, put back"])
    async def test_g4_then_one_new_run_has_it(self, stage: Stage, operator: Operator, place: str) -> None:
        """And the old one becomes a row without it, whichever of them is first."""
        run = keyed_run()
        await (stage.insert if place == "stored" else stage.accept)(run)
        taken = await stage.take() if place.startswith("draining") else ()
        asking = asyncio.create_task(self.reset(operator))
        if taken:
            looked = asyncio.Event()
            find = operator.buffered.find

            async def seen(*arguments: Any) -> Any:
                looked.set()
                return await find(*arguments)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(operator.buffered, "find", seen)
                await asyncio.wait_for(looked.wait(), 5)
                assert not asking.done()
                await (stage.put_back(taken) if place.endswith("put back") else stage.drain.handle(taken))
                reply = await asking
        else:
            reply = await asking
        assert reply == {
            "type": "idempotency_key_reset",
            "correlation_id": None,
            "task": TASK,
            "idempotency_key": "k",
            "run_id": run.id,
        }
        assert code(await self.reset(operator)) == "run_not_found"
        assert await stage.redis.get(KEYS.claim(run)) is None
        second = keyed_run()
        await stage.accept(second)
        third = replace(keyed_run(), buffered_at=now())
        (answer,) = await stage.buffer.accept([third], [None])
        assert getattr(answer, "run_id", None) == second.id
        await stage.drain_all()
        keys = {row["id"]: row["idempotency_key"] for row in await stage.rows()}
        assert keys == {run.id: None, second.id: "k"}

    async def test_only_the_very_key_of_the_very_task(self, stage: Stage, operator: Operator) -> None:
        buffered, stored = keyed_run(task="one"), keyed_run(task="two")
        await stage.accept(buffered)
        await stage.insert(stored)
        for task, key in (("one", "K"), ("one", "k "), ("two", "kk"), ("three", "k")):
            assert code(await self.reset(operator, task, key)) == "run_not_found"
        for run in (buffered, stored):
            assert (await ask(operator, "run.retrieve", run))["run"]["idempotency_key"] == "k"

    @pytest.mark.parametrize("place", ["buffered", "stored", "draining"])
    async def test_g7_not_that_of_another_organization(
        self, stage: Stage, operator: Operator, place: str
    ) -> None:
        """Although it names the same environment, task and key."""
        run = keyed_run(organization_id="org_2")
        await (stage.insert if place == "stored" else stage.accept)(run)
        taken = await stage.take() if place == "draining" else ()
        claim = await stage.redis.get(KEYS.claim(run))
        assert code(await self.reset(operator)) == "run_not_found"
        assert await stage.redis.get(KEYS.claim(run)) == claim
        await (stage.drain.handle(taken) if taken else stage.drain_all())
        assert (await stage.row(run))["idempotency_key"] == "k"

    async def test_what_could_not_be_looked_for_is_not_called_missing(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        away = Operator(connect("redis://127.0.0.1:1/0"), stage.pool, operator.settings)
        assert code(await self.reset(away)) == "buffer_unavailable"
        operator.runs = Runs(no_store, operator.buffered, 0.2)
        operator.stored = no_store
        assert code(await self.reset(operator)) == "store_unavailable"

    @pytest.mark.parametrize("place", ["buffered", "stored"])
    async def test_g4_triggered_again_in_the_middle(
        self, stage: Stage, operator: Operator, place: str
    ) -> None:
        """Whoever comes by the key once the first has lost it keeps it, wherever it is."""
        first, second = keyed_run(), keyed_run()
        await (stage.accept if place == "buffered" else stage.insert)(first)

        async def trigger() -> None:
            await (stage.insert if place == "buffered" else stage.accept)(second)

        buffered = paced(operator.buffered, "after change", trigger)
        operator.runs = Runs(operator.stored, buffered if place == "buffered" else operator.buffered, 5)
        if place == "stored":
            operator.stored = paced(operator.stored, "after reset_key", trigger)
        reply = await self.reset(operator)
        assert (code(reply), reply["run_id"]) == ("idempotency_key_reset", first.id)
        await stage.drain_all()
        keys = {row["id"]: row["idempotency_key"] for row in await stage.rows()}
        assert keys == {first.id: None, second.id: "k"}

    @pytest.mark.parametrize("is_forgotten", [False, True], ids=["in its grace time", "forgotten"])
    @pytest.mark.parametrize("moment", ["before reset_key", "after reset_key"])
    async def test_g4_handed_over_in_the_middle(
        self, stage: Stage, operator: Operator, moment: str, is_forgotten: bool
    ) -> None:
        """It is a row before or after the row is looked for; either way it loses its key."""
        run = keyed_run()
        await stage.accept(run)
        hand_over = stage.hand_over if is_forgotten else stage.drain_all
        operator.stored = paced(operator.stored, moment, hand_over)
        reply = await self.reset(operator)
        assert (code(reply), reply["run_id"]) == ("idempotency_key_reset", run.id)
        assert (await stage.row(run))["idempotency_key"] is None
        assert await stage.redis.get(KEYS.claim(run)) is None

    async def test_g4_a_row_and_a_buffered_run_with_one_key(self, stage: Stage, operator: Operator) -> None:
        """As when claims were out of reach: both lose it, so that the next trigger makes a new run."""
        stored, buffered = keyed_run(), keyed_run()
        await stage.insert(stored)
        await stage.accept(buffered)
        assert code(await self.reset(operator)) == "idempotency_key_reset"
        assert code(await self.reset(operator)) == "run_not_found"
        await stage.drain_all()
        assert [row["idempotency_key"] for row in await stage.rows()] == [None, None]

    async def test_tried_again_after_an_outage(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns
    ) -> None:
        run = keyed_run()
        await stage.accept(run)
        stored, operator.stored = operator.stored, no_store
        operator.runs = Runs(no_store, operator.buffered, 0.2)
        assert code(await self.reset(operator)) == "store_unavailable"
        operator.stored, operator.runs = stored, Runs(stored, operator.buffered, 0.2)
        reply = await self.reset(operator)
        assert (code(reply), reply["run_id"]) == ("idempotency_key_reset", run.id)
        assert (await ask(operator, "run.retrieve", run))["run"]["idempotency_key"] is None


filters = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["QUEUED", "DELAYED", "CANCELED", "FAILED"]),
        "task": st.sampled_from(["t0", "t1"]),
        "tag": st.sampled_from(["a", "b"]),
        "since": st.integers(0, 6),
        "until": st.integers(0, 6),
    },
)
listed_runs = st.lists(
    st.fixed_dictionaries(
        {
            "minutes": st.integers(0, 5),
            "place": st.sampled_from(["stored", "buffered", "materialised"]),
            "task": st.sampled_from(["t0", "t1"]),
            "tags": st.sampled_from([(), ("a",), ("b",), ("a", "b")]),
            "is_delayed": st.booleans(),
            "is_cancelled": st.booleans(),
            "is_mine": st.sampled_from([True, True, True, False]),
        }
    ),
    min_size=3,
    max_size=16,
)


class TestListing:
    @given(listed=listed_runs, wanted=filters, limit=st.integers(1, 5))
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    async def test_pages_against_a_model(
        self,
        stage: Stage,
        operator: Operator,
        listed: list[dict[str, Any]],
        wanted: dict[str, Any],
        limit: int,
    ) -> None:
        """Whatever is where, and in whatever order it was accepted: no gap, no repetition."""
        await stage.redis.flushall()
        await stage.pool.execute("TRUNCATE mollifier.runs")
        start = now() - HOUR

        def at(minutes: int) -> datetime:
            return start + timedelta(minutes=minutes)

        runs = [
            new_run(
                organization_id=ORG if one["is_mine"] else "org_2",
                created_at=at(one["minutes"]),
                task=one["task"],
                tags=one["tags"],
                delay_until=now() + HOUR if one["is_delayed"] else None,
            )
            for one in listed
        ]
        for place in ("materialised", "stored", "buffered"):
            for run, one in zip(runs, listed, strict=True):
                if one["place"] == place:
                    await (stage.insert if place == "stored" else stage.accept)(run)
                    if one["is_cancelled"]:
                        await operator("run.cancel", ENV, run.organization_id, run_id=friendly(run.id))
            if place == "materialised":
                await stage.drain_all()
        expected = [
            run.id
            for run, one in sorted(
                zip(runs, listed, strict=True),
                key=lambda pair: (pair[0].created_at, pair[0].id),
                reverse=True,
            )
            if one["is_mine"]
            and wanted.get("status", _status(one)) == _status(one)
            and wanted.get("task", run.task) == run.task
            and wanted.get("tag", "a") in (run.tags if "tag" in wanted else "a")
            and one["minutes"] >= wanted.get("since", 0)
            and one["minutes"] < wanted.get("until", 99)
        ]
        asked = wanted | {name: at(wanted[name]).isoformat() for name in ("since", "until") if name in wanted}
        pages = [page async for page in self.walk(operator, limit=limit, **asked)]
        assert [run["id"] for page in pages for run in page["runs"]] == expected
        assert [len(page["runs"]) for page in pages[:-1]] == [limit] * (len(pages) - 1)
        assert len(pages) == max(1, -(-len(expected) // limit))

    async def walk(self, operator: Operator, **asked: Any) -> AsyncIterator[Reply]:
        """All pages of a list."""
        cursor: dict[str, str] = {}
        while True:
            page = await ask(operator, "run.list", **asked, **cursor)
            assert page["type"] == "run_list", page
            yield page
            if page["next_cursor"] is None:
                return
            assert page["next_cursor"] != cursor.get("cursor"), "it comes no further"
            cursor = {"cursor": page["next_cursor"]}

    async def test_a_run_is_listed_as_it_is_retrieved(self, stage: Stage, operator: Operator) -> None:
        stored, buffered = keyed_run(tags=("a",)), new_run(metadata=b'{"n":1}')
        await stage.insert(stored)
        await stage.accept(buffered)
        await changed(operator, "run.cancel", buffered, reason="r")
        page = await ask(operator, "run.list")
        assert page["runs"] == [
            (await ask(operator, "run.retrieve", run))["run"] for run in (buffered, stored)
        ]
        assert page["next_cursor"] is None

    @pytest.mark.parametrize("place", ["stored", "buffered"])
    async def test_from_since_on_and_before_until(self, stage: Stage, operator: Operator, place: str) -> None:
        minutes = [now() - HOUR + timedelta(minutes=number) for number in range(4)]
        runs = [new_run(created_at=minute) for minute in minutes]
        await (stage.insert if place == "stored" else stage.accept)(*runs)
        page = await ask(operator, "run.list", since=minutes[1].isoformat(), until=minutes[3].isoformat())
        assert [run["id"] for run in page["runs"]] == [runs[2].id, runs[1].id]

    async def test_20_runs_where_nothing_else_is_asked_for(self, stage: Stage, operator: Operator) -> None:
        await stage.accept(*(new_run() for _ in range(21)))
        page = await ask(operator, "run.list")
        assert (len(page["runs"]), page["next_cursor"] is None) == (20, False)

    async def test_the_newest_request_was_accepted_first(self, stage: Stage, operator: Operator) -> None:
        """A thousand older ones were accepted after it: it is first all the same."""
        newest = new_run()
        await stage.accept(newest)
        day = now() - 24 * HOUR
        await stage.accept(*(new_run(created_at=day + timedelta(seconds=n)) for n in range(1200)))
        page = await ask(operator, "run.list", limit=2)
        assert page["runs"][0]["id"] == newest.id
        assert page["runs"][1]["created_at"].startswith((day + timedelta(seconds=1199)).isoformat()[:19])

    async def test_no_more_is_read_than_needed(self, stage: Stage, operator: Operator) -> None:
        """Of 5,000 entries accepted in order, the last page's worth."""
        for _ in range(10):
            await stage.accept(*(new_run() for _ in range(500)))
        read: list[int] = []
        demand = operator.scripts.demand

        async def counting(calls: Sequence[Call]) -> list[Any]:
            answers = await demand(calls)
            read.extend(len(answers[0]) for call in calls if call.name == "XREVRANGE")
            return answers

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator.scripts, "demand", counting)
            page = await ask(operator, "run.list", limit=100)
        assert len(page["runs"]) == 100
        assert sum(read) <= 1_500

    @pytest.mark.parametrize("moment", ["HGET", "XREVRANGE", "HMGET"])
    async def test_g2_handed_over_while_it_is_listed(
        self, stage: Stage, operator: Operator, moment: str
    ) -> None:
        """After any of the looks at Redis everything becomes a row, and Redis forgets it."""
        runs = [new_run() for _ in range(7)]
        await stage.accept(*runs)
        demand = operator.scripts.demand
        moments: list[str] = []

        async def interrupted(calls: Sequence[Call]) -> list[Any]:
            answers = await demand(calls)
            if calls[0].name == moment and not moments:
                moments.append(moment)
                await stage.hand_over()
            return answers

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator.scripts, "demand", interrupted)
            page = await ask(operator, "run.list")
        assert moments == [moment]
        assert [run["id"] for run in page["runs"]] == [run.id for run in reversed(runs)]

    async def test_each_run_once_while_it_is_drained(self, stage: Stage, operator: Operator) -> None:
        runs = [new_run() for _ in range(300)]
        await stage.accept(*runs)
        drained = 0

        async def drain() -> None:
            nonlocal drained
            while drained < len(runs):
                stage.turns.schedule.stir()
                taken = await stage.turns.take(7)
                drained += await stage.drain.handle(taken) if taken else 0
                await stage.turns.forget()

        draining = asyncio.create_task(drain())
        walks = 0
        while not draining.done() or not walks:
            ids = [run["id"] async for page in self.walk(operator, limit=17) for run in page["runs"]]
            assert ids == [run.id for run in reversed(runs)]
            walks += 1
        await draining

    @pytest.mark.parametrize(
        ("asked", "names"),
        [
            ({"limit": 0}, "limit"),
            ({"limit": 101}, "limit"),
            ({"limit": "5"}, "limit"),
            ({"limit": 1.5}, "limit"),
            ({"cursor": ""}, "cursor"),
            ({"cursor": "x" * 513}, "cursor"),
            ({"cursor": "!"}, "cursor"),
            ({"cursor": "Y3Vyc29y"}, "cursor"),
            ({"cursor": "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk6YQ"}, "cursor"),
            ({"cursor": "gICA"}, "cursor"),
            ({"cursor": "MToA"}, "cursor"),
            ({"cursor": "é"}, "cursor"),
            ({"cursor": 7}, "cursor"),
            ({"status": "LOST"}, "status"),
            ({"task": ""}, "task"),
            ({"tag": "x" * 257}, "tag"),
            ({"since": "yesterday"}, "since"),
            ({"until": "2030-01-01T00:00:00"}, "until"),
            ({"since": "0001-01-01T00:00:00+23:59"}, "since"),
            ({"until": "9999-12-31T23:59:59-23:59"}, "until"),
            ({"order": "oldest"}, "order"),
        ],
    )
    async def test_a_mistake_is_named(self, operator: Operator, asked: Any, names: str) -> None:
        reply = await ask(operator, "run.list", **asked)
        assert code(reply) == "invalid_request", reply
        assert reply["error"]["message"].startswith(f"{names}: ")

    @pytest.mark.parametrize(
        "asked",
        [
            {"since": "0001-01-01T00:00:00Z"},
            {"until": "9999-12-31T23:59:59Z"},
            {"limit": 100},
            {"cursor": "LTE6YQ"},
        ],
    )
    async def test_what_is_at_the_edge(self, stage: Stage, operator: Operator, asked: Any) -> None:
        await stage.accept(new_run())
        assert code(await ask(operator, "run.list", **asked)) == "run_list"

    async def test_without_one_of_the_stores_there_is_no_list(
        self, stage: Stage, operator: Operator, no_store: PostgresStoredRuns, no_buffer: RedisBufferedRuns
    ) -> None:
        """Half a list would look like a whole one."""
        await stage.accept(new_run())
        stored, operator.stored = operator.stored, no_store
        assert code(await ask(operator, "run.list")) == "store_unavailable"
        operator.stored, operator.buffered = stored, no_buffer
        await operator.handle([operator.entry("run.list", ENV, ORG)])
        assert [code(reply) for reply in operator.replies.values()] == ["store_unavailable"]


def _status(one: dict[str, Any]) -> str:
    if one["is_cancelled"]:
        return "CANCELED"
    return "DELAYED" if one["is_delayed"] else "QUEUED"

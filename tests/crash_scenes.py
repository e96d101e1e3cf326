"""What processes do when one of them is killed: a mix of requests, operations, buffered runs, leftovers.

Each scene plays in a namespace of its own: a process is killed at a point, another of its kind takes over,
and the scene asserts what has to be so then. It returns the seconds that the other took, its start included.
"""

import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg

from app import changes
from app.batch import Answer
from app.buffer import RedisBuffer
from app.buffered_runs import RedisBufferedRuns
from app.census import RedisCensus
from app.drain import Drain
from app.keys import Keys, tenant
from app.leftovers import PostgresRows, RedisLeftovers
from app.redis_client import Scripts
from app.replies import RedisDesk
from app.run_ids import derive, friendly
from app.runs import Runs, Tenancy
from app.settings import Settings
from app.store import PostgresStore
from app.stored_runs import PostgresStoredRuns
from app.sweep import Sweep
from app.telemetry import Telemetry
from app.turns import RedisTurns
from schemas.snapshot import Snapshot, encode_snapshot
from tests import waiting
from tests.adapters import Pool
from tests.builders import run
from tests.crash_points import Crash
from tests.crashing import Child, Nursery
from tests.producer import Producer, Reply, new_environment, operation, producing, request
from tests.test_drain import ids, keyed, new_runs

TTL_MS = 1000

LEAVING = ("leave-group", "let-lease-go")
"""Points that a process comes to when it is told to leave."""

# The first try to write a row of the task `once` costs its connection.
STUMBLING = """
CREATE FUNCTION public.stumble() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval(format('public.%I', 'tries_' || NEW.environment_id)::regclass) = 1 THEN
        PERFORM pg_terminate_backend(pg_backend_pid());
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER stumble BEFORE INSERT ON mollifier.runs
    FOR EACH ROW WHEN (NEW.task = 'once') EXECUTE FUNCTION public.stumble();
"""


@dataclass(frozen=True)
class Scene:
    """A namespace: who plays in it, and what there is to look at."""

    nursery: Nursery
    producer: Producer
    redis: Any
    pool: Pool
    settings: Settings
    children: list[Child]

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, nursery: Nursery, redis: Any, redis_url: str, pool: Pool, **settings: object
    ) -> AsyncIterator["Scene"]:
        """A new namespace; its processes are killed when the block ends."""
        namespace = new_environment("crash")
        config = Settings.model_validate({"namespace": namespace, **settings})
        async with producing(redis_url, namespace) as producer:
            scene = cls(nursery, producer, redis, pool, config, [])
            try:
                yield scene
            except Exception as error:
                for child in scene.children:
                    error.add_note(f"--- {child.pid}, {child.crash or 'not to be killed'}\n{child.log()}")
                raise
            finally:
                for child in scene.children:
                    child.kill()

    @property
    def keys(self) -> Keys:
        return Keys(self.settings.namespace, self.settings.partitions)

    @property
    def scripts(self) -> Scripts:
        return Scripts(self.redis)

    @property
    def buffer(self) -> RedisBuffer:
        return RedisBuffer(self.scripts, self.keys, self.settings)

    @property
    def store(self) -> PostgresStore:
        return PostgresStore(self.pool, self.settings)

    @property
    def runs(self) -> Runs:
        stored = PostgresStoredRuns(self.pool, self.settings)
        return Runs(stored, RedisBufferedRuns(self.scripts, self.keys), 10)

    def start(self, line: str, crash: Crash | None = None) -> Child:
        """A process of the scene."""
        child = self.nursery.start(
            line, crash, **self.settings.model_dump(include=self.settings.model_fields_set)
        )
        self.children.append(child)
        return child

    async def accept(self, runs: Sequence[Snapshot]) -> None:
        """Buffer runs, in one call."""
        answers = await self.buffer.accept(runs, [None] * len(runs))
        assert all(isinstance(answer, Answer) for answer in answers), answers

    async def insert(self, runs: Sequence[Snapshot]) -> None:
        """Have runs as rows."""
        answers = await self.store.insert(runs, datetime.now(UTC))
        assert all(isinstance(answer, Answer) for answer in answers), answers

    async def no_heartbeats(self) -> None:
        """Let those that were killed be known to be dead at once."""
        names = await self.redis.keys(self.keys.heartbeat("*"))
        if names:
            await self.redis.delete(*names)

    async def rows(self, *environments: str) -> dict[str, asyncpg.Record]:
        """The rows of some environments, by id."""
        query = "SELECT * FROM mollifier.runs WHERE environment_id = ANY ($1::text[])"
        return {row["id"]: row for row in await self.pool.fetch(query, environments)}

    async def arrived(self, environment: str) -> list[str]:
        """The ids of an environment's rows, in the order in which they were written."""
        query = """
            SELECT id FROM public.arrivals JOIN mollifier.runs AS run USING (id)
            WHERE environment_id = $1 ORDER BY position
        """
        return [record["id"] for record in await self.pool.fetch(query, environment)]

    async def buffered(self, environment: str) -> list[str]:
        """The ids of the runs that an environment's buffer remembers, in the order accepted."""
        entries = await self.redis.xrange(self.keys.environment(environment).entries)
        return [fields[b"run_id"].decode() for _, fields in entries]

    async def append(self, environment: str, fields: dict[str, Any]) -> None:
        """Append an entry that no run was accepted as, to an environment that has some."""
        names = self.keys.environment(environment)
        await self.redis.xadd(names.entries, fields)
        await self.redis.hincrby(names.drain, "queued", 1)
        await self.redis.hincrby(self.keys.totals(names.partition), "queued", 1)

    async def are_forgotten(self, *environments: str) -> None:
        """Asserts that the buffers of some environments are gone."""
        for names in map(self.keys.environment, environments):
            assert not await self.redis.exists(names.entries, names.index, names.drain, names.overlays)

    async def dead_letters(self) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in await self.redis.xrange(self.keys.dead_letters)]

    async def has_group(self, stream: str) -> None:
        """Asserts that somebody reads a stream, or is about to."""
        assert await self.redis.xinfo_groups(stream)

    async def is_settled(self, stream: str) -> None:
        """Asserts that a stream holds no request, waiting or handed out."""
        assert await self.redis.xlen(stream) == 0
        assert (await self.redis.xpending(stream, self.keys.group))["pending"] == 0

    async def is_drained(self) -> None:
        """Asserts that nothing is buffered, and that no drainer holds anything."""
        partitions = range(self.keys.partitions)
        names = [name(part) for part in partitions for name in (self.keys.ready, self.keys.totals)]
        names += [f"{self.keys.turns}:{part}" for part in ("organizations", "states", "takers", "resting")]
        assert await self.redis.exists(*names) == 0

    async def nothing_is_reserved(self) -> None:
        """Asserts that no id is held for its caller."""
        names = [self.keys.chosen(partition) for partition in range(self.keys.partitions)]
        assert await self.redis.exists(*names) == 0

    async def claims(self) -> dict[str, str]:
        """The claims of idempotency keys."""
        names = await self.redis.keys(self.keys.claims.replace("{*}", "*"))
        return {name.decode(): (await self.redis.get(name) or b"").decode() for name in names}

    async def claims_end_by_themselves(self, rows: Iterable[str]) -> None:
        """Asserts that claims which are left are of rows, and will be gone within their time."""
        for name, value in (await self.claims()).items():
            assert value in rows
            assert 0 < await self.redis.pttl(name) <= self.settings.claim_ttl_s * 1000

    async def drain(self) -> None:
        """Materialise what is buffered."""
        drain = Drain(
            turns=RedisTurns(self.scripts, self.keys, self.settings, "drainer-of-the-test"),
            materialiser=self.store,
            graveyard=RedisDesk(self.scripts, self.keys, self.keys.triggers),
            reservations=self.buffer,
            settings=self.settings,
            telemetry=Telemetry("test"),
        )

        async def is_dry() -> None:
            while await drain.turn():
                pass
            await self.is_drained()

        await eventually(is_dry)

    async def replies(self, names: Sequence[str]) -> dict[str, Reply]:
        """The one reply to each request."""
        await self.producer.all_replies(names, within=20)
        replies = {name: self.producer.replies[name] for name in names}
        assert {name: len(some) for name, some in replies.items() if len(some) > 1} == {}
        return {name: some[0] for name, some in replies.items()}

    async def sweep(self) -> None:
        """Make a sweeper's pass."""
        sweep = Sweep(
            census=RedisCensus(self.scripts, self.keys, self.settings),
            leftovers=RedisLeftovers(self.scripts, self.keys, self.settings),
            rows=PostgresRows(self.pool, self.settings),
            settings=self.settings,
            telemetry=Telemetry("test"),
        )
        await sweep.make_pass()


async def eventually(assertion: Callable[[], Awaitable[object]], within_s: float = 10) -> None:
    """Look until it is so; not too often, for many scenes are played at once."""
    await waiting.eventually(assertion, within_s, every_s=0.05)


Play = Callable[[Scene, Crash | None], Awaitable[float]]


async def trigger(scene: Scene, crash: Crash | None) -> float:
    """Requests of every kind, in one batch; a trigger worker is killed with them."""
    return await _trigger(scene, [crash] if crash else [])


async def recover(scene: Scene, crash: Crash | None) -> float:
    """A trigger worker is killed that is to take over what another had as it was killed."""
    return await _trigger(scene, [Crash("before", "reply"), crash] if crash else [])


async def _trigger(scene: Scene, crashes: Sequence[Crash]) -> float:
    mix = await Mix.prepared(scene)
    took_s = await _send(scene, mix, crashes)
    replies = await scene.replies(list(mix.bodies))
    told = await _told(scene, mix, replies)
    keys = ("first", "key", "awaited")
    again = await scene.producer.ask_all([mix.bodies[name] for name in keys])
    assert named(again) == [(told[name], True) for name in keys]
    await _all_are_rows(scene, mix, told)
    await scene.is_settled(scene.keys.triggers)
    await scene.nothing_is_reserved()
    return took_s


MOLLIFIED = ("chosen", "key", "linked", "child", "child of row", "awaited")
HASTY = ("hasty", "hasty row")


class Mix(NamedTuple):
    """Requests by name. In the environment `busy` the first that is counted passes the gate, and no other.

    `awaited` has a key that another holds until `claim` is deleted; `won` is buffered, `parent` is a row.
    """

    busy: str
    calm: str
    parent: Snapshot
    won: Snapshot
    claim: str
    bodies: dict[str, Any]

    @classmethod
    async def prepared(cls, scene: Scene) -> "Mix":
        """With what they meet."""
        busy, calm = new_environment("busy"), new_environment("calm")
        (parent,), (won,) = new_runs(busy, 1, task="parent"), new_runs(busy, 1, **keyed("won"))
        await scene.insert([parent])
        await scene.accept([won])
        claim = scene.keys.claim(run(busy, organization_id=f"org_of_{busy}", idempotency_key="awaited"))
        await scene.redis.set(claim, "pending:another:1")
        resuming = {"parent_run_id": friendly(parent.id), "resume_parent_on_completion": True}
        options: dict[str, dict[str, Any]] = {
            "first": {"idempotency_key": "first"},
            "first again": {"idempotency_key": "first"},
            "chosen": {"run_id": f"run_chosen-{busy}", "tags": ["a", "b"]},
            "key": {"idempotency_key": "key"},
            "key again": {"idempotency_key": "key"},
            "linked": {"batch": {"id": "batch_1", "index": 7}, "metadata": {"n": 1}},
            "child": {"parent_run_id": friendly(won.id)},
            "child of row": {"parent_run_id": friendly(parent.id)},
            "awaited": {"idempotency_key": "awaited"},
            "resuming": {"idempotency_key": "won", **resuming},
            "token": {"one_time_use_token": f"token of {busy}"},
            "hasty": {},
        }
        bodies: dict[str, Any] = {name: request(busy, options=some) for name, some in options.items()}
        chosen = {"run_id": f"run_chosen-{calm}"}
        bodies |= {
            "plain": request(calm, enrolled=False),
            "hasty row": request(calm, enrolled=False),
            "chosen row": request(calm, enrolled=False, options=chosen),
            "invalid": request(calm, surprise=True),
            "unreadable": b"{",
        }
        return cls(busy, calm, parent, won, claim, bodies)

    def ids(self, scene: Scene) -> dict[str, str]:
        """The ids that requests are to be told, if they have a run."""
        own = {
            name: derive(scene.keys.namespace, scene.producer.entry_ids[name], body["environment"]["id"])
            for name, body in self.bodies.items()
            if name not in ("invalid", "unreadable")
        }
        return own | {
            "chosen": f"chosen-{self.busy}",
            "chosen row": f"chosen-{self.calm}",
            "first again": own["first"],
            "key again": own["key"],
            "resuming": self.won.id,
        }


async def _send(scene: Scene, mix: Mix, crashes: Sequence[Crash]) -> float:
    """Send the mix to workers that are killed, one after the other; how long the last one then takes.

    The first of them has it as one batch. The hasty ones' deadline passes before the last one has them.
    """
    producer, names = scene.producer, list(mix.bodies)
    victims = [scene.start("triggers", crash) for crash in crashes[:1]]
    if victims:
        await eventually(lambda: scene.has_group(scene.keys.triggers))
    deadline = datetime.now(UTC) + timedelta(milliseconds=1.2 * TTL_MS)
    for name in HASTY:
        mix.bodies[name]["deadline"] = deadline.isoformat()
    await producer.send_all(list(mix.bodies.values()), correlation_ids=names)
    for crash in crashes[1:]:
        await victims[-1].crashed()
        await scene.no_heartbeats()
        victims.append(scene.start("triggers", crash))

    async def one_waits_or_is_left() -> None:
        if [name for name in names if name not in producer.replies] != ["awaited"]:
            await victims[-1].is_gone()

    async def deadline_has_passed() -> None:
        assert datetime.now(UTC) > deadline

    if victims:
        await eventually(one_waits_or_is_left)
    await scene.redis.delete(mix.claim)
    if crashes and crashes[-1].point in LEAVING:
        await producer.all_replies(names)
        victims[-1].send(signal.SIGTERM)
    if victims:
        await victims[-1].crashed()
    started = time.monotonic()
    if victims:
        await eventually(deadline_has_passed)
    scene.start("triggers")
    await scene.replies(names)
    await eventually(lambda: scene.is_settled(scene.keys.triggers))
    return time.monotonic() - started


async def _told(scene: Scene, mix: Mix, replies: dict[str, Reply]) -> Mapping[str, str]:
    """The ids of the runs that requests were told of: one outcome for each, one run for each and its key."""
    for name in ("invalid", "unreadable"):
        assert replies.pop(name)["error"]["code"] == "invalid_request"
    for name in HASTY:
        if replies[name]["type"] == "error":
            assert replies.pop(name)["error"]["code"] == "deadline_exceeded"
    letters = [letter[b"id"].decode() for letter in await scene.dead_letters()]
    assert set(letters) == {scene.producer.entry_ids["unreadable"]}
    assert len(letters) <= 2, "the one that was being set aside may be there twice"
    told = dict(zip(replies, named(replies.values()), strict=True))
    cached = ("first again", "key again", "resuming")
    ids = mix.ids(scene)
    assert told == {name: (ids[name], name in cached) for name in replies}
    assert all(replies[name]["is_mollified"] for name in MOLLIFIED)
    return {name: run_id for name, (run_id, _) in told.items()}


async def _all_are_rows(scene: Scene, mix: Mix, told: Mapping[str, str]) -> None:
    """Asserts that what was told of, and nothing else, becomes rows; what was buffered in its order."""
    accepted = await scene.buffered(mix.busy)
    assert {mix.won.id, *(told[name] for name in MOLLIFIED)} <= set(accepted)
    await scene.drain()
    rows = await scene.rows(mix.busy, mix.calm)
    assert rows.keys() == {mix.parent.id, *told.values()}
    assert [one for one in await scene.arrived(mix.busy) if one in accepted] == accepted
    linked, child = rows[told["linked"]], rows[told["child"]]
    assert (linked["batch_id"], linked["batch_index"], linked["metadata"]) == ("batch_1", 7, '{"n": 1}')
    assert (child["parent_run_id"], child["root_run_id"], child["depth"]) == (mix.won.id, mix.won.id, 1)
    assert rows[told["chosen"]]["tags"] == ["a", "b"]
    query = "SELECT child_run_id, parent_run_id FROM mollifier.waitpoints WHERE environment_id = $1"
    waiting = [tuple(record) for record in await scene.pool.fetch(query, mix.busy)]
    assert waiting == [(mix.won.id, mix.parent.id)]
    await scene.claims_end_by_themselves(rows)


def named(replies: Iterable[Reply]) -> list[tuple[str, bool]]:
    """The id that each reply names, and whether that run was there before."""
    known = list(replies)
    assert {reply["type"] for reply in known} == {"run"}, known
    return [(reply["run"]["id"], reply["is_cached"]) for reply in known]


async def operate(scene: Scene, crash: Crash | None) -> float:
    """Operations on buffered runs and on rows, in one batch; an operations worker is killed with them."""
    environment, tomorrow = new_environment(), datetime.now(UTC) + timedelta(days=1)
    counted, cancelled, plain = new_runs(environment, 3)
    (delayed,) = new_runs(environment, 1, delay_until=tomorrow)
    row, cancelled_row = new_runs(environment, 2)
    await scene.insert([row, cancelled_row])
    await scene.accept([counted, cancelled, delayed, plain])

    def on(one: Snapshot, kind: str, **fields: Any) -> dict[str, Any]:
        return operation(f"run.{kind}", environment, run_id=friendly(one.id), **fields)

    increment = {"operations": [{"type": "increment", "key": "n", "value": 1}]}
    bodies = {
        "count": on(counted, "update_metadata", **increment),
        "count again": on(counted, "update_metadata", **increment),
        "tag": on(counted, "add_tags", tags=["a"]),
        "count row": on(row, "update_metadata", **increment),
        "count row again": on(row, "update_metadata", **increment),
        "tag row": on(row, "add_tags", tags=["a"]),
        "cancel": on(cancelled, "cancel", reason="enough"),
        "cancel row": on(cancelled_row, "cancel", reason="enough"),
        "reschedule": on(delayed, "reschedule", delay="1h"),
        "retrieve": on(plain, "retrieve"),
        "list": operation("run.list", environment),
        "nobody": operation("run.retrieve", environment, run_id="run_nobody"),
        "invalid": operation("run.surprise", environment),
    }
    replay = on(plain, "replay", payload={"again": True})
    replies, took_s = await _operate(scene, crash, bodies, replay)

    # G1: an outcome for each
    errors = {name: reply["error"]["code"] for name, reply in replies.items() if reply["type"] == "error"}
    assert errors == {"nobody": "run_not_found", "invalid": "invalid_request"}
    assert len(replies["list"]["runs"]) == 6

    # G3: however often it was triggered, the replay is one run
    replays = [json.loads(fields[b"body"]) for _, fields in await scene.redis.xrange(scene.keys.triggers)]
    assert {one["payload"]["again"] for one in replays} == {True}
    assert len({one["options"]["run_id"] for one in replays}) == 1

    # G2, G9, G10, G11: all are rows, in order, and have each change once
    await scene.drain()
    rows = await scene.rows(environment)
    buffered = ids([counted, cancelled, delayed, plain])
    assert rows.keys() == {*buffered, *ids([row, cancelled_row])}
    assert [one for one in await scene.arrived(environment) if one in buffered] == buffered
    for one in (counted, row):
        assert (json.loads(rows[one.id]["metadata"]), rows[one.id]["tags"]) == ({"n": 2}, ["a"])
    for one in (cancelled, cancelled_row):
        assert (rows[one.id]["status"], rows[one.id]["cancel_reason"]) == ("CANCELED", "enough")
    assert (rows[delayed.id]["status"], rows[delayed.id]["delay_until"] < tomorrow) == ("DELAYED", True)
    return took_s


async def reset(scene: Scene, crash: Crash | None) -> float:
    """The key of a buffered run is made free; an operations worker is killed with it."""
    (one,) = new_runs(new_environment(), 1, **keyed("k"), created_at=datetime.now(UTC))
    await scene.accept([one])
    return await _reset(scene, crash, one)


async def reset_row(scene: Scene, crash: Crash | None) -> float:
    """The key of a row is made free; an operations worker is killed with it."""
    (one,) = new_runs(new_environment(), 1, **keyed("k"), created_at=datetime.now(UTC))
    await scene.insert([one])
    return await _reset(scene, crash, one)


async def _reset(scene: Scene, crash: Crash | None, one: Snapshot) -> float:
    environment = one.environment_id
    body = operation("idempotency_key.reset", environment, task=one.task, idempotency_key="k")
    replies, took_s = await _operate(scene, crash, {"reset": body})
    assert await scene.claims() == {}
    await scene.drain()
    (row,) = (await scene.rows(environment)).values()
    assert (row["id"], row["idempotency_key"]) == (one.id, None)
    assert replies["reset"]["type"] == "idempotency_key_reset", replies["reset"]
    assert replies["reset"]["run_id"] in (one.id, None)
    return took_s


async def _operate(
    scene: Scene, crash: Crash | None, bodies: Mapping[str, object], *unanswered: object
) -> tuple[Mapping[str, Reply], float]:
    """The replies to operations; and how long it took another worker to give them, once one was killed."""
    stream, names = scene.keys.operations, list(bodies)
    more = [f"unanswered {number}" for number, _ in enumerate(unanswered)]
    await scene.producer.send_all(
        [*bodies.values(), *unanswered], correlation_ids=[*names, *more], stream=stream
    )
    if crash is not None:
        await scene.start("operations", crash).crashed()
    started = time.monotonic()
    scene.start("operations")
    replies = await scene.replies(names)
    await eventually(lambda: scene.is_settled(stream))
    took_s = time.monotonic() - started
    assert await scene.dead_letters() == []
    return replies, took_s


async def drain(scene: Scene, crash: Crash | None) -> float:
    """Three batches with something of everything; a drainer is killed with them."""
    return await _drain(scene, [crash] if crash else [])


async def take_over(scene: Scene, crash: Crash | None) -> float:
    """A drainer is killed that is to take over what another had as it was killed."""
    return await _drain(scene, [Crash("after", "take-entries"), crash] if crash else [])


async def _drain(scene: Scene, crashes: Sequence[Crash]) -> float:
    entries = await Entries.prepared(scene)
    for crash in crashes:
        await scene.start("drainer", crash).crashed()
        if crash is not crashes[-1]:
            await scene.no_heartbeats()
    started = time.monotonic()
    scene.start("drainer")
    await eventually(scene.is_drained, within_s=20)
    took_s = time.monotonic() - started
    await entries.are_drained(scene)
    if crashes:
        await scene.sweep()
    await scene.nothing_is_reserved()
    assert await scene.claims() == {}
    await eventually(lambda: scene.are_forgotten(entries.environment, entries.other))
    return took_s


class Entries(NamedTuple):
    """What is buffered: `good` has a chosen id, a key, changes, and a row that costs its connection first."""

    environment: str
    other: str
    row: Snapshot
    good: list[Snapshot]
    others: list[Snapshot]
    cancelled: Snapshot
    tagged: Snapshot
    alias: Snapshot
    refused: Snapshot
    impossible: Snapshot

    @classmethod
    async def prepared(cls, scene: Scene) -> "Entries":
        """And a row that has the key of one of them."""
        environment, other = new_environment(), new_environment()
        await scene.pool.execute(f'CREATE SEQUENCE public."tries_{environment}"')
        row, alias, winner = (new_runs(environment, 1, **keyed(key))[0] for key in ("taken", "taken", "won"))
        once, refused, impossible = (
            new_runs(environment, 1, task=task)[0] for task in ("once", "refused", "impossible")
        )
        (chosen,) = new_runs(environment, 1, id=f"chosen-{environment}")
        cancelled, tagged = new_runs(environment, 2)
        good = [
            *new_runs(environment, 3),
            chosen,
            winner,
            once,
            cancelled,
            tagged,
            *new_runs(environment, 12),
        ]
        others = new_runs(other, 4)
        await scene.insert([row])
        await scene.buffer.recall([chosen], [chosen])
        await scene.accept([*good[:2], refused, *good[2:8], impossible, alias, *good[8:]])
        await scene.accept(others)
        await scene.append(environment, {"run_id": "poison", "snapshot": b"\xc1"})
        tenancy, now = Tenancy(row.organization_id, environment), datetime.now(UTC)
        for one, change in (cancelled, changes.cancel("enough", now)), (tagged, changes.add_tags(["a"], 10)):
            await scene.runs.change(tenancy, one.id, changes.once(change, "an operation"), now)
        return cls(environment, other, row, good, others, cancelled, tagged, alias, refused, impossible)

    async def are_drained(self, scene: Scene) -> None:
        """Asserts that each is a row, the alias of one, or a dead letter; in order, with what was changed."""
        rows = await scene.rows(self.environment, self.other)
        assert {id: row["status"] for id, row in rows.items()} == {
            **dict.fromkeys(ids([self.row, *self.good, *self.others]), "QUEUED"),
            self.refused.id: "SYSTEM_FAILURE",
            self.cancelled.id: "CANCELED",
        }
        query = "SELECT id, run_id FROM mollifier.run_aliases WHERE environment_id = $1"
        aliases = [tuple(record) for record in await scene.pool.fetch(query, self.environment)]
        assert aliases == [(self.alias.id, self.row.id)]
        letters = [(letter[b"reason"], letter[b"snapshot"]) for letter in await scene.dead_letters()]
        assert set(letters) == {
            (b"undecodable", b"\xc1"),
            (b"refused", encode_snapshot(self.impossible)),
        }
        assert len(letters) <= 4, "those that were being buried may be there twice"
        order = ids([self.row, *self.good])
        assert [one for one in await scene.arrived(self.environment) if one in order] == order
        assert await scene.arrived(self.other) == ids(self.others)
        assert rows[self.tagged.id]["tags"] == ["a"]
        assert {row["idempotency_key"] for row in rows.values()} == {None, "taken", "won"}


async def sweep(scene: Scene, crash: Crash | None) -> float:
    """What the dead have left behind, beside what is still needed; a sweeper is killed with it."""
    left = await LeftBehind.prepared(scene)
    before = b"dead"
    if crash is not None:
        victim = scene.start("sweeper", crash)
        if crash.point in LEAVING:
            await eventually(lambda: left.is_swept(scene))
            victim.send(signal.SIGTERM)
        await victim.crashed()
        before = await scene.redis.get(scene.keys.sweeper)

    async def is_replaced() -> None:
        assert await scene.redis.get(scene.keys.sweeper) not in (before, b"dead", None)
        await left.is_swept(scene)

    started = time.monotonic()
    scene.start("sweeper")
    await eventually(is_replaced)
    took_s = time.monotonic() - started

    assert (await scene.redis.xpending(scene.keys.triggers, scene.keys.group))["pending"] == 1
    await scene.drain()
    rows = await scene.rows(left.row.environment_id, left.lost.environment_id)
    assert rows.keys() == {left.row.id, left.buffered.id, left.lost.id}
    assert await scene.claims() == {}
    return took_s


class LeftBehind(NamedTuple):
    """A claim and a reservation of a `row`, and of one that is `buffered`; one whose arrival was `lost`; in
    either stream a consumer that is dead, and one that is too but has a request."""

    row: Snapshot
    buffered: Snapshot
    lost: Snapshot

    @classmethod
    async def prepared(cls, scene: Scene) -> "LeftBehind":
        """And a lease that is held by the dead."""
        environment, redis, keys = new_environment(), scene.redis, scene.keys
        row, buffered = (new_runs(environment, 1, **keyed(key))[0] for key in ("row", "buffered"))
        (lost,) = new_runs(new_environment(), 1)
        await scene.insert([row])
        await scene.accept([buffered])
        await scene.accept([lost])
        await redis.set(keys.claim(row), row.id)
        for one in (row, buffered):
            owner = tenant(one.organization_id, environment)
            await redis.hset(keys.chosen(keys.partition(one.id)), one.id, owner)
        partition = keys.environment(lost.environment_id).partition
        for arrival in await redis.zrange(keys.arrivals(partition), 0, -1):
            if arrival.endswith(lost.environment_id.encode()):
                await redis.zrem(keys.arrivals(partition), arrival)
        long_ago = time.time() * 1000 - 60_000
        await redis.zadd(keys.ready(partition), {lost.environment_id: long_ago}, xx=True)
        await scene.producer.send(request(environment))
        for stream in (keys.triggers, keys.operations):
            await redis.xgroup_create(stream, keys.group, id="0", mkstream=True)
            await redis.xgroup_createconsumer(stream, keys.group, "dead")
        await redis.xreadgroup(keys.group, "dead-with-a-request", {keys.triggers: ">"})
        await redis.set(keys.sweeper, "dead")
        return cls(row, buffered, lost)

    async def is_swept(self, scene: Scene) -> None:
        """Asserts that what nobody needs is gone, and what somebody needs is there."""
        redis, keys = scene.redis, scene.keys
        consumers = [
            one["name"]
            for stream in (keys.triggers, keys.operations)
            for one in await redis.xinfo_consumers(stream, keys.group)
        ]
        assert consumers == [b"dead-with-a-request"]
        assert list((await scene.claims()).values()) == [self.buffered.id]
        for one in (self.row, self.buffered):
            is_reserved = await redis.hexists(keys.chosen(keys.partition(one.id)), one.id)
            assert is_reserved is (one is self.buffered)
        partition = keys.environment(self.lost.environment_id).partition
        arrivals = await redis.zrange(keys.arrivals(partition), 0, -1)
        assert any(arrival.endswith(self.lost.environment_id.encode()) for arrival in arrivals)

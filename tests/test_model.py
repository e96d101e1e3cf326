"""One run per request (G3), one run per key (G4) and walls between tenants (G7), against a plain model.

Hypothesis decides what happens: workers and drainers handle, stall, die, fall silent, and lose a server in
the middle of a call. After every step both stores are read as they are and held against what the model
allows. Time is the model's alone: nothing ends by itself, claims in Redis included. A longer search: see
`machines.py`.

Not played: an id that a caller chose while Postgres cannot be asked whether another tenant has it.
"""

import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import combinations
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import asyncpg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
)
from msgspec.structs import replace
from redis.asyncio import Redis

from app.batch import Claim, Entry
from app.claims import PENDING, RedisClaims
from app.drain import Drain
from app.errors import StoreUnavailable, Unreachable
from app.heartbeat import consumer_name
from app.pipeline import Pipeline
from app.replies import RedisDesk
from app.run_ids import derive
from app.settings import Settings
from app.store_health import StoreHealth
from app.telemetry import Telemetry
from app.turns import RedisTurns
from app.wiring import World
from schemas.snapshot import Snapshot, decode_snapshot
from tests.builders import NOW, body, bound_id
from tests.fakes import FakeGate, FakeHeart
from tests.machines import Endings, Fault, Job, Machine, breakable, faults, patient, search, tell

Tenant = tuple[str, str]
Key = tuple[str, str, str, str]
Kind = Literal["batch", "tick", "turn"]

SETTINGS = {
    "claim_ttl_s": 8,
    "claim_min_ttl_s": 4,
    "claim_wait_ms": 10**9,
    "ack_grace_ttl_s": 0,
    "partitions": 2,
}
SETTINGS |= {"drain_batch_size": 3, "max_deliveries": 10**9, "store_pressure_latency_ms": 10**9}
WORKERS: dict[int, dict[str, Any]] = {0: {}, 1: {"claim_wait_ms": 0}, 2: {"divert_on_store_failure": False}}
DRAINERS: dict[int, dict[str, Any]] = {3: {}, 4: {}}

TENANTS = [*[("org_1", "env_1")] * 6, ("org_1", "env_2"), ("org_2", "env_3"), ("org_2", "env_1")]
"""Organizations and environments. The last one is hostile: its environment is another organization's."""

CHOSEN = {"x": None, "y": "a", "bound": "a"}
"""Ids that callers choose, with the idempotency key that goes with each: a repetition asks for the same. Each
tenant has a bound one of its own.
"""

ENVIRONMENTS = sorted({environment for _, environment in TENANTS})
FREES_ITS_KEY = ("FAILED", "EXPIRED", "SYSTEM_FAILURE")
ERRORS = {"claim_timed_out", "run_id_conflict", "store_unavailable"}
CLAIMS = ("find_winners", "claim", "settle_claims")
TWO_RUNS = {*CLAIMS, "look_up_keys", "stalled", "bypass"}

EXCUSES = """Why the model is not strict about a key for a while; see `_excuse`:

claim         claims could not be reached, so only Postgres' unique index was asked
look_up_keys  Postgres could not be asked whether a row has the key
recall        Postgres could not be asked whether the request has a run already
stalled       a worker stood still for longer than the claim was its own
bypass        a request that claims nothing was under way together with another of its key
"""


class Ask(NamedTuple):
    """What a producer asks for."""

    tenant: Tenant
    task: str = "send"
    key: str | None = "a"
    ttl: str | None = None
    chosen: str | None = None
    bypass: bool = False


class Request(NamedTuple):
    """A request that was made after so many steps. `run_id` is that of the run it makes, if it makes one."""

    entry: Entry
    tenant: Tenant
    key: Key | None
    bypass: bool
    run_id: str
    made: int
    made_at: datetime


class Run(NamedTuple):
    """A run as one of the stores has it."""

    id: str
    organization_id: str
    environment_id: str
    task: str
    idempotency_key: str | None
    idempotency_key_expires_at: datetime | None
    span_id: str
    payload: bytes

    @property
    def tenant(self) -> Tenant:
        return self.organization_id, self.environment_id

    @property
    def key(self) -> Key:
        return self.organization_id, self.environment_id, self.task, self.idempotency_key or ""


_columns = attrgetter(*Run._fields)


@dataclass
class State:
    """What is there. `settled` and `queued` are the buffer up to its mark and after it; `claims` are by key;
    `asked` are the requests that nobody has acknowledged."""

    rows: dict[str, Run]
    statuses: dict[str, str]
    aliases: dict[str, str]
    settled: list[Run]
    queued: list[Run]
    asked: set[str]
    claims: dict[str, str] = field(default_factory=dict)

    def buffered(self) -> list[Run]:
        return [run for run in self.queued if run.id not in self.rows and run.id not in self.aliases]

    def live(self, now: datetime) -> dict[Key, set[str]]:
        """The runs that have each key: rows that keep it, and buffered runs."""
        rows = [run for run in self.rows.values() if self.statuses[run.id] not in FREES_ITS_KEY]
        return _by_key([*rows, *self.buffered()], now)


def _by_key(runs: list[Run], now: datetime) -> dict[Key, set[str]]:
    ids: defaultdict[Key, set[str]] = defaultdict(set)
    for run in runs:
        if run.idempotency_key_expires_at is not None and run.idempotency_key_expires_at > now:
            ids[run.key].add(run.id)
    return ids


class Work(Job):
    """A batch, a tick or a turn under way. It `began` after so many steps; `holds` are its claims at its
    halt, until when in ms."""

    def __init__(
        self, kind: Kind, process: int, requests: list[Request], fault: Fault | None, began: int
    ) -> None:
        super().__init__(process, fault)
        self.kind = kind
        self.requests = requests
        self.began = began
        self.holds: dict[Key, tuple[str, int]] = {}

    def keyed(self) -> list[Key]:
        return [request.key for request in self.requests if request.key is not None]


class ClaimsByTheClock(RedisClaims):
    """Claims of those who wait are made by the model's time too."""

    clock: Callable[[], datetime]

    async def claim(self, runs: Sequence[Snapshot], now: datetime, *, seek: bool = False) -> Sequence[Claim]:
        return await super().claim(runs, self.clock(), seek=seek)


FROM_CLAIMS = (
    "find_winners",
    "claim",
    "look_up_keys",
    "insert",
    "accept",
    "settle_claims",
    "respond",
    "release",
)
ASKS = st.lists(
    st.builds(
        Ask,
        st.sampled_from(TENANTS),
        st.sampled_from(["send", "send", "send", "fetch"]),
        st.sampled_from(["a", "a", "a", "b", None]),
        st.sampled_from([None, None, "10s"]),
        st.sampled_from([*[None] * 8, *CHOSEN]),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=3,
)
WORKER = st.sampled_from(sorted(WORKERS))
PASSES = st.sampled_from([0, 9, 1])
FAULT = faults("find", "recall", *FROM_CLAIMS)
PICK = st.integers(0, 30)
DRAINER = st.sampled_from(sorted(DRAINERS))


class Model(Machine):
    """The rules are what may happen; `_check` is what must hold after each."""

    worlds: list[World]
    redis: Any
    postgres: Any
    channel: Any

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.requests: list[Request] = []
        self.deliveries: Counter[str] = Counter()
        self.jobs: list[Work] = []
        self.owners: dict[str, Tenant] = {}
        self.first_seen: dict[str, int] = {}
        self.spans: dict[str, str] = {}
        self.answered: dict[str, Tenant] = {}
        self.history: list[dict[Key, set[str]]] = [{}]
        self.together: set[tuple[str, str]] = set()
        self.excuses: defaultdict[Key, set[str]] = defaultdict(set)
        self.endings = Endings(self.redis, "mollifier:*:claim:*", 1000)
        self.is_sound = True
        self.wait_for(self._empty())
        self.gates = {number: FakeGate() for number in WORKERS}
        self.pipelines = {number: self._pipeline(number) for number in WORKERS}
        self.drains = {number: self._drain(number) for number in DRAINERS}
        self.state: State = self.wait_for(self._look())

    # What happens

    @initialize(asks=ASKS, worker=WORKER, passes=PASSES, fault=FAULT)
    def first(self, worker: int, asks: list[Ask], passes: int, fault: Fault | None) -> None:
        self.trigger(worker, asks, passes, fault)

    @rule(asks=ASKS, worker=WORKER, passes=PASSES, fault=FAULT)
    def trigger(self, worker: int, asks: list[Ask], passes: int, fault: Fault | None) -> None:
        self._handle(worker, [self._request(*ask) for ask in asks], passes, fault)

    @rule(
        picks=st.lists(PICK, min_size=1, max_size=3),
        lost=st.booleans(),
        worker=WORKER,
        passes=PASSES,
        fault=FAULT,
    )
    def redeliver(self, worker: int, picks: list[int], lost: bool, passes: int, fault: Fault | None) -> None:
        """Also what is handled elsewhere, and (not `lost`) what was answered a moment ago."""
        held = {one.entry.id for job in self.jobs if job.process == worker for one in job.requests}
        held |= self.pipelines[worker].waiting_room.held
        choice = [one for one in self.requests if one.entry.id not in held]
        choice = [one for one in choice if one.entry.id in self.state.asked or not lost]
        picked = {-1 - pick % len(choice) for pick in picks if choice}
        if picked:
            self._handle(worker, [choice[position] for position in sorted(picked)], passes, fault)

    @precondition(lambda self: any(line.waiting_room.held for line in self.pipelines.values()))
    @rule(worker=WORKER, passes=PASSES, fault=faults(*FROM_CLAIMS))
    def tick(self, worker: int, passes: int, fault: Fault | None) -> None:
        held = self.pipelines[worker].waiting_room.held
        if held and not any(job.process == worker for job in self.jobs):
            self.gates[worker].passes = passes
            requests = [request for request in self.requests if request.entry.id in held]
            self._start("tick", worker, requests, fault, self._tick(worker))

    @precondition(lambda self: self.state.queued)
    @rule(drainer=DRAINER, fault=faults("schedule", "take", "materialise", "settle", "release"))
    def drain(self, drainer: int, fault: Fault | None) -> None:
        if not any(job.process == drainer for job in self.jobs):
            self._start("turn", drainer, [], fault, self._turn(drainer))

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK, fault=faults(*FROM_CLAIMS, "materialise", "settle"))
    def go_on(self, pick: int, fault: Fault | None) -> None:
        job = self.jobs[pick % len(self.jobs)]
        job.go_on(fault)
        self._proceed(job)

    @precondition(lambda self: self.jobs or any(line.waiting_room.held for line in self.pipelines.values()))
    @rule(process=st.sampled_from([*WORKERS, *DRAINERS]))
    def crash(self, process: int) -> None:
        """Its memory is gone, and its name with the heartbeat: what it held is left to the others."""
        for job in [job for job in self.jobs if job.process == process]:
            self.wait_for(job.die())
            self.jobs.remove(job)
        if process in WORKERS:
            self.pipelines[process] = self._pipeline(process)
        else:
            self.silence(process)
            self.drains[process] = self._drain(process)

    @precondition(lambda self: any(job.kind == "turn" for job in self.jobs))
    @rule(drainer=DRAINER)
    def silence(self, drainer: int) -> None:
        """A drainer stalls so long that it looks dead."""
        self.wait_for(self.redis.delete(self.worlds[0].keys.heartbeat(self.drains[drainer][0])))

    @rule(seconds=st.sampled_from([10, 1, 5, 40]))
    def advance(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.wait_for(self.endings.end(self._now_ms))
        self._check(None)

    @precondition(lambda self: "QUEUED" in self.state.statuses.values())
    @rule(pick=PICK, status=st.sampled_from(["FAILED", "COMPLETED", "EXPIRED", "CANCELED"]))
    def finish(self, pick: int, status: str) -> None:
        """An executor ends a run."""
        rows = sorted(run_id for run_id, status in self.state.statuses.items() if status == "QUEUED")
        update = "UPDATE mollifier.runs SET status = $2 WHERE id = $1"
        self.wait_for(self.postgres.execute(update, rows[-1 - pick % len(rows)], status))
        self._check(None)

    @precondition(lambda self: self.state.settled)
    @rule(drainer=DRAINER)
    def forget(self, drainer: int) -> None:
        self._start("turn", drainer, [], None, self.drains[drainer][1].forget())

    def teardown(self) -> None:
        """Nothing goes wrong any more, and everything ends as it should."""
        try:
            if self.is_sound:
                self._come_to_rest()
        finally:
            for job in self.jobs:
                self.wait_for(job.die())

    def _come_to_rest(self) -> None:
        while self.jobs:
            self.go_on(0, None)
        for _ in range(20):
            self.advance(8)
            for worker in WORKERS:
                self.tick(worker, 9, None)
            for drainer in DRAINERS:
                self.drain(drainer, None)
            self.redeliver(0, list(range(len(self.requests))), True, 9, None)
            if not self.state.asked and not self.state.queued:
                break
        self.advance(8)
        assert not self.state.asked
        assert not self.state.queued
        assert not [value for value in self.state.claims.values() if value.startswith(PENDING)]
        for run_id, tenant in self.answered.items():
            assert self.state.rows[self.state.aliases.get(run_id, run_id)].tenant == tenant

    # How it happens

    @property
    def _now_ms(self) -> int:
        return int(self.now.timestamp() * 1000)

    async def _empty(self) -> None:
        await self.redis.flushall()
        await self.postgres.execute("TRUNCATE mollifier.runs, mollifier.run_aliases")
        await self._answers()

    def _pipeline(self, number: int) -> Pipeline:
        world = self.worlds[number]
        claims = ClaimsByTheClock(world.scripts, world.keys, world.settings)
        claims.clock = lambda: self.now
        return Pipeline(
            gate=self.gates[number],
            buffer=world.buffer,
            reservations=world.buffer,
            claims=claims,
            store=world.store,
            desk=RedisDesk(world.scripts, world.keys, world.keys.triggers),
            health=StoreHealth(world.settings, lambda: self.now.timestamp()),
            settings=world.settings,
            telemetry=world.telemetry,
            heart=FakeHeart(),
            clock=lambda: self.now,
        )

    def _drain(self, number: int) -> tuple[str, RedisTurns, Drain]:
        world = self.worlds[number]
        consumer = consumer_name()
        turns = RedisTurns(world.scripts, world.keys, world.settings, consumer)
        drain = Drain(
            turns=turns,
            materialiser=world.store,
            graveyard=RedisDesk(world.scripts, world.keys, world.keys.triggers),
            reservations=world.buffer,
            settings=world.settings,
            telemetry=world.telemetry,
            clock=lambda: self.now,
        )
        return consumer, turns, drain

    def _request(
        self, tenant: Tenant, task: str, key: str | None, ttl: str | None, chosen: str | None, bypass: bool
    ) -> Request:
        number = len(self.requests)
        options = {} if ttl is None else {"idempotency_key_ttl": ttl}
        if bypass:
            options["one_time_use_token"] = f"token {number}"
        chosen_id = bound_id(*tenant) if chosen == "bound" else chosen
        if chosen is not None:
            task, key, options, bypass = "send", CHOSEN[chosen], {"run_id": f"run_{chosen_id}"}, False
        if key is not None:
            options["idempotency_key"] = key
        content = body(tenant[1], tenant[0], task=task, payload=number, options=options)
        fields = {b"body": json.dumps(content).encode(), b"reply_to": b"mollifier:reply:%d" % number}
        entry = Entry(f"{int(self.now.timestamp() * 1000)}-{number}", fields)
        self.wait_for(self.redis.xadd("mollifier:triggers", fields, id=entry.id))
        run_id = chosen_id or derive("mollifier", entry.id, tenant[1])
        unique = None if key is None else (*tenant, task, key)
        made = len(self.history) - 1, self.now
        self.requests.append(Request(entry, tenant, unique, bypass, run_id, *made))
        return self.requests[-1]

    def _handle(self, worker: int, requests: list[Request], passes: int, fault: Fault | None) -> None:
        self.deliveries.update(request.entry.id for request in requests)
        entries = [replace(one.entry, deliveries=self.deliveries[one.entry.id]) for one in requests]
        self.gates[worker].passes = passes
        self._start("batch", worker, requests, fault, self.pipelines[worker].handle(entries))

    async def _tick(self, worker: int) -> None:
        await self.pipelines[worker].waiting_room.tick()
        await self.pipelines[worker].waiting_room.settled()

    async def _turn(self, drainer: int) -> None:
        consumer, _, drain = self.drains[drainer]
        await self.redis.set(self.worlds[0].keys.heartbeat(consumer), "1")
        await drain.turn()

    def _start(
        self,
        kind: Kind,
        process: int,
        requests: list[Request],
        fault: Fault | None,
        work: Coroutine[Any, Any, Any],
    ) -> None:
        if fault and fault[:2] == ("recall", "lost") and any(one.run_id in CHOSEN for one in requests):
            fault = None
        job = Work(kind, process, requests, fault, len(self.history) - 1)
        job.start(self.loop, work)
        self.jobs.append(job)
        self._proceed(job)

    def _proceed(self, job: Work) -> None:
        self.is_sound = False
        self.wait_for(job.until_still())
        assert job.task is not None
        if job.task.done():
            self.jobs.remove(job)
            try:
                job.task.result()
            except (Unreachable, StoreUnavailable):
                assert job.struck is not None
                assert job.struck.kind == "lost"
        self._check(job)

    # What is there

    async def _look(self) -> State:
        # Rows are accepted by the model's time, too.
        by_the_server = "UPDATE mollifier.runs SET materialised_at = $1 WHERE materialised_at < $2"
        await self.postgres.execute(by_the_server, self.now, NOW)
        rows = await self.postgres.fetch("SELECT * FROM mollifier.runs")
        aliases = await self.postgres.fetch("SELECT id, run_id FROM mollifier.run_aliases")
        asked = await self.redis.xrange("mollifier:triggers")
        state = State(
            {row["id"]: Run(*(row[name] for name in Run._fields)) for row in rows},
            {row["id"]: row["status"] for row in rows},
            {alias["id"]: alias["run_id"] for alias in aliases},
            [],
            [],
            {entry_id.decode() for entry_id, _ in asked},
        )
        for names in map(self.worlds[0].keys.environment, ENVIRONMENTS):
            mark = _position(await self.redis.hget(names.drain, "done") or b"0-0")
            for entry_id, fields in await self.redis.xrange(names.entries):
                run = Run(*_columns(decode_snapshot(fields[b"snapshot"])))
                (state.settled if _position(entry_id) <= mark else state.queued).append(run)
        await self.endings.look(self._now_ms)
        state.claims = dict(self.endings.values)
        assert not await self.redis.exists("mollifier:dead-letters")
        return state

    async def _answers(self) -> list[tuple[int, dict[str, Any]]]:
        """Replies since the last time, with the numbers of their requests."""
        await self.channel.ping("so far")
        answers = []
        while (message := await self.channel.get_message(timeout=10))["type"] != "pong":
            if message["type"] == "pmessage":
                answers.append((int(message["channel"].rpartition(b":")[2]), json.loads(message["data"])))
        return answers

    def _claim(self, key: Key) -> str:
        """The value of a key's claim, '' if there is none."""
        return self.state.claims.get(self._claim_name(key), "")

    def _claim_name(self, key: Key) -> str:
        return self.worlds[0].keys.claim(Run("", *key, None, "", b""))

    # What must hold

    def _check(self, job: Work | None) -> None:
        self.is_sound = False
        self.state = self.wait_for(self._look())
        self._check_requests()
        self._excuse(job)
        self._check_keys()
        for number, answer in self.wait_for(self._answers()):
            assert job is not None
            self._check_answer(self.requests[number], answer, job)
        self._forgive()
        self.is_sound = True

    def _check_requests(self) -> None:
        """G3: a run is what one request asked for, once. G7: its id never has another owner."""
        state = self.state
        for run in (*state.rows.values(), *state.settled, *state.queued):
            request = self.requests[int(run.payload)]
            assert (run.id, run.tenant) == (request.run_id, request.tenant)
            assert self.owners.setdefault(run.id, run.tenant) == run.tenant
            self.first_seen.setdefault(run.id, len(self.history))
            self.spans[run.id] = run.span_id
        assert not [
            run_id for run_id, count in Counter(_ids(state.settled + state.queued)).items() if count > 1
        ]
        assert not state.rows.keys() & state.aliases.keys()
        assert {*_ids(state.settled)} <= state.rows.keys() | state.aliases.keys()

    def _check_keys(self) -> None:
        """G4: a key has one run. Two only with an excuse, and then one becomes an alias of the other."""
        buffered = {*_ids(self.state.buffered())}
        for key, ids in self.state.live(self.now).items():
            assert len(ids) == 1 or self.excuses[key] & TWO_RUNS, (key, ids)
            assert len(ids & buffered) < 2 or self.excuses[key] & {*CLAIMS}, (key, ids)
            self.together.update(combinations(sorted(ids), 2))
        self.history.append(self._known())
        for alias, winner in self.state.aliases.items():
            assert self.state.rows[winner].tenant == self.owners[alias]
            assert (min(alias, winner), max(alias, winner)) in self.together

    def _known(self, now: datetime | None = None) -> dict[Key, set[str]]:
        """The runs that may be named for each key: live ones, and whatever is still in the buffer."""
        queued = _by_key(self.state.queued, now or self.now)
        live = self.state.live(now or self.now)
        return {key: live.get(key, set()) | queued.get(key, set()) for key in {*live, *queued}}

    def _check_answer(self, request: Request, answer: dict[str, Any], job: Work) -> None:
        """G7: it names a run of its tenant. G3: its own, if it has one. G4: else the one that has its key."""
        if answer["type"] == "error":
            assert answer["error"]["code"] in ERRORS
            assert not [run_id for run_id in self.owners.keys() - CHOSEN.keys() if run_id in str(answer)]
            return
        run_id, key = answer["run"]["id"], request.key
        assert self.owners.get(run_id) == request.tenant
        assert answer["run"].get("span_id") in (None, self.spans[run_id])
        self.answered[run_id] = request.tenant
        if run_id == request.run_id:
            return
        assert answer["is_cached"]
        assert key is not None
        had_one = self.first_seen.get(request.run_id, len(self.history)) <= job.began
        assert not had_one or job.kind == "tick" or "recall" in self.excuses[key]
        # A batch is handled as of its beginning, also where it took longer; who waits does so since it asked.
        # Whether a key had run out is a question of when the request was made, however late it is handled.
        since = request.made if job.kind == "tick" else job.began
        known = [*self.history[since:], self._known(request.made_at)]
        assert self.excuses[key] or any(run_id in one.get(key, ()) for one in known)

    def _excuse(self, job: Work | None) -> None:
        """Note why the model cannot be strict about a key: see EXCUSES."""
        for one in {*self.jobs, *([job] if job else [])}:
            keys, struck = Counter(one.keyed()), one.struck
            if one is job:
                one.holds = self._held(one)
            for key, (run_id, end) in one.holds.items():
                if not self._is_pending(key, run_id) and self._claim(key) != run_id:
                    assert end <= self._now_ms or self._was_handed_out_again(run_id), "a claim was stolen"
                    self.excuses[key].add("stalled")
            for request in one.requests:
                others = {key for other in self.jobs if other is not one for key in other.keyed()}
                if (
                    request.bypass
                    and request.key
                    and (one.halted or keys[request.key] > 1 or request.key in others)
                ):
                    self.excuses[request.key].add("bypass")
            if struck and struck.kind == "lost" and (struck.point != "claim" or one.kind != "tick"):
                for key in keys:
                    self.excuses[key] |= {struck.point} & {*CLAIMS, "look_up_keys", "recall"}

    def _held(self, job: Work) -> dict[Key, tuple[str, int]]:
        """The claims that a job holds: by key, for which run and until when."""
        return {
            request.key: (request.run_id, self.endings.at[self._claim_name(request.key)])
            for request in job.requests
            if request.key is not None and self._is_pending(request.key, request.run_id)
        }

    def _was_handed_out_again(self, run_id: str) -> bool:
        """Another attempt at the same run may end the claim of the first."""
        return sum(self.deliveries[one.entry.id] for one in self.requests if one.run_id == run_id) > 1

    def _is_pending(self, key: Key, run_id: str) -> bool:
        return self._claim(key).startswith(f"{PENDING}{run_id}:")

    def _forgive(self) -> None:
        """Be strict again about keys whose one run, if any, all can know of, and that nobody works on."""
        busy = {key for job in self.jobs for key in job.keyed()}
        buffered = _ids(self.state.buffered())
        for key in [key for key in self.excuses if key not in busy]:
            live, value = self.state.live(self.now).get(key, set()), self._claim(key)
            is_published = value != "" and not value.startswith(PENDING)
            if len(live) < 2 and (value in buffered if is_published else not live & {*buffered}):
                del self.excuses[key]


def _ids(runs: list[Run]) -> list[str]:
    return [run.id for run in runs]


def _position(entry_id: bytes) -> tuple[int, int]:
    ms, _, sequence = entry_id.partition(b"-")
    return int(ms), int(sequence)


@asynccontextmanager
async def site(redis_url: str, database_url: str) -> AsyncIterator[dict[str, Any]]:
    worlds = []
    for changes in (WORKERS | DRAINERS).values():
        urls = {"REDIS_URL": redis_url, "DATABASE_URL": database_url}
        world = await World.open(Settings.model_validate(urls | SETTINGS | changes), Telemetry("model"))
        breakable(world.scripts, "run", lambda calls: {call.name for call in calls}, Unreachable)
        for method in ("insert", "look_up_keys", "recall", "materialise"):
            breakable(world.store, method, lambda *_, name=method: {name}, StoreUnavailable)
        worlds.append(world)
    redis = Redis.from_url(redis_url, protocol=2)
    channel: Any = redis.pubsub()
    await channel.psubscribe("mollifier:reply:*")
    postgres = await asyncpg.connect(database_url)
    yield {"worlds": worlds, "redis": redis, "channel": channel, "postgres": postgres}
    for world in worlds:
        await world.close()
    await channel.aclose()
    await redis.aclose()
    await postgres.close()


ONE = [Ask(("org_1", "env_1"))]
BEFORE_ACCEPT = Fault("accept", "halt", False)


def a_run_fails_while_the_buffer_still_shows_it(model: Model) -> None:
    model.trigger(0, ONE, 0, None)
    model.drain(3, None)
    model.trigger(0, ONE, 0, None)
    model.finish(0, "FAILED")
    model.trigger(0, ONE, 0, None)


def a_request_is_handled_elsewhere_while_it_waits(model: Model) -> None:
    model.trigger(0, ONE, 9, None)
    model.finish(0, "FAILED")
    model.trigger(1, ONE, 0, None)
    model.redeliver(0, [0], False, 9, None)
    model.finish(0, "FAILED")
    model.trigger(1, ONE, 0, None)


def a_request_comes_again_when_its_run_failed_and_another_has_the_key(model: Model) -> None:
    model.trigger(0, ONE, 9, None)
    model.finish(0, "FAILED")
    model.trigger(0, ONE, 9, None)
    model.tick(0, 9, None)
    model.redeliver(0, [1], False, 9, None)


def two_work_on_one_key(model: Model) -> None:
    model.trigger(0, ONE, 0, BEFORE_ACCEPT)
    model.trigger(1, ONE, 0, None)


def a_claim_runs_out_before_it_is_accepted(model: Model) -> None:
    model.trigger(0, ONE, 0, BEFORE_ACCEPT)
    model.advance(10)
    model.trigger(1, ONE, 0, BEFORE_ACCEPT)
    model.go_on(0, None)
    model.go_on(0, None)


def a_claim_runs_out_before_it_is_let_go(model: Model) -> None:
    model.trigger(2, ONE, 9, Fault("look_up_keys", "halt", False))
    model.advance(10)
    model.trigger(0, ONE, 0, BEFORE_ACCEPT)
    model.go_on(0, Fault("insert", "lost", False))


def a_claim_runs_out_before_it_is_published(model: Model) -> None:
    model.trigger(0, ONE, 9, Fault("settle_claims", "halt", False))
    model.advance(10)
    model.finish(0, "FAILED")
    model.trigger(1, ONE, 0, BEFORE_ACCEPT)
    model.go_on(0, None)


def a_call_is_repeated_whose_run_lost_its_key(model: Model) -> None:
    model.trigger(0, [Ask(TENANTS[0], chosen="bound")], 9, None)
    model.finish(0, "FAILED")
    model.trigger(1, ONE, 0, None)
    model.trigger(1, [Ask(TENANTS[0], chosen="bound")], 0, None)
    model.drain(3, None)
    model.trigger(0, [Ask(TENANTS[0], chosen="bound")], 0, None)


def a_call_is_repeated_while_claims_are_away(model: Model) -> None:
    model.trigger(0, [Ask(TENANTS[0], chosen="bound")], 0, None)
    model.trigger(1, [Ask(TENANTS[0], chosen="bound")], 9, Fault("claim", "lost", False))
    model.redeliver(0, [1], False, 9, None)


def a_run_that_lost_its_key_is_drained_again(model: Model) -> None:
    model.trigger(0, [*ONE, Ask(TENANTS[0], bypass=True)], 0, None)
    model.drain(3, Fault("settle", "halt", False))
    model.crash(3)
    model.finish(0, "FAILED")


def an_organization_chooses_an_id_that_another_has_in_the_buffer(model: Model) -> None:
    for tenant in (TENANTS[0], TENANTS[-1]):
        model.trigger(0, [Ask(tenant, chosen="x")], 0, None)


STORIES = [
    a_run_fails_while_the_buffer_still_shows_it,
    a_request_is_handled_elsewhere_while_it_waits,
    a_request_comes_again_when_its_run_failed_and_another_has_the_key,
    two_work_on_one_key,
    a_claim_runs_out_before_it_is_accepted,
    a_claim_runs_out_before_it_is_let_go,
    a_claim_runs_out_before_it_is_published,
    a_call_is_repeated_whose_run_lost_its_key,
    a_call_is_repeated_while_claims_are_away,
    a_run_that_lost_its_key_is_drained_again,
    an_organization_chooses_an_id_that_another_has_in_the_buffer,
]


@patient
async def test_g3_g4_g7_one_run_each_and_walls_between_tenants(redis_url: str, database_url: str) -> None:
    await search(Model, partial(site, redis_url, database_url), examples=250, steps=25)


@pytest.mark.parametrize("story", STORIES)
async def test_g3_g4_g7_what_chance_seldom_finds(
    story: Callable[[Model], None], redis_url: str, database_url: str
) -> None:
    await tell(story, Model, partial(site, redis_url, database_url))

"""The buffer and its drain against plain lists: nothing is lost (G2), taken twice (G3) or out of order (G9),
keys have one winner (G4), changes stick (G11), and tenants share (G9).

Hypothesis decides what happens: fronts accept, runs are changed, drainers take, write and settle, stall, die,
are taken for dead and come back, and a server is lost in the middle of a call. What Redis holds is read
before and after every script, and held against what that one may do. Time is the model's. Postgres is a dict.
A longer search: see `machines.py`.

Not played: DRAIN_MAX_RATE, which goes by the server's clock; two organizations that name one environment.
"""

import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from app.batch import Answer, Claim
from app.buffer import RedisBuffer
from app.buffered_runs import RedisBufferedRuns
from app.changes import add_tags, once
from app.claims import RedisClaims
from app.drain import Drain
from app.errors import (
    BufferUnavailable,
    ClaimLost,
    QueueLimitExceeded,
    RunBusy,
    StatementTimedOut,
    StoreUnavailable,
    Unreachable,
)
from app.keys import Keys
from app.ports import Taken
from app.redis_client import Call, Scripts
from app.redis_connection import connect
from app.replies import RedisDesk
from app.rows import Materialised, Row
from app.runs import Runs, StoredRun, Tenancy
from app.settings import Settings
from app.telemetry import Telemetry
from app.turns import RedisTurns
from schemas.overlay import decode_overlay
from schemas.snapshot import Snapshot, decode_snapshot
from tests.buffer_look import Look, decoded, look, position
from tests.builders import NOW, START_MS, run
from tests.machines import (
    JOB,
    Endings,
    Fault,
    Job,
    Machine,
    breakable,
    faults,
    patient,
    search,
    tell,
)

BATCH = 6
GRACE_S = 3600
SETTINGS = {
    "partitions": 2,
    "drain_batch_size": BATCH,
    "ack_grace_ttl_s": GRACE_S,
    "claim_ttl_s": 8,
    "claim_min_ttl_s": 4,
    "drain_target_latency_ms": 10**9,
}
CONFIG = Settings.model_validate(SETTINGS)
KEYS = Keys(CONFIG.namespace, CONFIG.partitions)

ORGANIZATIONS = {"env_1": "org_1", "env_2": "org_1", "env 3": "org_2", "é:4": "org_3"}
FRONTS = (0, 1)
LIMITS = (0, 4)
"""What each front lets an environment have queued; 0: no limit."""

DRAINERS = (2, 3, 4)
CHANGER = 5
HANDS = 3
"""Batches that a drainer may have in its hands."""

AHEAD = 3 * BATCH
"""How far one that waits may fall behind another, in entries over weight: it may owe a batch that it had
alone, and the other may lag by two. Two were seen."""

FAR = 10**15
SCRIPTS = {"claim", "accept", "change", "schedule", "take", "settle", "forget"}


class Ask(NamedTuple):
    """A run to be accepted: one that is `known` by then, if there is any, or a new one."""

    environment: str
    key: str | None = None
    is_claimed: bool = True
    known: int | None = None


class Ledger:
    """What tenants were given, in entries over weight, and how far those that wait fell behind others."""

    def __init__(self) -> None:
        self.given: defaultdict[str, float] = defaultdict(float)
        self._least: dict[tuple[str, str], float] = {}

    def give(self, shares: Mapping[str, float], waiting: set[str]) -> None:
        """Note what is handed out, to some of those that were waiting for it."""
        for pair in [pair for pair in self._least if pair[0] not in waiting]:
            del self._least[pair]
        for one in waiting:
            for other in self.given.keys() | waiting:
                before = self.given[other] - self.given[one]
                self._least[one, other] = min(self._least.get((one, other), before), before)
        for tenant, share in shares.items():
            self.given[tenant] += share
        for (one, other), least in self._least.items():
            ahead = self.given[other] - self.given[one] - least
            assert ahead <= AHEAD, f"{one} waits, and {other} was given {ahead} more"


class Rows:
    """What is in Postgres. Implements `ports.Materialiser` and `runs.StoredRuns`."""

    def __init__(self, accepted: Mapping[str, list[str]]) -> None:
        self._accepted = accepted
        self.rows: dict[str, Row] = {}

    async def materialise(self, rows: Sequence[Row], now: datetime) -> Sequence[Materialised]:
        """As `amend_runs.sql` has it, rows that are there are brought up to later changes."""
        return [self._write(row) for row in rows]

    def _write(self, row: Row) -> Materialised:
        known = self.rows.get(row.run.id)
        if known is None:
            todo = [run_id for run_id in self._accepted[row.run.environment_id] if run_id not in self.rows]
            assert row.run.id == todo[0], "rows of an environment come in the order accepted"
            self.rows[row.run.id] = row
            return Materialised("inserted")
        if known.revision < row.revision:
            self.rows[row.run.id] = row
        return Materialised("present")

    async def find(self, tenancy: Tenancy, run_id: str) -> StoredRun | None:
        row = self.rows.get(run_id)
        return None if row is None else StoredRun(row, NOW, NOW)

    async def change(self, before: StoredRun, after: Row) -> StoredRun | None:
        if self.rows[after.run.id].revision != before.row.revision:
            return None
        self.rows[after.run.id] = after
        return before._replace(row=after)


class Postgres:
    """The rows as a drainer reaches them: its statements may fail, and hang."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    async def materialise(self, rows: Sequence[Row], now: datetime) -> Sequence[Materialised]:
        fault, call = JOB.get().fault, partial(self._rows.materialise, rows, now)
        lost: Any = partial(_error, fault) if fault else StoreUnavailable
        result: Sequence[Materialised] = await JOB.get().meet({"materialise", "hang"}, call, lost)
        return result


def _error(fault: Fault, message: str) -> StoreUnavailable:
    error = StatementTimedOut(message) if fault.point == "hang" else StoreUnavailable(message)
    error.may_be_done = fault.done or fault.point == "hang"
    return error


class Work(Job):
    """A job of a front (`runs` and what becomes of them), of a drainer (`batch`), or a change."""

    kind = ""
    runs: Sequence[Snapshot] = ()
    claims: Sequence[Claim | None] = ()
    claims_after: Mapping[str, str]
    """Of those of all keys, once its runs are accepted."""
    expected: list[Any]
    """The answers that it is to get."""
    batch: "Batch | None" = None
    is_sound = True
    """Whether its process is alive, and cannot have been taken for dead since it began."""


@dataclass(eq=False)
class Batch:
    """What a drainer has in its hands: `sound` until the drainer may be taken for dead, `over` once it has
    said how its statement ended."""

    taken: Sequence[Taken]
    is_sound: bool = True
    is_handled: bool = False
    is_over: bool = False


@dataclass
class Drainer:
    consumer: str
    turns: RedisTurns
    drain: Drain
    batches: list[Batch] = field(default_factory=list)


WHERE = st.sampled_from([*ORGANIZATIONS, "env_1"])
ASK = st.builds(
    Ask, WHERE, st.sampled_from([None, None, "a", "b"]), st.booleans(), st.none() | st.integers(0, 9)
)
PICK = st.integers(0, 30)
WEIGHTS = st.dictionaries(st.sampled_from(["org_1", "org_2"]), st.integers(2, 4))
DRAINER = st.sampled_from(DRAINERS)
NOTICES = st.sampled_from(["hears", "looks", "looks", "neither"])
TAKING = faults("schedule", "take", "ZRANGE", "ZREM", "SMEMBERS", "EXISTS", "HKEYS")
HANDLING = faults("materialise", "hang", "materialise", "settle")


class Model(Machine):
    """The rules are what may happen; `_before` and `_after` are what must hold at each script."""

    redis: Any
    scripts: Sequence[Scripts]
    stage: "Stage"

    def __init__(self) -> None:
        super().__init__()
        self.stage.model = self
        self.now, self.now_ms = NOW, START_MS
        self.count = 0
        self.accepted: defaultdict[str, list[str]] = defaultdict(list)
        self.runs: list[Snapshot] = []
        self.tags: defaultdict[str, set[str]] = defaultdict(set)
        self.rows = Rows(self.accepted)
        self.jobs: list[Work] = []
        self.weights: dict[str, int] = {}
        self.organizations, self.environments = Ledger(), defaultdict[str, Ledger](Ledger)
        self.endings = Endings(self.redis, "mollifier:*:claim:*", 1000)
        self.graces: dict[str, int] = {}
        self.consumers: list[str] = []
        self.alive: set[str] = set()
        self.wait_for(self.redis.flushall())
        limited = CONFIG.model_copy(update={"max_buffered_per_env": LIMITS[1]})
        fronts = zip(FRONTS, (CONFIG, limited), strict=True)
        self.buffers = [RedisBuffer(self.scripts[front], KEYS, config) for front, config in fronts]
        self.claims = [RedisClaims(self.scripts[front], KEYS, CONFIG) for front in FRONTS]
        rows: Any = self.rows
        self.reader = Runs(rows, RedisBufferedRuns(self.scripts[CHANGER], KEYS), wait_s=0)
        self.drainers = {number: self._drainer(number) for number in DRAINERS}
        self.look = self.wait_for(self._look())
        self.is_sound = True

    # What happens

    @rule(
        front=st.sampled_from(FRONTS),
        asks=st.lists(ASK, min_size=1, max_size=4),
        fault=faults("claim", "accept"),
    )
    def accept(self, front: int, asks: list[Ask], fault: Fault | None) -> None:
        job = Work(front, fault)
        self._start("accept", job, self._accept(job, [self._run_for(ask) for ask in asks]))

    @rule(drainer=DRAINER, notices=NOTICES, fault=TAKING)
    def take(self, drainer: int, notices: str, fault: Fault | None) -> None:
        one = self.drainers[drainer]
        takes = any(job.process == drainer and job.kind == "take" for job in self.jobs)
        if takes or len(one.batches) == HANDS:
            return
        if notices == "hears":
            one.turns.schedule.stir()
        # Now and then it looks who arrived and who died, and time is the model's.
        one.turns.schedule._looked = math.inf if notices == "neither" else -math.inf
        job = Work(drainer, fault)
        job.is_sound = one.consumer in self.alive
        self._start("take", job, self._take(job, one))

    @rule(drainer=DRAINER, notices=NOTICES, pick=PICK, fault=HANDLING)
    def turn(self, drainer: int, notices: str, pick: int, fault: Fault | None) -> None:
        self.take(drainer, notices, None)
        self.handle(drainer, pick, fault)

    @precondition(lambda self: any(one.batches for one in self.drainers.values()))
    @rule(drainer=DRAINER, pick=PICK, fault=HANDLING)
    def handle(self, drainer: int, pick: int, fault: Fault | None) -> None:
        one = self.drainers[drainer]
        batches = [batch for batch in one.batches if not batch.is_handled]
        if batches:
            job = Work(drainer, fault)
            job.batch = batches[pick % len(batches)]
            job.batch.is_handled = True
            self._start("handle", job, self._handle(job, one))

    @precondition(lambda self: self.runs)
    @rule(pick=PICK, fault=faults("read", "change"))
    def change(self, pick: int, fault: Fault | None) -> None:
        known = [one for one in self.runs if one.id in self.accepted[one.environment_id]]
        if known:
            self._start(
                "change", job := Work(CHANGER, fault), self._change(job, known[-1 - pick % len(known)])
            )

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK, fault=faults("accept", "schedule", "take", "materialise", "hang", "settle", "change"))
    def go_on(self, pick: int, fault: Fault | None) -> None:
        job = self.jobs[pick % len(self.jobs)]
        job.go_on(fault)
        self._proceed(job)

    @rule(process=st.sampled_from([*FRONTS, *DRAINERS]), kind=st.sampled_from(["crash", "silence", "beat"]))
    def suffer(self, process: int, kind: str) -> None:
        if kind == "crash":
            self.crash(process)
        elif process in DRAINERS:
            self.silence(process) if kind == "silence" else self.beat(process)

    def crash(self, process: int) -> None:
        """Its memory is gone, and its heartbeat: what it held is left to the others."""
        for job in [job for job in self.jobs if job.process == process]:
            self.wait_for(job.die())
            self.jobs.remove(job)
        if process in DRAINERS:
            self.silence(process)
            self.drainers[process] = self._drainer(process)

    def silence(self, drainer: int) -> None:
        """It stalls so long that it looks dead."""
        consumer = self.drainers[drainer].consumer
        self.alive.discard(consumer)
        self.wait_for(self.redis.delete(KEYS.heartbeat(consumer)))
        for batch in self.drainers[drainer].batches:
            batch.is_sound = False
        for job in self.jobs:
            job.is_sound = job.is_sound and job.process != drainer

    def beat(self, drainer: int) -> None:
        self._beat(self.drainers[drainer].consumer)

    def advance(self, seconds: int) -> None:
        """Claims end, grace is over, and what failed has rested."""
        self.now += timedelta(seconds=seconds)
        self.now_ms += seconds * 1000
        self.wait_for(self._advance())

    @rule(drainer=DRAINER, seconds=st.sampled_from([5, 20, GRACE_S]), fault=faults("ZRANGEBYSCORE", "forget"))
    def forget(self, drainer: int, seconds: int, fault: Fault | None) -> None:
        self.advance(seconds)
        job = Work(drainer, fault)
        self._start("forget", job, self._forget(job, self.drainers[drainer]))

    @rule(drainer=DRAINER, weights=WEIGHTS, where=st.sets(WHERE, min_size=2), batches=st.integers(3, 6))
    def flow(self, drainer: int, weights: dict[str, int], where: set[str], batches: int) -> None:
        """For a while there is much to do, and nothing goes wrong with this drainer."""
        self.weigh(weights)
        self.accept(0, [Ask(environment) for environment in sorted(where) for _ in range(9)], None)
        if not any(job.process == drainer for job in self.jobs):
            for _ in range(batches):
                self.take(drainer, "hears", None)
                self._handle_all(drainer)

    def weigh(self, weights: dict[str, int]) -> None:
        self.weights = weights
        schedule = self.drainers[DRAINERS[0]].turns.schedule
        self._start("weigh", Work(DRAINERS[0], None), schedule.set_weights(weights))

    def _handle_all(self, drainer: int) -> None:
        while any(not batch.is_handled for batch in self.drainers[drainer].batches):
            self.handle(drainer, 0, None)

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
        for drainer in DRAINERS:
            self.beat(drainer)
        idle = 0
        for number in range(sum(map(len, self.accepted.values())) + 20):
            drainer = DRAINERS[number % len(DRAINERS)]
            self.take(drainer, "looks", None)
            idle = 0 if self.drainers[drainer].batches else idle + 1
            self._handle_all(drainer)
            if idle == len(DRAINERS):
                self.advance(10)
                if not any(one.queued for one in self.look.environments.values()):
                    break
        assert idle == len(DRAINERS), "all is drained"
        for drainer in (*DRAINERS, *DRAINERS):  # what the dead had is found empty, and reported the next time
            self.take(drainer, "looks", None)
            assert not self.drainers[drainer].batches
        assert {*self.rows.rows} == {run_id for some in self.accepted.values() for run_id in some}
        for run_id, tags in self.tags.items():
            assert tags <= {*self.rows.rows[run_id].run.tags}, "changes stick"
        self.forget(DRAINERS[0], GRACE_S, None)
        left = {name.decode() for name in self.wait_for(self.redis.keys("*"))}
        assert left - {f"{KEYS.turns}:weights"} == {KEYS.heartbeat(consumer) for consumer in self.alive}

    # How it happens

    async def _accept(self, job: Work, runs: Sequence[tuple[Snapshot, bool]]) -> None:
        claims: list[Claim | None] = [None] * len(runs)
        keyed: dict[str, int] = {}
        for at, (one, is_claimed) in enumerate(runs):
            if is_claimed and one.idempotency_key:
                keyed.setdefault(KEYS.claim(one), at)
        try:
            found = await self.claims[job.process].claim([runs[at][0] for at in keyed.values()], self.now)
        except Unreachable:
            found = []
        for at, claim in zip(keyed.values(), found, strict=False):
            claims[at] = claim
        mine = [at for at, claim in enumerate(claims) if claim is None or claim.state == "claimed"]
        job.runs, job.claims = [runs[at][0] for at in mine], [claims[at] for at in mine]
        if not mine:
            return
        outcomes = await self.buffers[job.process].accept(job.runs, job.claims)
        assert [one if isinstance(one, Answer) else type(one) for one in outcomes] == job.expected

    async def _take(self, job: Work, one: Drainer) -> None:
        taken = await one.drain.take()
        if taken:
            batch = Batch(taken, is_sound=job.is_sound)
            one.batches.append(batch)
            self._check_batch(batch, one.consumer)

    async def _handle(self, job: Work, one: Drainer) -> None:
        assert job.batch is not None
        try:
            await one.drain.handle(job.batch.taken)
        finally:
            one.batches.remove(job.batch)

    async def _change(self, job: Work, changed: Snapshot) -> None:
        tag = f"tag {self.count}"
        self.count += 1
        tenancy, before = Tenancy(changed.organization_id, changed.environment_id), {*self.tags[changed.id]}
        try:
            found = await self.reader.change(tenancy, changed.id, once(add_tags((tag,), 1000), tag), self.now)
        except RunBusy:
            return
        assert {tag} | before <= {*found.row.run.tags}
        self.tags[changed.id].add(tag)

    async def _forget(self, job: Work, one: Drainer) -> None:
        while await one.turns.forget() or job.struck:
            if job.struck:
                return
        assert not self._due(self.look)

    def _run_for(self, ask: Ask) -> tuple[Snapshot, bool]:
        known = [one for one in self.runs if one.environment_id == ask.environment]
        if ask.known is not None and known:
            return known[-1 - ask.known % len(known)], ask.is_claimed
        changes: dict[str, Any] = {"created_at": self.now, "buffered_at": self.now}
        if ask.key is not None:
            changes |= {
                "idempotency_key": ask.key,
                "idempotency_key_expires_at": self.now + timedelta(seconds=20),
            }
        one = run(ask.environment, organization_id=ORGANIZATIONS[ask.environment], **changes)
        self.runs.append(one)
        return one, ask.is_claimed

    def _drainer(self, number: int) -> Drainer:
        consumer = f"drainer {self.count}"
        self.count += 1
        self.consumers.append(consumer)
        self._beat(consumer)
        scripts = self.scripts[number]
        turns = RedisTurns(scripts, KEYS, CONFIG, consumer)
        drain = Drain(
            turns=turns,
            materialiser=Postgres(self.rows),
            graveyard=RedisDesk(scripts, KEYS, KEYS.triggers),
            reservations=self.buffers[0],
            settings=CONFIG,
            telemetry=Telemetry("model"),
            clock=lambda: self.now,
        )
        return Drainer(consumer, turns, drain)

    def _beat(self, consumer: str) -> None:
        self.alive.add(consumer)
        self.wait_for(self.redis.set(KEYS.heartbeat(consumer), "1"))

    def _start(self, kind: str, job: Work, work: Coroutine[Any, Any, Any]) -> None:
        job.kind = kind
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
            except (Unreachable, StoreUnavailable, BufferUnavailable):
                assert job.struck is not None
                assert job.struck.kind == "lost"
        self.is_sound = True

    # What is there

    async def _look(self) -> Look:
        """Read everything. Rests and grace are made endless: they are over when the model says so."""
        found = await look(self.redis, KEYS, ORGANIZATIONS, self.consumers)
        resting = found.schedule.resting
        tired = {environment: FAR for environment, until in resting.items() if 0 < until < FAR}
        if tired:
            await self.redis.zadd(f"{KEYS.turns}:resting", tired)
        for element in found.grace - self.graces.keys():
            self.graces[element] = self.now_ms + GRACE_S * 1000
        return found

    def _due(self, found: Look) -> list[str]:
        return sorted(element for element in found.grace if self.graces[element] <= self.now_ms)

    async def _advance(self) -> None:
        await self.endings.end(self.now_ms)
        resting = self.look.schedule.resting
        if resting:
            await self.redis.zadd(f"{KEYS.turns}:resting", dict.fromkeys(resting, 0))
        for element in self._due(self.look):
            partition = KEYS.environment(element.partition(" ")[2]).partition
            await self.redis.zadd(KEYS.grace(partition), {element: 0})
        self.look = await self._look()

    # What must hold

    async def observe(
        self, calls: Sequence[Call], make: Callable[[Sequence[Call]], Awaitable[list[Any]]]
    ) -> Any:
        """Make calls, and look what the scripts among them do."""
        name = calls[0].name if calls else ""
        if name not in SCRIPTS:
            return await make(calls)
        before, claims, job = self.look, dict(self.endings.values), JOB.get()
        assert isinstance(job, Work)
        plan = self._plan(job) if name == "accept" else {}
        answers = await make(calls)
        self.look = await self._look()
        if name in ("claim", "accept", "settle"):
            await self.endings.look(self.now_ms)
        self._check_state()
        for environment, now in self.look.environments.items():
            was = before.environments[environment]
            if name != "accept":
                assert [one.id for _, one in now.entries] == [
                    one.id for _, one in was.entries
                ] or name == "forget"
            if name not in ("take", "settle", "forget"):
                assert now.marks() == was.marks()
            if name not in ("change", "forget"):
                assert now.overlays == was.overlays
        if name == "accept":
            self._check_accept(before, plan)
        elif name == "take":
            self._check_take(before, self._consumer(job))
        elif name == "settle":
            self._check_settle(before, claims, job)
        elif name == "forget":
            self._check_forget(before)
        elif name == "change":
            self._check_change(before)
        elif name == "schedule":
            self._check_shares(str(calls[0].arguments[0]), answers[0])
        return answers

    def _consumer(self, job: Job) -> str:
        return self.drainers[job.process].consumer

    def _check_state(self) -> None:
        """What is so between any two scripts, whoever stands still."""
        look = self.look
        for environment, one in look.environments.items():
            run_ids = [run.id for _, run in one.entries]
            accepted, queued = self.accepted[environment], one.queued
            assert run_ids == accepted[len(accepted) - len(run_ids) :], "G9: they are in order"
            waiting = accepted[len(accepted) - len(queued) :]
            assert {*accepted} - {*waiting} <= self.rows.rows.keys(), "G2: it was taken off, and is no row"
            assert int(one.drain.get("queued", 0)) == len(queued)
            since = look.ready.get(environment)
            assert (since is None) == (not queued)
            # A script's time goes on in Redis 7.0 before the entry has its id.
            assert since is None or 0 <= position(queued[0][0])[0] - since <= 1000
            assert one.index == {run.id: entry_id for entry_id, run in one.entries}
            assert one.overlays.keys() <= one.index.keys()
            assert ("holder" in one.drain) == ("hold" in one.drain) == ("taken" in one.drain)
            assert not queued or environment in look.schedule.states | look.arrivals, "G9: it is forgotten"
        for partition, total in enumerate(look.totals):
            mine = [
                one
                for name, one in look.environments.items()
                if KEYS.environment(name).partition == partition
            ]
            assert total == sum(len(one.queued) for one in mine)
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Every environment of the schedule is in one place, from which it will be taken."""
        schedule = self.look.schedule
        waiting = schedule.waiting()
        places = Counter([*waiting, *schedule.resting, *schedule.apart])
        places.update(environment for some in schedule.held.values() for environment in some)
        assert places == Counter(dict.fromkeys(schedule.states, 1))
        has_environments = {name for name, some in schedule.environments.items() if some}
        assert schedule.organizations.keys() == has_environments
        can_be_chosen = {ORGANIZATIONS[environment] for environment in waiting}
        assert schedule.choosable == {name: schedule.organizations[name] for name in can_be_chosen}
        assert schedule.takers == {consumer for consumer, some in schedule.held.items() if some}

    def _plan(self, job: Work) -> dict[str, list[str]]:
        """What is to be accepted: run ids by environment. The job is given the answers that it is to get."""
        claims = dict(self.endings.values)
        added: dict[str, list[str]] = {environment: [] for environment in ORGANIZATIONS}
        job.expected = []
        limit = LIMITS[job.process]
        for one, claim in zip(job.runs, job.claims, strict=True):
            there = self.look.environments[one.environment_id]
            known = {run.id: run for run in self.runs if run.id in {*there.index, *added[one.environment_id]}}
            name = KEYS.claim(one) if one.idempotency_key else ""
            value, mine = claims.get(name, ""), (claim and claim.expected) or ""
            is_pending, has_winner = value.startswith("pending:"), value not in ("", one.id)
            answer: Any
            if one.id in known:
                answer = Answer(one.id, one.span_id, None, is_mollified=True)
            elif has_winner and not is_pending and value in known:
                answer = Answer(value, known[value].span_id, None, is_mollified=True, is_cached=True)
            elif has_winner and not is_pending and not mine:
                answer = Answer(value, None, None, is_mollified=False, is_cached=True)
            elif (has_winner and not is_pending) or (mine and value not in (mine, one.id)):
                answer = ClaimLost
            elif limit and len(there.queued) + len(added[one.environment_id]) >= limit:
                answer = QueueLimitExceeded
            else:
                answer = Answer(one.id, one.span_id, None, is_mollified=True)
                added[one.environment_id].append(one.id)
                if name and (not is_pending or value == mine):
                    claims[name] = one.id
            job.expected.append(answer)
        job.claims_after = claims
        for environment, run_ids in added.items():
            self.accepted[environment] += run_ids
        return added

    def _check_accept(self, before: Look, plan: Mapping[str, list[str]]) -> None:
        job = JOB.get()
        assert isinstance(job, Work)
        assert self.endings.values == job.claims_after, "G4"
        for environment, added in plan.items():
            was, now = before.environments[environment], self.look.environments[environment]
            assert [one.id for _, one in now.entries] == [one.id for _, one in was.entries] + added

    def _check_take(self, before: Look, taker: str) -> None:
        """The oldest entries of what nobody else holds, or just what a dead drainer had taken."""
        for environment, was in before.environments.items():
            now = self.look.environments[environment]
            assert now.mark("done") == was.mark("done")
            if now.hold is None and was.hold is not None:
                assert not was.queued
            elif now.hold != was.hold:
                assert now.hold is not None
                assert now.hold[0] == taker
                assert now.mark("taken") in [position(entry_id) for entry_id, _ in was.queued]
                if was.hold is not None and was.hold[0] != taker:
                    assert was.hold[0] not in self.alive, "it was taken from the living"
                    assert now.mark("taken") == was.mark("taken")
                else:
                    count = len(was.queued) - len(now.past("taken"))
                    assert count <= int(before.schedule.held[taker].get(environment, str(BATCH)).split()[0])

    def _check_batch(self, batch: Batch, taker: str) -> None:
        """Of what is in the hands of those who may not be taken for dead, nothing is there twice."""
        for one in batch.taken:
            now = self.look.environments[one.environment_id]
            queued = [(entry_id, run.id) for entry_id, run in now.queued]
            if batch.is_sound:
                got = [(entry_id, decode_snapshot(snapshot).id) for entry_id, snapshot in one.entries]
                assert got == queued[: len(got)], "G9: the oldest, in order"
                assert (now.hold, now.mark("taken")) == ((taker, one.hold), position(got[-1][0]))
                assert {entry: now.overlays.get(run_id) for entry, run_id in got} == {
                    entry: one.overlays.get(entry) for entry, _ in got
                }
        sound = [
            other
            for one in self.drainers.values()
            for other in one.batches
            if other.is_sound and not other.is_over
        ]
        held = Counter(one.environment_id for other in sound for one in other.taken)
        assert max(held.values(), default=1) == 1, "G3: two hold it"

    def _check_settle(self, before: Look, claims: dict[str, str], job: Work) -> None:
        """Only the holder's word counts, and only for what is a row by now."""
        taker, batch = self._consumer(job), job.batch
        assert batch is not None
        holds = {one.environment_id: (taker, one.hold) for one in batch.taken}
        lasts = {one.environment_id: position(one.entries[-1][0]) for one in batch.taken}
        for environment, was in before.environments.items():
            now = self.look.environments[environment]
            if environment not in holds or holds[environment] != was.hold:
                assert now.marks() == was.marks(), "it was not held"
                continue
            assert now.hold is None
            assert now.mark("done") in (was.mark("done"), lasts[environment])
            if now.mark("done") == was.mark("done"):
                written = [one.id for _, one in now.queued if one.id in self.rows.rows]
                assert all(now.state_of(run_id) == "DRAINING" for run_id in written), "it may be in Postgres"
            for entry_id, one in was.queued:
                is_settled = position(entry_id) <= now.mark("done")
                if is_settled and one.idempotency_key and claims.get(KEYS.claim(one)) == one.id:
                    del claims[KEYS.claim(one)]
        assert self.endings.values == claims, "Postgres has the keys of what was settled, and no others"
        batch.is_over = True

    def _check_forget(self, before: Look) -> None:
        """What was settled and is due, and all of what was settled before it."""
        for environment, was in before.environments.items():
            now = self.look.environments[environment]
            due = [
                position(element.partition(" ")[0])
                for element in self._due(before)
                if element.partition(" ")[2] == environment
            ]
            first = position(now.entries[0][0]) if now.entries else (FAR, 0)
            gone = [position(entry_id) for entry_id, _ in was.entries if position(entry_id) < first]
            assert not gone or gone[-1] in due
            assert now.overlays == {
                run_id: was.overlays[run_id] for run_id in now.index if run_id in was.overlays
            }
            assert not now.entries or now.marks() == was.marks()

    def _check_change(self, before: Look) -> None:
        """One after the other, and not of an entry that is a row already or that anybody may write (G11)."""
        batches = [one for drainer in self.drainers.values() for one in drainer.batches if not one.is_over]
        in_hand = {decoded(run).id for one in batches for taken in one.taken for _, run in taken.entries}
        for environment, was in before.environments.items():
            overlays = self.look.environments[environment].overlays
            for run_id in [run_id for run_id in overlays if overlays[run_id] != was.overlays.get(run_id)]:
                assert was.state_of(run_id) == "QUEUED"
                assert run_id not in {*self.rows.rows, *in_hand}, "it is a row, or may be one at any time"
                revision = decode_overlay(was.overlays[run_id]).revision if run_id in was.overlays else 0
                assert decode_overlay(overlays[run_id]).revision == revision + 1

    def _check_shares(self, taker: str, answer: Sequence[Any]) -> None:
        """Nobody who waits falls behind: organizations by weight, then the environments of one (G9)."""
        shares = {
            environment.decode(): int(share)
            for environment, share in zip(answer[2::2], answer[3::2], strict=True)
        }
        assert sum(shares.values()) <= BATCH
        if not shares:
            return
        held = self.look.schedule.held[taker]
        assert len(shares) == 1 or not any(held[one].endswith("apart") for one in shares), (
            "what failed is alone"
        )
        waiting = self.look.schedule.waiting() | shares.keys()
        of_organizations: defaultdict[str, float] = defaultdict(float)
        for environment, share in shares.items():
            of_organizations[ORGANIZATIONS[environment]] += share / self.weights.get(
                ORGANIZATIONS[environment], 1
            )
        self.organizations.give(of_organizations, {ORGANIZATIONS[environment] for environment in waiting})
        for organization in of_organizations:
            mine = {name for name in waiting if ORGANIZATIONS[name] == organization}
            weight = self.weights.get(organization, 1)
            self.environments[organization].give(
                {name: share / weight for name, share in shares.items() if name in mine}, mine
            )


class Stage:
    """Where the model of the example that is being played can be found."""

    model: Model


@asynccontextmanager
async def site(redis_url: str) -> AsyncIterator[dict[str, Any]]:
    clients = [connect(redis_url) for _ in range(CHANGER + 2)]
    scripts, stage = [Scripts(client) for client in clients[:-1]], Stage()
    for one in scripts:
        make = one.run

        async def run(calls: Sequence[Call], make: Any = make) -> Any:
            return await stage.model.observe(calls, make)

        one.run = run  # type: ignore[method-assign]
        breakable(one, "run", lambda calls: {call.name for call in calls}, Unreachable)
    yield {"redis": clients[-1], "scripts": scripts, "stage": stage}
    for client in clients:
        await client.aclose()


ONE = [Ask("env_1")]
BEFORE_WRITING = Fault("materialise", "halt", False)
GONE = Fault("materialise", "lost", False)


def a_statement_of_the_dead_ends_late(model: Model) -> None:
    """Another drainer cannot write what it takes over, and puts it back; then the run is changed."""
    model.accept(0, ONE, None)
    model.take(2, "looks", None)
    model.handle(2, 0, BEFORE_WRITING)
    model.silence(2)
    model.take(3, "looks", None)
    model.handle(3, 0, GONE)
    model.change(0, None)
    model.go_on(0, None)
    model.change(0, None)


def a_drainer_that_looked_dead_has_two_statements_under_way(model: Model) -> None:
    """What it held was given back by another, and handed to it again."""
    model.accept(0, ONE, None)
    model.take(2, "looks", None)
    model.handle(2, 0, BEFORE_WRITING)
    model.silence(2)
    model.take(3, "looks", Fault("EXISTS", "halt", False))
    model.go_on(1, Fault("schedule", "lost", True))
    model.beat(2)
    model.take(2, "looks", None)
    model.handle(2, 0, GONE)
    model.change(0, None)
    model.go_on(0, None)
    model.change(0, None)


KEYED = [Ask("env_1", "a")]
BEFORE_ACCEPTING = Fault("accept", "halt", False)


def a_claim_runs_out_before_its_run_is_accepted(model: Model) -> None:
    """The key is free again, or another's: claimed, or with a winner."""
    model.accept(0, KEYED, BEFORE_ACCEPTING)
    model.advance(10)
    model.go_on(0, None)
    model.accept(0, KEYED, BEFORE_ACCEPTING)
    model.advance(10)
    model.accept(1, KEYED, BEFORE_ACCEPTING)
    model.go_on(0, None)
    model.accept(0, KEYED, BEFORE_ACCEPTING)
    model.go_on(0, None)


def a_key_runs_out_before_its_run_is_drained(model: Model) -> None:
    for _ in range(2):
        model.accept(0, KEYED, None)
        model.advance(20)
    model.accept(0, KEYED, None)
    model.turn(2, "looks", 0, None)


def tenants_share_for_a_long_time(model: Model) -> None:
    """Two of them from the beginning, by weight, and two more that come when the first had much."""
    model.weigh({"org_2": 3})
    for environments in (["env_1", "env 3"], ["env_2", "é:4"]):
        for environment in environments:
            model.accept(0, [Ask(environment)] * 90, None)
        for _ in range(20):
            model.turn(2, "hears", 0, None)


def who_was_stuck_does_not_make_up_for_it(model: Model) -> None:
    model.accept(0, [Ask("env_1")] * 90, None)
    model.take(2, "looks", None)
    model.accept(0, [Ask("é:4")] * 90, None)
    for _ in range(10):
        model.turn(3, "looks", 0, None)
    model.handle(2, 0, None)
    for _ in range(10):
        model.turn(2, "looks", 0, None)


STORIES = [
    who_was_stuck_does_not_make_up_for_it,
    tenants_share_for_a_long_time,
    a_key_runs_out_before_its_run_is_drained,
    a_claim_runs_out_before_its_run_is_accepted,
    a_statement_of_the_dead_ends_late,
    a_drainer_that_looked_dead_has_two_statements_under_way,
]


@patient
async def test_g2_g3_g4_g9_g11_whatever_happens(redis_url: str) -> None:
    await search(Model, partial(site, redis_url), examples=50, steps=30)


@pytest.mark.parametrize("story", STORIES)
async def test_g2_g3_g4_g9_g11_what_chance_seldom_finds(
    story: Callable[[Model], None], redis_url: str
) -> None:
    await tell(story, Model, partial(site, redis_url))

"""The story of a trigger, step by step, with the world in memory. Cites the guarantees it tells of."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from msgspec.structs import replace

from app import run_ids
from app.batch import Entry
from app.errors import BufferUnavailable, GateUnavailable, StoreUnavailable, Unreachable
from app.pipeline import Pipeline
from app.settings import Settings
from app.store_health import StoreHealth
from app.switches import OperatorSettings, Switches
from app.telemetry import Telemetry
from tests.builders import START_MS, body, entry, run
from tests.fakes import FakeBuffer, FakeClaims, FakeDesk, FakeGate, FakeHeart, FakeStore

NOW = datetime.fromtimestamp(START_MS / 1000, UTC) + timedelta(milliseconds=5)
PREFIX = "mollifier:reply:"


class World:
    """A pipeline in memory, and what came out of it."""

    def __init__(self, **changes: Any) -> None:
        self.gate, self.buffer, self.store, self.desk = FakeGate(), FakeBuffer(), FakeStore(), FakeDesk()
        self.claims = FakeClaims(self.buffer)
        self.settings = Settings.model_validate(changes)
        self.telemetry = Telemetry("test")
        self.now = NOW
        self.heart = FakeHeart()
        self.switches = Switches.of(self.settings)
        self.looks = 0
        self.pipeline = Pipeline(
            gate=self.gate,
            buffer=self.buffer,
            reservations=self.buffer,
            claims=self.claims,
            store=self.store,
            desk=self.desk,
            health=StoreHealth(self.settings),
            settings=self.settings,
            telemetry=self.telemetry,
            heart=self.heart,
            switches=self._look,
            clock=lambda: self.now,
        )

    def decide(self, **decided: Any) -> None:
        """Have operators decide so, and nothing else."""
        self.switches = Switches.of(self.settings, OperatorSettings(**decided))

    def _look(self) -> Switches:
        self.looks += 1
        return self.switches

    async def handle(self, *entries: Entry) -> list[dict[str, Any]]:
        """Handle one batch; the replies to it, in order."""
        before = len(self.desk.replies)
        await self.pipeline.handle(entries)
        return [orjson.loads(reply) for _, reply in self.desk.replies[before:]]

    async def tick(self) -> list[dict[str, Any]]:
        """Let the waiting room look at its claims once; the replies that came of it."""
        before = len(self.desk.replies)
        await self.pipeline.waiting_room.tick()
        await self.pipeline.waiting_room.settled()
        return [orjson.loads(reply) for _, reply in self.desk.replies[before:]]

    def count(self, metric: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(metric, labels) or 0.0


async def test_a_trigger_that_passes_is_a_row_and_a_reply() -> None:
    world = World()
    (reply,) = await world.handle(entry())
    run_id = reply["run"]["id"]
    assert reply == {
        "type": "run",
        "correlation_id": None,
        "run": {"id": run_id, "friendly_id": f"run_{run_id}", "span_id": run_ids.span_id(run_id)},
        "status": "QUEUED",
        "is_cached": False,
        "is_mollified": False,
    }
    assert list(world.store.rows) == [run_id]
    assert not world.buffer.runs


async def test_a_mollified_trigger_is_buffered_and_never_written() -> None:
    world = World()
    world.gate.passes = 0
    (reply,) = await world.handle(entry())
    assert reply["is_mollified"]
    assert reply["notice"]["code"] == "mollifier.queued"
    assert not world.store.rows
    (buffered,) = world.buffer.runs.values()
    assert buffered.buffered_at == NOW


async def test_the_first_of_a_batch_pass_and_the_rest_are_mollified() -> None:
    world = World()
    world.gate.passes = 2
    replies = await world.handle(*(entry() for _ in range(5)))
    assert [reply["is_mollified"] for reply in replies] == [False, False, True, True, True]
    assert world.gate.asked == [{"env_1": 5}]


@pytest.mark.parametrize("bad", [b"", b"{", b'{"task":1}', b"\xff", b"[" * 5000])
async def test_g12_one_bad_entry_disturbs_no_other(bad: bytes) -> None:
    world = World()
    good = [entry(), entry()]
    replies = await world.handle(good[0], entry(bad), good[1])
    assert [reply["type"] for reply in replies] == ["run", "error", "run"]
    assert replies[1]["error"]["code"] == "invalid_request"
    assert len(world.store.rows) == 2


async def test_the_order_of_a_batch_changes_no_outcome() -> None:
    contents = [
        body(),
        body(environment="env_2"),
        b"{",
        body(extra=1),
        body(options={"run_id": "run_mine"}),
        body(),
    ]
    entries = [entry(content, reply_to=f"{PREFIX}{number}") for number, content in enumerate(contents)]
    outcomes = []
    for seed in range(6):
        world = World()
        shuffled = random.Random(seed).sample(entries, len(entries))
        await world.handle(*shuffled)
        outcomes.append(
            (sorted(world.desk.replies), sorted(world.store.rows), sorted(world.desk.acknowledged))
        )
    assert all(outcome == outcomes[0] for outcome in outcomes)


async def test_g1_every_entry_is_acknowledged_with_exactly_one_outcome() -> None:
    world = World(max_tags=1)
    entries = [
        entry(),
        entry(body(options={"tags": ["a", "b"]})),
        entry(b"{"),
        entry(b"{", reply_to=None),
        entry(body(unknown=True), reply_to=None),
        entry(reply_to="somebody:else"),
        entry(reply_to=None),
    ]
    await world.handle(*entries)
    assert world.desk.acknowledged == [one.id for one in entries]
    dead = {item.entry.id: item.dead_letter.reason for item in world.desk.dead if item.dead_letter}
    assert dead == {
        entries[2].id: "undecodable",
        entries[3].id: "undecodable",
        entries[4].id: "unanswerable",
        entries[5].id: "reply_channel",
    }
    assert len(world.store.rows) == 2
    assert [channel for channel, _ in world.desk.replies] == [f"{PREFIX}test"] * 3


@pytest.mark.parametrize("late", [{"deliveries": 9}, {"deadline": True}], ids=["worn out", "late"])
async def test_g3_a_request_that_may_have_a_run_is_not_refused_while_nobody_can_tell(
    late: dict[str, Any],
) -> None:
    """Its run is a row, and Postgres is away when it comes again, too late."""
    world = World(max_deliveries=2)
    deadline = {"deadline": (NOW + timedelta(seconds=1)).isoformat()} if "deadline" in late else {}
    first = entry(body(**deadline))
    await world.handle(first)
    world.now += timedelta(seconds=2)
    world.store.failure = StoreUnavailable()
    (reply,) = await world.handle(replace(first, deliveries=late.get("deliveries", 2)))
    assert (reply["error"]["code"], reply["error"]["retryable"]) == ("store_unavailable", True)
    assert world.desk.dead == []


async def refusing(*arguments: object) -> None:
    raise BufferUnavailable


@pytest.mark.parametrize("passes", [0, 1], ids=["mollified", "diverted"])
@pytest.mark.parametrize("options", [{}, {"idempotency_key": "k"}], ids=["unkeyed", "keyed"])
async def test_g1_what_comes_again_while_nobody_can_tell_is_not_said_to_be_nothing(
    passes: int, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run is a row, Postgres is away when it comes again, and the buffer refuses it."""
    world = World()
    first = entry(body(options=options))
    await world.handle(first)
    world.claims.values.clear()
    world.gate.passes = passes
    world.store.failure = StoreUnavailable()
    monkeypatch.setattr(world.buffer, "accept", refusing)
    (again, new) = await world.handle(replace(first, deliveries=2), entry())
    assert again["error"]["code"] == "store_unavailable"
    assert new["error"]["code"] == "buffer_unavailable"


async def test_g1_nor_is_it_if_it_follows_a_new_one_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    first, new = (entry(body(options={"idempotency_key": "k"})) for _ in range(2))
    await world.handle(first)
    world.claims.values.clear()
    world.gate.passes = 0
    world.store.failure = StoreUnavailable()
    monkeypatch.setattr(world.buffer, "accept", refusing)
    (leads, follows) = await world.handle(new, replace(first, deliveries=2))
    assert leads["error"]["code"] == "buffer_unavailable"
    assert follows["error"]["code"] == "store_unavailable"


async def test_g3_a_redelivered_request_gets_the_same_run_and_reply() -> None:
    for passes in (0, 1):
        world = World()
        world.gate.passes = passes
        first = entry(body(options={"delay": "10m"}))
        (reply,) = await world.handle(first)
        world.gate.passes = 1 - passes
        (again,) = await world.handle(replace(first, deliveries=2))
        assert again == reply
        assert reply["status"] == "DELAYED"
        assert len(world.store.rows) + len(world.buffer.runs) == 1


def lapse_after(world: World, owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process be taken for dead in the middle of a step, once."""
    step = getattr(owner, name)

    async def slow(*arguments: Any, **named: Any) -> Any:
        result = await step(*arguments, **named)
        world.heart.lives += 1
        monkeypatch.undo()
        return result

    monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize("options", [{}, {"idempotency_key": "k"}], ids=["unkeyed", "keyed"])
async def test_g3_who_was_taken_for_dead_writes_and_answers_nothing(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was frozen before it came to write; another has its requests by now."""
    world = World()
    lapse_after(world, world.gate, "admit", monkeypatch)
    first = entry(body(options=options))
    assert await world.handle(first) == []
    assert world.store.rows == {}
    (reply,) = await world.handle(replace(first, deliveries=2, life=1))
    assert list(world.store.rows) == [reply["run"]["id"]]


async def test_g3_who_was_taken_for_dead_after_it_wrote_leaves_the_answer_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    lapse_after(world, world.store, "insert", monkeypatch)
    first = entry()
    assert await world.handle(first) == []
    (reply,) = await world.handle(replace(first, deliveries=2, life=1))
    assert list(world.store.rows) == [reply["run"]["id"]]


async def test_g3_who_waited_for_a_key_while_its_process_was_taken_for_dead_is_not_answered() -> None:
    world = World()
    key = ("env_1", "send-email", "k")
    world.claims.values[key] = "pending:another"
    assert await world.handle(entry(body(options={"idempotency_key": "k"}))) == []
    del world.claims.values[key]
    world.heart.lives += 1
    assert await world.tick() == []
    assert world.store.rows == {}


async def test_g3_a_handled_request_is_answered_whatever_its_deadline_and_deliveries_say() -> None:
    world = World(max_deliveries=2)
    first = entry(body(deadline=(NOW + timedelta(seconds=1)).isoformat()))
    (reply,) = await world.handle(first)
    world.now = NOW + timedelta(hours=1)
    (again,) = await world.handle(replace(first, deliveries=9))
    assert again == reply


async def test_a_late_request_is_refused() -> None:
    world = World()
    (reply,) = await world.handle(entry(body(deadline=NOW.isoformat())))
    assert reply["error"]["code"] == "deadline_exceeded"
    assert not world.store.rows


async def test_a_request_handed_out_too_often_is_answered_and_set_aside() -> None:
    world = World(max_deliveries=3)
    (kept,) = await world.handle(entry(deliveries=3))
    assert kept["type"] == "run"
    (reply,) = await world.handle(entry(deliveries=4))
    assert reply["error"]["code"] == "internal_error"
    (item,) = world.desk.dead
    assert item.dead_letter is not None
    assert item.dead_letter.reason == "deliveries"


async def test_g5_off_means_off() -> None:
    world = World(enabled=False)
    world.gate.failure = GateUnavailable("must not be asked")
    world.buffer.failure = BufferUnavailable("must not be touched")
    replies = await world.handle(entry(), entry(body(options={"run_id": "run_mine"})), entry(deliveries=2))
    assert [reply["type"] for reply in replies] == ["run"] * 3
    assert not world.buffer.chosen
    assert world.count("mollifier_gate_failures_total") == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"debounce": {"key": "k", "delay": "5s"}}, "bypass_debounce"),
        ({"one_time_use_token": "t"}, "bypass_one_time_use_token"),
        ({"parent_run_id": "run_p", "resume_parent_on_completion": True}, "bypass_resume_parent"),
    ],
)
async def test_g6_bypasses_are_not_counted_and_never_buffered(options: dict[str, Any], reason: str) -> None:
    world = World()
    world.store.rows["p"] = run(id="p")
    world.gate.passes = 0
    (reply,) = await world.handle(entry(body(options=options)))
    assert not reply["is_mollified"]
    assert world.gate.asked == []
    labels = {"outcome": "pass_through", "reason": reason, "enrolled": "true", "organization": "org_1"}
    assert world.count("mollifier_decisions_total", **labels) == 1
    world.store.failure = StoreUnavailable()
    (reply,) = await world.handle(entry(body(options=options)))
    assert reply["error"]["code"] == "store_unavailable"
    assert not world.buffer.runs


@pytest.mark.parametrize(
    ("flag", "default", "shadow", "outcome"),
    [
        (True, False, False, "mollify"),
        (False, True, False, "pass_through"),
        (None, True, False, "mollify"),
        (None, False, False, "pass_through"),
        (False, False, True, "shadow"),
        (True, True, True, "shadow"),
    ],
)
async def test_enrolment_and_shadow_mode(
    flag: bool | None, default: bool, shadow: bool, outcome: str
) -> None:
    world = World(default_enrolled=default, shadow_mode=shadow)
    world.gate.passes = 0
    content = body()
    if flag is not None:
        content["environment"]["feature_flags"] = {"mollifier_enabled": flag, "another": "flag"}
    (reply,) = await world.handle(entry(content))
    assert reply["is_mollified"] == (outcome == "mollify")
    asked = outcome != "pass_through"
    assert bool(world.gate.asked) == asked
    total = sum(
        sample.value
        for metric in world.telemetry.registry.collect()
        for sample in metric.samples
        if sample.name == "mollifier_decisions_total" and sample.labels["outcome"] == outcome
    )
    assert total == 1


async def test_a_flag_is_never_coerced() -> None:
    content = body()
    content["environment"]["feature_flags"] = {"mollifier_enabled": "false"}
    (reply,) = await World().handle(entry(content))
    assert reply["error"]["message"].startswith("environment.feature_flags.mollifier_enabled:")


async def test_the_gate_fails_open_and_is_counted() -> None:
    world = World()
    world.gate.failure = GateUnavailable("away")
    (reply,) = await world.handle(entry())
    assert not reply["is_mollified"]
    assert world.count("mollifier_gate_failures_total") == 1


async def test_the_fleets_rate_mollifies_what_environments_would_let_pass() -> None:
    world = World()
    world.gate.fleet = 1
    replies = await world.handle(entry(), entry(body(environment="env_2")))
    assert [reply["is_mollified"] for reply in replies] == [False, True]
    labels = {"outcome": "mollify", "reason": "global_rate", "enrolled": "true", "organization": "org_1"}
    assert world.count("mollifier_decisions_total", **labels) == 1


async def test_g8_a_refusing_buffer_is_an_error_and_never_a_row() -> None:
    world = World()
    world.gate.passes = 0
    world.buffer.failure = BufferUnavailable()
    (reply,) = await world.handle(entry())
    assert reply["error"] == {
        "code": "buffer_unavailable",
        "message": BufferUnavailable.default,
        "status": 503,
        "retryable": True,
    }
    assert not world.store.rows


async def test_what_the_buffer_did_is_not_guessed() -> None:
    world = World()
    world.gate.passes = 0
    world.buffer.failure = Unreachable("silence")
    bad = entry(b"{")
    replies = await world.handle(entry(), bad)
    assert [reply["type"] for reply in replies] == ["error"]
    assert world.desk.acknowledged == [bad.id]


async def test_a_failing_store_diverts_into_the_buffer_under_the_same_id() -> None:
    world = World()
    world.store.failure = StoreUnavailable()
    (reply,) = await world.handle(entry())
    assert reply["is_mollified"]
    assert [run_id for _, run_id in world.buffer.runs] == [reply["run"]["id"]]
    labels = {
        "outcome": "mollify",
        "reason": "store_unavailable",
        "enrolled": "true",
        "organization": "org_1",
    }
    assert world.count("mollifier_decisions_total", **labels) == 1
    await world.handle(entry())
    assert world.gate.asked == [{"env_1": 1}], "while the store fails the gate's answer would not matter"


@pytest.mark.parametrize(
    ("failure", "is_held"), [(StoreUnavailable(), True), (None, False)], ids=["failed for now", "a row"]
)
async def test_g7_a_chosen_id_is_held_while_another_attempt_may_need_it(
    failure: StoreUnavailable | None, is_held: bool
) -> None:
    """One that is told to try again lets go of nothing: its run may be about to be buffered elsewhere."""
    world = World(divert_on_store_failure=False)
    world.store.failure = failure
    await world.handle(entry(body(options={"run_id": "run_mine"})))
    assert ("mine" in world.buffer.chosen) == is_held


@pytest.mark.parametrize("may_be_done", [False, True])
async def test_g1_what_may_be_a_row_is_not_said_to_be_nothing(may_be_done: bool) -> None:
    """The buffer refuses what was diverted to it, after a statement whose end nobody heard of."""
    world = World()
    world.store.failure, world.buffer.failure = StoreUnavailable(), BufferUnavailable()
    world.store.failure.may_be_done = may_be_done
    (reply,) = await world.handle(entry())
    assert reply["error"]["code"] == ("store_unavailable" if may_be_done else "buffer_unavailable")


@pytest.mark.parametrize(
    "changes", [{"divert_on_store_failure": False}, {"default_enrolled": False}, {"shadow_mode": True}]
)
async def test_a_failing_store_is_an_error_where_diverting_is_not_allowed(changes: dict[str, bool]) -> None:
    world = World(**changes)
    world.store.failure = StoreUnavailable()
    (reply,) = await world.handle(entry())
    assert reply["error"]["code"] == "store_unavailable"
    assert not world.buffer.runs


@pytest.mark.parametrize("prepare", [lambda world: None, lambda world: setattr(world.gate, "passes", 0)])
async def test_g7_a_chosen_id_of_another_environment_is_a_conflict(prepare: Callable[[World], None]) -> None:
    world = World()
    prepare(world)
    options = {"run_id": "run_mine"}
    (mine,) = await world.handle(entry(body(options=options)))
    (theirs,) = await world.handle(entry(body(environment="env_2", options=options)))
    assert mine["run"]["friendly_id"] == "run_mine"
    assert theirs["error"]["code"] == "run_id_conflict"
    assert "env_1" not in str(theirs)
    (again,) = await world.handle(entry(body(options=options)))
    assert again == mine


async def test_a_reserved_id_is_let_go_once_the_run_is_a_row() -> None:
    world = World()
    await world.handle(entry(body(options={"run_id": "run_mine"})))
    assert world.buffer.chosen == {}
    world.gate.passes = 0
    await world.handle(entry(body(options={"run_id": "run_other"})))
    assert world.buffer.chosen == {"other": "env_1"}


async def test_an_id_of_the_derived_form_can_be_repeated_but_not_invented() -> None:
    world = World()
    (reply,) = await world.handle(entry())
    options = {"run_id": reply["run"]["friendly_id"]}
    (again,) = await world.handle(entry(body(options=options)))
    assert again["run"] == reply["run"]
    (invented,) = await world.handle(entry(body(options={"run_id": "run_m" + "0" * 31})))
    assert invented["error"]["code"] == "invalid_request"
    world.store.failure = StoreUnavailable()
    (unknown,) = await world.handle(entry(body(options={"run_id": "run_m" + "1" * 31})))
    assert unknown["error"]["code"] == "store_unavailable"


async def test_a_full_buffer_is_a_retryable_error() -> None:
    world = World()
    world.gate.passes, world.buffer.limit = 0, 1
    replies = await world.handle(entry(), entry())
    assert [reply.get("error", {}).get("code") for reply in replies] == [None, "queue_limit_exceeded"]


@pytest.mark.parametrize("where", ["buffered", "stored"])
async def test_a_child_inherits_depth_and_root_from_its_parent(where: str) -> None:
    world = World()
    parent = run(id="p", depth=2, root_run_id="r")
    if where == "stored":
        world.store.rows["p"] = parent
    else:
        world.buffer.runs["env_1", "p"] = parent
    (reply,) = await world.handle(entry(body(options={"parent_run_id": "run_p"})))
    child = world.store.rows[reply["run"]["id"]]
    assert (child.parent_run_id, child.depth, child.root_run_id) == ("p", 3, "r")


async def test_g7_a_parent_of_another_tenant_does_not_exist() -> None:
    world = World()
    world.store.rows["p"] = run("env_2", id="p")
    world.store.rows["q"] = run("env_1", id="q", organization_id="org_2")
    replies = await world.handle(
        *(entry(body(options={"parent_run_id": f"run_{name}"})) for name in ("p", "q", "nowhere")), entry()
    )
    assert [reply.get("error", {}).get("code") for reply in replies] == ["parent_run_not_found"] * 3 + [None]
    assert len({str(reply) for reply in replies[:3]}) == 1


async def test_a_parent_that_cannot_be_looked_up_is_not_denied() -> None:
    world = World()
    world.store.failure = StoreUnavailable()
    (reply,) = await world.handle(entry(body(options={"parent_run_id": "run_p"})))
    assert reply["error"]["code"] == "store_unavailable"

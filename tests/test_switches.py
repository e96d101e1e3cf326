"""What operators decide, over what the environment variables say: who comes before whom, and from when on."""

from collections.abc import Sequence
from datetime import datetime
from itertools import product
from typing import Any

import pytest

from app.batch import Claim
from app.errors import BufferUnavailable, GateUnavailable, StoreUnavailable, Unreachable
from app.settings import Settings
from app.switches import OperatorSettings, Override, Rate, Switchboard, Switches, changes
from schemas.snapshot import Snapshot
from tests.builders import body, entry, run
from tests.test_pipeline import World

ON, OFF, SHADOW = (True, False), (False, False), (True, True)


def settings(**values: Any) -> Settings:
    return Settings.model_validate(values)


@pytest.mark.parametrize(
    ("enabled", "shadow_mode", "switch", "outcome"),
    [
        (True, False, None, ON),
        (False, False, None, OFF),
        (True, True, None, SHADOW),
        *((*variables, "on", ON) for variables in product((True, False), repeat=2)),
        *((*variables, "off", OFF) for variables in product((True, False), repeat=2)),
        *((*variables, "shadow", SHADOW) for variables in product((True, False), repeat=2)),
    ],
)
def test_the_operators_switch_comes_before_the_environment_variables(
    enabled: bool, shadow_mode: bool, switch: Any, outcome: tuple[bool, bool]
) -> None:
    variables = settings(enabled=enabled, shadow_mode=shadow_mode)
    switches = Switches.of(variables, OperatorSettings(switch=switch))
    assert (switches.enabled, switches.shadow_mode) == outcome


@pytest.mark.parametrize(
    ("decided", "flag", "default", "enrolled"),
    [
        *(
            (decided, *rest, decided)
            for decided, *rest in product((True, False), (True, False, None), (True, False))
        ),
        *((None, flag, default, flag) for flag, default in product((True, False), repeat=2)),
        (None, None, True, True),
        (None, None, False, False),
    ],
)
def test_enrolment_is_the_operators_else_the_requests_else_the_default(
    decided: bool | None, flag: bool | None, default: bool, enrolled: bool
) -> None:
    enrolment = {"another": not enrolled} if decided is None else {"org_1": decided}
    switches = Switches.of(settings(default_enrolled=default), OperatorSettings(enrolment=enrolment))
    assert switches.is_enrolled("org_1", flag) is enrolled


@pytest.mark.parametrize(
    ("environment", "organization", "rate"),
    [
        (None, None, None),
        (Override(threshold=1), None, Rate(200, 1, 500)),
        (None, Override(threshold=2), Rate(200, 2, 500)),
        (Override(threshold=1), Override(threshold=2), Rate(200, 1, 500)),
        (Override(window_ms=1), Override(hold_ms=2), Rate(1, 100, 2)),
        (Override(threshold=1), Override(7, 8, 9), Rate(7, 1, 9)),
        (Override(4, 5, 6), Override(7, 8, 9), Rate(4, 5, 6)),
    ],
)
def test_each_part_of_a_rate_is_the_environments_else_the_organizations_else_the_settings(
    environment: Override | None, organization: Override | None, rate: Rate | None
) -> None:
    decided = OperatorSettings(
        environments={"another": Override(1, 1, 1)} | ({"env_1": environment} if environment else {}),
        organizations={"another": Override(1, 1, 1)} | ({"org_1": organization} if organization else {}),
    )
    rates = Switches.of(settings(), decided).rates(
        [("env_1", "org_1"), ("env_2", "org_2"), ("env_1", "org_1")]
    )
    assert rates == ({} if rate is None else {"env_1": rate})


@pytest.mark.parametrize(("decided", "rate"), [(None, 7), (0, 0), (9, 9)])
def test_the_drain_has_the_operators_rate_or_that_of_the_settings(decided: int | None, rate: int) -> None:
    assert Switches.of(settings(drain_max_rate=7), OperatorSettings(drain_rate=decided)).drain_rate == rate


def test_a_switchboard_goes_by_the_environment_until_it_knows_better() -> None:
    board = Switchboard(settings(enabled=False))
    assert (board.current.enabled, board.is_known) == (False, False)
    before = board.current
    assert board.decide(OperatorSettings(revision=1, switch="on")) == {"revision": 1, "switch": "on"}
    assert (board.current.enabled, board.is_known) == (True, True)
    assert not before.enabled, "who has taken it keeps it as it was"


def test_what_has_changed_is_told_in_short() -> None:
    before = OperatorSettings(1, enrolment={f"org_{n}": True for n in range(30)}, weights={"a": 2, "b": 3})
    after = OperatorSettings(2, weights={"b": 4}, environments={"env_1": Override(threshold=5)})
    assert changes(before, after) == {
        "revision": 2,
        "enrolment": {f"org_{n}": None for n in range(10)},
        "weights": {"a": None, "b": 4},
        "environments": {"env_1": {"window_ms": None, "threshold": 5, "hold_ms": None}},
    }


async def test_a_batch_looks_once_however_many_requests_it_has() -> None:
    world = World()
    await world.handle(*(entry(body(options={"idempotency_key": f"k{n}"})) for n in range(500)))
    assert world.looks == 1


async def test_the_gate_is_asked_with_the_rates_that_operators_set() -> None:
    world = World()
    await world.handle(entry(), entry(body("env_2", "org_2")))
    world.decide(organizations={"org_2": Override(threshold=1)})
    await world.handle(entry(), entry(body("env_2", "org_2")))
    assert world.gate.rates == [{}, {"env_2": Rate(200, 1, 500)}]


@pytest.mark.parametrize(("decided", "flag"), [(True, False), (False, True)])
async def test_operators_come_before_the_flag_of_a_request(decided: bool, flag: bool) -> None:
    world = World()
    world.gate.passes = 0
    world.decide(enrolment={"org_1": decided})
    content = body()
    content["environment"]["feature_flags"] = {"mollifier_enabled": flag}
    (reply,) = await world.handle(entry(content))
    assert reply["is_mollified"] is decided


async def test_g5_off_means_off_from_one_batch_to_the_next() -> None:
    """With a buffered run, a waiting request, and a caller's id that the buffer holds."""
    world = World()
    world.gate.passes = 0
    content = body(options={"run_id": "run_mine", "idempotency_key": "k"})
    (buffered,) = await world.handle(entry(content))
    assert buffered["is_mollified"]
    world.decide(switch="off")
    world.gate.failure = GateUnavailable("must not be asked")
    world.buffer.failure = BufferUnavailable("must not be touched")
    world.claims.failure = Unreachable("must not be touched")
    replies = await world.handle(entry(), entry(content), entry(deliveries=2))
    assert [(reply["type"], reply["is_mollified"]) for reply in replies] == [("run", False)] * 3
    assert world.buffer.chosen == {"mine": "env_1"}
    world.store.failure = StoreUnavailable()
    (reply,) = await world.handle(entry())
    assert reply["error"]["code"] == "store_unavailable", "nothing is diverted either"


async def test_g5_who_waits_for_a_key_goes_on_without_it() -> None:
    world = World()
    world.claims.values["env_1", "send-email", "k"] = "pending:another:token"
    keyed = body(options={"idempotency_key": "k"})
    assert await world.handle(entry(keyed), entry(keyed)) == []
    world.decide(switch="off")
    world.claims.failure = Unreachable("must not be touched")
    replies = await world.tick()
    assert {(reply["type"], reply["is_mollified"]) for reply in replies} == {("run", False)}
    assert world.claims.values == {("env_1", "send-email", "k"): "pending:another:token"}
    assert world.pipeline.waiting_room.held == set()


@pytest.mark.parametrize("decided", [{"switch": "shadow"}, {"enrolment": {"org_1": False}}])
async def test_g4_who_is_not_mollified_any_more_is_given_the_buffered_run_of_its_key(
    decided: dict[str, Any],
) -> None:
    """Without claiming it, and unless nobody may look (G5)."""
    world = World()
    world.gate.passes = 0
    keyed = body(options={"idempotency_key": "k"})
    (buffered,) = await world.handle(entry(keyed))
    world.decide(**decided)
    (reply, other) = await world.handle(entry(keyed), entry(body(options={"idempotency_key": "other"})))
    assert (reply["run"], reply["is_cached"]) == (buffered["run"], True)
    assert not other["is_mollified"]
    assert world.claims.values == {("env_1", "send-email", "k"): buffered["run"]["id"]}
    world.decide(switch="off")
    (reply,) = await world.handle(entry(keyed))
    assert not reply["is_cached"]


@pytest.mark.parametrize(
    "decided", [{"switch": "off"}, {"switch": "shadow"}, {"enrolment": {"org_1": False}}]
)
async def test_g4_a_batch_ends_under_the_switches_that_it_began_with(
    decided: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has claimed its key when operators decide: it is mollified all the same, and its claim published."""
    world = World()
    world.gate.passes = 0
    claim = world.claims.claim

    async def decisive(runs: Sequence[Snapshot], now: datetime, *, seek: bool = False) -> Sequence[Claim]:
        claims = await claim(runs, now, seek=seek)
        world.decide(**decided)
        return claims

    monkeypatch.setattr(world.claims, "claim", decisive)
    first, second = await world.handle(*[entry(body(options={"idempotency_key": "k"}))] * 2)
    assert (first["is_mollified"], second["is_cached"]) == (True, True)
    assert world.claims.values == {("env_1", "send-email", "k"): first["run"]["id"]}
    (later,) = await world.handle(entry())
    assert not later["is_mollified"]


async def test_g4_a_claim_that_was_won_while_waiting_is_ended_by_who_is_switched_off_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.claims.values["env_1", "send-email", "k"] = "pending:another:token"
    await world.handle(entry(body(options={"idempotency_key": "k"})))
    world.claims.values.clear()
    claim = world.claims.claim

    async def decisive(runs: Sequence[Snapshot], now: datetime, *, seek: bool = False) -> Sequence[Claim]:
        world.switches, claims = (
            Switches.of(world.settings, OperatorSettings(switch="off")),
            await claim(runs, now, seek=seek),
        )
        return claims

    monkeypatch.setattr(world.claims, "claim", decisive)
    (reply,) = await world.tick()
    assert (reply["is_mollified"], list(world.store.rows)) == (False, [reply["run"]["id"]])
    assert world.claims.values == {("env_1", "send-email", "k"): reply["run"]["id"]}


async def test_a_parent_in_the_buffer_is_found_until_the_switch_is_off() -> None:
    """Off, nobody looks there: it is a row soon."""
    world = World()
    world.buffer.runs["env_1", "p"] = run(id="p")
    child = body(options={"parent_run_id": "run_p"})
    (reply,) = await world.handle(entry(child))
    assert reply["type"] == "run"
    world.decide(switch="off")
    (reply,) = await world.handle(entry(child))
    assert reply["error"]["code"] == "parent_run_not_found"

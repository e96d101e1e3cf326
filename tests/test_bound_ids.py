"""Ids that callers choose and that carry their tenant: nothing is reserved, and less is asked. G3, G4, G7."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from redis.asyncio import Redis

from app import run_ids
from app.batch import Entry
from app.buffer import RedisBuffer
from app.claims import RedisClaims
from app.errors import StoreUnavailable, Unreachable
from app.keys import Keys
from app.ports import KeyHolder
from app.redis_client import Scripts
from app.settings import Settings
from app.store import PostgresStore
from schemas.snapshot import Snapshot
from tests.adapters import Pool
from tests.builders import NOW, body, bound_id, entry, run
from tests.test_pipeline import World

At = TypeVar("At")
KEYS = Keys("mollifier", 16)
MINE = bound_id("org_1", "env_1")


def call(number: int = 0, *, key: str | None = "order-42", **changes: Any) -> Entry:
    """One more try of a call with a bound id."""
    options = {"run_id": f"run_{bound_id('org_1', 'env_1', number)}"}
    if key is not None:
        options["idempotency_key"] = key
    return entry(body(options=options, **changes))


class Asked:
    """How often both stores were asked for ids."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffer, self.store = 0, 0
        recall_buffer, recall_store = world.buffer.recall, world.store.recall

        async def buffer(*arguments: Any) -> Any:
            self.buffer += 1
            return await recall_buffer(*arguments)

        async def store(*arguments: Any) -> Any:
            self.store += 1
            return await recall_store(*arguments)

        monkeypatch.setattr(world.buffer, "recall", buffer)
        monkeypatch.setattr(world.store, "recall", store)


def _take_keys_off(runs: dict[At, Snapshot]) -> None:
    for at, one in runs.items():
        runs[at] = run(id=one.id, buffered_at=one.buffered_at)


def test_their_form() -> None:
    one, other = run_ids.bind("org_1", "env_1"), run_ids.bind("org_1", "env_1")
    assert one != other
    assert one[:13] <= other[:13]
    for tenant in (("org_1", "env_2"), ("org_2", "env_1"), ("org_", "1env_1")):
        assert run_ids.is_foreign(one, *tenant)
    for own in (one, other, MINE):
        assert run_ids.is_bound(own)
        assert not run_ids.is_foreign(own, "org_1", "env_1")
        assert not run_ids.is_derived(own)
        assert not run_ids.needs_reservation(own)
    for free in ("mine", one[:-1], one.upper(), f"c{one[1:]}"):
        assert not run_ids.is_bound(free)
        assert not run_ids.is_foreign(free, "org_2", "env_2")
        assert run_ids.needs_reservation(free)


async def test_g7_another_tenants_is_a_conflict_and_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    asked = Asked(world, monkeypatch)
    for environment, organization in (("env_2", "org_1"), ("env_1", "org_2")):
        theirs = body(environment, organization, options={"run_id": f"run_{MINE}"})
        (reply,) = await world.handle(entry(theirs))
        assert reply["error"]["code"] == "run_id_conflict"
    assert (asked.buffer, asked.store) == (0, 0)
    assert not world.store.rows


@pytest.mark.parametrize("passes", [0, 9], ids=["mollified", "passed through"])
async def test_g3_a_repeated_call_is_one_run_and_the_same_reply(
    passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    world.gate.passes = passes
    asked = Asked(world, monkeypatch)
    (first,) = await world.handle(call())
    assert first["run"]["friendly_id"] == f"run_{MINE}"
    world.gate.passes = 9 - passes
    (second,) = await world.handle(call())
    assert second == first
    assert (asked.buffer, asked.store) == (0, 0), "its key tells"
    assert len(world.store.rows) + len(world.buffer.runs) == 1
    assert not world.buffer.chosen


@pytest.mark.parametrize("passes", [0, 9], ids=["mollified", "passed through"])
@pytest.mark.parametrize("holder", ["nobody", "a row", "a buffered run"])
async def test_g3_so_it_is_when_the_key_was_taken_off_its_run(passes: int, holder: str) -> None:
    world = World()
    world.gate.passes = passes
    (first,) = await world.handle(call())
    world.claims.values.clear()
    _take_keys_off(world.store.rows)
    _take_keys_off(world.buffer.runs)
    if holder != "nobody":
        world.gate.passes = 9 if holder == "a row" else 0
        (taken,) = await world.handle(entry(body(options={"idempotency_key": "order-42"})))
        assert taken["run"] != first["run"]
    (again,) = await world.handle(call())
    assert again == first
    (other,) = await world.handle(call(1))
    if holder == "nobody":
        assert (other["run"]["id"], other["is_cached"]) == (bound_id("org_1", "env_1", 1), False)
    else:
        assert (other["run"], other["is_cached"]) == (taken["run"], True)


async def test_g3_a_buffered_run_that_was_drained_since_says_so_still() -> None:
    world = World()
    world.gate.passes = 0
    (first,) = await world.handle(call())
    ((_, one),) = world.buffer.runs.items()
    world.store.rows[one.id] = one
    world.buffer.runs.clear()
    world.claims.values.clear()
    (again,) = await world.handle(call())
    assert again == first
    assert again["is_mollified"]


async def test_g4_of_one_batch_the_first_is_sought_and_the_others_are_looked_for() -> None:
    """A follower is told of its leader's run: it must not have one of its own."""
    world = World()
    (first,) = await world.handle(call(1))
    world.store.rows[first["run"]["id"]] = run(id=first["run"]["id"])
    world.claims.values.clear()
    replies = await world.handle(call(0), call(1), call(2))
    assert [reply["run"]["id"] for reply in replies] == [MINE, first["run"]["id"], MINE]
    assert [reply["is_cached"] for reply in replies] == [False, False, True]


@pytest.mark.parametrize(("passes", "is_published"), [(0, False), (9, False), (9, True)])
async def test_g4_who_follows_a_repeated_call_is_not_told_of_a_run_that_lost_the_key(
    passes: int, is_published: bool
) -> None:
    world = World()
    world.gate.passes = passes
    (first,) = await world.handle(call())
    _take_keys_off(world.store.rows)
    _take_keys_off(world.buffer.runs)
    if not is_published:
        world.claims.values.clear()
    assert await world.handle(call(), call(1)) == [first]
    if is_published:
        assert await world.tick() == [], "the claim names a run that does not have the key: it is let go"
    (other,) = await world.tick()
    assert (other["run"]["id"], other["is_cached"]) == (bound_id("org_1", "env_1", 1), False)


async def test_an_unkeyed_call_is_looked_for_and_nothing_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    asked = Asked(world, monkeypatch)
    world.gate.passes = 0
    (first,) = await world.handle(call(key=None))
    world.gate.passes = 9
    (again,) = await world.handle(call(key=None))
    assert again == first
    assert (asked.buffer, asked.store) == (2, 1)
    assert not world.buffer.chosen
    assert not world.store.rows


async def test_g3_a_call_that_was_handled_is_answered_after_its_deadline() -> None:
    world = World()
    (first,) = await world.handle(call())
    (again,) = await world.handle(call(deadline=(NOW.replace(year=NOW.year - 1)).isoformat()))
    assert again == first


async def test_g3_a_call_is_not_run_again_while_nobody_can_say_whether_it_is_buffered() -> None:
    world = World()
    world.gate.passes = 0
    (first,) = await world.handle(call())
    world.claims.failure, world.gate.passes = Unreachable("gone"), 9
    again, follower = call(), call(1)
    assert await world.handle(again, follower) == []
    assert not world.store.rows
    assert again.id not in world.desk.acknowledged
    world.claims.failure = None
    (reply,) = await world.handle(Entry(again.id, again.fields, 2))
    assert reply == first


async def test_g4_who_waits_for_a_key_goes_on_waiting_if_claims_go_away_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def gone(*_: object) -> None:
        raise Unreachable("gone")

    world = World()
    monkeypatch.setattr(world.claims, "settle", gone)
    world.claims.values["env_1", "send-email", "held"] = "pending:another"
    world.claims.values["env_1", "send-email", "stale"] = "nowhere"
    waiting, stale = entry(body(options={"idempotency_key": "held"})), call(key="stale")
    assert await world.handle(waiting, stale) == []
    assert world.desk.acknowledged == []
    assert not world.store.rows
    monkeypatch.undo()
    world.claims.values.clear()
    (reply,) = await world.tick()
    assert list(world.store.rows) == [reply["run"]["id"]]


async def test_g3_a_repeated_call_is_its_own_while_nobody_can_say_more() -> None:
    world = World()
    (first,) = await world.handle(call())
    world.store.failure = StoreUnavailable()
    (again,) = await world.handle(call())
    assert (again["run"]["id"], again["is_cached"]) == (first["run"]["id"], False)


async def test_g1_what_may_be_a_row_is_not_said_to_be_nothing() -> None:
    world = World(max_buffered_per_env=1)
    world.gate.passes = 0
    await world.handle(entry())
    world.buffer.limit = 1
    world.store.failure = StoreUnavailable()
    (reply,) = await world.handle(call())
    assert reply["error"]["code"] == "store_unavailable", "not queue_limit_exceeded: it may be a row"


class TestClaims:
    async def test_what_the_buffer_knows_claims_nothing(
        self, client: Redis, make_buffer: Callable[..., RedisBuffer]
    ) -> None:
        claims = RedisClaims(Scripts(client), KEYS, Settings.model_validate({}))
        later = NOW.replace(year=NOW.year + 1)
        fields: dict[str, Any] = {
            "idempotency_key": "a",
            "idempotency_key_expires_at": later,
            "buffered_at": NOW,
        }
        known, new = run(**fields), run(**fields)
        (claim,) = await claims.claim([known], NOW, seek=True)
        assert claim.state == "claimed"
        await make_buffer().accept([known], [claim])
        await client.delete(KEYS.claim(known))  # as when its key is reset
        (claim,) = await claims.claim([known], NOW, seek=True)
        assert (claim.state, claim.winner) == ("taken", known)
        assert not await client.exists(KEYS.claim(known))
        (claim,) = await claims.claim([new], NOW, seek=True)
        assert claim.state == "claimed"
        (claim,) = await claims.claim([known], NOW, seek=True)
        assert (claim.state, claim.winner) == ("taken", known), "its own run comes before the key's"
        (claim,) = await claims.claim([known], NOW)
        assert claim.state == "pending"


class TestStore:
    async def test_a_run_is_found_by_its_id_before_its_key(self, pool: Pool) -> None:
        store = PostgresStore(pool, Settings())

        def keyed(**changes: Any) -> Snapshot:
            later = NOW.replace(year=NOW.year + 1)
            return run(idempotency_key="a", idempotency_key_expires_at=later, **changes)

        first, second = keyed(buffered_at=NOW), keyed()
        assert await store.look_up_keys([first], NOW, [first.id]) == [None]
        await store.insert([first], NOW)
        held = KeyHolder(first.id, first.span_id, None, is_buffered=True)
        assert await store.look_up_keys([first, second], NOW, [first.id, second.id]) == [held, held]
        await pool.execute("UPDATE mollifier.runs SET idempotency_key = NULL WHERE id = $1", first.id)
        await store.insert([second], NOW)
        other = KeyHolder(second.id, second.span_id, None, is_buffered=False)
        assert await store.look_up_keys([first, second], NOW, [first.id]) == [held, other]
        assert await store.look_up_keys([first, second], NOW) == [other, other]

    async def test_one_that_lost_its_key_to_another_is_still_itself(self, pool: Pool) -> None:
        store = PostgresStore(pool, Settings())
        winner, alias = run(), run()
        await store.insert([winner], NOW)
        await pool.execute(
            "INSERT INTO mollifier.run_aliases (id, run_id, environment_id) VALUES ($1, $2, $3)",
            alias.id,
            winner.id,
            alias.environment_id,
        )
        (holder,) = await store.look_up_keys([alias], NOW, [alias.id])
        assert holder == KeyHolder(alias.id, None, None, is_buffered=True)

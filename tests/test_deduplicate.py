"""One run per key, told with the world in memory: leaders, followers, waiting, and the ends of keys. G4."""

import asyncio
from sys import maxsize
from typing import Any

import pytest
from msgspec.structs import replace

from app.errors import BufferUnavailable, StoreUnavailable, Unreachable
from tests.builders import NOW, body, entry, run
from tests.test_pipeline import World

KEY = {"idempotency_key": "order-42"}


def keyed(**options: Any) -> Any:
    return entry(body(options={**KEY, **options}))


def runs(replies: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    return [(reply["run"]["id"], reply["is_cached"]) for reply in replies]


@pytest.mark.parametrize("passes", [0, 9])
async def test_duplicates_in_a_batch_follow_the_first(passes: int) -> None:
    world = World()
    world.gate.passes = passes
    replies = await world.handle(keyed(), entry(), keyed(), keyed())
    first, unkeyed, second, third = runs(replies)
    assert (first[1], unkeyed[1]) == (False, False)
    assert second == third == (first[0], True)
    assert "notice" not in replies[2]
    assert len(world.store.rows) + len(world.buffer.runs) == 2
    assert world.gate.asked == [{"env_1": 2}], "followers are not counted"


@pytest.mark.parametrize("passes", [0, 9])
async def test_a_later_request_is_answered_with_the_winner(passes: int) -> None:
    world = World()
    world.gate.passes = passes
    (first,) = runs(await world.handle(keyed()))
    (second,) = runs(await world.handle(keyed()))
    assert second == (first[0], True)


async def test_a_request_whose_key_is_held_waits_without_holding_up_its_batch() -> None:
    world = World()
    world.claims.values["env_1", "send-email", "order-42"] = "pending:another:token"
    waiting = keyed()
    (other,) = await world.handle(waiting, entry())
    assert not other["is_cached"]
    assert world.pipeline.waiting_room.held == {waiting.id}
    await world.pipeline.waiting_room.tick()
    assert world.pipeline.waiting_room.held == {waiting.id}


async def test_a_waiting_request_claims_a_key_that_was_released() -> None:
    world = World()
    world.claims.values["env_1", "send-email", "order-42"] = "pending:another:token"
    await world.handle(keyed(), keyed())
    world.claims.values.clear()
    first, second = runs(await world.tick())
    assert (first[1], second) == (False, (first[0], True))
    assert world.pipeline.waiting_room.held == set()


async def test_a_waiting_request_is_answered_with_the_winner() -> None:
    world = World()
    (winner,) = await world.handle(keyed())
    world.claims.values["env_1", "send-email", "order-42"] = "pending:another:token"
    await world.handle(keyed())
    world.claims.values["env_1", "send-email", "order-42"] = winner["run"]["id"]
    (waited,) = runs(await world.tick())
    assert waited == (winner["run"]["id"], True)


async def test_waiting_ends_in_time() -> None:
    world = World(claim_wait_ms=0)
    world.claims.values["env_1", "send-email", "order-42"] = "pending:another:token"
    await world.handle(keyed())
    (reply,) = await world.tick()
    assert reply["error"]["code"] == "claim_timed_out"
    assert reply["error"]["retryable"]


async def test_who_has_waited_long_enough_is_answered_by_the_row_that_its_claim_hides() -> None:
    world = World(claim_wait_ms=0)
    (winner,) = await world.handle(keyed())
    world.claims.values["env_1", "send-email", "order-42"] = "pending:another:token"
    await world.handle(keyed(), keyed())
    assert runs(await world.tick()) == [(winner["run"]["id"], True)] * 2


async def test_a_redelivered_request_ends_the_claim_that_its_first_attempt_left() -> None:
    world = World()
    request = keyed()
    (first,) = runs(await world.handle(request))
    world.claims.values["env_1", "send-email", "order-42"] = f"pending:{first[0]}:token"
    assert runs(await world.handle(replace(request, deliveries=2))) == [first]
    assert world.claims.values["env_1", "send-email", "order-42"] == first[0]


@pytest.mark.parametrize("changes", [{"enabled": False}, {"default_enrolled": False}, {"shadow_mode": True}])
async def test_what_is_not_claimed_ends_no_claim_either(changes: dict[str, bool]) -> None:
    world = World(**changes)
    request = keyed()
    (first,) = runs(await world.handle(request))
    world.claims.values["env_1", "send-email", "order-42"] = f"pending:{first[0]}:token"
    await world.handle(replace(request, deliveries=2))
    assert world.claims.values["env_1", "send-email", "order-42"] == f"pending:{first[0]}:token"


async def test_a_request_whose_claim_was_lost_on_the_way_finds_out_who_has_it() -> None:
    world = World()
    world.gate.passes = 0
    world.buffer.loses_claims = True
    assert await world.handle(keyed(), keyed()) == []
    world.buffer.loses_claims = False
    world.claims.values.clear()
    first, second = runs(await world.tick())
    assert (first[1], second) == (False, (first[0], True))


async def test_a_failed_leader_frees_its_key_and_its_followers_share_a_retryable_error() -> None:
    world = World()
    world.gate.passes = 0
    world.buffer.failure = BufferUnavailable()
    replies = await world.handle(keyed(), keyed())
    assert [reply["error"]["code"] for reply in replies] == ["buffer_unavailable"] * 2
    assert world.claims.values == {}


async def test_followers_of_a_leader_with_a_fault_of_its_own_try_again() -> None:
    world = World()
    world.store.refuses = {b'{"bad": 1}'}
    (refused,) = await world.handle(keyed(metadata={"bad": 1}), keyed())
    assert refused["error"]["code"] == "invalid_request"
    (second,) = runs(await world.tick())
    assert second[1] is False


async def test_a_claim_that_names_a_run_which_is_nowhere_is_let_go() -> None:
    world = World()
    world.claims.values["env_1", "send-email", "order-42"] = "vanished"
    assert await world.handle(keyed()) == []
    (reply,) = runs(await world.tick())
    assert reply[1] is False


async def test_without_claims_the_store_decides() -> None:
    world = World()
    world.claims.failure = Unreachable("away")
    (reply,) = runs(await world.handle(keyed()))
    assert reply[1] is False


async def test_without_the_store_a_key_is_accepted_under_its_claim() -> None:
    world = World()
    world.store.failure = StoreUnavailable()
    (first,) = await world.handle(keyed())
    assert first["is_mollified"]
    assert not first["is_cached"]
    (second,) = runs(await world.handle(keyed()))
    assert second == (first["run"]["id"], True)


@pytest.mark.parametrize("changes", [{"enabled": False}, {"default_enrolled": False}, {"shadow_mode": True}])
async def test_what_the_gate_could_never_mollify_is_not_claimed(changes: dict[str, bool]) -> None:
    world = World(**changes)
    await world.handle(keyed())
    assert world.claims.values == {}


PARENT = run(id="parent")
BYPASSES: list[dict[str, Any]] = [
    {"debounce": {"key": "k", "delay": "5s"}},
    {"one_time_use_token": "t"},
    {"parent_run_id": "run_parent", "resume_parent_on_completion": True},
]


async def mollified_winner(world: World) -> str:
    """The id of a buffered run that has the key."""
    await world.store.insert([PARENT], NOW)
    world.gate.passes = 0
    (winner,) = runs(await world.handle(keyed()))
    world.gate.passes = maxsize
    return winner[0]


@pytest.mark.parametrize("bypass", BYPASSES)
async def test_g4_a_bypassed_request_finds_the_buffered_run_of_its_key(bypass: dict[str, Any]) -> None:
    world = World()
    winner = await mollified_winner(world)
    (reply,) = runs(await world.handle(keyed(**bypass)))
    assert reply == (winner, True)
    assert list(world.store.rows) == [PARENT.id]
    waits = {(winner, PARENT.id)} if "parent_run_id" in bypass else set()
    assert world.store.waitpoints == waits


async def test_a_parent_that_cannot_be_made_to_wait_is_told_so() -> None:
    world = World()
    await mollified_winner(world)
    world.store.waitpoints_fail = True
    (reply,) = await world.handle(keyed(**BYPASSES[2]))
    assert reply["error"]["code"] == "store_unavailable"


@pytest.mark.parametrize("bypass", BYPASSES)
async def test_a_bypassed_request_claims_nothing_and_leaves_the_rest_to_the_store(
    bypass: dict[str, Any],
) -> None:
    world = World()
    await world.store.insert([PARENT], NOW)
    for failure in (None, Unreachable("away")):
        world.claims.failure = failure
        (reply,) = runs(await world.handle(keyed(**bypass)))
        assert reply[1] is False
    assert world.claims.values == {}


async def test_the_room_empties_when_the_process_stops() -> None:
    world = World(claim_wait_ms=0, claim_poll_ms=1)
    world.claims.values["env_1", "send-email", "order-42"] = "pending:another:token"
    await world.handle(keyed())
    stopping = asyncio.Event()
    stopping.set()
    await world.pipeline.waiting_room.run(stopping)
    assert world.pipeline.waiting_room.held == set()
    assert len(world.desk.replies) == 1


async def test_a_key_that_comes_free_before_the_batch_has_ended_is_handled_once() -> None:
    world = World()
    world.claims.values["env_1", "send-email", "order-42"] = "pending:another:token"
    reached, go_on = asyncio.Event(), asyncio.Event()
    insert = world.store.insert

    async def slow_insert(runs: Any, now: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await insert(runs, now)

    world.store.insert = slow_insert  # type: ignore[method-assign]
    waiting = keyed()
    batch = asyncio.create_task(world.pipeline.handle([waiting, entry()]))
    await reached.wait()
    world.claims.values.clear()
    world.store.insert = insert  # type: ignore[method-assign]
    await world.tick()
    go_on.set()
    await batch
    assert world.desk.acknowledged.count(waiting.id) == 1
    assert len(world.desk.replies) == len(world.store.rows) == 2

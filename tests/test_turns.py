"""The buffer as drainers see it: taking, settling, putting back, taking over, forgetting. G2, G9."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from app.buffer import RedisBuffer
from app.errors import Unreachable
from app.heartbeat import Heartbeat
from app.keys import Keys
from app.ports import Taken
from app.redis_client import Call, Scripts
from app.telemetry import Telemetry
from app.turns import RedisTurns
from schemas.snapshot import Snapshot, decode_snapshot
from tests.adapters import silence_after
from tests.builders import run

KEYS = Keys("mollifier", 16)


def ids(taken: list[Taken] | tuple[Taken, ...] | object) -> list[str]:
    assert isinstance(taken, list)
    return [decode_snapshot(snapshot).id for one in taken for _, snapshot in one.entries]


async def accept(
    make_buffer: Callable[..., RedisBuffer], count: int, environment: str = "env_1"
) -> list[Snapshot]:
    runs = [run(environment) for _ in range(count)]
    await make_buffer().accept(runs, [None] * count)
    return runs


async def alive(client: Redis, consumer: str, ttl_ms: int = 60_000) -> Heartbeat:
    heart = Heartbeat(Scripts(client), KEYS, consumer, ttl_ms, Telemetry("test"))
    await heart.beat()
    return heart


async def schedule_keys(client: Redis) -> list[Any]:
    return list(await client.keys("mollifier:{turns}*"))


async def test_g9_entries_come_in_the_order_accepted(
    make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    runs = await accept(make_buffer, 5)
    turns = make_turns()
    first = await turns.take(3)
    assert ids(first) == [one.id for one in runs[:3]]
    await turns.settle(first, [])
    second = await turns.take(3)
    assert ids(second) == [one.id for one in runs[3:]]
    await turns.settle(second, [])
    assert await turns.take(3) == []


async def test_g2_what_is_not_settled_is_taken_again(
    make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    runs = await accept(make_buffer, 3)
    assert ids(await make_turns("drainer-1").take(2)) == [one.id for one in runs[:2]]
    successor = make_turns("drainer-2")
    inherited = await successor.take(9)
    assert ids(inherited) == [one.id for one in runs[:2]], "no more: they may still be under way"
    await successor.settle(inherited, [])
    assert ids(await successor.take(9)) == [runs[2].id]


async def test_g2_a_take_of_which_nobody_knows_is_taken_again(
    client: Redis, make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    runs = await accept(make_buffer, 3)
    turns = make_turns()
    for script in ("schedule", "take", "settle"):
        with silence_after(turns._scripts, script), pytest.raises(Unreachable):
            await turns.settle(await turns.take(9), [])
        if script != "settle":
            taken = await turns.take(9)
            assert ids(taken) == [one.id for one in runs]
            await turns.put_back(taken, apart=False)
    assert await turns.take(9) == []
    await turns.schedule.flush()
    assert await schedule_keys(client) == []


async def test_entries_put_back_are_in_their_place(
    make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    runs = await accept(make_buffer, 3)
    turns = make_turns()
    await turns.put_back(await turns.take(2), apart=False)
    more = await accept(make_buffer, 1)
    assert ids(await make_turns("drainer-2").take(9)) == [one.id for one in (*runs, *more)]


async def test_an_environment_is_held_by_one_living_drainer(
    client: Redis, make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    runs = await accept(make_buffer, 2)
    one, two = make_turns("drainer-1"), make_turns("drainer-2")
    heart = await alive(client, "drainer-1")
    held = await one.take(1)
    assert await two.take(9) == []
    await heart.remove()
    assert ids(await two.take(9)) == [runs[0].id]
    await one.settle(held, [])
    assert await client.hget(KEYS.environment("env_1").drain, "queued") == b"2", (
        "a hold that was lost settles nothing"
    )


async def test_turns_are_shared_between_environments(
    make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    await accept(make_buffer, 100, "heavy")
    for number in range(10):
        await accept(make_buffer, 1, f"light_{number}")
    taken = await make_turns().take(22)
    assert {one.environment_id: len(one.entries) for one in taken} == {
        "heavy": 12,
        **{f"light_{number}": 1 for number in range(10)},
    }


async def test_settled_entries_stay_readable_until_their_grace_is_over(
    client: Redis, make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    (mine,) = await accept(make_buffer, 1)
    turns = make_turns(ack_grace_ttl_s=60)
    await turns.settle(await turns.take(9), [])
    assert await turns.forget() == 0
    assert await make_buffer().recall([mine], []) != [None]
    (late,) = await accept(make_buffer, 1)
    assert ids(await turns.take(9)) == [late.id]


async def test_forgetting_leaves_nothing_behind(
    client: Redis, make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    turns = make_turns(ack_grace_ttl_s=0)
    for environment in ("env_1", "env with spaces", "é:*"):
        await accept(make_buffer, 3, environment)
    while taken := await turns.take(4):
        await turns.settle(taken, [])
    while await turns.forget():
        pass
    assert await client.keys("*") == []


async def test_forgetting_spares_what_was_accepted_since(
    make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    turns = make_turns(ack_grace_ttl_s=0)
    await accept(make_buffer, 2)
    await turns.settle(await turns.take(9), [])
    (late,) = await accept(make_buffer, 1)
    assert await turns.forget() == 2
    assert ids(await turns.take(9)) == [late.id]


async def test_settling_twice_settles_once(
    client: Redis, make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    await accept(make_buffer, 3)
    turns = make_turns()
    taken = await turns.take(2)
    await turns.settle(taken, [])
    await turns.settle(taken, [])
    assert await client.hget(KEYS.environment("env_1").drain, "queued") == b"1"


async def test_the_limit_counts_what_is_queued_not_what_is_remembered(
    make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    buffer, turns = make_buffer(max_buffered_per_env=2), make_turns(ack_grace_ttl_s=60)
    await buffer.accept([run(), run()], [None] * 2)
    await turns.settle(await turns.take(9), [])
    outcomes = await buffer.accept([run(), run(), run()], [None] * 3)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Answer", "Answer", "QueueLimitExceeded"]


async def test_g2_what_was_handed_out_twice_in_one_call_is_found_again(
    make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    """The client repeats a call whose connection broke: only the second answer is seen, and it is empty."""
    runs = await accept(make_buffer, 3)
    turns = make_turns()
    send = turns._scripts._send

    async def repeat(calls: Sequence[Call]) -> list[Any]:
        await send(calls)
        return await send(calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns._scripts, "_send", repeat)
        assert await turns.take(9) == []
    assert ids(await turns.take(9)) == [one.id for one in runs]

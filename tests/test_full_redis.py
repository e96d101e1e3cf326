"""A Redis that is out of memory: what would fill it is refused, all that empties it goes on. G8, G2."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis

from app.batch import Answer, DeadLetter, Item
from app.buffer import RedisBuffer
from app.claims import RedisClaims
from app.errors import BufferUnavailable
from app.gate import RedisGate
from app.heartbeat import Heartbeat
from app.keys import Keys
from app.ports import Settlement
from app.redis_client import Scripts
from app.replies import RedisDesk
from app.settings import Settings
from app.telemetry import Telemetry
from app.turns import RedisTurns
from tests.builders import NOW, entry, run
from tests.test_claims import keyed

KEYS = Keys("mollifier", 16)
Fill = Callable[[], Awaitable[None]]

SETTINGS = Settings.model_validate({"trip_threshold": 1})


@pytest.fixture
async def full(client: Redis) -> AsyncIterator[Fill]:
    """Called, it leaves Redis without memory until the test ends."""

    async def fill() -> None:
        await client.config_set("maxmemory", "1")

    yield fill
    await client.config_set("maxmemory", "0")


async def test_accepting_is_refused_and_draining_goes_on(
    client: Redis,
    full: Fill,
    make_buffer: Callable[..., RedisBuffer],
    make_turns: Callable[..., RedisTurns],
) -> None:
    buffer, turns = make_buffer(), make_turns(ack_grace_ttl_s=0)
    mine = run(id="chosen")
    await buffer.recall([mine], [mine])
    await buffer.accept([mine], [None])
    await full()
    (refused,) = await buffer.accept([run()], [None])
    assert isinstance(refused, BufferUnavailable)
    assert [type(found) for found in await buffer.recall([mine], [mine])] == [Answer]
    await turns.settle(await turns.take(9), [])
    await turns.schedule.flush()
    await buffer.release([mine])
    assert await turns.forget() == 1
    assert await client.keys("*") == []


async def test_the_gate_still_holds(client: Redis, full: Fill) -> None:
    gate = RedisGate(Scripts(client), KEYS, SETTINGS)
    await full()
    assert (await gate.admit({"env_1": 3})).by_environment == {"env_1": 1}
    assert (await gate.admit({"env_1": 1})).by_environment == {"env_1": 0}


async def test_a_claim_of_what_is_refused_is_released(
    client: Redis, full: Fill, make_buffer: Callable[..., RedisBuffer]
) -> None:
    claims = RedisClaims(Scripts(client), KEYS, SETTINGS)
    mine = keyed()
    await full()
    (claim,) = await claims.claim([mine], NOW)
    assert claim.expected is not None
    (refused,) = await make_buffer().accept([mine], [claim])
    assert isinstance(refused, BufferUnavailable)
    assert await claims.settle([Settlement(mine, claim.expected, "")], NOW) == [True]
    assert await client.keys("*claim*") == []


async def test_who_lives_does_not_look_dead(client: Redis, full: Fill) -> None:
    await full()
    await Heartbeat(Scripts(client), KEYS, "me", 60_000, Telemetry("test")).beat()
    assert await client.exists(KEYS.heartbeat("me"))


async def test_a_dead_letter_that_cannot_be_kept_is_not_dropped(client: Redis, full: Fill) -> None:
    desk = RedisDesk(Scripts(client), KEYS, KEYS.triggers)
    item = Item(entry(b"{"), dead_letter=DeadLetter("undecodable", "not JSON"))
    await full()
    assert await desk.set_aside([item]) == [item]

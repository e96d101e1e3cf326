"""A process lives from one heartbeat to the next."""

import pytest
from redis.asyncio import Redis

from app.errors import Unreachable
from app.heartbeat import Heartbeat
from app.keys import Keys
from app.redis_client import Call, Scripts
from app.telemetry import Telemetry

KEYS = Keys("mollifier", 16)
TTL_MS = 5000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heart(client: Redis, clock: Clock) -> Heartbeat:
    return Heartbeat(Scripts(client), KEYS, "me", TTL_MS, Telemetry("test"), clock)


async def test_nobody_is_alive_before_others_can_see_it(
    heart: Heartbeat, clock: Clock, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, and when Redis was away for longer than a life: what is read then, others may take."""
    await heart.renew()
    assert await client.exists(KEYS.heartbeat("me"))
    first = heart.life()

    async def gone(calls: list[Call]) -> None:
        raise Unreachable("Redis: gone")

    with monkeypatch.context() as away:
        away.setattr(heart._scripts, "demand", gone)
        for _ in range(3):
            clock.now += 5
            with pytest.raises(Unreachable):
                await heart.renew()
            heart.life()
    await client.delete(KEYS.heartbeat("me"))
    await heart.renew()
    assert await client.exists(KEYS.heartbeat("me"))
    assert heart.life() == first + 1


async def test_who_beats_in_time_has_one_life(heart: Heartbeat, clock: Clock, client: Redis) -> None:
    first = heart.life()
    for _ in range(5):
        clock.now += 4.9
        await heart.beat()
        assert heart.life() == first
    assert 0 < await client.pttl(KEYS.heartbeat("me")) <= TTL_MS


async def test_who_was_silent_for_too_long_has_another(heart: Heartbeat, clock: Clock) -> None:
    """Also when the first thing that happens after that is a beat."""
    await heart.beat()
    first = heart.life()
    clock.now += 5
    await heart.beat()
    second = heart.life()
    clock.now += 5
    assert len({first, second, heart.life()}) == 3


async def test_what_is_about_to_be_written_has_half_a_life(heart: Heartbeat, clock: Clock) -> None:
    """G3: it is renewed for that before half of it is over, and is another if it was over."""
    await heart.beat()
    first = heart.life()
    clock.now += 2.4
    await heart.renew()
    clock.now += 2.5
    await heart.renew()
    clock.now += 4.9
    assert heart.life() == first
    clock.now += 2.5
    await heart.renew()
    assert heart.life() != first


async def test_who_cannot_renew_its_life_is_told(
    heart: Heartbeat, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(calls: list[Call]) -> None:
        raise Unreachable("Redis: gone")

    await heart.beat()
    monkeypatch.setattr(heart._scripts, "demand", gone)
    await heart.renew()
    clock.now += 2.5
    with pytest.raises(Unreachable):
        await heart.renew()


async def test_a_beat_counts_from_when_it_was_sent(
    heart: Heartbeat, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that failed, or whose answer was long under way, does not prolong a life."""
    await heart.beat()
    first = heart.life()

    async def late(calls: list[Call]) -> None:
        clock.now += 3
        raise Unreachable("Redis: gone")

    monkeypatch.setattr(heart._scripts, "demand", late)
    with pytest.raises(Unreachable):
        await heart.beat()
    clock.now += 2
    assert heart.life() != first

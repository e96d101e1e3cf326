"""Alive while the loops move, ready while the servers answer; the two never mix."""

import asyncio

from app.health import Health


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def _well() -> None:
    return None


async def _away() -> None:
    raise ConnectionError("refused")


async def test_a_loop_that_stands_still_is_stuck_until_it_moves() -> None:
    clock = Clock()
    health = Health({}, clock)
    health.progress("read", within_s=30)
    health.progress("recover", within_s=60)
    clock.now = 31
    assert health.stuck() == {"read": 31}
    health.progress("read", within_s=30)
    assert health.stuck() == {}


async def test_a_server_that_is_away_is_missing_and_nothing_is_stuck() -> None:
    health = Health({"redis": _away, "postgres": _well})
    assert await health.missing() == {"redis": "refused"}
    assert health.stuck() == {}


async def test_servers_are_asked_at_most_once_a_second() -> None:
    clock, asked = Clock(), []

    async def ask() -> None:
        asked.append(clock.now)

    health = Health({"redis": ask}, clock)
    await health.missing()
    await health.missing()
    clock.now = 1.5
    await health.missing()
    assert asked == [0.0, 1.5]


async def test_a_server_that_says_nothing_is_missing() -> None:
    async def silence() -> None:
        await asyncio.Event().wait()

    assert "no answer" in (await Health({"redis": silence}).missing())["redis"]

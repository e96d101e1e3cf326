"""One exchange for many commands: its answers are its own, whatever happens to it. G1."""

import asyncio

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from app.errors import Unreachable
from app.redis_client import Call, Scripts
from app.redis_connection import connect, connection_of
from tests.waiting import eventually


def command(name: str, *arguments: str | int) -> Call:
    return Call(name, None, arguments)


async def hangs(client: Redis) -> None:
    assert "blpop" in [one["cmd"] for one in await client.client_list()]


async def test_an_answer_that_is_an_error_is_one_of_the_answers(client: Redis) -> None:
    answers = await Scripts(client).run(
        [command("SET", "a", 1), command("LPUSH", "a", 1), command("GET", "a"), command("HGETALL", "none")]
    )
    assert answers[0] is True
    assert isinstance(answers[1], ResponseError)
    assert answers[2:] == [b"1", {}]


async def test_what_is_cancelled_leaves_its_answer_to_nobody(redis_url: str) -> None:
    """Of a command that hangs, on the only connection there is; the next one is asked on another."""
    client = connect(redis_url + "?max_connections=1")
    scripts = Scripts(client)
    await scripts.run([command("SET", "a", "mine")])
    hanging = asyncio.create_task(scripts.run([command("BLPOP", "list", 0), command("GET", "list")]))
    other = connect(redis_url)
    await eventually(lambda: hangs(other))
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    await other.lpush("list", "of the one that hung")
    assert await scripts.run([command("GET", "a")] * 3) == [b"mine"] * 3
    await client.aclose()
    await other.aclose()


async def test_who_does_not_answer_in_time_is_unreachable(redis_url: str) -> None:
    client = connect(redis_url + "?socket_timeout=0.2")
    scripts = Scripts(client)
    with pytest.raises(Unreachable, match="does not answer in time"):
        await scripts.run([command("BLPOP", "list", 0)])
    assert await scripts.run([command("PING")]) == [True]
    await client.aclose()


@pytest.mark.parametrize(("retries", "survives"), [(1, True), (0, False)])
async def test_a_connection_that_was_cut_is_tried_again_as_often_as_the_client_may(
    client: Redis, redis_url: str, retries: int, survives: bool
) -> None:
    own = connect(redis_url)
    own.set_retry(Retry(NoBackoff(), retries))
    scripts, appends = Scripts(own), [command("XADD", "stream", "*", "a", 1)]
    async with connection_of(own) as connection:
        exchange = connection.exchange

        async def cut_once(commands: list[tuple[object, ...]]) -> list[object]:
            connection.__dict__.pop("exchange")
            await exchange(commands)  # it is done, but nobody hears of it
            await connection.disconnect(nowait=True)
            raise RedisConnectionError

        connection.__dict__["exchange"] = cut_once
    outcome = await asyncio.gather(scripts.run(appends), return_exceptions=True)
    assert isinstance(outcome[0], list) == survives
    assert await client.xlen("stream") == 1 + survives
    await own.aclose()

"""One exchange for many commands: its answers are its own, whatever happens to it. G1."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from app.batch import Answer
from app.buffer import RedisBuffer
from app.errors import BufferUnavailable, Unreachable
from app.keys import Keys
from app.redis_client import Call, Scripts
from app.redis_connection import connect, connection_of
from app.settings import Settings
from tests.builders import run
from tests.waiting import eventually


def command(name: str, *arguments: str | int) -> Call:
    return Call(name, None, arguments)


async def cut_once(client: Redis, meanwhile: Callable[[], Awaitable[object]] | None = None) -> None:
    """Have the next exchange of a client be done, but nobody hear of it."""
    async with connection_of(client) as connection:
        exchange = connection.exchange

        async def cut(commands: Sequence[Sequence[Any]]) -> list[Any]:
            connection.__dict__.pop("exchange")
            await exchange(commands)
            if meanwhile is not None:
                await meanwhile()
            await connection.disconnect(nowait=True)
            raise RedisConnectionError

        connection.__dict__["exchange"] = cut


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


async def test_a_connection_that_was_closed_under_a_write_is_lost(client: Redis) -> None:
    """Which uvloop says with a RuntimeError."""

    class Closed:
        def writelines(self, lines: Sequence[bytes]) -> None:
            raise RuntimeError("the handler is closed")

        def close(self) -> None:
            """As a StreamWriter."""

        async def wait_closed(self) -> None:
            """As a StreamWriter."""

    async with connection_of(client) as connection:
        for send in (lambda: connection.send_command("PING"), lambda: connection.exchange([("PING",)])):
            connection._writer = Closed()  # type: ignore[assignment]
            with pytest.raises(RedisConnectionError, match="the handler is closed"):
                await send()
            await connection.connect()  # type: ignore[attr-defined]
    assert await client.ping()


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
    await cut_once(own)
    outcome = await asyncio.gather(scripts.run(appends), return_exceptions=True)
    assert isinstance(outcome[0], list) == survives
    assert await client.xlen("stream") == 1 + survives
    await own.aclose()


class Forgetful(Scripts):
    """Does what it is asked, but says of the first call that its script is not there; once."""

    asked: list[list[str]]

    async def _send(self, calls: Sequence[Call]) -> list[Any]:
        self.asked.append([call.name for call in calls])
        if len(self.asked) > 1:
            return await super()._send(calls)
        return [NoScriptError("No matching script."), *await super()._send(calls[1:])]


async def test_what_was_done_is_not_done_again_for_a_script_that_was_not_there(client: Redis) -> None:
    """Another process may load it between two calls of one exchange; done again, a call might be refused."""
    scripts = Forgetful(client)
    scripts.asked = []
    call = Call("enlist", ["processes"], ["triggers me", 1000])
    answers = await scripts.run([call, command("RPUSH", "list", 1), command("WAIT", 0, 100)])
    assert scripts.asked == [["enlist", "RPUSH", "WAIT"], ["enlist", "WAIT"]]
    assert answers[1:] == [1, 0]
    assert not isinstance(answers[0], Exception)
    assert await client.llen("list") == 1


async def test_g2_what_was_done_before_the_connection_broke_is_not_said_to_be_refused(
    client: Redis, redis_url: str
) -> None:
    """There is no memory left by the time that it is asked for again: it is not known, or found."""
    own, mine, late = connect(redis_url), run(), run()
    scripts = Scripts(own)
    buffer = RedisBuffer(scripts, Keys("mollifier", 16), Settings.model_validate({}))
    await buffer.accept([run()], [None])
    await buffer.accept([mine], [None])
    await cut_once(own, meanwhile=lambda: client.config_set("maxmemory", "1"))
    try:
        with pytest.raises(Unreachable, match="asked again"):
            await scripts.run([command("SET", "done", 1)])
        known = Answer(mine.id, mine.span_id, None, is_mollified=True)
        found, refused = await buffer.accept([mine, late], [None, None])
        assert found == known
        assert isinstance(refused, BufferUnavailable)
    finally:
        await client.config_set("maxmemory", "0")
    assert await client.get("done") == b"1"
    assert await buffer.recall([mine, late], []) == [known, None]
    await own.aclose()

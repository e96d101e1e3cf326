"""Requests at a given rate, or as fast as they are answered, and how long their replies take."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from hiredis import pack_command

from app.client import Mollifier
from bench.findings import Reading

Body = Callable[[int], dict[str, Any]]
"""The body of a request by its number."""

_TICK_S = 0.002
_WITHIN_S = 30.0
_LANES, _AT_ONCE = 8, 250


async def offered(client: Mollifier, body: Body, rate: float, seconds: float) -> Reading:
    """Send at a steady rate, whether or not earlier requests are answered. A reply's time counts from when
    its request was due, so what holds up the sender is not left out.
    """
    clock = asyncio.get_running_loop().time
    total, sent, took_s = int(rate * seconds), 0, list[float]()
    started = clock()

    async def send(numbers: range) -> None:
        at = clock() - started
        async for delivery in client.trigger_many(map(body, numbers), timeout=_WITHIN_S):
            if delivery.error is not None:
                raise delivery.error
            took_s.append(at - numbers[delivery.position] / rate + delivery.latency_s)

    async with asyncio.TaskGroup() as sending:
        while sent < total:
            due = min(total, int((clock() - started) * rate) + 1)
            if due > sent:
                sending.create_task(send(range(sent, due)))
                sent = due
            await asyncio.sleep(_TICK_S)
    return replied(took_s, clock() - started)


async def poured(
    redis_url: str, body: bytes, rate: float, seconds: float, stream: str = "mollifier:triggers"
) -> None:
    """Append the same request at a steady rate; nobody listens for the replies. It costs this process next
    to nothing, so that it does not disturb what else it measures.
    """
    address = urlsplit(redis_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    request: tuple[Any, ...] = ("XADD", stream, "*", "body", body, "reply_to", "mollifier:reply:nobody")
    append = pack_command(request)
    clock = asyncio.get_running_loop().time
    total, sent, started = int(rate * seconds), 0, clock()

    async def read() -> None:
        while await reader.read(65536):
            pass

    reading = asyncio.create_task(read())
    try:
        while sent < total:
            due = min(total, int((clock() - started) * rate) + 1)
            writer.write(append * (due - sent))
            sent = due
            await asyncio.sleep(_TICK_S)
        await writer.drain()
    finally:
        writer.close()
        await reading


async def saturated(client: Mollifier, body: Body, count: int) -> float:
    """Replies a second while 2,000 requests are always under way."""
    clock = asyncio.get_running_loop().time
    stretches = iter(range(0, count, _AT_ONCE))

    async def lane() -> None:
        for first in stretches:
            bodies = map(body, range(first, first + _AT_ONCE))
            async for delivery in client.trigger_many(bodies, timeout=_WITHIN_S):
                if delivery.error is not None:
                    raise delivery.error

    started = clock()
    async with asyncio.TaskGroup() as lanes:
        for _ in range(_LANES):
            lanes.create_task(lane())
    return count / (clock() - started)


def replied(took_s: Iterable[float], seconds: float) -> Reading:
    """The reading of replies that took so long each."""
    ordered = sorted(took_s)
    return Reading(
        len(ordered), seconds, p50_ms=percentile(ordered, 50) * 1000, p99_ms=percentile(ordered, 99) * 1000
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

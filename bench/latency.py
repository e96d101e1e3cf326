"""How long a reply takes: alone, beside the least that a worker can do, and under load."""

import time
from collections.abc import Mapping
from itertools import count as counting
from typing import Any

from app.client import Mollifier, request
from bench import echo
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Figure, Measured, Reading, in_turn
from bench.load import offered, replied, saturated
from bench.stage import Stage
from bench.triggers import MOLLIFIES, PAYLOAD, STREAM, tenant, trigger

ASKED = 300
"""Requests that are alone, one after the other."""
WARM_UP = 50
SATURATING = 20_000
LOADED_S = 3.0

_ALONE = Bound(name="median reply alone, ours to the echo", most=4)
_HALF = Bound(name="99% of the replies at half of capacity within", unit="ms", most=50)
_MOST = Bound(name="99% of the replies at 90% of capacity within", unit="ms", most=250)
_CHANNEL = "mollifier:reply:bench:alone"


async def measure(stage: Stage, scale: Scale) -> Measured:
    async def bare() -> Reading:
        await stage.clear()
        await stage.redis.xgroup_create(echo.STREAM, echo.GROUP, id="0", mkstream=True)
        async with stage.processes("bench.echo"):
            return await _asked(stage, echo.STREAM, scale.of(ASKED))

    async def ours(**settings: int) -> Reading:
        await stage.clear()
        async with stage.processes("workers.triggers", **settings):
            return await _asked(stage, STREAM, scale.of(ASKED))

    async def mollified() -> Reading:
        return await ours(**MOLLIFIES)

    alone = await in_turn({"the echo": bare, "passing": ours, "mollified": mollified}, scale.pairs)
    loaded = [await _loaded(stage, scale) for _ in range(scale.pairs)]
    return Measured(
        {
            _ALONE.name: alone.ratios("p50_ms", "passing", "the echo"),
            _HALF.name: tuple(half.p99_ms for _, half, _ in loaded),
            _MOST.name: tuple(most.p99_ms for _, _, most in loaded),
        },
        (
            *alone.figures(),
            Figure("capacity, a second", "", tuple(capacity for capacity, _, _ in loaded)),
            Figure(
                "at half of it, half of the replies within", "ms", tuple(half.p50_ms for _, half, _ in loaded)
            ),
            Figure(
                "at 90% of it, half of the replies within", "ms", tuple(most.p50_ms for _, _, most in loaded)
            ),
        ),
    )


async def _asked(stage: Stage, stream: str, count: int) -> Reading:
    """One request at a time: append it, wait for its reply."""
    async with stage.redis.pubsub() as replies:
        await replies.subscribe(_CHANNEL)
        await replies.get_message(timeout=5)

        async def ask(number: int) -> float:
            fields: Mapping[Any, Any] = {
                "body": trigger(number),
                "reply_to": _CHANNEL,
                "correlation_id": number,
            }
            started = time.perf_counter()
            await stage.redis.xadd(stream, dict(fields))
            assert await replies.get_message(timeout=5) is not None, "no reply"
            return time.perf_counter() - started

        for number in range(WARM_UP):
            await ask(number)
        started = time.perf_counter()
        took_s = [await ask(number) for number in range(count)]
        return replied(took_s, time.perf_counter() - started)


async def _loaded(stage: Stage, scale: Scale) -> tuple[float, Reading, Reading]:
    """The capacity of one worker, in replies a second, and replies at half of it and at 90%."""
    await stage.clear()
    keys = counting()

    def body(number: int) -> dict[str, Any]:
        key = f"key-{next(keys)}"
        return request("send-email", PAYLOAD, environment=tenant(number), idempotency_key=key)

    async with stage.processes("workers.triggers"), Mollifier(stage.valkey.url) as client:
        await saturated(client, body, SATURATING // 5)
        capacity = await saturated(client, body, scale.of(SATURATING))
        half = await offered(client, body, 0.5 * capacity, LOADED_S * scale.share)
        most = await offered(client, body, 0.9 * capacity, LOADED_S * scale.share)
    return capacity, half, most


COMPARISON = Comparison(
    name="latency",
    title="Reply latency",
    how=f"""
        Alone: {ASKED} requests without a key, each appended when the one before was answered, with the
        default settings, so they pass through; the echo is a FastStream process that publishes what it reads
        from a stream. Under load: one trigger worker with the default settings, requests with keys from a
        producer in Python on the same machine. Capacity is what it answers while 2,000 requests are always
        under way; then half of that rate, and 90%, for {LOADED_S:g} s each.
    """,
    bounds=(_ALONE, _HALF, _MOST),
    measure=measure,
)

"""Trigger requests, and timing the workers that work them off."""

import time
from collections.abc import Sequence

import orjson

from bench.findings import Reading
from bench.process import Process, machine_s, until
from bench.stage import Stage

ENVIRONMENTS = 20
ORGANIZATIONS = 8
PAYLOAD = {"text": "y" * (400 - len('{"text":""}'))}
"""400 bytes as JSON."""

MOLLIFIES = {"trip_window_ms": 600_000, "trip_threshold": 1, "hold_ms": 600_000}
"""Settings with which an environment's second request, and all after it, are mollified."""
PASSES = {"trip_threshold": 1_000_000_000}
"""Settings with which the gate is asked and lets everything pass."""

STREAM = "mollifier:triggers"


def tenant(number: int, environments: int = ENVIRONMENTS) -> dict[str, str]:
    """The environment of a request by its number."""
    environment = number % environments
    return {
        "id": f"env_{environment}",
        "organization_id": f"org_{environment % ORGANIZATIONS}",
        "project_id": "proj_1",
    }


def trigger(number: int, *, environments: int = ENVIRONMENTS, key: str | None = None) -> bytes:
    """The body of a request: `number` chooses its environment."""
    body: dict[str, object] = {
        "task": "send-email",
        "environment": tenant(number, environments),
        "payload": PAYLOAD,
    }
    if key is not None:
        body["options"] = {"idempotency_key": key}
    return orjson.dumps(body)


def triggers(count: int, *, environments: int = ENVIRONMENTS, keys: str | None = None) -> list[bytes]:
    """So many bodies, with keys of their own that begin with `keys` if that is given."""
    return [
        trigger(number, environments=environments, key=None if keys is None else f"{keys}-{number}")
        for number in range(count)
    ]


async def work_off(stage: Stage, workers: Sequence[Process], bodies: Sequence[bytes]) -> Reading:
    """Append requests all at once, and time the idle workers from their first batch on.

    An entry leaves the stream when it was answered and acknowledged, so the stream's length says how far
    they are. By the first that leaves, others are half done: processor time is that of all, in proportion.
    """
    answered, idle_s = await _runs(workers), used_by(workers)
    async with stage.redis.pipeline(transaction=True) as pipeline:
        for number, body in enumerate(bodies):
            fields = {"body": body, "reply_to": f"mollifier:reply:bench:{number}", "correlation_id": number}
            pipeline.xadd(STREAM, fields)  # type: ignore[arg-type]
        await pipeline.execute()

    async def has_begun() -> bool:
        return await left() < len(bodies)

    async def is_done() -> bool:
        for worker in workers:
            worker.check()
        return await left() == 0

    async def left() -> int:
        return int(await stage.redis.xlen(STREAM))

    await until(has_begun, "the first batch", every_s=0.001)
    count, started = await left(), time.perf_counter()
    redis_s, all_s = stage.redis_cpu_s, machine_s()
    await until(is_done, f"{count} requests to be answered")
    seconds = time.perf_counter() - started
    reading = Reading(
        count,
        seconds,
        (used_by(workers) - idle_s) * count / len(bodies),
        stage.redis_cpu_s - redis_s,
        machine_s() - all_s,
    )
    assert await _runs(workers) - answered == len(bodies), "not every request was answered with a run"
    return reading


async def _runs(workers: Sequence[Process]) -> float:
    """How many requests were answered with a run so far."""
    return sum([await worker.metric("mollifier_replies_total", code="run") for worker in workers])


def used_by(processes: Sequence[Process]) -> float:
    """Processor time of all of them so far."""
    return sum(process.cpu_s for process in processes)

"""The storm of `mollifier demo`: who triggers what and when, and what became of it."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

from app.client import Delivery, Mollifier, request

WAVES = 12
WAVE_EVERY_S = 0.4
GUSTS = (2, 6, 10)
"""The waves in which the noisy environment triggers, all at once; the others do in every wave."""

NOISY = "env_1"
REPLY_WITHIN_S = 60.0

KEYED_EVERY = 10
DUPLICATED_SHARE = 0.3
"""The share of keyed triggers that repeat the key of an earlier one of their environment and task."""

_TASKS = ("send-email", "resize-image", "sync-invoice")
_NOTE = "Leave it at the door, please, and ring twice: the dog is friendly and the neighbours are curious."


@dataclass(frozen=True, slots=True)
class Plan:
    """How big the storm is. The noisy environment sends half of everything, the others share the rest."""

    triggers: int
    environments: int
    organizations: int

    def waves(self) -> Iterator[list[dict[str, Any]]]:
        """The requests, wave by wave; a gust comes before those who have to wait behind it."""
        noisy = self.triggers // 2 if self.environments > 1 else self.triggers
        gusts = iter(_shares(range(noisy), len(GUSTS)))
        for wave, numbers in enumerate(_shares(range(noisy, self.triggers), WAVES)):
            gust = [self._request(0, number) for number in next(gusts)] if wave in GUSTS else []
            yield gust + [self._request(1 + number % (self.environments - 1), number) for number in numbers]

    def _request(self, sender: int, number: int) -> dict[str, Any]:
        return request(
            _TASKS[number % len(_TASKS)],
            _payload(number),
            environment={
                "id": f"env_{sender + 1}",
                "organization_id": f"org_{sender % self.organizations + 1}",
                "project_id": f"proj_{sender + 1}",
            },
            idempotency_key=self._key(number) if number % KEYED_EVERY == 0 else None,
            tags=["storm", f"customer-{number % 97}"] if number % 7 == 0 else None,
            metadata={"source": "demo", "attempt": 1} if number % 11 == 0 else None,
            ttl="1h" if number % 13 == 0 else None,
            delay="10m" if number % 29 == 0 else None,
        )

    def _key(self, number: int) -> str:
        earlier = number - KEYED_EVERY * len(_TASKS) * max(1, self.environments - 1)
        if earlier >= 0 and Random(number).random() < DUPLICATED_SHARE:
            return self._key(earlier)
        return f"order-{number}"


@dataclass(slots=True)
class Tally:
    """What is known of a storm so far. Times are those of the event loop, in seconds; `..._in` are counts by
    the second since the start.
    """

    offered: int = 0
    passed: int = 0
    mollified: int = 0
    cached: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    run_ids: list[str] = field(default_factory=list)
    cached_run_ids: list[str] = field(default_factory=list)
    noisy_latencies_s: list[float] = field(default_factory=list)
    other_latencies_s: list[float] = field(default_factory=list)
    offered_in: Counter[int] = field(default_factory=Counter)
    answered_in: Counter[int] = field(default_factory=Counter)
    started: float = 0.0
    all_offered: float = 0.0
    last_reply: float = 0.0

    @property
    def answered(self) -> int:
        return len(self.run_ids) + len(self.cached_run_ids)

    def offer(self, count: int) -> None:
        """Count requests that are about to be sent."""
        self.all_offered = asyncio.get_running_loop().time()
        self.offered += count
        self.offered_in[int(self.all_offered - self.started)] += count

    def add(self, delivery: Delivery, environment_id: str) -> None:
        """Count what became of one request."""
        self.last_reply = asyncio.get_running_loop().time()
        reply, error = delivery.reply, delivery.error
        if reply is None:
            self.errors[getattr(error, "code", "no reply")] += 1
            return
        self.answered_in[int(self.last_reply - self.started)] += 1
        latencies_s = self.noisy_latencies_s if environment_id == NOISY else self.other_latencies_s
        latencies_s.append(delivery.latency_s)
        (self.cached_run_ids if reply.is_cached else self.run_ids).append(reply.run.id)
        if reply.is_cached:
            self.cached += 1
        elif reply.is_mollified:
            self.mollified += 1
        else:
            self.passed += 1


async def storm(mollifier: Mollifier, plan: Plan, tally: Tally) -> None:
    """Send the waves, each in its time whether or not the last one is answered; end with the last reply."""
    clock = asyncio.get_running_loop().time
    tally.started = clock()
    async with asyncio.TaskGroup() as waves:
        for number, requests in enumerate(plan.waves()):
            await asyncio.sleep(tally.started + number * WAVE_EVERY_S - clock())
            tally.offer(len(requests))
            waves.create_task(_send(mollifier, requests, tally))


async def _send(mollifier: Mollifier, requests: list[dict[str, Any]], tally: Tally) -> None:
    async for delivery in mollifier.trigger_many(requests, timeout=REPLY_WITHIN_S):
        tally.add(delivery, requests[delivery.position]["environment"]["id"])


def _shares(numbers: range, count: int) -> Iterator[range]:
    """`numbers` cut into `count` stretches of about the same length."""
    edges = [len(numbers) * edge // count for edge in range(count + 1)]
    return (numbers[first:end] for first, end in pairwise(edges))


def _payload(number: int) -> dict[str, Any]:
    return {
        "order": number,
        "to": f"customer-{number % 97}@example.com",
        "template": "order-confirmed",
        "items": [{"sku": f"sku-{number % 31}", "quantity": number % 4 + 1, "price": "19.90"}],
        "note": _NOTE,
    }

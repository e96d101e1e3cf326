"""The rate gate against a plain one that takes requests one by one, in whole numbers. DESIGN section 6.

Hypothesis decides who asks for how much and when: several clients, one after the other and at once, several
environments, and what the buffer holds of them. Time is the model's alone, also that of the keys' ends.
A longer search: see `machines.py`.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from sys import maxsize
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from app.buffer import RedisBuffer
from app.gate import RedisGate
from app.keys import Keys
from app.redis_client import Scripts
from app.redis_connection import connect
from app.settings import Settings
from app.turns import RedisTurns
from tests.builders import START_MS, run
from tests.machines import Endings, Machine, patient, search, tell

WINDOW, HOLD = 60_000, 150_000
ENVIRONMENTS = ["env_1", "env_2", "a:b", "a", ":b", "env é"]
CLIENTS = 3
FLEET = ""
"""The scope of all environments together."""

Requests = Mapping[str, int]


class Policy(NamedTuple):
    """Settings of the gate, the same for all clients."""

    window: str
    threshold: int
    fleet_threshold: int
    hold_until_drained: bool


@dataclass
class Scope:
    """An environment, or the fleet. Every request is decided on its own."""

    sliding: bool
    threshold: int
    index: int = 0
    count: int = 0
    previous: int = 0
    tripped_until: int = 0

    def decide(self, now: int, has_entries: bool) -> bool:
        """Whether one request, now, passes. A clock that was set back changes just a window's name."""
        index, elapsed = divmod(now, WINDOW)
        if index > self.index:
            self.count, self.previous = 0, self.count if index == self.index + 1 else 0
        self.index = index
        self.tripped_until = min(self.tripped_until, now + HOLD)
        self.count += 1
        carried = self.previous * (WINDOW - elapsed) if self.sliding else 0
        is_tripped = self.tripped_until > now or has_entries
        if carried + self.count * WINDOW > self.threshold * WINDOW:
            self.tripped_until = now + HOLD
            return False
        return not is_tripped

    def admit(self, requests: int, now: int, has_entries: bool) -> int:
        """How many of some requests pass."""
        answers = [self.decide(now, has_entries) for _ in range(requests)]
        assert answers == sorted(answers, reverse=True), "the first ones pass"
        return sum(answers)

    def says_nothing(self, now: int) -> bool:
        """Whether all is as if nobody had asked yet."""
        return self.tripped_until <= now and now // WINDOW > self.index + 1


REQUESTS = st.dictionaries(
    st.sampled_from(ENVIRONMENTS), st.sampled_from([1, 1, 2, 3, 4, 5, 7, 12, 40]), min_size=1, max_size=3
)
CLIENT = st.integers(0, CLIENTS - 1)
PAUSES = st.sampled_from([1, WINDOW // 12, WINDOW // 3, WINDOW // 2, WINDOW - 1, WINDOW]) | st.sampled_from(
    [WINDOW + 1, 2 * WINDOW - 1, 2 * WINDOW, HOLD - 1, HOLD, 2 * WINDOW + HOLD, 50 * WINDOW, 7919]
)
POLICY = st.builds(
    Policy,
    st.sampled_from(["sliding", "fixed"]),
    st.integers(1, 6),
    st.sampled_from([0, 4, 9]),
    st.booleans(),
)


class Model(Machine):
    """The rules are what may happen; each answer is compared with that of the plain gate."""

    redis: Any
    scripts: list[Scripts]

    def __init__(self) -> None:
        super().__init__()
        self.now = START_MS
        self.scopes: dict[str, Scope] = {}
        self.passed: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.entries: Counter[str] = Counter()
        self.endings = Endings(self.redis, "mollifier:*gate*", WINDOW // 2)
        self.wait_for(self.redis.flushall())

    @initialize(policy=POLICY, offset=st.sampled_from([0, 1, WINDOW - 1]))
    def begin(self, policy: Policy, offset: int) -> None:
        self.policy = policy
        self.now += offset
        config = Settings.model_validate(
            {
                "trip_window_ms": WINDOW,
                "trip_threshold": policy.threshold,
                "hold_ms": HOLD,
                "gate_window": policy.window,
                "global_trip_threshold": policy.fleet_threshold,
                "hold_until_drained": policy.hold_until_drained,
                "partitions": 3,
                "ack_grace_ttl_s": 0,
            }
        )
        self.keys = Keys(config.namespace, config.partitions)
        self.gates = [RedisGate(scripts, self.keys, config) for scripts in self.scripts]
        self.buffer = RedisBuffer(self.scripts[0], self.keys, config)
        self.turns = RedisTurns(self.scripts[0], self.keys, config, "drainer-1")

    # What happens

    @rule(client=CLIENT, requests=REQUESTS)
    def admit(self, client: int, requests: Requests) -> None:
        self._admit([(client, requests)])

    @rule(asked=st.lists(st.tuples(CLIENT, REQUESTS), min_size=2, max_size=4))
    def admit_at_once(self, asked: Sequence[tuple[int, Requests]]) -> None:
        self._admit(asked)

    @rule(pause=PAUSES)
    def advance(self, pause: int) -> None:
        self.now += pause
        self.wait_for(self.endings.end(self.now))
        for name in [name for name in self.scopes if self._key(name) not in self.endings.at]:
            assert self.scopes.pop(name).says_nothing(self.now), "it ended too early"

    @rule(before=st.booleans())
    def come_to_a_boundary(self, before: bool) -> None:
        self.advance(max(0, WINDOW - self.now % WINDOW - before))

    @rule(pause=PAUSES)
    def set_back(self, pause: int) -> None:
        """The server's clock was wrong, or another server is asked from now on."""
        self.now -= pause
        self.passed.clear()

    @precondition(lambda self: self.policy.hold_until_drained)
    @rule(environment=st.sampled_from(ENVIRONMENTS))
    def buffer_one(self, environment: str) -> None:
        self.wait_for(self.buffer.accept([run(environment)], [None]))
        self.entries[environment] += 1

    @precondition(lambda self: self.entries.total())
    @rule(most=st.integers(1, 3))
    def drain(self, most: int) -> None:
        self.turns.schedule.stir()
        taken = self.wait_for(self.turns.take(most))
        assert taken
        self.wait_for(self.turns.settle(taken, []))
        self.entries -= Counter({one.environment_id: len(one.entries) for one in taken})

    # What must hold

    def _admit(self, asked: Sequence[tuple[int, Requests]]) -> None:
        self.wait_for(self._ask_and_check(asked))

    async def _ask_and_check(self, asked: Sequence[tuple[int, Requests]]) -> None:
        calls = [self.gates[client].admit(requests, self.now) for client, requests in asked]
        admissions = await asyncio.gather(*calls)
        batches: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for (_, requests), admission in zip(asked, admissions, strict=True):
            assert admission.by_environment.keys() == requests.keys()
            for environment, count in requests.items():
                batches[environment].append((count, admission.by_environment[environment]))
            if self.policy.fleet_threshold:
                batches[FLEET].append((sum(requests.values()), admission.fleet))
            else:
                assert admission.fleet == maxsize
        for name, answers in batches.items():
            self._check_answers(name, answers)
            self._check_window(name)
        await self._check_keys(batches.keys())

    def _check_answers(self, name: str, answers: Sequence[tuple[int, int]]) -> None:
        """Each batch of a scope got what the plain gate gives them in some order, whatever others ask."""
        threshold = self.policy.threshold if name != FLEET else self.policy.fleet_threshold
        before = self.scopes.setdefault(name, Scope(self.policy.window == "sliding", threshold))
        after = []
        for order in permutations(answers):
            scope = copy(before)
            if all(scope.admit(count, self.now, self.entries[name] > 0) == passed for count, passed in order):
                after.append(scope)
        assert after, (name, self.now, before, answers)
        self.scopes[name] = after[0]
        self.passed[name].append((self.now, sum(passed for _, passed in answers)))

    def _check_window(self, name: str) -> None:
        """Of any window's requests no more pass than the threshold, and sliding a part of what passed in the
        calendar's window before: as much of it as has elapsed of this one."""
        threshold, elapsed = self.scopes[name].threshold, self.now % WINDOW
        start = self.now - elapsed
        older = sum(count for at, count in self.passed[name] if self.now - WINDOW < at < start)
        newer = sum(count for at, count in self.passed[name] if at >= start)
        if self.policy.window == "fixed":
            assert newer <= threshold
        elif self.passed[name][-1][1]:
            assert (older + newer) * WINDOW <= threshold * WINDOW + older * elapsed

    async def _check_keys(self, asked: Set[str]) -> None:
        """One key a scope, and each of them ends."""
        await self.endings.look(self.now)
        names = {self._key(name) for name in asked}
        assert names <= self.endings.at.keys() <= {self._key(name) for name in self.scopes}
        assert all(self.now < self.endings.at[name] <= self.now + 2 * WINDOW + HOLD for name in names)

    def _key(self, name: str) -> str:
        return self.keys.fleet_gate if name == FLEET else self.keys.environment(name).gate


@asynccontextmanager
async def site(redis_url: str) -> AsyncIterator[dict[str, Any]]:
    clients = [connect(redis_url) for _ in range(CLIENTS + 1)]
    yield {"redis": clients[-1], "scripts": [Scripts(client) for client in clients[:-1]]}
    for client in clients:
        await client.aclose()


def a_clock_that_was_set_back_holds_nobody(model: Model) -> None:
    model.begin(Policy("sliding", 1, 0, False), 0)
    model.admit(0, {"env_1": 2})
    model.set_back(50 * WINDOW)
    for _ in range(2):
        model.admit(0, {"env_1": 1})
        model.advance(HOLD)
    assert model.passed["env_1"][-1][1] == 1


def a_clock_that_was_set_back_makes_no_window_longer(model: Model) -> None:
    model.begin(Policy("fixed", 2, 0, False), 0)
    model.admit(0, {"env_1": 1})
    model.set_back(50 * WINDOW)
    for _ in range(3):
        model.advance(WINDOW)
        model.admit(0, {"env_1": 1})


STORIES = [a_clock_that_was_set_back_holds_nobody, a_clock_that_was_set_back_makes_no_window_longer]


@patient
async def test_requests_are_decided_one_by_one_whoever_asks(redis_url: str) -> None:
    await search(Model, partial(site, redis_url), examples=200, steps=30)


@pytest.mark.parametrize("story", STORIES)
async def test_what_chance_seldom_finds(story: Callable[[Model], None], redis_url: str) -> None:
    await tell(story, Model, partial(site, redis_url))

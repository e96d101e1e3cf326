"""Processes are killed at every step, before it and after it; others do what they leave. G1 to G12.

A step without a crash point fails by its name; so does a point that no scene reaches.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple

import asyncpg
import pytest

from app import ports, runs, wiring
from app.drain import Drain
from app.lease import Lease
from app.operate import Operate
from app.operations import scene as stage
from app.pipeline import Pipeline
from app.postgres import create_pool
from app.redis_connection import connect
from app.runs import Runs
from app.schedule import Schedule
from app.settings import Settings
from app.streams import RequestStream
from app.sweep import Sweep
from app.telemetry import Telemetry
from app.turns import RedisTurns
from app.waiting import WaitingRoom
from app.wiring import World
from tests import crash_scenes as scenes
from tests.adapters import Pool
from tests.crash_points import POINTS, Crash, Step
from tests.crash_scenes import STUMBLING, TTL_MS, Scene
from tests.crashing import Nursery
from tests.processes import TRIPS_AT_TWO
from tests.test_drain import MEDDLING

pytestmark = pytest.mark.one_redis

TAKEN_OVER_WITHIN_S = TTL_MS / 1000 + 1
AT_ONCE = 12

WHOLE: Mapping[Step, str] = {
    (Pipeline, "handle"): "all steps",
    (Pipeline, "_run"): "all steps",
    (Operate, "handle"): "all steps",
    (WaitingRoom, "run"): "`tick`, again and again",
    (WaitingRoom, "settled"): "waits for what was taken on",
    (Drain, "turn"): "`take` and `handle`; a drainer calls these",
    (Drain, "take"): "`RedisTurns.take`",
    (Drain, "handle"): "all steps",
    (Drain, "_handle"): "all steps",
    (RedisTurns, "_settle"): "of `settle` and `put_back`",
    (Schedule, "_next"): "all steps of `next`",
    (Runs, "find"): "finds a row or an entry",
    (Runs, "change"): "changes a row or an entry",
    (Sweep, "make_pass"): "all steps",
}
"""What is no step of its own."""

SCENES: Mapping[str, tuple[scenes.Play, Mapping[str, object], str]] = {
    "trigger": (
        scenes.trigger,
        {**TRIPS_AT_TWO, "claim_wait_ms": 20_000},
        """
        decode validate recall relate deduplicate decide fence write settle fence:2 respond
        try-keys take-on resume
        recall-from-buffer recall-from-store find-buffered-parents find-stored-parents
        find-winners let-parents-wait claim look-up-keys admit insert accept
        settle-claims set-aside release reply leave-group
        """,
    ),
    "operate": (
        scenes.operate,
        {},
        """
        decode perform perform:2 fence respond reply
        find-row change-row list-rows find-entry change-entry list-entries trigger
        """,
    ),
    "reset": (
        scenes.reset,
        {},
        "find-key-holder change-entry end-claim reset-stored-key",
    ),
    "reset row": (scenes.reset_row, {}, "find-key-holder reset-stored-key"),
    "recover": (
        scenes.recover,
        {**TRIPS_AT_TWO, "claim_wait_ms": 20_000},
        "ensure-group recover find-abandoned find-silent find-pending take-over-pending",
    ),
    "drain": (
        scenes.drain,
        {"drain_batch_size": 10, "ack_grace_ttl_s": 0},
        """
        next-turn recollect report look-for-arrivals strike-off take take-entries
        write-rows materialise materialise:2 write-failures bury bury-letters settle-entries release
        put-back put-back-entries flush report:2 forget set-weights
        """,
    ),
    "take over": (
        scenes.take_over,
        {"drain_batch_size": 10, "ack_grace_ttl_s": 0},
        "return-of-the-dead without-heartbeat without-heartbeat:2 take-entries take-entries:2",
    ),
    "sweep": (
        scenes.sweep,
        {"stale_sweep_interval_s": 1, "reclaim_idle_ms": 1},
        """
        hold-lease pass-lease-on look-at-holder pass-lease-on:2 let-lease-go
        sweep-count count sweep-count-streams count-streams
        sweep-announce-lost announce-lost sweep-drop-consumers drop-consumers
        sweep-retire find-kept find-tenants find-not-buffered retire
        """,
    ),
}
"""What is played, with which settings, and the points that it leads to."""


class Case(NamedTuple):
    """A crash, and the scene that it happens in."""

    scene: str
    crash: Crash

    def __str__(self) -> str:
        return f"{self.scene}: {self.crash}"


def cases() -> Iterator[Case]:
    """Before and after each point of each scene."""
    for scene, (_, _, points) in SCENES.items():
        for point in points.split():
            name, _, call = point.partition(":")
            for when in ("before", "after"):
                yield Case(scene, Crash(when, name, int(call or 1)))


CASES = list(cases())


class Theatre:
    """Plays scenes, a few at a time."""

    def __init__(self, nursery: Nursery, redis: Any, redis_url: str, pool: Pool) -> None:
        self._nursery = nursery
        self._redis = redis
        self._redis_url = redis_url
        self._pool = pool
        self._room = asyncio.Semaphore(AT_ONCE)
        self._plays: dict[tuple[str, Crash | None], asyncio.Task[float]] = {}

    def announce(self, scene: str, crash: Crash | None) -> None:
        """Have a scene played in its turn."""
        self._plays[scene, crash] = asyncio.create_task(self._play(scene, crash))

    async def outcome(self, scene: str, crash: Crash | None) -> float:
        """How long a scene took, once it has been played.

        Raises:
            AssertionError: something was not as it has to be.
        """
        return await self._plays[scene, crash]

    async def _play(self, scene: str, crash: Crash | None) -> float:
        play, settings, _ = SCENES[scene]
        async with (
            self._room,
            Scene.opened(
                self._nursery,
                self._redis,
                self._redis_url,
                self._pool,
                heartbeat_ttl_ms=TTL_MS,
                **settings,
            ) as one,
        ):
            return await play(one, crash)

    async def close(self) -> None:
        """Play no more."""
        for play in self._plays.values():
            play.cancel()
        await asyncio.gather(*self._plays.values(), return_exceptions=True)


@pytest.fixture(scope="module")
async def theatre(
    request: pytest.FixtureRequest,
    shared_redis_url: str,
    shared_database_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Theatre]:
    """All scenes that were asked for are on their way."""
    connection = await asyncpg.connect(shared_database_url)
    await connection.execute(MEDDLING + STUMBLING)
    await connection.close()
    redis, pool = connect(shared_redis_url), await create_pool(shared_database_url, 10.0)
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), shared_redis_url, shared_database_url)
    theatre = Theatre(nursery, redis, shared_redis_url, pool)
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = [spec.params["case"] for spec in specs if spec is not None and "case" in spec.params]
    for scene in dict.fromkeys(case.scene for case in wanted):
        theatre.announce(scene, None)
    for case in wanted:
        theatre.announce(*case)
    yield theatre
    await theatre.close()
    nursery.close()
    pool.terminate()
    await redis.aclose()


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_crash_costs_time_and_nothing_else(case: Case, theatre: Theatre) -> None:
    took_s = await theatre.outcome(*case)
    usual_s = await theatre.outcome(case.scene, None)
    print(f"{case}: over after {took_s:.2f} s, without a crash {usual_s:.2f} s")
    assert took_s <= TAKEN_OVER_WITHIN_S + 5 * usual_s


def test_every_crash_point_is_tested() -> None:
    assert {case.crash.point for case in CASES} == POINTS.keys()


async def test_every_step_has_a_crash_point() -> None:
    """What the product code has of steps: one that is new is missing in `crash_points.POINTS`."""
    world = await World.open(Settings.model_validate({}), Telemetry("test"))
    try:
        steps = set(steps_of(world))
    finally:
        await world.close()
    missing = steps - set(POINTS.values()) - WHOLE.keys()
    assert sorted(map(name_of, missing)) == [], "steps without a crash point"
    gone = WHOLE.keys() - steps
    assert sorted(map(name_of, gone)) == [], "no such steps"


def steps_of(world: World) -> Iterator[Step]:
    """Steps of both ways of requests, of whatever else is told as a story, and what is asked of the world."""
    parts = [step for _, step in world.pipeline()._steps]
    parts += [part for part in vars(world.operate()).values() if is_async(type(part), "__call__")]
    for part in parts:
        yield type(part), "__call__"
    for story in (Pipeline, WaitingRoom, Operate, Drain, RedisTurns, Schedule, RequestStream, Lease, Sweep):
        for name in vars(story):
            if is_async(story, name):
                yield story, name
    adapters = [value for value in vars(wiring).values() if isinstance(value, type)]
    for module in (ports, runs, stage):
        for port in vars(module).values():
            if getattr(port, "_is_protocol", False) and port.__module__ == module.__name__:
                names = [name for name in vars(port) if is_async(port, name)]
                fitting = [one for one in adapters if all(is_async(one, name) for name in names)]
                assert fitting, f"nothing implements {port.__name__}"
                for adapter in fitting:
                    yield from ((adapter, name) for name in names)


def is_async(owner: type, name: str) -> bool:
    return inspect.iscoroutinefunction(getattr(owner, name, None))


def name_of(step: Step) -> str:
    owner, method = step
    return f"{owner.__module__}.{owner.__name__}.{method}"

"""What `mollifier status` and `mollifier top` see of a real installation, and what a look costs."""

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from app.buffer import RedisBuffer
from app.embedded import Postgres, Valkey
from app.gate import RedisGate
from app.heartbeat import Heartbeat
from app.keys import Keys
from app.postgres import create_pool
from app.redis_client import Scripts
from app.redis_connection import connect
from app.settings import Settings
from app.status import environments
from app.status.environments import read_gate
from app.status.look import Lookout
from app.status.pace import Mark, Pace, Pacer
from app.switches import Rate
from app.telemetry import Telemetry
from app.turns import RedisTurns
from schemas.status import Consumer, Environment, Status, Stream, Switches
from tests.builders import run as a_run
from tests.test_cli import COMMAND, environ, run

KEYS = Keys("mollifier", 16)
TRIPPED: dict[str, Any] = {"trip_window_ms": 60_000, "trip_threshold": 100, "hold_ms": 600_000}

NewLookout = Callable[..., Awaitable[Lookout]]


class Place:
    """An installation, and what fills it."""

    def __init__(self, redis: Redis, redis_url: str, settings: Settings) -> None:
        self.redis = redis
        self.redis_url = redis_url
        self.settings = settings
        self.scripts = Scripts(redis)

    async def accept(self, environment: str, count: int = 1, organization: str = "org_1") -> None:
        runs = [a_run(environment, organization_id=organization) for _ in range(count)]
        for start in range(0, count, 1000):
            some = runs[start : start + 1000]
            await RedisBuffer(self.scripts, KEYS, self.settings).accept(some, [None] * len(some))

    async def trigger(self, **requests: int) -> None:
        await RedisGate(self.scripts, KEYS, self.settings).admit(requests)

    def turns(self, consumer: str) -> RedisTurns:
        return RedisTurns(self.scripts, KEYS, self.settings, consumer)

    def heart(self, kind: str, consumer: str) -> Heartbeat:
        return Heartbeat(self.scripts, KEYS, consumer, 60_000, Telemetry(kind))


@pytest.fixture
def place(redis: Redis, redis_url: str) -> Place:
    return Place(redis, redis_url, Settings.model_validate({"REDIS_URL": redis_url, **TRIPPED}))


@pytest.fixture
async def lookout(redis_url: str, database_url: str) -> AsyncIterator[NewLookout]:
    """Makes lookouts with changed settings."""
    closing: list[Any] = []

    async def make(redis_url: str = redis_url, database_url: str = database_url, **settings: Any) -> Lookout:
        redis, pool = connect(redis_url), await create_pool(database_url, 3.0, size=1)
        closing.append((redis, pool))
        return Lookout(Settings.model_validate({**TRIPPED, **settings}), KEYS, redis, pool)

    yield make
    for redis, pool in closing:
        pool.terminate()
        await redis.aclose()


def named(status: Status) -> dict[str, Environment]:
    return {one.environment: one for one in status.environments}


class TestEnvironments:
    async def test_nothing_is_there(self, lookout: NewLookout) -> None:
        seen = await (await lookout()).look(20)
        assert (seen.redis, seen.postgres, seen.environments, seen.consumers) == (None, None, [], [])
        assert seen.buffer is not None
        assert (seen.buffer.depth, seen.buffer.environments, seen.buffer.oldest_dwell_s) == (0, 0, 0)

    async def test_one_that_is_tripped(self, place: Place, lookout: NewLookout) -> None:
        await place.trigger(env_1=150, env_2=60)
        await place.accept("env_1", 7, "org_7")
        seen = named(await (await lookout()).look(20))
        one, other = seen["env_1"], seen["env_2"]
        assert (one.organization, one.queued, one.draining, one.tripped) == ("org_7", 7, 0, True)
        assert one.tripped_for_s == pytest.approx(600, abs=10)
        assert one.tripped_until is not None
        assert 0 < one.rate_per_s <= 150 / 60
        assert 0 <= one.oldest_dwell_s < 10
        # What has nothing buffered is found by what the gate counts.
        assert (other.organization, other.queued, other.tripped, other.tripped_for_s) == (
            None,
            0,
            False,
            None,
        )
        assert other.rate_per_s > 0

    async def test_one_that_is_held_until_it_is_drained(self, place: Place, lookout: NewLookout) -> None:
        await place.accept("env_1")
        (seen,) = (await (await lookout(hold_until_drained=1)).look(20)).environments
        assert (seen.tripped, seen.tripped_for_s) == (True, None)

    async def test_the_fleet_is_tripped(self, place: Place, lookout: NewLookout) -> None:
        settings = place.settings.model_copy(update={"global_trip_threshold": 10})
        await RedisGate(place.scripts, KEYS, settings).admit({"env_1": 11})
        buffer = (await (await lookout()).look(20)).buffer
        assert buffer is not None
        assert buffer.all_tripped_for_s == pytest.approx(600, abs=10)

    @pytest.mark.parametrize(
        ("order", "expected"),
        [
            ("depth", ["env_deep", "env_old", "env_busy"]),
            ("dwell", ["env_old", "env_deep", "env_busy"]),
            ("rate", ["env_busy", "env_old", "env_deep"]),
        ],
    )
    async def test_the_worst_come_first(
        self, place: Place, lookout: NewLookout, order: str, expected: list[str]
    ) -> None:
        await place.accept("env_old", 2)
        await _a_moment_later(place.redis)
        await place.accept("env_deep", 9)
        await place.trigger(env_busy=90, env_old=20, env_deep=10)
        looking = await lookout()
        assert [one.environment for one in (await looking.look(20, order)).environments] == expected
        assert [one.environment for one in (await looking.look(1, order)).environments] == expected[:1]

    async def test_what_is_being_drained(self, place: Place, lookout: NewLookout) -> None:
        await place.accept("env_1", 9)
        turns = place.turns("drainer-1")
        turns.schedule.stir()
        taken = await turns.take(4)
        assert len(taken[0].entries) == 4
        seen = await (await lookout()).look(20)
        assert (seen.environments[0].queued, seen.environments[0].draining) == (5, 4)
        assert seen.buffer is not None
        assert (seen.buffer.depth, seen.buffer.draining) == (9, 4)
        assert seen.consumers == [
            Consumer(kind="drainer", consumer="drainer-1", alive=False, heartbeat_s=None, pending=4)
        ]

    @pytest.mark.parametrize("window", ["sliding", "fixed"])
    async def test_the_rate_is_what_the_gate_counts(self, place: Place, window: str) -> None:
        settings = place.settings.model_copy(update={"trip_window_ms": 1000, "gate_window": window})
        gate = RedisGate(place.scripts, KEYS, settings)
        await gate.admit({"env_1": 40}, now_ms=10_000)
        await gate.admit({"env_1": 10}, now_ms=11_250)
        state: Any = await place.redis.get(KEYS.environment("env_1").gate)
        rate = Rate(1000, 100, 500)
        rates = [read_gate(state, now_ms, rate).rate_per_s for now_ms in (11_250, 11_750, 12_500, 13_000)]
        assert rates == [40 * 0.75 + 10, 40 * 0.25 + 10, 10 * 0.5, 0]


class TestPace:
    def test_rates_are_taken_between_two_looks(self) -> None:
        pacer = Pacer()
        assert pacer.add(Mark(0, 100, 1000)) == Pace()
        assert pacer.add(Mark(2000, 500, 900)) == Pace(200, 150, 18)

    def test_what_grows_is_never_empty(self) -> None:
        pacer = Pacer()
        pacer.add(Mark(0, 0, 10))
        assert pacer.add(Mark(1000, 5, 20)) == Pace(5, 15, None)

    def test_what_is_empty_is_so_now(self) -> None:
        pacer = Pacer()
        pacer.add(Mark(0, 0, 0))
        assert pacer.add(Mark(1000, 0, 0)) == Pace(0, 0, 0)

    def test_a_count_that_began_again_is_not_compared(self) -> None:
        pacer = Pacer()
        pacer.add(Mark(0, 500, 10))
        assert pacer.add(Mark(1000, 20, 10)) == Pace()
        assert pacer.add(Mark(2000, 30, 0)) == Pace(10, 0, 0)

    def test_rates_are_of_the_last_seconds(self) -> None:
        pacer = Pacer()
        for second in range(60):
            pace = pacer.add(Mark(second * 1000, second * (100 if second < 30 else 0) or 3000, 1))
        assert pace.drained_per_s == 0

    async def test_of_a_real_drain(self, place: Place, lookout: NewLookout) -> None:
        await place.accept("env_1", 400)
        turns, looking = place.turns("drainer-1"), await lookout()
        started = await _ms(place.redis)
        await looking.glance()
        turns.schedule.stir()
        taken = await turns.take(300)
        await turns.settle(taken, [])
        await turns.schedule.flush()
        await place.accept("env_1", 100)
        await _a_moment_later(place.redis)
        buffer = (await looking.look(20)).buffer
        seconds = (await _ms(place.redis) - started) / 1000
        assert buffer is not None
        assert buffer.depth == 200
        assert buffer.drained_per_s is not None
        assert buffer.drained_per_s >= 300 / seconds
        assert buffer.accepted_per_s == pytest.approx(buffer.drained_per_s / 3)
        assert buffer.empty_in_s == pytest.approx(300 / buffer.drained_per_s)

    async def test_nothing_of_it_stays(self, place: Place) -> None:
        turns = place.turns("drainer-1")
        await place.accept("env_1", 10)
        turns.schedule.stir()
        await turns.settle(await turns.take(5), [])
        await turns.schedule.flush()
        assert await place.redis.get(f"{KEYS.turns}:drained") == b"5"
        await turns.settle(await turns.take(5), [])
        await turns.schedule.flush()
        assert await place.redis.exists(f"{KEYS.turns}:drained") == 0

    async def test_what_is_put_back_is_not_drained(self, place: Place) -> None:
        turns = place.turns("drainer-1")
        await place.accept("env_1", 10)
        turns.schedule.stir()
        await turns.put_back(await turns.take(5), apart=False)
        await turns.schedule.flush()
        assert await place.redis.exists(f"{KEYS.turns}:drained") == 0


class TestFleet:
    async def test_streams(self, place: Place, lookout: NewLookout) -> None:
        redis = place.redis
        await redis.xgroup_create(KEYS.triggers, KEYS.group, id="0", mkstream=True)
        for _ in range(3):
            await redis.xadd(KEYS.triggers, {"body": "{}"})
        await redis.xreadgroup(KEYS.group, "worker-1", {KEYS.triggers: ">"}, count=1)
        seen = await (await lookout()).look(20)
        triggers, operations = seen.streams
        assert (triggers.length, triggers.pending, triggers.lag) == (3, 1, 2)
        assert 0 <= triggers.oldest_s < 10
        assert operations == Stream(stream=KEYS.operations, length=0, pending=0, lag=None, oldest_s=0)
        assert [(one.kind, one.consumer, one.pending) for one in seen.consumers] == [
            ("triggers", "worker-1", 1)
        ]

    async def test_processes_the_dead_first(self, place: Place, lookout: NewLookout) -> None:
        for kind in ("sweeper", "triggers", "drainer"):
            await place.heart(kind, f"{kind}-1").beat()
        await place.redis.delete(KEYS.heartbeat("triggers-1"))
        seen = (await (await lookout()).look(20)).consumers
        assert [(one.kind, one.alive) for one in seen] == [
            ("triggers", False),
            ("drainer", True),
            ("sweeper", True),
        ]
        assert all(one.heartbeat_s is not None and one.heartbeat_s < 10 for one in seen)

    async def test_who_ended_in_order_is_forgotten(self, place: Place, lookout: NewLookout) -> None:
        heart = place.heart("drainer", "drainer-1")
        await heart.beat()
        await heart.remove()
        assert (await (await lookout()).look(20)).consumers == []

    async def test_who_died_long_ago_is_forgotten(self, place: Place) -> None:
        await place.redis.zadd(KEYS.processes, {"drainer long-ago": await _ms(place.redis) - 3_600_001})
        await place.heart("drainer", "drainer-1").beat()
        assert await place.redis.zrange(KEYS.processes, 0, -1) == [b"drainer drainer-1"]

    async def test_dead_letters(self, place: Place, lookout: NewLookout) -> None:
        for reason in ("undecodable", "deliveries"):
            await place.redis.xadd(KEYS.dead_letters, {"reason": reason})
        letters = (await (await lookout()).look(20)).dead_letters
        assert letters is not None
        assert (letters.count, letters.newest_reason) == (2, "deliveries")
        assert letters.newest_s is not None
        assert letters.newest_s < 10

    async def test_switches(self, lookout: NewLookout, database_url: str) -> None:
        looking = await lookout(drain_max_rate=7)
        before = (await looking.look(20)).switches
        assert before == Switches(
            known=True, mode="on", drain_paused=False, drain_rate=7, enrolments=0, weights=0, gates=0
        )
        await _decide(
            database_url,
            """INSERT INTO mollifier.settings VALUES ('switch', '"shadow"'), ('drain.paused', 'true')""",
            "INSERT INTO mollifier.organization_settings (organization_id, weight) VALUES ('org_1', 3)",
            "INSERT INTO mollifier.gate_settings (scope, id, threshold) VALUES ('organization', 'org_1', 5)",
        )
        after = (await looking.look(20)).switches
        assert (after.mode, after.drain_paused, after.weights, after.gates) == ("shadow", True, 1, 1)

    async def test_a_gate_of_its_own(self, place: Place, lookout: NewLookout, database_url: str) -> None:
        """Operators gave the organization a window of 10 s, and a hold of 20 s."""
        rate = Rate(10_000, 100, 20_000)
        await place.accept("env_1", organization="org_1")
        await RedisGate(place.scripts, KEYS, place.settings).admit({"env_1": 200}, rates={"env_1": rate})
        await _decide(
            database_url,
            "INSERT INTO mollifier.gate_settings (scope, id, window_ms, hold_ms)"
            " VALUES ('organization', 'org_1', 10000, 20000)",
        )
        looking = await lookout()
        await looking.glance()
        (seen,) = (await looking.look(20)).environments
        assert seen.tripped_for_s == pytest.approx(20, abs=5)
        assert 5 < seen.rate_per_s <= 20

    async def test_a_hold_that_was_cut_short(
        self, place: Place, lookout: NewLookout, database_url: str
    ) -> None:
        await place.trigger(env_1=200)
        await _decide(
            database_url,
            "INSERT INTO mollifier.gate_settings (scope, id, hold_ms) VALUES ('environment', 'env_1', 20000)",
        )
        looking = await lookout()
        await looking.glance()
        (seen,) = (await looking.look(20)).environments
        assert seen.tripped_for_s == 20


class TestAway:
    async def test_redis(self, lookout: NewLookout) -> None:
        seen = await (await lookout(redis_url="redis://127.0.0.1:1/0")).look(20)
        assert (seen.redis, seen.postgres, seen.buffer) == ("connection refused", None, None)
        assert seen.switches.known

    async def test_postgres(self, place: Place, lookout: NewLookout) -> None:
        await place.accept("env_1")
        seen = await (await lookout(database_url="postgresql://postgres@127.0.0.1:1/postgres")).look(20)
        assert (seen.redis, seen.postgres, seen.switches.known) == (None, "connection refused", False)
        assert [one.environment for one in seen.environments] == ["env_1"]

    async def test_both_say_nothing(self, lookout: NewLookout, valkey: Valkey, postgres: Postgres) -> None:
        looking = await lookout()
        valkey.pause()
        postgres.pause()
        started = time.monotonic()
        await looking.glance()
        seen = await looking.look(20)
        assert time.monotonic() - started < 10
        assert (seen.redis, seen.postgres) == ("no answer", "no answer")
        valkey.resume()
        postgres.resume()
        seen = await looking.look(20)
        assert (seen.redis, seen.postgres) == (None, None)


class TestCost:
    """A look costs a bounded number of commands, none of which is long."""

    CHEAP = frozenset(
        {
            *("time", "get", "mget", "exists", "hget", "hmget", "hgetall", "smembers", "scan"),
            *("zcard", "zrange", "zrevrange", "xlen", "xrange", "xrevrange"),
            *("xinfo|groups", "xinfo|consumers", "client|setinfo"),
        }
    )

    async def test_of_ten_thousand_environments(self, place: Place, lookout: NewLookout) -> None:
        for number in range(100):
            some = [
                a_run(f"env_{number}_{one}", organization_id=f"org_{number}")
                for one in range(100)
                for _ in (0, 1)
            ]
            await RedisBuffer(place.scripts, KEYS, place.settings).accept(some, [None] * len(some))
        await place.accept("env_7_7", 50)
        looking = await lookout()
        commands, seen = await self._commands(place.redis, looking)
        assert seen.buffer is not None
        assert (seen.buffer.environments, seen.buffer.looked_at, seen.buffer.depth) == (
            10_000,
            10_000,
            20_050,
        )
        assert seen.environments[0].environment == "env_7_7"
        assert len(seen.environments) == 20
        assert commands.keys() <= self.CHEAP
        assert commands.pop("hmget") == 10_000
        assert sum(commands.values()) < 150

    async def test_of_more_than_a_look_takes(
        self, place: Place, lookout: NewLookout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those with the oldest entries are looked at."""
        await place.accept("env_first")
        await _a_moment_later(place.redis)
        for number in range(300):
            await place.accept(f"env_{number}")
        monkeypatch.setattr(environments, "LOOK_AT", 160)
        commands, seen = await self._commands(place.redis, await lookout())
        assert seen.buffer is not None
        assert commands["hmget"] <= 160
        assert commands["scan"] <= 3, "a search that is through ends"
        assert seen.buffer.environments == 301
        assert seen.buffer.looked_at == commands["hmget"]
        assert (await (await lookout()).look(1, "dwell")).environments[0].environment == "env_first"

    async def test_the_search_goes_on_where_it_ended(
        self, place: Place, lookout: NewLookout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await place.trigger(**{f"env_{number}": 1 for number in range(500)})
        monkeypatch.setattr(environments, "_PAGE", 20)
        looking = await lookout()
        found: set[str] = set()
        for _ in range(10):
            seen = await looking.look(1000)
            assert len(seen.environments) < 500
            found |= {one.environment for one in seen.environments}
        assert len(found) == 500

    async def _commands(self, redis: Redis, looking: Lookout) -> tuple[dict[str, int], Status]:
        await looking.look(20)
        await redis.config_resetstat()
        seen = await looking.look(20)
        stats: Any = await redis.info("commandstats")
        counts = {name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()}
        return {
            name: calls for name, calls in counts.items() if not name.startswith(("config", "info"))
        }, seen


@pytest.mark.one_redis
class TestCommand:
    async def test_for_people(self, place: Place, database_url: str) -> None:
        await place.trigger(env_1=150)
        await place.accept("env_1", 1234)
        await place.accept("env_\x1b[31mred")
        await place.heart("drainer", "drainer-1").beat()
        gate = {f"MOLLIFIER_{name.upper()}": str(value) for name, value in TRIPPED.items()}
        done = run("status", variables={"REDIS_URL": place.redis_url, "DATABASE_URL": database_url, **gate})
        assert done.returncode == 0, done.stderr
        assert "buffer    1,235 entries (0 draining) of 2 environments" in done.stdout
        assert "0/s out, 0/s in: not getting emptier" in done.stdout
        assert re.search(r"env_1 +org_1 +[0-9.]+/s +for (9m|10m) +1,234 +0 ", done.stdout)
        assert r"env_\x1b[31mred" in done.stdout
        assert re.search(r"drainer +drainer-1 +alive", done.stdout)
        assert "no dead letters" in done.stdout

    async def test_as_json(self, place: Place, database_url: str) -> None:
        await place.accept("env_1")
        done = run("status", "--json", variables={"REDIS_URL": place.redis_url, "DATABASE_URL": database_url})
        assert done.stdout.count("\n") == 1
        seen = msgspec.json.decode(done.stdout, type=Status)
        assert [one.environment for one in seen.environments] == ["env_1"]
        assert seen.buffer is not None
        assert seen.buffer.drained_per_s == 0

    def test_both_are_away(self) -> None:
        nobody = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://postgres@127.0.0.1:1/a"}
        done = run("status", variables=nobody)
        assert done.returncode == 1
        assert "Redis: connection refused\nPostgres: connection refused\n" in done.stdout

    def test_an_unknown_order_is_a_mistake_of_use(self) -> None:
        assert run("status", "--by", "age").returncode == 2

    @pytest.mark.parametrize("term", ["dumb", "xterm"])
    def test_top_needs_a_terminal(self, term: str) -> None:
        done = run("top", variables={"TERM": term})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "mollifier: top needs a terminal; `mollifier status` prints one look\n"


_HOME = "\x1b[H"


class Terminal:
    """A command on a terminal of its own, and what it has shown there."""

    def __init__(self, process: "subprocess.Popen[bytes]", terminal: int) -> None:
        self.process = process
        self.terminal = terminal
        self.shown = ""

    def shows(self, mark: str, within_s: float = 20) -> None:
        """Wait until something new that has `mark` is shown."""
        self.shown = ""
        deadline = time.monotonic() + within_s
        while mark not in self.shown:
            assert time.monotonic() < deadline, f"{mark!r} is not shown in {self.shown[-3000:]!r}"
            self._read()

    def frame(self) -> str:
        """One whole look, between two that begin at the upper left."""
        self.shown = ""
        while self.shown.count(_HOME) < 2:
            self._read()
        return self.shown.split(_HOME)[1]

    def types(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def ended(self, within_s: float = 10) -> int:
        deadline = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it still runs"
            self._read()
        self._read()
        return self.process.returncode

    def _read(self) -> None:
        if select.select([self.terminal], [], [], 0.1)[0]:
            try:
                self.shown += os.read(self.terminal, 65_536).decode(errors="replace")
            except OSError:  # the other end is closed
                time.sleep(0.01)


@contextmanager
def on_a_terminal(*arguments: str, **variables: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 120))
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env={**environ({**variables, "TERM": "xterm"}), "LINES": "30"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: _take(theirs),
    )
    before = termios.tcgetattr(theirs)
    try:
        yield Terminal(process, ours)
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)


def _take(terminal: int) -> None:
    """Make a terminal that of this session, so that Ctrl-C on it means this process."""
    import fcntl

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.mark.one_redis
class TestTop:
    @pytest.fixture
    def servers(self, redis_url: str, database_url: str) -> dict[str, str]:
        return {"REDIS_URL": redis_url, "DATABASE_URL": database_url}

    @pytest.mark.parametrize("key", ["q", "Q", "\x03"])
    async def test_is_live_until_it_is_left(self, servers: dict[str, str], place: Place, key: str) -> None:
        with on_a_terminal("top", "--every", "0.2", **servers) as terminal:
            terminal.shows("0 entries")
            await place.accept("env_new", 5)
            terminal.shows("env_new")
            terminal.types(key)
            assert terminal.ended() == 0
            assert "\x1b[?1049l" in terminal.shown, "the screen from before is back"
            assert "Traceback" not in terminal.shown

    async def test_ends_in_order(self, servers: dict[str, str]) -> None:
        with on_a_terminal("top", **servers) as terminal:
            terminal.shows("0 entries")
            terminal.process.send_signal(signal.SIGTERM)
            assert terminal.ended() == 0

    async def test_goes_on_while_servers_come_and_go(
        self, servers: dict[str, str], valkey: Valkey, postgres: Postgres
    ) -> None:
        with on_a_terminal("top", "--every", "0.2", **servers) as terminal:
            terminal.shows("0 entries")
            valkey.kill()
            terminal.shows("Redis: connection refused")
            postgres.kill()
            terminal.shows("Postgres: connection refused")
            valkey.start()
            terminal.shows("0 entries")
            postgres.start()
            terminal.shows("drain goes on")
            terminal.types("q")
            assert terminal.ended() == 0

    async def test_is_left_while_a_server_says_nothing(self, servers: dict[str, str], valkey: Valkey) -> None:
        with on_a_terminal("top", "--every", "0.2", **servers) as terminal:
            terminal.shows("0 entries")
            valkey.pause()
            terminal.shows("Redis: no answer")
            terminal.types("q")
            assert terminal.ended(2) == 0
        valkey.resume()

    async def test_fits_the_terminal(self, servers: dict[str, str], place: Place) -> None:
        for number in range(60):
            await place.accept(f"env_{number}")
            await place.heart("drainer", f"drainer-{number}").beat()
        with on_a_terminal("top", "--every", "0.2", **servers) as terminal:
            terminal.shows("drainer-0")
            frame = terminal.frame()
            assert (frame.count("env_"), frame.count("drainer-"), frame.count("\n") < 30) == (14, 7, True)
            terminal.types("q")
            assert terminal.ended() == 0


async def _decide(database_url: str, *statements: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _ms(redis: Redis) -> int:
    seconds, us = await redis.time()
    return int(seconds * 1000 + us // 1000)


async def _a_moment_later(redis: Redis) -> None:
    """Return once the server's clock shows another ms, and some more."""
    started = await _ms(redis)
    while await _ms(redis) < started + 20:
        pass

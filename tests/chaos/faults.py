"""The faults: each breaks something for a while and heals it again.

A fault is an async context manager: entering it injects, leaving it heals. It yields what it hit.
"""

import asyncio
import os
import random
import signal
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import asyncpg
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.embedded import Postgres, Valkey
from tests.chaos.fleet import Fleet, Member
from tests.chaos.proxy import DISTANCE_S
from tests.processes import ROOT

HEARTBEAT_S = 1.5
CLAIM_TTL_S = 4
STORE_TIMEOUT_S = 1.0


class Promise(NamedTuple):
    """How long after the healing a request is answered, and a buffered run is a row, at the latest."""

    answer_s: float
    row_s: float


TAKEN_OVER = Promise(HEARTBEAT_S + 1, HEARTBEAT_S + 1)
"""What a dead process held is taken over within HEARTBEAT_TTL_MS and one second."""

REDIS = Promise(2.0, 6.0)
"""A reader tries again after one second at the latest, a drainer after five; and one to connect."""

POSTGRES = Promise(2.0, 6.0)
"""One request a second finds out that Postgres is well again; a drainer tries after five at the latest."""

HUNG = Promise(2.0, 31.0)
"""Environments whose statements hung are tried again after half a minute at the latest."""


@dataclass(slots=True)
class Scene:
    """What there is to break."""

    valkey: Valkey
    postgres: Postgres
    fleet: Fleet
    redis_busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    postgres_busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    switch_busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    def redis(self) -> "Redis":
        """A client of Redis itself, with nothing in between."""
        return Redis.from_url(self.valkey.url, socket_timeout=5, retry=Retry(NoBackoff(), 0))


Break = Callable[[Scene, random.Random], AbstractAsyncContextManager[str]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. It lasts between the two times, in seconds.

    `heals_at_once`: others take over without any healing, so the promise counts from the injection.
    """

    name: str
    inject: Break
    lasts_s: tuple[float, float]
    promise: Promise
    heals_at_once: bool = False


@asynccontextmanager
async def _picked(
    scene: Scene, rng: random.Random, *lines: str, jumps: bool = False
) -> AsyncIterator[Member]:
    """One member that no other fault has in hand, for as long as this one lasts."""
    members = [member for member in scene.fleet.of(*lines) if member.can_jump or not jumps]
    order = rng.sample(members, len(members))
    member = next((one for one in order if not one.busy.locked()), order[0])
    async with member.busy:
        yield member


def _killed(*lines: str) -> Break:
    @asynccontextmanager
    async def fault(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
        async with _picked(scene, rng, *lines) as member:
            member.kill()
            try:
                yield member.name
            finally:
                member.start()
                await member.wait_ready()

    return fault


@asynccontextmanager
async def _all_killed(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    """Everybody who does one job, at once."""
    line = rng.choice(["triggers", "drainer", "operations"])
    async with AsyncExitStack() as stack:
        members = scene.fleet.of(line)
        for member in members:
            await stack.enter_async_context(member.busy)
        for member in members:
            member.kill()
        try:
            yield f"all of {line}"
        finally:
            for member in members:
                member.start()
            await asyncio.gather(*(member.wait_ready() for member in members))


@asynccontextmanager
async def _left(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    async with _picked(scene, rng) as member:
        await member.leave()
        try:
            yield f"{member.name}, exit status {member.exits[-1]}"
        finally:
            member.start()
            await member.wait_ready()


@asynccontextmanager
async def _frozen(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    async with _picked(scene, rng) as member:
        member.send(signal.SIGSTOP)
        try:
            yield member.name
        finally:
            member.send(signal.SIGCONT)


def _switched(position: str) -> Break:
    """The whole fleet, by the operator's command; for up to two seconds processes differ."""

    @asynccontextmanager
    async def fault(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
        async with scene.switch_busy:
            await _operate(scene, "switch", position)
            try:
                yield "all"
            finally:
                await _operate(scene, "switch", "default")
                await scene.fleet.is_on()

    return fault


@asynccontextmanager
async def _jumping(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    async with _picked(scene, rng, jumps=True) as member:
        member.send(signal.SIGUSR1)
        try:
            yield f"{member.name} by {member.settings['CHAOS_CLOCK_JUMP_S']} s"
        finally:
            member.send(signal.SIGUSR1)


@asynccontextmanager
async def _drain_paused(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    """By the operator's command; meanwhile everything stays in the buffer, and is changed there."""
    await _operate(scene, "drain", "pause")
    try:
        yield "drain"
    finally:
        await _operate(scene, "drain", "resume")


async def _operate(scene: Scene, *command: str) -> None:
    """Postgres may be away for the moment: try until it is done."""
    environment = {**os.environ, "DATABASE_URL": scene.postgres.url, "REDIS_URL": scene.valkey.url}
    while True:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "app.cli",
            *command,
            cwd=ROOT,
            env=environment,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        if await process.wait() == 0:
            return
        await asyncio.sleep(0.2)


def _server(which: str, action: str) -> Break:
    @asynccontextmanager
    async def fault(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
        server: Valkey | Postgres = scene.valkey if which == "redis" else scene.postgres
        async with scene.redis_busy if which == "redis" else scene.postgres_busy:
            await asyncio.to_thread(getattr(server, action))
            try:
                yield which
            finally:
                await asyncio.to_thread(server.resume if action == "pause" else server.start)

    return fault


@asynccontextmanager
async def _cut(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    """Connections break, again and again: those of one process, or all."""
    members = [rng.choice(scene.fleet.members)] if rng.random() < 0.5 else scene.fleet.members
    links = [link for member in members for link in (member.redis, member.postgres)]

    async def cut_again() -> None:
        while True:
            for link in links:
                link.cut()
            await asyncio.sleep(rng.uniform(0.05, 0.5))

    cutting = asyncio.create_task(cut_again())
    try:
        yield members[0].name if len(members) == 1 else "all"
    finally:
        cutting.cancel()


@asynccontextmanager
async def _delayed(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    links = [link for member in scene.fleet.members for link in (member.redis, member.postgres)]
    slow = rng.sample(links, rng.randint(1, len(links)))
    for link in slow:
        link.delay_s = rng.uniform(0.01, 0.3)
    try:
        yield ", ".join(link.name for link in slow)
    finally:
        for link in slow:
            link.delay_s = DISTANCE_S


@asynccontextmanager
async def _hanging(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    """The links of one process to one server swallow everything, and cough it up again at the end."""
    member = rng.choice(scene.fleet.members)
    link = rng.choice([member.redis, member.postgres])
    link.hang()
    try:
        yield link.name
    finally:
        if rng.random() < 0.5:
            link.cut()
        link.flow()


@asynccontextmanager
async def _scripts_flushed(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    async def flush_again() -> None:
        redis: Any
        async with scene.redis() as redis:
            while True:
                with suppress(Exception):
                    await redis.script_flush()
                await asyncio.sleep(rng.uniform(0.05, 0.4))

    flushing = asyncio.create_task(flush_again())
    try:
        yield "redis"
    finally:
        flushing.cancel()


def _configured(name: str, broken: str, well: str) -> Break:
    """Redis with a setting that hurts."""

    @asynccontextmanager
    async def fault(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
        async with scene.redis_busy, scene.redis() as redis:
            await redis.config_set(name, broken)
            try:
                yield f"{name} {broken}"
            finally:
                await redis.config_set(name, well)

    return fault


@asynccontextmanager
async def _few_clients(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    """Redis takes no new connections, and all that there were are broken."""
    async with scene.redis_busy, scene.redis() as redis:
        await redis.config_set("maxclients", "8")
        for member in scene.fleet.members:
            member.redis.cut()
        try:
            yield "maxclients 8"
        finally:
            await redis.config_set("maxclients", "10000")


@asynccontextmanager
async def _read_only(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    async with scene.postgres_busy:
        await _alter(scene, "SET default_transaction_read_only = on")
        try:
            yield "postgres"
        finally:
            await _alter(scene, "RESET default_transaction_read_only")


async def _alter(scene: Scene, what: str) -> None:
    connection = await asyncpg.connect(scene.postgres.url, timeout=10)
    try:
        await connection.execute("SET default_transaction_read_only = off")
        await connection.execute(f"ALTER SYSTEM {what}")
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()


@asynccontextmanager
async def _no_slots(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    """All connections that Postgres has to give are somebody else's."""
    async with scene.postgres_busy, AsyncExitStack() as stack:
        first = await asyncpg.connect(scene.postgres.url, timeout=10)
        stack.push_async_callback(first.close)
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        await first.execute(f"{query} AND backend_type = 'client backend'")
        for _ in range(200):
            try:
                # Superusers have a few slots of their own; these are taken first, then the others.
                stack.push_async_callback((await asyncpg.connect(scene.postgres.url, timeout=5)).close)
            except (asyncpg.PostgresError, OSError, TimeoutError):
                break
        yield "postgres"


@asynccontextmanager
async def _table_locked(scene: Scene, rng: random.Random) -> AsyncIterator[str]:
    """Statements hang until they are cut off, and every connection of every pool with them."""
    async with scene.postgres_busy:
        connection = await asyncpg.connect(scene.postgres.url, timeout=10)
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE mollifier.runs IN ACCESS EXCLUSIVE MODE")
                yield "mollifier.runs"
        finally:
            with suppress(Exception):
                await connection.close(timeout=5)


SHORT, LONG = (0.5, 3.0), (HEARTBEAT_S + 0.5, CLAIM_TTL_S + 3.0)

KINDS = (
    Kind("trigger worker killed", _killed("triggers"), SHORT, TAKEN_OVER, heals_at_once=True),
    Kind("drainer killed", _killed("drainer"), SHORT, TAKEN_OVER, heals_at_once=True),
    Kind("operations worker killed", _killed("operations"), SHORT, TAKEN_OVER, heals_at_once=True),
    Kind("sweeper killed", _killed("sweeper"), SHORT, TAKEN_OVER, heals_at_once=True),
    Kind("all of a kind killed", _all_killed, SHORT, TAKEN_OVER),
    Kind("drain paused", _drain_paused, (2.0, 5.0), TAKEN_OVER),
    Kind("process restarted in order", _left, SHORT, TAKEN_OVER, heals_at_once=True),
    Kind("process frozen for a moment", _frozen, (0.2, HEARTBEAT_S - 0.5), TAKEN_OVER),
    Kind("process frozen past its claims", _frozen, LONG, TAKEN_OVER, heals_at_once=True),
    Kind("master switch off", _switched("off"), (2.0, 5.0), TAKEN_OVER),
    Kind("shadow mode", _switched("shadow"), (2.0, 5.0), TAKEN_OVER),
    Kind("clock jump in one process", _jumping, (1.0, 4.0), TAKEN_OVER),
    Kind("redis killed", _server("redis", "kill"), SHORT, REDIS),
    Kind("redis restarted", _server("redis", "stop"), SHORT, REDIS),
    Kind("redis frozen", _server("redis", "pause"), SHORT, REDIS),
    Kind("redis out of memory", _configured("maxmemory", "1", "0"), SHORT, REDIS),
    Kind("redis out of connections", _few_clients, SHORT, REDIS),
    Kind("scripts flushed", _scripts_flushed, SHORT, REDIS),
    Kind("postgres killed", _server("postgres", "kill"), SHORT, POSTGRES),
    Kind("postgres restarted", _server("postgres", "stop"), SHORT, POSTGRES),
    Kind("postgres frozen", _server("postgres", "pause"), SHORT, HUNG),
    Kind("postgres read-only", _read_only, SHORT, POSTGRES),
    Kind("postgres out of connections", _no_slots, SHORT, POSTGRES),
    Kind("table locked", _table_locked, SHORT, HUNG),
    Kind("connections cut", _cut, SHORT, REDIS),
    Kind("connections delayed", _delayed, (1.0, 4.0), HUNG),
    Kind("connections hanging", _hanging, LONG, HUNG),
)

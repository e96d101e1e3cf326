"""Fixtures: the real adapters on the run's servers."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from typing import Any, TypeAlias

import asyncpg
import pytest
from redis.asyncio import Redis

from app.batch import Entry, Item
from app.buffer import RedisBuffer
from app.buffered_runs import RedisBufferedRuns
from app.claims import RedisClaims
from app.drain import Drain
from app.errors import Unreachable
from app.keys import Keys
from app.operate import Operate
from app.operations import TABLE
from app.operations.scene import Scene
from app.postgres import create_pool
from app.redis_client import Call, Scripts
from app.redis_connection import connect
from app.replies import RedisDesk
from app.runs import Runs
from app.settings import Settings
from app.store import PostgresStore
from app.stored_runs import PostgresStoredRuns
from app.telemetry import Telemetry
from app.turns import RedisTurns
from tests.fakes import FakeHeart

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

_numbers = count(1)


class Operator:
    """The operations worker without its streams: an operation goes in, its reply comes back.

    It is desk and front door itself: `replies` has every reply by entry id, `triggered` every request
    that was put before the front door. While it is `silent`, no reply gets out, as in a crash.
    """

    def __init__(
        self,
        redis: Redis,
        pool: Pool,
        settings: Settings,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        scripts, keys = Scripts(redis), Keys(settings.namespace, settings.partitions)
        self.settings = settings
        self.scripts = scripts
        self.clock = clock
        self.stored = PostgresStoredRuns(pool, settings)
        self.buffered = RedisBufferedRuns(scripts, keys)
        self.runs = Runs(self.stored, self.buffered, settings.mutate_wait_ms / 1000)
        self.claims = RedisClaims(scripts, keys, settings)
        self.buffer = RedisBuffer(scripts, keys, settings)
        self.replies: dict[str, dict[str, Any]] = {}
        self.triggered: list[dict[str, Any]] = []
        self.silent = False

    async def __call__(self, kind: str, environment: str, organization: str, **fields: Any) -> dict[str, Any]:
        """Perform one operation; its reply, which for a replay the front door is going to send."""
        entry = self.entry(kind, environment, organization, **fields)
        await self.handle([entry])
        return self.replies.get(entry.id, {"type": "triggered"})

    def entry(self, kind: str, environment: str, organization: str, **fields: Any) -> Entry:
        """An operation's entry, of now."""
        tenant = {"id": environment, "organization_id": organization}
        body = json.dumps({"type": kind, "environment": tenant, **fields}).encode()
        now_ms = int(self.clock().timestamp() * 1000)
        return Entry(f"{now_ms}-{next(_numbers)}", {b"body": body, b"reply_to": b"mollifier:reply:test"})

    async def handle(self, entries: Sequence[Entry]) -> None:
        """Perform a batch."""
        scene = Scene(
            runs=self.runs,
            stored=self.stored,
            buffered=self.buffered,
            claims=self.claims,
            keys=self.stored,
            front_door=self,
            settings=self.settings,
        )
        operate = Operate(
            table=TABLE,
            scene=scene,
            reservations=self.buffer,
            desk=self,
            settings=self.settings,
            telemetry=Telemetry("test"),
            heart=FakeHeart(),
            clock=self.clock,
        )
        await operate.handle(entries)

    async def respond(self, replies: Sequence[tuple[Item, bytes | None]]) -> None:
        """As `ports.Desk`."""
        if self.silent:
            raise Unreachable("Redis: lost")
        self.replies |= {item.entry.id: json.loads(reply) for item, reply in replies if reply}

    async def set_aside(self, items: Sequence[Item]) -> Sequence[Item]:
        """As `ports.Desk`: nothing can fail."""
        return []

    async def trigger(self, body: bytes, reply_to: str | None, correlation_id: str | None) -> None:
        """As `scene.FrontDoor`."""
        self.triggered.append(json.loads(body))


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    """A client as the program makes it."""
    redis = connect(redis_url)
    yield redis
    await redis.aclose()


@pytest.fixture
def make_buffer(client: Redis) -> Callable[..., RedisBuffer]:
    """A buffer with some settings changed."""

    def make(**changes: Any) -> RedisBuffer:
        config = Settings.model_validate(changes)
        return RedisBuffer(Scripts(client), Keys(config.namespace, config.partitions), config)

    return make


@pytest.fixture
def make_turns(client: Redis) -> Callable[..., RedisTurns]:
    """The turns of one drainer, with some settings changed."""

    def make(consumer: str = "drainer-1", **changes: Any) -> RedisTurns:
        config = Settings.model_validate(changes)
        return RedisTurns(Scripts(client), Keys(config.namespace, config.partitions), config, consumer)

    return make


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """Connections to an empty, migrated database."""
    pool = await create_pool(database_url, 5.0)
    yield pool
    await pool.close()


@pytest.fixture
def store(pool: Pool) -> PostgresStore:
    return PostgresStore(pool, Settings.model_validate({}))


@pytest.fixture
def make_operator(client: Redis, pool: Pool) -> Callable[..., Operator]:
    """An operator with some settings changed."""

    def make(**changes: Any) -> Operator:
        return Operator(client, pool, Settings.model_validate(changes))

    return make


@pytest.fixture
def make_drain(
    client: Redis, store: PostgresStore, make_buffer: Callable[..., RedisBuffer]
) -> Callable[..., Drain]:
    """What drains into the store by the given turns."""

    def make(turns: RedisTurns, **changes: Any) -> Drain:
        config = Settings.model_validate(changes)
        keys = Keys(config.namespace, config.partitions)
        return Drain(
            turns=turns,
            materialiser=store,
            graveyard=RedisDesk(Scripts(client), keys, keys.triggers),
            reservations=make_buffer(),
            settings=config,
            telemetry=Telemetry("test"),
        )

    return make


@contextmanager
def silence_after(scripts: Scripts, script: str) -> Iterator[None]:
    """A script is run and its answer is lost."""
    run = scripts.run

    async def lossy(calls: Sequence[Call]) -> list[Any]:
        answers = await run(calls)
        if any(call.name == script for call in calls):
            raise Unreachable("Redis: lost")
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "run", lossy)
        yield

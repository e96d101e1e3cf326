"""Fixtures: the real adapters on the run's servers."""

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import asyncpg
import pytest
from redis.asyncio import Redis

from app.buffer import RedisBuffer
from app.keys import Keys
from app.postgres import create_pool
from app.redis_client import Scripts, connect
from app.settings import Settings
from app.store import PostgresStore
from app.turns import RedisTurns

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


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

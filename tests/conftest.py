"""Real servers, one of each for the whole run. A test owns them in turn: Redis is empty when it begins, and
its database is a fresh copy of the migrated one. Tests may kill or pause them; the next one finds them well.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import count

import asyncpg
import pytest
import uvloop
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.embedded import Postgres, Valkey

TEMPLATE = "migrated"

_numbers = count(1)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], uvloop.Loop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """The run's one Valkey. Tests take `redis_url` or `redis`; those that break the server take this too."""
    with Valkey(tmp_path_factory.mktemp("valkey"), options={"appendfsync": "no"}) as server:
        yield server


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The run's one Postgres. Tests take `database_url`; those that break the server take this too."""
    options = {"fsync": "off", "full_page_writes": "off", "wal_level": "minimal", "max_wal_senders": "0"}
    with Postgres(tmp_path_factory.mktemp("postgres"), options=options) as server:
        yield server


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """An empty Redis."""
    valkey.start()
    valkey.resume()
    with Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[AsyncRedis]:
    """A client on an empty Redis."""
    async with AsyncRedis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def database_url(postgres: Postgres, _template: None) -> AsyncIterator[str]:
    """A migrated database without rows."""
    postgres.start()
    postgres.resume()
    name = f"test_{next(_numbers)}"
    await _execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield _database(postgres, name)
    postgres.start()
    postgres.resume()
    await _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
async def _template(postgres: Postgres) -> None:
    from app.migrate import migrate

    await _execute(postgres, f"CREATE DATABASE {TEMPLATE}")
    await migrate(_database(postgres, TEMPLATE))


def _database(postgres: Postgres, name: str) -> str:
    return postgres.url.rpartition("/")[0] + "/" + name


async def _execute(postgres: Postgres, statement: str) -> None:
    connection = await asyncpg.connect(postgres.url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()

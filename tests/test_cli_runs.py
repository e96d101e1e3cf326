"""`mollifier runs`, run as a user runs it, on real workers."""

import json
from collections.abc import AsyncIterator
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.processes import TRIPS_AT_TWO, Stage, Workers, staged
from tests.producer import new_environment, request
from tests.test_cli import NOBODY, run

pytestmark = pytest.mark.one_redis

Done = CompletedProcess[str]


@pytest.fixture(scope="module")
async def stage(
    shared_redis_url: str, shared_database_url: str, shared_workers: Workers
) -> AsyncIterator[Stage]:
    """Without a drainer: what is buffered stays there."""
    lines = "triggers operations"
    async with staged(shared_workers, lines, shared_redis_url, shared_database_url, **TRIPS_AT_TWO) as stage:
        yield stage


async def triggered(stage: Stage, environment: str, **fields: Any) -> str:
    """The friendly id of a new run."""
    reply = await stage.producer.ask(request(environment, **fields))
    return str(reply["run"]["friendly_id"])


def runs(stage: Stage, environment: str, *arguments: str) -> Done:
    """`mollifier runs`, in an environment of `tests.producer.request`."""
    where = ("--env", environment, "--org", f"org_of_{environment}")
    return run("runs", *arguments, *where, variables={"REDIS_URL": stage.redis_url})


def lines(done: Done) -> list[dict[str, Any]]:
    """The JSON that was printed, one object a line."""
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def fields(done: Done) -> dict[str, str]:
    """What was printed for people: name and value on a line."""
    assert (done.returncode, done.stderr) == (0, "")
    pairs = (line.split("  ", 1) for line in done.stdout.splitlines())
    return {name.strip(): value.strip() for name, value in pairs}


async def test_get(stage: Stage) -> None:
    environment = new_environment()
    await stage.producer.trip(environment)
    options = {"delay": "1h", "tags": ["a", "b"], "metadata": {"n": 1}}
    run_id = await triggered(stage, environment, payload={"to": "ada"}, options=options)
    shown = fields(runs(stage, environment, "get", run_id))
    assert (shown["friendly id"], shown["task"], shown["status"]) == (run_id, "send-email", "DELAYED")
    assert (shown["tags"], shown["payload"], shown["metadata"]) == ("a, b", '{"to": "ada"}', '{"n": 1}')
    assert (shown["is buffered"], shown["environment id"]) == ("yes", environment)
    assert "materialised at" not in shown
    (whole,) = lines(runs(stage, environment, "get", run_id, "--json"))
    asked = await stage.producer.operate("run.retrieve", environment, run_id=run_id)
    assert whole == asked["run"]


async def test_changes(stage: Stage) -> None:
    environment = new_environment()
    run_id = await triggered(stage, environment, options={"delay": "1h", "tags": ["a"]})
    shown = fields(runs(stage, environment, "tag", run_id, "b", "c"))
    assert shown == {"friendly id": run_id, "status": "DELAYED", "tags": "a, b, c"}
    shown = fields(runs(stage, environment, "reschedule", run_id, "2030-01-01T00:00:00Z"))
    assert shown == {"friendly id": run_id, "status": "DELAYED", "delay until": "2030-01-01 00:00:00+00:00"}
    shown = fields(runs(stage, environment, "cancel", run_id, "--reason", "a mistake"))
    assert shown.pop("cancelled at").endswith("+00:00")
    assert shown == {"friendly id": run_id, "status": "CANCELED", "cancel reason": "a mistake"}
    (whole,) = lines(runs(stage, environment, "cancel", run_id, "--json"))
    assert (whole["cancel_reason"], whole["tags"]) == ("a mistake", ["a", "b", "c"])


async def test_replay(stage: Stage) -> None:
    environment = new_environment()
    run_id = await triggered(stage, environment, payload=1)
    done = runs(stage, environment, "replay", run_id)
    assert (done.returncode, done.stderr) == (0, "")
    head, _ = done.stdout.splitlines()
    again, status = head.split()
    assert (again != run_id, status) == (True, "QUEUED")
    (reply,) = lines(runs(stage, environment, "replay", run_id, "--payload", '{"n": 2}', "--json"))
    assert reply["type"] == "run"
    (other,) = lines(runs(stage, environment, "get", reply["run"]["friendly_id"], "--json"))
    assert (other["payload"], other["replayed_from_run_id"]) == ({"n": 2}, run_id.removeprefix("run_"))


async def test_list(stage: Stage) -> None:
    environment = new_environment()
    bodies = [
        request(environment, task=("even", "odd")[n % 2], options={"tags": [f"third-{n % 3}"]})
        for n in range(50)
    ]
    made = [reply["run"]["friendly_id"] for reply in await stage.producer.ask_all(bodies)]
    newest = made[::-1]

    def listed(*arguments: str) -> list[str]:
        return [one["friendly_id"] for one in lines(runs(stage, environment, "list", "--json", *arguments))]

    assert listed("--limit", "50") == newest
    assert listed("--limit", "99", "--task", "odd") == newest[::2]
    even_thirds = [run_id for n, run_id in enumerate(made) if n % 6 == 0]
    assert listed("--tag", "third-0", "--status", "queued", "--task", "even") == even_thirds[::-1]
    assert listed("--since", "1h", "--until", "2020-01-01T00:00:00Z") == []
    assert listed("--since", "1h", "--until", "0s", "--limit", "50") == newest
    assert listed("--status", "canceled") == []

    done = runs(stage, environment, "list", "--json")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 20)
    assert done.stderr == "there are more; --limit shows more at once\n"

    done = runs(stage, environment, "list", "--limit", "3")
    heading, *rows, more = done.stdout.splitlines()
    assert heading.split() == ["run", "age", "status", "buffered", "task", "tags"]
    assert [row.split()[0] for row in rows] == newest[:3]
    assert rows[0].split()[2:] == ["QUEUED", "yes", "odd", "third-1"]
    assert more == "there are more; --limit shows more at once"
    assert runs(stage, new_environment(), "list").stdout == "no runs\n"


async def test_what_producers_write_does_nothing_to_the_terminal(stage: Stage) -> None:
    environment = new_environment()
    run_id = await triggered(stage, environment, task="\x1b[2J", options={"tags": ["\r\u202e"]})
    table = runs(stage, environment, "list").stdout
    assert r"\x1b[2J" in table
    assert r"\r\u202e" in table
    assert fields(runs(stage, environment, "get", run_id))["task"] == r"\x1b[2J"


async def test_errors_of_the_wire(stage: Stage) -> None:
    environment = new_environment()
    run_id = await triggered(stage, environment)
    commands = {
        ("get", "run_nowhere"): "run_not_found: There is no such run in this environment.",
        ("get", "nowhere"): "invalid_request: run_id: must be run_ and then ",
        (
            "cancel",
            run_id,
            "--reason",
            "x" * 2000,
        ): "invalid_request: reason: Expected `str` of length <= 1024",
        ("reschedule", run_id, "1h"): "run_not_delayed: ",
        ("reschedule", run_id, "soon"): "invalid_request: delay: 'soon' is neither a duration",
        ("tag", run_id, *(f"{n}" for n in range(11))): "too_many_tags: tags: ",
        ("list", "--task", "x" * 3000): "invalid_request: task: Expected `str` of length <= 2048",
    }
    for command, complaint in commands.items():
        done = runs(stage, environment, *command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(complaint)
    done = runs(stage, environment, "replay", "run_nowhere", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    error = json.loads(done.stdout)
    assert error["type"] == "error"
    assert (error["error"]["code"], error["error"]["retryable"]) == ("run_not_found", False)
    elsewhere = runs(stage, new_environment(), "get", run_id)
    assert (elsewhere.returncode, elsewhere.stderr.split(":")[0]) == (1, "run_not_found")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["list", "--status", "done"], "'done' is none of DELAYED, QUEUED"),
        (["list", "--since", "yesterday"], "'yesterday' is neither a duration like"),
        (["list", "--until", "2026-01-01T00:00:00"], "has no time zone"),
        (["list", "--limit", "0"], "--limit"),
        (["replay", "run_1", "--payload", "{"], "--payload"),
        (["tag", "run_1"], "TAG"),
        (["get"], "RUN_ID"),
        (["dance"], "dance"),
    ],
)
def test_mistakes_of_use(arguments: list[str], complaint: str) -> None:
    done = run("runs", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


async def test_without_a_worker(stage: Stage) -> None:
    nobodys = {"REDIS_URL": stage.redis_url, "MOLLIFIER_NAMESPACE": "nobodys"}
    for command in (["get", "run_1"], ["list", "--json"]):
        done = run("runs", *command, "--timeout", "0.2", variables=nobodys)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("mollifier: no reply within 0.2 s: is an operations worker running")


def test_without_redis() -> None:
    done = run("runs", "get", "run_1", variables={"REDIS_URL": f"redis://:secret@{NOBODY}/0"})
    assert done.returncode == 1
    assert done.stderr == (
        f"mollifier: Redis at redis://:***@{NOBODY}/0: connection refused. Is REDIS_URL right?\n"
    )


def test_help_names_every_command() -> None:
    done = run("runs", "--help")
    for command in ("get", "list", "cancel", "reschedule", "tag", "replay"):
        assert f"\n│ {command} " in done.stdout

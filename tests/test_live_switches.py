"""Switches, as operators put them with the command, in processes that run: in all within two seconds."""

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

import pytest

from app.embedded import Postgres, Valkey
from tests.processes import TRIPS_AT_TWO, Stage, Worker, Workers, staged
from tests.producer import Producer, Reply, new_environment, request
from tests.test_cli import NOBODY, SOON, run
from tests.test_guarantees import commands_seen, paused
from tests.waiting import eventually, fetch, runs_of, stays_so

WITHIN_S = 2.0

ALL = "triggers triggers drainer operations sweeper"


@pytest.fixture
async def stage(workers: Workers, redis_url: str, database_url: str) -> AsyncIterator[Stage]:
    async with staged(workers, "triggers drainer", redis_url, database_url, **TRIPS_AT_TWO) as stage:
        yield stage


def mollifier(stage: Stage, *arguments: str, status: int = 0) -> str:
    """Run the command with the addresses of a stage, but without Redis; what it printed."""
    variables = {"REDIS_URL": f"redis://{NOBODY}/0", "DATABASE_URL": stage.database_url}
    done = run(*arguments, variables=variables)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


async def says(worker: Worker, switch: str, value: int, within_s: float = WITHIN_S) -> None:
    """Wait until a process goes by a value of a switch."""

    async def is_so() -> None:
        assert await worker.metric("mollifier_switch", switch=switch) == value

    await eventually(is_so, within_s)


async def answers(stage: Stage, body: dict[str, Any], condition: Callable[[Reply], bool]) -> None:
    """Trigger until the reply is as it should be, for two seconds at most."""

    async def is_so() -> None:
        assert condition(await stage.producer.ask(body))

    await eventually(is_so, WITHIN_S)


def is_mollified(reply: Reply) -> bool:
    return bool(reply["is_mollified"])


def passes(reply: Reply) -> bool:
    return not reply["is_mollified"]


async def silence(database_url: str) -> None:
    """Let nobody hear of changes any more, as behind pgbouncer in transaction mode."""
    await fetch(database_url, "ALTER TABLE mollifier.audit DISABLE TRIGGER audit_notify")


async def end_listening(database_url: str) -> int:
    """End the connections on which processes listen; how many there were."""
    query = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%mollifier.audit%'
    """
    return len(await fetch(database_url, query))


@pytest.mark.one_redis
@pytest.mark.parametrize("way", ["heard of", "never heard of", "the connection has just ended"])
async def test_a_change_is_in_every_process_within_two_seconds(
    workers: Workers, redis_url: str, database_url: str, way: str
) -> None:
    """By the clock of Postgres, and that of the processes: they share a machine."""
    started = await workers.start_ready(ALL, redis_url, database_url)
    if way == "never heard of":
        await silence(database_url)
    if way == "the connection has just ended":
        assert await end_listening(database_url) == len(started)
    arrived_s = []
    for switch in ("off", "shadow"):
        done = run("switch", switch, variables={"DATABASE_URL": database_url, "REDIS_URL": redis_url})
        assert done.stdout.endswith(f", {SOON}\n")
        (change,) = await fetch(database_url, "SELECT at FROM mollifier.audit ORDER BY id DESC LIMIT 1")
        for worker in started:

            async def has_arrived() -> datetime:
                events = [one for one in worker.log("switches.changed") if one.get("switch") == switch]  # noqa: B023
                assert len(events) == 1
                return datetime.fromisoformat(events[0]["timestamp"])

            arrived_s.append((await eventually(has_arrived) - change["at"]).total_seconds())
    print(f"{way}: within {max(arrived_s):.3f} s, {min(arrived_s):.3f} s at the earliest")
    assert max(arrived_s) < WITHIN_S
    if way == "heard of":
        assert max(arrived_s) < 0.5


@pytest.mark.one_redis
class TestWhatTheyDo:
    async def test_the_master_switch_and_shadow_mode(self, stage: Stage) -> None:
        environment = new_environment()
        await stage.producer.trip(environment)
        body = request(environment)
        assert mollifier(stage, "switch").startswith("default: ")
        for position, condition in (("off", passes), ("on", is_mollified), ("shadow", passes)):
            assert mollifier(stage, "switch", position).startswith(f"{position}: ")
            await answers(stage, body, condition)
        (worker,) = stage.triggers
        assert await worker.metric("mollifier_decisions_total", outcome="shadow") >= 1
        assert mollifier(stage, "switch", "default").startswith("default: ")
        await answers(stage, body, is_mollified)

    async def test_enrolment(self, stage: Stage) -> None:
        """It comes before the flag of the request."""
        environment = new_environment()
        await stage.producer.trip(environment)
        organization = f"org_of_{environment}"
        assert mollifier(stage, "orgs", "disable", organization).startswith(
            f"{organization} does not take part, "
        )
        await answers(stage, request(environment, enrolled=True), passes)
        mollifier(stage, "orgs", "enable", organization)
        await answers(stage, request(environment, enrolled=False), is_mollified)
        mollifier(stage, "orgs", "default", organization)
        await answers(stage, request(environment, enrolled=False), passes)
        assert is_mollified(await stage.producer.ask(request(environment, enrolled=True)))

    async def test_the_gate_of_an_environment_and_of_an_organization(self, stage: Stage) -> None:
        environment = new_environment()
        await stage.producer.trip(environment)
        organization, body = f"org_of_{environment}", request(environment)
        mollifier(stage, "gate", "set", "--environment", environment, "--threshold", "9999", "--hold-ms", "1")
        await answers(stage, body, passes)
        mollifier(stage, "gate", "set", "--organization", organization, "--threshold", "1")
        await stays_so(lambda: answers(stage, body, passes), for_s=0.3)
        mollifier(stage, "gate", "clear", "--environment", environment)
        await answers(stage, body, is_mollified)
        assert mollifier(stage, "gate", "show") == f"organization {organization}: threshold 1\n"
        mollifier(
            stage, "gate", "set", "--organization", organization, "--threshold", "9999", "--hold-ms", "1"
        )
        await answers(stage, body, passes)

    async def test_the_rate_of_the_drain(self, stage: Stage) -> None:
        environment = new_environment()
        mollifier(stage, "drain", "rate", "20")
        (worker,) = stage.drainers

        async def knows(rate: int | None) -> None:
            assert worker.log("switches.changed")[-1]["drain_rate"] == rate

        await eventually(lambda: knows(20), WITHIN_S)
        await stage.producer.ask_all([request(environment)] * 300)

        async def rows(least: int) -> list[datetime]:
            found = [one["materialised_at"] for one in await runs_of(stage.database_url, environment)]
            assert len(found) >= least
            return sorted(found)

        early = await eventually(lambda: rows(60))
        rate = len(early[1:]) / (early[-1] - early[1]).total_seconds()
        print(f"{rate:.0f} rows a second")
        assert rate < 40
        mollifier(stage, "drain", "rate", "0")
        await eventually(lambda: rows(300), WITHIN_S)
        assert (
            mollifier(stage, "drain", "show")
            .splitlines()[1]
            .startswith("the rate of the drain has no limit (by ")
        )

    async def test_an_audit_says_who_did_it(self, stage: Stage) -> None:
        mollifier(stage, "switch", "off")
        mollifier(stage, "orgs", "weight", "org_1", "3")
        newest, oldest = mollifier(stage, "audit", "--json").splitlines()
        assert '"what":"organization org_1","before":null,"after":{"weight":3}' in newest
        assert '"what":"switch","before":null,"after":"off"' in oldest
        (record,) = await fetch(stage.database_url, "SELECT who FROM mollifier.audit WHERE what = 'switch'")
        assert record["who"] in mollifier(stage, "audit")
        assert f"(by {record['who']} at " in mollifier(stage, "switch")
        assert '"switch":"off","at":"20' in mollifier(stage, "switch", "--json")
        assert "weight      3" in mollifier(stage, "orgs", "show", "org_1")


@pytest.mark.one_redis
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["switch", "maybe"], "maybe"),
        (["orgs", "enable", ""], "ORG"),
        (["orgs", "enable", "x" * 2001], "2,000"),
        (["orgs", "weight", "org_1", "0"], "N"),
        (["orgs", "weight", "org_1", "2147483648"], "N"),
        (["gate", "set", "--threshold", "5"], "--environment"),
        (["gate", "set", "--environment", "e", "--organization", "o", "--threshold", "5"], "--organization"),
        (["gate", "set", "--environment", "e"], "--threshold"),
        (["gate", "set", "--environment", "e", "--window-ms", "0"], "--window-ms"),
        (["gate", "set", "--environment", "e", "--hold-ms", "1.5"], "--hold-ms"),
        (["gate", "clear"], "--environment"),
        (["drain", "rate", "fast"], "default"),
        (["drain", "rate", "9" * 5000], "default"),
        (["audit", "--limit", "0"], "--limit"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], names: str) -> None:
    done = run(*arguments, variables={"DATABASE_URL": f"postgresql://{NOBODY}/x"})
    assert (done.returncode, done.stdout) == (2, "")
    assert names in done.stderr


@pytest.mark.one_redis
@pytest.mark.parametrize(
    "arguments", [["switch"], ["switch", "off"], ["audit"], ["gate", "show"], ["drain", "show"]]
)
def test_without_postgres_nothing_can_be_decided(arguments: list[str]) -> None:
    done = run(*arguments, variables={"DATABASE_URL": f"postgresql://{NOBODY}/x"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mollifier: Postgres at postgresql://")
    assert len(done.stderr.splitlines()) == 1


class TestFailures:
    async def test_it_is_kept_through_a_restart(self, stage: Stage, workers: Workers) -> None:
        """From the first request on."""
        environment = new_environment()
        await stage.producer.trip(environment)
        mollifier(stage, "switch", "off")
        (worker,) = stage.triggers
        worker.kill()
        names = await stage.producer.send_all([request(environment)] * 50)
        await workers.start_ready("triggers", stage.redis_url, stage.database_url, **TRIPS_AT_TWO)
        assert {passes(reply) for reply in await stage.producer.all_replies(names)} == {True}

    async def test_without_postgres_the_last_known_values_hold(
        self, stage: Stage, workers: Workers, postgres: Postgres
    ) -> None:
        """Switched off, nothing is diverted; a process that starts then goes by its variables."""
        environment = new_environment()
        mollifier(stage, "switch", "off")
        mollifier(stage, "drain", "pause")
        old, drainer = stage.triggers[0], stage.drainers[0]
        await says(old, "enabled", 0)
        await says(drainer, "drain_paused", 1)
        postgres.kill()
        young = workers.start("drainer", stage.redis_url, stage.database_url)

        async def holds() -> None:
            reply = await stage.producer.ask(request(environment))
            assert reply["error"]["code"] == "store_unavailable"
            assert await old.metric("mollifier_switch", switch="enabled") == 0
            assert await drainer.metric("mollifier_switch", switch="drain_paused") == 1

        await stays_so(holds, for_s=2.5)
        await says(young, "enabled", 1, within_s=10)
        assert {one["event"] for one in young.log()} >= {"switches.unknown"}
        postgres.start()
        await says(young, "enabled", 0, within_s=10)
        await says(young, "drain_paused", 1)
        await answers(stage, request(environment), lambda reply: reply["type"] == "run" and passes(reply))
        mollifier(stage, "switch", "on")
        await says(old, "enabled", 1)

    async def test_the_kill_switch_works_while_redis_is_down(self, stage: Stage, valkey: Valkey) -> None:
        environment = new_environment()
        await stage.producer.trip(environment)
        (worker,) = stage.triggers
        valkey.kill()
        mollifier(stage, "switch", "off")
        await says(worker, "enabled", 0)
        valkey.start()

        async def is_back() -> None:
            assert passes(await stage.producer.ask(request(environment), within=3))

        await eventually(is_back, within_s=15)

    async def test_what_is_buffered_stays_readable_and_is_drained(
        self, stage: Stage, workers: Workers
    ) -> None:
        (worker,) = stage.triggers
        await workers.start_ready("operations", stage.redis_url, stage.database_url)
        environment = new_environment()
        await stage.producer.trip(environment)
        with paused(stage.drainers):
            buffered = await stage.producer.ask(request(environment))
            assert is_mollified(buffered)
            mollifier(stage, "switch", "off")
            await says(worker, "enabled", 0)
            run_id = buffered["run"]["friendly_id"]
            reply = await stage.producer.operate("run.add_tags", environment, run_id=run_id, tags=["late"])
            assert (reply["run"]["is_buffered"], reply["run"]["tags"]) == (True, ["late"])
        row = await stage.row(environment)
        assert (row["id"], row["tags"]) == (buffered["run"]["id"], ["late"])


async def untouched(producer: Producer, commands: list[str], environment: str) -> None:
    """Asserts that of an environment no key of gate, claims or buffer was named, and that there is none."""
    group = producer.group
    assert any(f"{group}:triggers" in command for command in commands)
    assert [one for one in commands if f"{group}:{{" in one or f"{group}:gate" in one] == []
    assert await producer.redis.keys(f"{group}:*{environment}*") == []


async def test_g5_off_means_off_also_while_it_runs(
    workers: Workers, redis_url: str, database_url: str
) -> None:
    """Without drainers, whose keys it is not about."""
    environment, settings = new_environment(), {"namespace": "live", **TRIPS_AT_TWO}
    async with staged(workers, "triggers", redis_url, database_url, **settings) as stage:
        (worker,) = stage.triggers
        await stage.producer.trip(new_environment())
        mollifier(stage, "switch", "off")
        await says(worker, "enabled", 0)
        bodies = [
            *[request(environment, enrolled=True)] * 50,
            *[request(environment, options={"idempotency_key": f"k{n}"}) for n in range(5)],
            request(environment, options={"run_id": f"run_live-{environment}"}),
        ]
        async with commands_seen(stage.producer) as commands:
            for _ in range(2):
                replies = await stage.producer.ask_all(bodies)
                assert {(reply["type"], passes(reply)) for reply in replies} == {("run", True)}
        await untouched(stage.producer, commands, environment)
        mollifier(stage, "switch", "on")
        await says(worker, "enabled", 1)
        await stage.producer.trip(environment)

"""What the doctor says of servers that are really configured wrong, away, or as they should be."""

import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from app import doctor
from app.buffer import RedisBuffer
from app.doctor import CHECKS, diagnose
from app.doctor.examination import Patient, examine
from app.doctor.postgres_checks import of_version as postgres_of
from app.doctor.redis_checks import of_version as redis_of
from app.doctor.redis_rights import needed
from app.doctor.settings_checks import RULES
from app.embedded import Postgres, Valkey
from app.fleet import KINDS
from app.heartbeat import Heartbeat
from app.keys import Keys
from app.migrate import migrate
from app.postgres import create_pool
from app.redis_client import Scripts
from app.redis_connection import connect
from app.settings import Settings
from app.telemetry import Telemetry
from schemas.diagnosis import Diagnosis, Finding
from tests.builders import run as a_run
from tests.test_cli import run
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent
KEYS = Keys("mollifier", 16)
NOBODY = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://postgres@127.0.0.1:1/postgres"}

StartValkey = Callable[..., Valkey]
Servers = Mapping[str, str]


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[StartValkey]:
    """Starts servers with options of valkey.conf, for one test."""
    started: list[Valkey] = []

    def start(**options: str) -> Valkey:
        named = {name.replace("_", "-"): value for name, value in options.items()}
        server = Valkey(tmp_path / f"valkey-{len(started)}", options=named)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def sound_postgres(server_dir: Path) -> Iterator[Postgres]:
    """A Postgres that keeps what it commits, unlike the one of the other tests."""
    with Postgres(server_dir / "sound-postgres") as server:
        yield server


@pytest.fixture
async def database(sound_postgres: Postgres) -> AsyncIterator[str]:
    """A migrated database on it."""
    sound_postgres.start()
    sound_postgres.resume()
    await _execute(sound_postgres.url, "CREATE DATABASE examined")
    url = _named(sound_postgres, "examined")
    await migrate(url)
    yield url
    sound_postgres.resume()
    await _execute(sound_postgres.url, "DROP DATABASE examined WITH (FORCE)")


def _named(server: Postgres, database: str, user: str = "postgres") -> str:
    return f"postgresql://{user}@127.0.0.1:{server.port}/{database}"


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def examined(redis_url: str, database_url: str, **settings: Any) -> dict[str, Finding]:
    """The findings of all checks, by check."""
    values = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, **settings}
    diagnosis = await diagnose(Settings.model_validate(values))
    return {one.check: one for one in diagnosis.findings}


def of_level(level: str, findings: Mapping[str, Finding]) -> set[str]:
    return {name for name, one in findings.items() if one.level == level}


@asynccontextmanager
async def alive(redis_url: str, *kinds: str) -> AsyncIterator[None]:
    """Processes of these kinds, as far as their heartbeats tell."""
    async with connect(redis_url) as client:
        hearts = [
            Heartbeat(Scripts(client), KEYS, f"{kind}-{number}", 60_000, Telemetry(kind))
            for number, kind in enumerate(kinds)
        ]
        for heart in hearts:
            await heart.beat()
        yield
        for heart in hearts:
            await heart.remove()


STAFF_IS_AWAY = {"fleet.triggers", "fleet.operations", "fleet.drainers", "fleet.sweepers", "fleet.groups"}


class TestRedis:
    async def test_a_sound_one_is_ok(self, own_valkey: StartValkey, database: str) -> None:
        found = await examined(own_valkey().url, database)
        assert of_level("failure", found) == set()
        assert of_level("warning", found) == STAFF_IS_AWAY
        assert {one.remedy for one in found.values() if one.level == "ok"} == {None}

    @pytest.mark.parametrize(
        ("check", "level", "said", "options", "settings"),
        [
            ("redis.eviction", "failure", "allkeys-lru", {"maxmemory_policy": "allkeys-lru"}, {}),
            ("redis.eviction", "failure", "volatile-ttl", {"maxmemory_policy": "volatile-ttl"}, {}),
            ("redis.append_only", "failure", "appendonly is off", {"appendonly": "no"}, {}),
            ("redis.fsync", "warning", "appendfsync is no", {"appendfsync": "no"}, {}),
            ("redis.memory", "failure", "(1", {"maxmemory": "900kb"}, {}),
            ("redis.writable", "failure", "maxmemory", {"maxmemory": "900kb"}, {}),
            ("redis.writable", "failure", "replicas", {"min_replicas_to_write": "1"}, {}),
            ("redis.cluster", "failure", "cluster", {"cluster_enabled": "yes"}, {}),
            (
                "redis.output_buffers",
                "warning",
                "1.0 MB",
                {"client_output_buffer_limit": "pubsub 1mb 1mb 60"},
                {},
            ),
            ("redis.replicas", "failure", "0 in step, 1 waited for", {}, {"buffer_wait_replicas": 1}),
            ("redis.wait_aof", "failure", "BUFFER_WAIT_AOF=1", {"appendonly": "no"}, {"buffer_wait_aof": 1}),
            ("redis.clients", "warning", "of 20 connected", {"maxclients": "20"}, {}),
        ],
    )
    async def test_a_wrong_setting_is_seen(
        self,
        own_valkey: StartValkey,
        database: str,
        check: str,
        level: str,
        said: str,
        options: dict[str, str],
        settings: dict[str, Any],
    ) -> None:
        server = own_valkey(**options)
        if check == "redis.clients":
            async with alive(server.url, "triggers"):
                found = await examined(server.url, database, **settings)
        else:
            found = await examined(server.url, database, **settings)
        assert (found[check].level, bool(found[check].remedy)) == (level, True), found[check]
        assert said in found[check].seen

    async def test_what_replicas_have_may_do_without_an_append_only_file(
        self, own_valkey: StartValkey, database: str
    ) -> None:
        primary = own_valkey(appendonly="no")
        replica = own_valkey(replicaof=f"127.0.0.1 {primary.port}")

        async def in_step() -> None:
            found = await examined(primary.url, database, buffer_wait_replicas=1)
            assert (found["redis.replicas"].level, found["redis.append_only"].level) == ("ok", "warning")

        await eventually(in_step, every_s=0.2)
        found = await examined(replica.url, database)
        assert "a replica" in found["redis.role"].seen
        assert {"redis.role", "redis.writable"} <= of_level("failure", found)

    async def test_a_write_to_disk_that_failed_is_seen(self, own_valkey: StartValkey, database: str) -> None:
        server = own_valkey(dbfilename="taken.rdb", stop_writes_on_bgsave_error="no")
        (server.data_dir / "data" / "taken.rdb").mkdir()
        async with connect(server.url) as client:
            await client.bgsave()
        findings = {}

        async def seen() -> None:
            findings.update(await examined(server.url, database))
            assert findings["redis.disk"].level == "warning"

        await eventually(seen, every_s=0.2)
        assert "rdb_last_bgsave_status" in findings["redis.disk"].seen

    async def test_wait_aof_where_the_server_has_it(self, own_valkey: StartValkey, database: str) -> None:
        """Redis 7.0 has no WAITAOF: workers would be ready there, and never answer what is mollified."""
        server = own_valkey()
        async with connect(server.url) as client:
            (known,) = await client.execute_command("COMMAND INFO", "WAITAOF")  # type: ignore[no-untyped-call]
        found = (await examined(server.url, database, buffer_wait_aof=1))["redis.wait_aof"]
        assert (found.level, "unknown command" in found.seen) == (
            ("ok", False) if known else ("failure", True)
        )

    @pytest.mark.parametrize("partitions", [8, 32])
    async def test_another_number_of_partitions_is_seen(
        self, own_valkey: StartValkey, database: str, partitions: int
    ) -> None:
        server = own_valkey()
        async with connect(server.url) as client:
            settings = Settings.model_validate({"REDIS_URL": server.url})
            runs = [a_run(f"env_{number}") for number in range(40)]
            await RedisBuffer(Scripts(client), KEYS, settings).accept(runs, [None] * len(runs))
        assert (await examined(server.url, database))["redis.partitions"].level == "ok"
        found = await examined(server.url, database, partitions=partitions)
        assert found["redis.partitions"].level == "failure"

    @pytest.mark.parametrize(("version", "level"), [("6.2.14", "failure"), ("7.0.0", "ok"), ("8.2.1", "ok")])
    def test_the_oldest_version(self, version: str, level: str) -> None:
        assert redis_of(version, "Redis").level == level


class TestRightsInRedis:
    async def test_a_user_who_may_not_read_settings(self, own_valkey: StartValkey, database: str) -> None:
        """What INFO tells needs no right to CONFIG."""
        url = await self._user(own_valkey(), "~mollifier:*", "&mollifier:*", "+@all", "-config", "-acl")
        found = await examined(url, database)
        assert of_level("failure", found) == set()
        assert {"redis.fsync", "redis.output_buffers"} <= of_level("warning", found)
        assert "NOPERM" in found["redis.fsync"].seen
        assert found["redis.eviction"].level == found["redis.append_only"].level == "ok"

    async def test_a_user_who_may_read_nothing(self, own_valkey: StartValkey, database: str) -> None:
        url = await self._user(own_valkey(), "~mollifier:*", "&mollifier:*", "+@all", "-@dangerous")
        found = await examined(url, database)
        assert of_level("failure", found) == set()
        assert "could not be read: INFO" in found["redis.eviction"].seen

    async def test_a_user_who_lacks_a_command_that_is_needed(
        self, own_valkey: StartValkey, database: str
    ) -> None:
        url = await self._user(
            own_valkey(), "~mollifier:*", "&mollifier:*", "+@all", "-xclaim", "-xgroup|create"
        )
        found = (await examined(url, database))["redis.commands"]
        assert found.level == "failure"
        assert found.seen.startswith("XCLAIM, XGROUP CREATE cannot be used: ")

    async def test_a_user_of_other_keys_or_channels(self, own_valkey: StartValkey, database: str) -> None:
        url = await self._user(own_valkey(), "~mollifier:*", "&other:*", "+@all")
        found = (await examined(url, database))["redis.commands"]
        assert found.seen.startswith("PUBLISH, SUBSCRIBE cannot be used: ")

    async def test_a_user_who_may_make_no_transactions(self, own_valkey: StartValkey, database: str) -> None:
        """Outside of one the commands would be run."""
        server = own_valkey()
        url = await self._user(server, "~mollifier:*", "&mollifier:*", "+@all", "-multi")
        found = await examined(url, database)
        assert "could not be read: MULTI" in found["redis.commands"].seen
        async with connect(server.url) as client:
            assert await client.dbsize() == 0

    async def test_nothing_is_written(self, own_valkey: StartValkey, database: str) -> None:
        server = own_valkey()
        await examined(server.url, database)
        async with connect(server.url) as client:
            assert await client.dbsize() == 0

    def test_every_command_of_scripts_and_adapters_is_asked_for(self) -> None:
        asked = {" ".join(map(str, command[: 1 + (command[0] in ("XGROUP",))])) for command in needed(KEYS)}
        names = {name.split()[0] for name in asked}
        used: set[str] = set()
        for script in (ROOT / "app/lua").glob("*.lua"):
            used |= set(re.findall(r"\bp?call\(.*?'([A-Z]+)'", script.read_text()))
        for module in (ROOT / "app").rglob("*.py"):
            if module.parent.name in ("app", "status"):
                used |= {name.split()[0] for name in re.findall(r'\bCall\(f?"([A-Z]+)', module.read_text())}
        assert used - names == {"MULTI", "EXEC", "WAITAOF"}  # looked at on their own

    async def _user(self, server: Valkey, *rules: str) -> str:
        async with connect(server.url) as client:
            await client.execute_command("ACL SETUSER", "clerk", "on", ">secret", *rules)  # type: ignore[no-untyped-call]
        return server.url.replace("redis://", "redis://clerk:secret@")


@pytest.mark.one_redis
class TestPostgres:
    async def test_a_schema_that_is_older(self, valkey: Valkey, sound_postgres: Postgres) -> None:
        found = await examined(valkey.url, sound_postgres.url)
        assert found["postgres.schema"].level == "failure"
        assert "lacks 0001_runs.sql" in found["postgres.schema"].seen
        assert "mollifier migrate" in str(found["postgres.schema"].remedy)
        assert found["postgres.program"].level == "ok"

    async def test_a_schema_that_is_newer(self, valkey: Valkey, database: str) -> None:
        await _execute(database, "INSERT INTO mollifier.migrations (name) VALUES ('9999_later.sql')")
        found = await examined(valkey.url, database)
        assert found["postgres.schema"].level == "ok"
        assert found["postgres.program"].level == "failure"
        assert "9999_later.sql" in found["postgres.program"].seen

    @pytest.mark.parametrize(
        ("check", "said", "setting"),
        [
            ("postgres.writable", "read_only", "default_transaction_read_only = on"),
            ("postgres.durability", "synchronous_commit is off", "synchronous_commit = off"),
        ],
    )
    async def test_a_wrong_setting_is_seen(
        self, valkey: Valkey, database: str, check: str, said: str, setting: str
    ) -> None:
        await _execute(database, f"ALTER DATABASE examined SET {setting}")
        found = await examined(valkey.url, database)
        assert found[check].level == "failure"
        assert said in found[check].seen

    async def test_one_that_keeps_nothing(self, valkey: Valkey, database_url: str) -> None:
        found = await examined(valkey.url, database_url)
        assert "fsync is off, full_page_writes is off" in found["postgres.durability"].seen
        assert found["postgres.durability"].level == "failure"

    async def test_a_user_without_rights(
        self, valkey: Valkey, database: str, sound_postgres: Postgres
    ) -> None:
        await _execute(
            database,
            "DROP ROLE IF EXISTS clerk",
            "CREATE ROLE clerk LOGIN",
            "GRANT USAGE ON SCHEMA mollifier TO clerk",
            "GRANT SELECT ON ALL TABLES IN SCHEMA mollifier TO clerk",
            "GRANT INSERT, UPDATE ON mollifier.runs, mollifier.run_aliases TO clerk",
        )
        url = _named(sound_postgres, "examined", "clerk")
        found = (await examined(valkey.url, url))["postgres.rights"]
        assert found.level == "failure"
        assert [right in found.seen for right in ("INSERT on mollifier.waitpoints", "runs")] == [True, False]
        await _execute(database, "REVOKE ALL ON SCHEMA mollifier FROM clerk")
        hidden = await examined(valkey.url, url)
        assert "USAGE on schema mollifier" in hidden["postgres.rights"].seen
        assert "could not be read: permission denied" in hidden["postgres.schema"].seen
        await _execute(database, "DROP OWNED BY clerk", "DROP ROLE clerk")

    async def test_pools_that_do_not_fit(self, redis_url: str, database: str) -> None:
        """Two processes with nine connections each."""
        await _execute(database, "ALTER DATABASE examined CONNECTION LIMIT 17")
        async with alive(redis_url, "triggers"):
            assert (await examined(redis_url, database))["postgres.connections"].level == "ok"
        async with alive(redis_url, "triggers", "drainer"):
            found = (await examined(redis_url, database))["postgres.connections"]
        assert found.level == "failure"
        assert found.seen.startswith("2 processes may need 18 of 17 connections, ")

    @pytest.mark.parametrize(
        ("major", "level"), [(11, "failure"), (12, "warning"), (15, "warning"), (16, "ok"), (18, "ok")]
    )
    def test_versions(self, major: int, level: str) -> None:
        assert postgres_of(major, f"{major}.1").level == level


@pytest.mark.one_redis
class TestFleet:
    async def test_nobody_takes_what_waits(self, redis_url: str, redis: Redis, database: str) -> None:
        await redis.xadd(KEYS.triggers, {"body": "{}"}, id="1-1")
        await redis.xadd(KEYS.operations, {"body": "{}"})
        settings = Settings.model_validate({"REDIS_URL": redis_url})
        await RedisBuffer(Scripts(redis), KEYS, settings).accept([a_run()], [None])
        found = await examined(redis_url, database)
        assert {"fleet.triggers", "fleet.operations", "fleet.drainers"} == of_level("failure", found)
        assert "mollifier:triggers: the oldest request waits for" in found["fleet.backlog"].seen
        assert found["fleet.backlog"].level == "warning"
        async with alive(redis_url, *KINDS):
            found = await examined(redis_url, database)
        assert of_level("failure", found) == set()

    @pytest.mark.parametrize(
        ("ahead_s", "level"), [(0.0, "ok"), (5.0, "warning"), (-5.0, "warning"), (3600.0, "failure")]
    )
    async def test_clocks(self, redis_url: str, database: str, ahead_s: float, level: str) -> None:
        redis, pool = connect(redis_url), await create_pool(database, 3.0, size=1)
        patient = Patient(Settings(), KEYS, redis, pool, clock=lambda: time.time() - ahead_s)
        clocks = [check for check in CHECKS if check.name.startswith("clock.")]
        found = await examine(clocks, patient)
        assert [one.level for one in found] == [level, level]
        for one in found:
            shown_s, _, way = one.seen.split(" ", 2)
            assert float(shown_s) == pytest.approx(abs(ahead_s), abs=0.2)
            assert not ahead_s or way.startswith("ahead of" if ahead_s > 0 else "behind")
        pool.terminate()
        await redis.aclose()

    @pytest.mark.timeout(60)
    async def test_a_whole_installation_is_ok(
        self, own_valkey: StartValkey, database: str, workers: Any
    ) -> None:
        redis_url = own_valkey().url
        await workers.start_ready("triggers operations drainer sweeper", redis_url, database)
        done = run("doctor", "--strict", variables={"REDIS_URL": redis_url, "DATABASE_URL": database})
        assert done.returncode == 0, done.stdout
        assert done.stdout.splitlines()[-1] == f"failures: 0, warnings: 0, ok: {len(CHECKS)}"


BROKEN: dict[str, dict[str, Any]] = {
    "settings.shutdown": {"shutdown_timeout_s": 16},
    "settings.heartbeat": {"heartbeat_ttl_ms": 60_000},
    "settings.reclaim": {"reclaim_idle_ms": 15_000},
    "settings.claims": {"claim_min_ttl_s": 31},
    "settings.claim_life": {"claim_ttl_s": 10},
    "settings.claim_wait": {"claim_poll_ms": 5000},
    "settings.deliveries": {"max_deliveries": 2},
    "settings.pressure": {"store_pressure_latency_ms": 5000},
    "settings.drain_latency": {"drain_target_latency_ms": 5000},
    "settings.global_threshold": {"global_trip_threshold": 100},
}
"""For each rule, the setting that just breaks it."""


class TestSettings:
    def test_what_is_set_by_default_holds(self) -> None:
        assert [rule.name for rule in RULES if not rule.holds(Settings.model_construct())] == []

    def test_every_rule_is_broken_once(self) -> None:
        assert BROKEN.keys() == {rule.name for rule in RULES}

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
    async def test_a_rule_that_is_broken_is_seen(self, rule: Any) -> None:
        ((name, value),) = BROKEN[rule.name].items()
        found = await examined(NOBODY["REDIS_URL"], NOBODY["DATABASE_URL"], **BROKEN[rule.name])
        assert found[rule.name].level == rule.level
        assert f"{Settings.variable(name)}={value}" in found[rule.name].seen
        assert not rule.holds(Settings.model_validate(BROKEN[rule.name]))
        assert rule.holds(Settings.model_validate({name: value + self._better(name)}))

    def _better(self, name: str) -> int:
        """One unit in the direction in which the rule holds again."""
        raised = (
            "shutdown_timeout_s",
            "reclaim_idle_ms",
            "claim_ttl_s",
            "max_deliveries",
            "global_trip_threshold",
        )
        return 1 if name in raised else -1


class TestAway:
    def test_both(self) -> None:
        done = run("doctor", variables=NOBODY)
        assert done.returncode == 1
        assert "Redis: connection refused" in done.stdout
        assert "Postgres: connection refused" in done.stdout
        assert len([line for line in done.stdout.splitlines() if line.startswith("failure ")]) == 2

    async def test_redis(self, database: str) -> None:
        found = await examined(NOBODY["REDIS_URL"], database)
        assert of_level("failure", found) == {"redis.reachable"}
        assert found["redis.eviction"].seen == "not known: Redis: connection refused"
        assert {"postgres.schema", "postgres.durability", "clock.postgres"} <= of_level("ok", found)

    async def test_postgres(self, own_valkey: StartValkey) -> None:
        found = await examined(own_valkey().url, NOBODY["DATABASE_URL"])
        assert of_level("failure", found) == {"postgres.reachable"}
        assert {"redis.eviction", "redis.commands", "clock.redis"} <= of_level("ok", found)

    async def test_both_say_nothing(
        self, own_valkey: StartValkey, database: str, sound_postgres: Postgres
    ) -> None:
        """Each is waited for once, not by each check."""
        server = own_valkey()
        server.pause()
        sound_postgres.pause()
        started = time.monotonic()
        found = await examined(server.url, database)
        assert time.monotonic() - started < 15
        assert found["redis.reachable"].seen == "Redis: no answer"
        assert found["postgres.reachable"].seen == "Postgres: no answer"
        server.resume()
        sound_postgres.resume()

    async def test_who_is_not_let_in_is_told_so(self, own_valkey: StartValkey) -> None:
        url = own_valkey().url
        async with connect(url) as client:
            await client.config_set("requirepass", "secret")
        done = run("doctor", variables={**NOBODY, "REDIS_URL": url})
        assert done.returncode == 1
        assert "Redis: Authentication required" in done.stdout


class TestCommand:
    def test_json(self, own_valkey: StartValkey) -> None:
        done = run("doctor", "--json", variables={**NOBODY, "REDIS_URL": own_valkey().url})
        assert done.returncode == 1
        diagnosis = msgspec.json.decode(done.stdout, type=Diagnosis)
        assert diagnosis.level == "failure"
        assert [one.check for one in diagnosis.findings] == [check.name for check in CHECKS]
        assert json.loads(done.stdout)["findings"][1].keys() == {"check", "level", "seen", "remedy"}

    async def test_warnings_are_no_failure_unless_they_are_to_be(
        self, own_valkey: StartValkey, database: str
    ) -> None:
        variables = {"REDIS_URL": own_valkey().url, "DATABASE_URL": database}
        assert run("doctor", variables=variables).returncode == 0
        assert run("doctor", "--strict", variables=variables).returncode == 1

    def test_what_is_worst_stands_last(self) -> None:
        levels = [
            line.split()[0]
            for line in run("doctor", variables=NOBODY).stdout.splitlines()
            if line.startswith(("ok ", "warning ", "failure "))
        ]
        assert levels == sorted(levels, key=["ok", "warning", "failure"].index)

    def test_a_setting_that_is_wrong_alone_is_named(self) -> None:
        done = run("doctor", variables={"MOLLIFIER_HOLD_MS": "soon"})
        assert (done.returncode, "MOLLIFIER_HOLD_MS" in done.stderr) == (1, True)

    def test_every_check_has_a_name_of_its_own(self) -> None:
        names = [check.name for check in CHECKS]
        assert len(names) == len({*names})
        essential = [check for checks in doctor.ESSENTIAL.values() for check in checks]
        assert {check.name for check in essential} <= {*names}


class TestStart:
    """What every process looks at when it starts."""

    async def test_a_redis_that_loses_data_is_warned_of(
        self, own_valkey: StartValkey, database: str, workers: Any
    ) -> None:
        server = own_valkey(appendonly="no", maxmemory_policy="allkeys-lru")
        worker = workers.start("drainer", server.url, database)

        async def warned() -> None:
            warnings = {one["check"]: one for one in worker.log("doctor.warning")}
            assert warnings.keys() == {"redis.eviction", "redis.append_only"}
            assert all(one["severity"] == "failure" and one["remedy"] for one in warnings.values())

        await eventually(warned, 15, every_s=0.1)
        await worker.wait_ready()

    async def test_an_older_schema_is_warned_of(
        self, own_valkey: StartValkey, sound_postgres: Postgres, workers: Any
    ) -> None:
        worker = workers.start("sweeper", own_valkey().url, sound_postgres.url)

        async def warned() -> None:
            assert [one["check"] for one in worker.log("doctor.warning")] == ["postgres.schema"]

        await eventually(warned, 15, every_s=0.1)
        assert worker.is_running

    async def test_who_would_never_answer_does_not_start(
        self, own_valkey: StartValkey, database: str, workers: Any
    ) -> None:
        """G1: with BUFFER_WAIT_AOF it would take requests, and wait for a file that is not there."""
        server = own_valkey(appendonly="no")
        worker = workers.start("triggers", server.url, database, buffer_wait_aof=1)
        assert await worker.ended() == 1
        assert worker.text().splitlines()[-1].startswith("mollifier: MOLLIFIER_BUFFER_WAIT_AOF=1, and ")
        assert "Traceback" not in worker.text()
        async with connect(server.url) as client:
            assert await client.keys("*heartbeat*") == []

    async def test_servers_may_be_away_at_start(
        self, own_valkey: StartValkey, database: str, workers: Any
    ) -> None:
        server = own_valkey(appendonly="no")
        server.kill()
        worker = workers.start("triggers", server.url, database, buffer_wait_aof=1)

        async def up() -> None:
            assert await worker.live() == 200

        await eventually(up, 15)
        assert worker.log("doctor.warning") == []
        server.start()
        assert await worker.ended() == 1
        assert "MOLLIFIER_BUFFER_WAIT_AOF" in worker.text().splitlines()[-1]


def test_no_server_is_needed_to_ask_for_help() -> None:
    assert "--strict" in run("doctor", "--help", variables={"PATH": os.environ["PATH"]}).stdout

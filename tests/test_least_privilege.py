"""Everything works as users who may do no more than they must: `ops/redis/users.acl` and `ops/postgres`."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from faststream.redis import RedisBroker
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, ResponseError

from app.client import Mollifier
from app.embedded import Postgres, Valkey
from app.errors import OneTimeUseTokenUsed
from app.keys import Keys
from app.ports import Letter
from app.redis_client import Scripts
from app.redis_connection import connect
from app.replies import RedisDesk
from schemas.snapshot import encode_snapshot
from tests.builders import run as a_run
from tests.processes import ROOT, TRIPS_AT_TWO, Workers, procfile
from tests.producer import new_environment, request
from tests.test_cli import run
from tests.waiting import eventually, fetch, runs_of

USERS = (ROOT / "ops/redis/users.acl").read_text()
ROLES = (ROOT / "ops/postgres/roles.sql").read_text()
GRANTS = (ROOT / "ops/postgres/grants.sql").read_text()
STATEMENTS = sorted((ROOT / "app/sql").glob("*.sql"))

WORKER, OPERATOR, PRODUCER = "mollifier-worker", "mollifier-operator", "shop"
QUICK = {"stale_sweep_interval_s": 1, "ack_grace_ttl_s": 1, "reclaim_idle_ms": 1000, "heartbeat_ttl_ms": 1000}
EVERYTHING = {"global_trip_threshold": 1_000_000, "hold_until_drained": 1, "drain_max_rate": 100_000}
FOR_FASTSTREAM = ("+unsubscribe", "&" + "[A-Za-z0-9]" * 22)
"""What a producer wants beside, that uses FastStream's `request`: it makes up its reply channels."""

NOT_IN_SCRIPTS = {
    "client|setinfo": "redis-py, when it connects",
    "evalsha": "app/redis_client.py",
    "script|load": "app/redis_client.py",
    "ping": "readiness; the client",
    "subscribe": "app/wake.py",
    "xgroup|create": "app/streams.py; FastStream",
    "xreadgroup": "FastStream",
    "xgroup|createconsumer": "app/streams.py",
    "mget": "app/streams.py",
    "info": "app/doctor, when a process starts",
}
"""What workers send beside scripts and `Call`s, and who sends it."""

ONLY_IF_SET = {"wait", "waitaof"}
"""What MOLLIFIER_BUFFER_WAIT_REPLICAS and MOLLIFIER_BUFFER_WAIT_AOF want beside."""

OF_OPERATORS = ("read_letters", "accept", "find", "reserve", "release")
"""The scripts behind `mollifier dead-letters`."""


@dataclass(frozen=True)
class Estate:
    """Both servers, migrated and guarded, with every process running as a worker."""

    port: int
    database: str
    workers: Workers

    def redis_url(self, user: str) -> str:
        return f"redis://{user}:password-of-{user}@127.0.0.1:{self.port}/0"

    def database_url(self, role: str) -> str:
        return re.sub(r"//.*@", f"//{role}@", self.database)

    def variables(self, user: str, role: str) -> dict[str, str]:
        return {"REDIS_URL": self.redis_url(user), "DATABASE_URL": self.database_url(role)}


@pytest.fixture(scope="module")
def own_valkey(valkey: Valkey, server_dir: Path) -> Iterator[Valkey]:
    """A server with exactly these users, and a password for each."""
    users = re.sub(r"^user (\S+) on", r"user \1 on >password-of-\1", USERS, flags=re.MULTILINE)
    with BlockingRedis.from_url(valkey.url) as client:
        try:
            client.execute_command("CLIENT", "SETINFO", "LIB-NAME", "x")
        except ResponseError:  # Redis 7.0, whose ACL takes no name that it does not know
            users = users.replace(" +client|setinfo", "")
    file = server_dir / "users.acl"
    file.write_text(users)
    with Valkey(server_dir / "least-privilege", options={"aclfile": str(file)}) as server:
        yield server


@pytest.fixture(scope="module")
async def guarded(postgres: Postgres) -> AsyncIterator[str]:
    """A database of its own with exactly these roles."""
    url = postgres.url.rpartition("/")[0] + "/least_privilege"
    await fetch(postgres.url, "CREATE DATABASE least_privilege")
    connection = await asyncpg.connect(url)
    await connection.execute(ROLES)
    await connection.close()
    yield url
    await fetch(postgres.url, "DROP DATABASE least_privilege WITH (FORCE)")
    for role in re.findall(r"CREATE ROLE (\w+)", ROLES):
        await fetch(postgres.url, f"DROP ROLE {role}")


@pytest.fixture(scope="module")
async def estate(own_valkey: Valkey, guarded: str, shared_workers: Workers) -> Estate:
    """Set up as docs/security.md says."""
    estate = Estate(own_valkey.port, guarded, shared_workers)
    done = run("migrate", variables=estate.variables(OPERATOR, "mollifier_owner"))
    assert (done.returncode, done.stderr) == (0, "")
    owner = await asyncpg.connect(estate.database_url("mollifier_owner"))
    await owner.execute(GRANTS)
    await owner.close()
    urls = estate.redis_url(WORKER), estate.database_url("mollifier_worker")
    settings: dict[str, Any] = {**TRIPS_AT_TWO, **QUICK, **EVERYTHING}
    started = [shared_workers.start(line, *urls, **settings) for line in procfile()]
    for worker in started:
        await worker.wait_ready(within_s=60)
    return estate


@pytest.fixture
async def admin(estate: Estate) -> AsyncIterator[Any]:
    """Who may do everything; nothing may have been refused to anybody by the end, unless the log is reset."""
    async with Redis.from_url(estate.redis_url("admin")) as client:
        await client.acl_log_reset()
        yield client
        assert await client.acl_log() == []


@pytest.fixture
async def producer(estate: Estate) -> AsyncIterator[Mollifier]:
    async with Mollifier(estate.redis_url(PRODUCER)) as client:
        yield client


def tenant() -> dict[str, Any]:
    environment: dict[str, Any] = request(new_environment())["environment"]
    return environment


async def test_triggers_go_every_way(estate: Estate, admin: Any, producer: Mollifier) -> None:
    """Passed through, mollified, cached, debounced, refused, with a parent: and all of them become rows."""
    environment = tenant()
    where: dict[str, Any] = {"environment": environment}
    first = await producer.trigger("t", idempotency_key="k", one_time_use_token=environment["id"], **where)
    again = await producer.trigger("t", idempotency_key="k", **where)
    assert (first.is_mollified, again.is_cached, again.run.id) == (False, True, first.run.id)
    with pytest.raises(OneTimeUseTokenUsed):
        await producer.trigger("t", one_time_use_token=environment["id"], **where)
    buffered = [await producer.trigger("t", idempotency_key=f"b{n}", **where) for n in range(6)]
    assert buffered[-1].is_mollified
    assert (await producer.trigger("t", idempotency_key="b5", **where)).is_cached
    parent: dict[str, Any] = {"parent_run_id": first.run.friendly_id, "resume_parent_on_completion": True}
    child = await producer.trigger("t", **parent, **where)
    pushed = [await producer.trigger("t", debounce={"key": "d", "delay": "1h"}, **where) for _ in range(2)]
    assert pushed[1].run.id == pushed[0].run.id
    accepted = {reply.run.id for reply in (first, child, *buffered, pushed[0])}

    async def are_rows() -> None:
        assert accepted == {row["id"] for row in await runs_of(estate.database, environment["id"])}

    await eventually(are_rows)


async def test_every_operation(estate: Estate, admin: Any, producer: Mollifier) -> None:
    """On a buffered run and on a row: `mollifier drain` makes sure of which it is."""
    operator = estate.variables(OPERATOR, "mollifier_operator")
    for command in ("resume", "pause"):
        assert run("drain", command, variables=operator).returncode == 0

    async def is_paused() -> None:
        drainer = next(one for one in estate.workers.started if one.line == "drainer")
        assert any(line.get("drain_paused") for line in drainer.log("switches.changed"))

    await eventually(is_paused)
    where: dict[str, Any] = {"environment": tenant()}
    for _ in range(3):
        last = await producer.trigger("t", idempotency_key="k", delay="1h", **where)
        await producer.reset_key("t", "k", **where)
    run_id = last.run.friendly_id
    assert (await producer.retrieve(run_id, **where)).is_buffered
    for is_buffered in (True, False):
        await producer.reschedule(run_id, "2h", **where)
        await producer.add_tags(run_id, ["a"], **where)
        await producer.update_metadata(
            run_id, operations=[{"type": "increment", "key": "n", "value": 1}], **where
        )
        replayed = await producer.replay(run_id, **where)
        listed = await producer.list_runs(**where)
        assert {last.run.id, replayed.run.id} <= {one.id for one in listed.runs}
        assert (await producer.retrieve(run_id, **where)).is_buffered is is_buffered
        if is_buffered:
            assert run("drain", "resume", variables=operator).returncode == 0

            async def is_row() -> None:
                assert not (await producer.retrieve(run_id, **where)).is_buffered

            await eventually(is_row)
    assert (await producer.cancel(run_id, **where)).status == "CANCELED"


async def test_dead_letters_and_the_command(estate: Estate, admin: Any, producer: Mollifier) -> None:
    """A request that nobody can be answered for, looked at, put back and dropped by an operator."""
    operator = estate.variables(OPERATOR, "mollifier_operator")
    async with Redis.from_url(estate.redis_url(PRODUCER)) as client:
        await client.xadd("mollifier:triggers", {"body": b"{}"})

    async def the_letter() -> str:
        (line,) = run("dead-letters", "list", "--json", variables=operator).stdout.splitlines()
        return str(json.loads(line)["dead_letter_id"])

    letter = await eventually(the_letter)
    assert run("dead-letters", "show", letter, variables=operator).returncode == 0
    assert run("dead-letters", "requeue", letter, variables=operator).returncode == 0
    assert run("dead-letters", "drop", await eventually(the_letter), variables=operator).returncode == 0
    where = ("--env", new_environment(), "--org", "o")
    for command in (("trigger", "t"), ("runs", "list")):
        done = run(*command, *where, variables=operator)
        assert (done.returncode, done.stderr) == (0, "")


async def test_a_buffered_run_is_set_aside_and_put_back(estate: Estate, admin: Any) -> None:
    """By a drainer and an operator; it is drained then, under its own id."""
    environment = new_environment()
    expiry = datetime.now(UTC) + timedelta(hours=1)
    snapshot = a_run(
        id=f"chosen-{environment}",
        environment_id=environment,
        idempotency_key="k",
        idempotency_key_expires_at=expiry,
    )
    async with connect(estate.redis_url(WORKER)) as client:
        desk = RedisDesk(Scripts(client), Keys("mollifier", 16), "mollifier:triggers")
        await desk.bury([Letter(environment, "1-1", encode_snapshot(snapshot), None, "refused", "no")])
    done = run("dead-letters", "requeue", "--all", variables=estate.variables(OPERATOR, "mollifier_operator"))
    assert (done.returncode, done.stdout) == (0, "requeued 1 dead letter\n")

    async def is_row() -> None:
        (row,) = await runs_of(estate.database, environment)
        assert row["id"] == snapshot.id

    await eventually(is_row)


async def test_a_weight_reaches_the_drainers(estate: Estate, admin: Any) -> None:
    decide = "INSERT INTO mollifier.organization_settings (organization_id, weight) VALUES ($1, $2)"
    await fetch(estate.database, decide, "o", 7)

    async def is_known() -> None:
        assert await admin.hget("mollifier:{turns}:weights", "o") == b"7"

    await eventually(is_known)


async def test_what_the_dead_held_is_taken_over(estate: Estate, admin: Any) -> None:
    """Requests of a consumer without a heartbeat are handled, and the consumer is dropped."""
    environment = tenant()
    await admin.xgroup_createconsumer("mollifier:triggers", "mollifier", "ghost")
    body = json.dumps({"task": "t", "environment": environment})
    entry_id = await admin.xadd("mollifier:triggers", {"body": body})
    await admin.xclaim("mollifier:triggers", "mollifier", "ghost", 0, [entry_id], force=True)

    async def is_row() -> None:
        assert len(await runs_of(estate.database, environment["id"])) == 1

    async def is_dropped() -> None:
        consumers: Any = await admin.xinfo_consumers("mollifier:triggers", "mollifier")
        assert b"ghost" not in {one["name"] for one in consumers}

    await eventually(is_row)
    await eventually(is_dropped)


async def test_a_producer_that_uses_faststream(estate: Estate, admin: Any) -> None:
    await admin.execute_command("ACL", "SETUSER", PRODUCER, *FOR_FASTSTREAM)
    broker: Any = RedisBroker(estate.redis_url(PRODUCER), apply_types=False)
    async with broker:
        body = {"task": "t", "environment": tenant()}
        reply = await broker.request(body, stream="mollifier:triggers", timeout=10)
    assert json.loads(reply.body)["type"] == "run"
    back = ("-unsubscribe", "resetchannels", f"&mollifier:reply:{PRODUCER}:*")
    await admin.execute_command("ACL", "SETUSER", PRODUCER, *back)


def test_nothing_was_refused_to_a_process(estate: Estate) -> None:
    for worker in estate.workers.started:
        assert "NOPERM" not in worker.text()
        assert "permission denied" not in worker.text()
        assert not [line for line in worker.log() if line["level"] == "error"]


ANYBODYS = (
    "FLUSHALL",
    "CONFIG GET *",
    "CONFIG SET appendonly no",
    "EVAL return 0",
    "FUNCTION LIST",
    "KEYS *",
    "ACL LIST",
    "ACL SETUSER x on",
    "MONITOR",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "SHUTDOWN NOSAVE",
    "REPLICAOF NO ONE",
    "SWAPDB 0 1",
    "PUBSUB CHANNELS",
    "PSUBSCRIBE *",
    "PSUBSCRIBE mollifier:reply:*",
    "XTRIM mollifier:triggers MAXLEN 0",
    "XADD elsewhere * a b",
    "GET elsewhere",
)
"""What none of them may."""

REFUSED: dict[str, tuple[str, ...]] = {
    PRODUCER: (
        "XREAD STREAMS mollifier:triggers 0",
        "XRANGE mollifier:triggers - +",
        "XINFO STREAM mollifier:triggers",
        "XLEN mollifier:triggers",
        "XDEL mollifier:triggers 1-1",
        "DEL mollifier:triggers",
        "XREADGROUP GROUP mollifier me STREAMS mollifier:triggers >",
        "XADD mollifier:dead-letters * a b",
        "XADD mollifier:{0}:entries:env * a b",
        "XRANGE mollifier:{0}:entries:env - +",
        "HGETALL mollifier:{0}:index:env",
        "GET mollifier:{0}:claim:x",
        "SCAN 0",
        "INFO",
        "EVALSHA 0000000000000000000000000000000000000000 0",
        "SCRIPT LOAD return",
        "PUBLISH mollifier:reply:shop:1 x",
        "PUBLISH mollifier:reply:another:1 x",
        "PUBLISH mollifier:wake x",
        "SUBSCRIBE mollifier:reply:another:1",
        "SUBSCRIBE mollifier:reply:shop",
        "SUBSCRIBE mollifier:wake",
        "SUBSCRIBE Ab3Ab3Ab3Ab3Ab3Ab3Ab3z",
    ),
    WORKER: (
        "SUBSCRIBE elsewhere",
        "PUBLISH elsewhere x",
        "EVAL_RO return 0",
    ),
    OPERATOR: (
        "XRANGE mollifier:triggers - +",
        "XREADGROUP GROUP mollifier me STREAMS mollifier:triggers >",
        "DEL mollifier:triggers",
        "INFO",
        "SET mollifier:heartbeat:x 1",
        "SUBSCRIBE mollifier:reply:shop:1",
        "PUBLISH mollifier:reply:shop:1 x",
    ),
}


@pytest.mark.parametrize("user", REFUSED)
async def test_what_a_user_may_not_do(estate: Estate, user: str) -> None:
    async with Redis.from_url(estate.redis_url(user)) as client:
        for command in (*REFUSED[user], *ANYBODYS):
            with pytest.raises(NoPermissionError):
                await client.execute_command(*command.split(" "))  # type: ignore[no-untyped-call]


def test_a_user_may_send_what_the_code_sends_and_nothing_else(own_valkey: Valkey) -> None:
    with BlockingRedis.from_url(f"redis://admin:password-of-admin@127.0.0.1:{own_valkey.port}/0") as client:
        known = {name.decode().upper() for name in client.command_list()}
    scripts = {path.stem: _commands(path.read_text(), known) for path in (ROOT / "app/lua").glob("*.lua")}
    calls = {path.stem: _calls(path.read_text()) for path in (ROOT / "app").glob("*.py")}
    by_operators = set(calls.pop("dead_letters")).union(*(scripts[name] for name in OF_OPERATORS))
    del scripts["read_letters"]
    by_workers = set().union(*scripts.values(), *calls.values()) - ONLY_IF_SET
    assert _granted(WORKER) == by_workers | NOT_IN_SCRIPTS.keys()
    assert _granted(OPERATOR) == by_operators | NOT_IN_SCRIPTS.keys() - {
        "xreadgroup",
        "mget",
        "info",
        "xgroup|createconsumer",
    }
    assert _granted(PRODUCER) == {"xadd", "subscribe", "ping", "client|setinfo"}


def _granted(user: str) -> set[str]:
    (line,) = (line for line in USERS.splitlines() if line.startswith(f"user {user} "))
    return {word[1:] for word in line.split() if word.startswith("+")}


def _commands(script: str, known: set[str]) -> set[str]:
    """The commands of a script; those with parts as ACLs name them."""
    parts = re.findall(r"'(XINFO|XGROUP)', '([A-Z]+)'", script)
    whole = known.intersection(re.findall(r"'([A-Z]+)'", script)) - {one for one, _ in parts}
    return {name.lower() for name in whole} | {f"{one}|{part}".lower() for one, part in parts}


def _calls(module: str) -> set[str]:
    """The commands that a module sends beside scripts."""
    sent = re.findall(r'Call\(\s*"([A-Z]+)",\s*None,\s*(?:\["([A-Z]+)")?', module)
    return {f"{name}|{part}".lower() if part else name.lower() for name, part in sent}


FORBIDDEN = {
    "mollifier_worker": (
        "CREATE TABLE mollifier.mine ()",
        "CREATE TABLE public.mine ()",
        "CREATE TEMPORARY TABLE mine ()",
        "CREATE SCHEMA mine",
        "ALTER TABLE mollifier.runs ADD COLUMN mine text",
        "DROP TABLE mollifier.waitpoints",
        "TRUNCATE mollifier.runs",
        "DELETE FROM mollifier.runs",
        "UPDATE mollifier.settings SET value = '1'",
        "UPDATE mollifier.organization_settings SET weight = 9",
        "DELETE FROM mollifier.migrations",
    ),
    "mollifier_operator": (
        "SELECT payload FROM mollifier.runs",
        "INSERT INTO mollifier.audit (what) VALUES ('switch')",
        "DELETE FROM mollifier.audit",
        "DROP TABLE mollifier.settings",
        "CREATE TABLE mollifier.mine ()",
    ),
    "mollifier_owner": ("CREATE ROLE mine", "CREATE DATABASE mine"),
}


@pytest.mark.parametrize("role", FORBIDDEN)
async def test_what_a_role_may_not_do(estate: Estate, role: str) -> None:
    for statement in FORBIDDEN[role]:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await fetch(estate.database_url(role), statement)


async def test_a_role_may_do_what_the_statements_do_and_nothing_else(estate: Estate) -> None:
    """Each statement is some role's, and without any one of its rights a role cannot do all of its own."""
    connection = await asyncpg.connect(estate.database)
    try:
        may = {
            role: await _permitted(connection, role) for role in ("mollifier_worker", "mollifier_operator")
        }
        assert set().union(*may.values()) == {path.stem for path in STATEMENTS}
        for rights, tables, role in re.findall(
            r"^GRANT (.+) ON (mollifier.+) TO (\w+);$", GRANTS, re.MULTILINE
        ):
            for right, table in product(rights.split(", "), tables.split(", ")):
                if table == "mollifier.migrations":
                    continue  # read by no statement of these, but by every process when it starts
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute(f"REVOKE {right} ON {table} FROM {role}")
                assert await _permitted(connection, role) < may[role], f"{right} on {table} is superfluous"
                await transaction.rollback()
    finally:
        await connection.close()


async def _permitted(connection: "asyncpg.Connection[asyncpg.Record]", role: str) -> set[str]:
    """The statements that a role may send."""
    permitted = set()
    for path in STATEMENTS:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"SET LOCAL ROLE {role}")
        try:
            await connection.execute(f"EXPLAIN (GENERIC_PLAN) {path.read_text()}")
            permitted.add(path.stem)
        except asyncpg.InsufficientPrivilegeError:
            pass
        finally:
            await transaction.rollback()
    return permitted

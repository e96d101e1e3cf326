"""What operators decide in Postgres: what is changed, who is noted for it, how a process comes to know."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from app.embedded import Postgres
from app.errors import StoreUnavailable
from app.operator_changes import Change, OperatorChanges
from app.operator_settings import OperatorNews
from app.settings import Settings
from app.switches import OperatorSettings, Override
from tests.waiting import eventually, fetch

WHO = "ada@laptop"


@pytest.fixture
async def operators(database_url: str) -> AsyncIterator[OperatorChanges]:
    """Somebody with the command, on an empty database."""
    connection = await asyncpg.connect(database_url)
    yield OperatorChanges(connection, WHO)
    await connection.close()


@pytest.fixture
async def news(database_url: str) -> AsyncIterator[OperatorNews]:
    """A process' view of the same."""
    news = OperatorNews(Settings.model_validate({"DATABASE_URL": database_url, "store_timeout_ms": 1000}))
    yield news
    news.close()


Act = Callable[[OperatorChanges], Awaitable[Change | None]]

CHANGES: list[tuple[Act, dict[str, Any], str, Any]] = [
    (lambda o: o.set("switch", "off"), {"switch": "off"}, "switch", "off"),
    (lambda o: o.set("drain.paused", True), {"drain_paused": True}, "drain.paused", True),
    (lambda o: o.set("drain.rate", 0), {"drain_rate": 0}, "drain.rate", 0),
    (
        lambda o: o.enrol("org_1", False),
        {"enrolment": {"org_1": False}},
        "organization org_1",
        {"enrolled": False, "weight": 1},
    ),
    (
        lambda o: o.weigh("org é:\"'", 3),
        {"weights": {"org é:\"'": 3}},
        "organization org é:\"'",
        {"weight": 3},
    ),
    (
        lambda o: o.set_gate("environment", "env_1", Override(threshold=5)),
        {"environments": {"env_1": Override(threshold=5)}},
        "gate environment env_1",
        {"threshold": 5},
    ),
    (
        lambda o: o.set_gate("organization", "org_1", Override(1, 2, 3)),
        {"organizations": {"org_1": Override(1, 2, 3)}},
        "gate organization org_1",
        {"window_ms": 1, "threshold": 2, "hold_ms": 3},
    ),
]


@pytest.mark.parametrize(("act", "decided", "what", "after"), CHANGES)
async def test_a_change_is_there_and_is_noted(
    operators: OperatorChanges, news: OperatorNews, act: Act, decided: dict[str, Any], what: str, after: Any
) -> None:
    assert await news.read(None) == OperatorSettings()
    change = await act(operators)
    read = await news.read(0)
    assert read is not None
    assert read == OperatorSettings(read.revision, **decided)
    assert await news.read(read.revision) is None
    assert change is not None
    assert change[1:] == (WHO, "postgres", what, None, after, True)
    assert await operators.audit(9) == [change._replace(is_new=False)]


async def test_what_is_changed_back_is_noted_with_what_it_was(operators: OperatorChanges) -> None:
    await operators.set("switch", "off")
    await operators.set("switch", None)
    await operators.enrol("org_1", True)
    await operators.weigh("org_1", 2)
    await operators.reset_organization("org_1")
    await operators.set_gate("environment", "env_1", Override(threshold=5))
    await operators.set_gate("environment", "env_1", Override(hold_ms=6))
    await operators.reset_gate("environment", "env_1")
    changes = [(change.what, change.before, change.after) for change in reversed(await operators.audit(99))]
    assert changes == [
        ("switch", None, "off"),
        ("switch", "off", None),
        ("organization org_1", None, {"enrolled": True, "weight": 1}),
        ("organization org_1", {"enrolled": True, "weight": 1}, {"enrolled": True, "weight": 2}),
        ("organization org_1", {"enrolled": True, "weight": 2}, None),
        ("gate environment env_1", None, {"threshold": 5}),
        ("gate environment env_1", {"threshold": 5}, {"threshold": 5, "hold_ms": 6}),
        ("gate environment env_1", {"threshold": 5, "hold_ms": 6}, None),
    ]
    assert await operators.read() == OperatorSettings((await operators.read()).revision)
    assert [change.what for change in await operators.audit(2)] == ["gate environment env_1"] * 2


async def test_what_changes_nothing_is_not_noted(operators: OperatorChanges) -> None:
    """But answered with the change that made it so."""
    assert await operators.set("switch", None) is None
    assert await operators.reset_gate("organization", "org_1") is None
    first = await operators.set("switch", "off")
    assert first is not None
    assert await operators.set("switch", "off") == first._replace(is_new=False)
    assert len(await operators.audit(9)) == 1


async def test_a_change_by_hand_is_noted_too(operators: OperatorChanges, database_url: str) -> None:
    await fetch(database_url, "INSERT INTO mollifier.settings VALUES ('switch', '\"off\"')")
    change = await operators.last("switch")
    assert change is not None
    assert (change.who, change.database_user, change.after) == (None, "postgres", "off")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO mollifier.settings VALUES ('switch', '\"maybe\"')",
        "INSERT INTO mollifier.settings VALUES ('switch', 'true')",
        "INSERT INTO mollifier.settings VALUES ('drain.paused', '1')",
        "INSERT INTO mollifier.settings VALUES ('drain.rate', '-1')",
        "INSERT INTO mollifier.settings VALUES ('drain.rate', '1.5')",
        "INSERT INTO mollifier.settings VALUES ('drain.rate', '\"1\"')",
        "INSERT INTO mollifier.settings VALUES ('drain.rate', '2147483648')",
        "INSERT INTO mollifier.gate_settings VALUES ('project', 'p', 1)",
        "INSERT INTO mollifier.gate_settings VALUES ('environment', 'e', 0)",
        "INSERT INTO mollifier.gate_settings VALUES ('environment', 'e', NULL, 0)",
        "INSERT INTO mollifier.gate_settings VALUES ('environment', 'e', NULL, NULL, 0)",
        "INSERT INTO mollifier.organization_settings VALUES ('o', NULL, 0)",
    ],
)
async def test_what_no_process_could_make_sense_of_never_gets_in(
    operators: OperatorChanges, database_url: str, statement: str
) -> None:
    with pytest.raises((asyncpg.IntegrityConstraintViolationError, asyncpg.DataError)):
        await fetch(database_url, statement)
    assert await operators.audit(9) == []


async def test_what_only_a_newer_version_knows_leaves_the_last_known_values(
    operators: OperatorChanges, news: OperatorNews, database_url: str
) -> None:
    await fetch(database_url, "ALTER TABLE mollifier.settings DROP CONSTRAINT settings_value")
    await operators.set("switch", "half")
    with pytest.raises(StoreUnavailable) as caught:
        await news.read(0)
    assert "$.switch" in str(caught.value.__cause__)
    await operators.set("switch", "off")
    assert (await news.read(0) or OperatorSettings()).switch == "off"


async def test_an_earlier_change_is_never_committed_after_a_later_one(
    operators: OperatorChanges, news: OperatorNews, database_url: str
) -> None:
    """Else a process that has read the later one would pass the earlier one over."""
    connection = await asyncpg.connect(database_url)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("INSERT INTO mollifier.organization_settings VALUES ('slow', false)")
    quick = asyncio.create_task(operators.enrol("quick", False))

    async def is_waiting() -> None:
        query = (
            "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        )
        assert await fetch(database_url, query)

    await eventually(is_waiting)
    assert await news.read(0) is None
    await transaction.commit()
    await quick
    read = await news.read(0)
    assert read is not None
    assert read.enrolment == {"slow": False, "quick": False}
    await connection.close()


async def test_30000_of_each_are_read_in_a_moment(
    operators: OperatorChanges, news: OperatorNews, database_url: str
) -> None:
    numbers = "FROM generate_series(1, 30000) AS n"
    for table, values in (
        ("organization_settings", "'org_' || n, n % 2 = 0, 2"),
        ("gate_settings", "'environment', 'env_' || n, n"),
        ("gate_settings", "'organization', 'org_' || n, n"),
    ):
        await fetch(database_url, f"INSERT INTO mollifier.{table} SELECT {values} {numbers}")
    started = time.perf_counter()
    read = await news.read(0)
    took_s = time.perf_counter() - started
    print(f"120,000 values were read in {took_s:.2f} s")
    assert took_s < 1
    assert read is not None
    counts = [len(of) for of in (read.enrolment, read.weights, read.environments, read.organizations)]
    assert counts == [30_000] * 4
    assert read.environments["env_7"] == Override(window_ms=7)


async def test_a_change_is_heard_of_at_once(operators: OperatorChanges, news: OperatorNews) -> None:
    await news.read(None)
    waiting = asyncio.create_task(news.wait(30))
    await operators.set("switch", "off")
    await asyncio.wait_for(waiting, 2)


@pytest.mark.parametrize("ends", ["its backend", "postgres"])
async def test_a_connection_that_ended_is_made_again(
    operators: OperatorChanges, news: OperatorNews, database_url: str, postgres: Postgres, ends: str
) -> None:
    await operators.set("switch", "off")
    await news.read(None)
    if ends == "postgres":
        postgres.kill()
        with pytest.raises(StoreUnavailable):
            await news.read(None)
        postgres.start()
    else:
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%mollifier.audit%'"
        await fetch(database_url, f"{query} AND pid <> pg_backend_pid() AND datname = current_database()")

    async def reads() -> None:
        try:
            found = await news.read(None)
        except StoreUnavailable as error:  # it may find out only now
            raise AssertionError from error
        assert found is not None
        assert found.switch == "off"

    await eventually(reads)
    waiting = asyncio.create_task(news.wait(30))
    await fetch(database_url, "DELETE FROM mollifier.settings")
    await asyncio.wait_for(waiting, 2)


async def test_postgres_that_does_not_answer_is_not_waited_for(
    news: OperatorNews, postgres: Postgres
) -> None:
    await news.read(None)
    postgres.pause()
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(news.read(None), 3)
    assert news._connection is None, "it may be dead for good"
    postgres.resume()
    await eventually(lambda: news.read(None))

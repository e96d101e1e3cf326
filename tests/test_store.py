"""Rows in Postgres: every column, bad rows alone, races. G3, G4, G12."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

import asyncpg
import pytest

from app.batch import Answer
from app.errors import InvalidRequest, OneTimeUseTokenUsed, RunIdConflict, StoreUnavailable
from app.postgres import create_pool, statement
from app.rows import Materialised, Row, key_digest, status_at
from app.settings import Settings
from app.store import PostgresStore
from schemas.snapshot import Snapshot
from tests.adapters import Pool
from tests.builders import run
from tests.test_runs import statements

NOW = datetime.now(UTC)
LARGE = 60
"""Rows that are copied."""
ALIAS_WITH_TOKEN = (
    "INSERT INTO mollifier.run_aliases (id, run_id, environment_id, one_time_use_token)"
    " VALUES ('x', $1, 'env_1', 't')"
)

FULL: dict[str, Any] = {
    "environment_type": "STAGING",
    "payload": b'{"a":  1, "b":"\\u0000\xc3\xa9"}',
    "payload_type": "application/json",
    "metadata": b'{"m": [1, {"n": null}]}',
    "tags": ("one", "two"),
    "idempotency_key": "key",
    "idempotency_key_expires_at": NOW,
    "idempotency_key_options": b'{"key": "key", "scope": "run"}',
    "delay_until": NOW + timedelta(days=1),
    "ttl_seconds": 3600,
    "expires_at": NOW + timedelta(hours=1),
    "queue": "emails",
    "concurrency_key": "user-7",
    "worker_queue": "main",
    "machine": "small-1x",
    "priority": -3,
    "max_attempts": 3,
    "max_duration": 300,
    "locked_to_version": "20260101.1",
    "is_test": True,
    "depth": 2,
    "parent_run_id": "parent",
    "root_run_id": "root",
    "resume_parent_on_completion": True,
    "batch_id": "batch_1",
    "batch_index": 4,
    "debounce_key": "debounce",
    "debounce_mode": "leading",
    "debounce_until": NOW + timedelta(days=2),
    "one_time_use_token": "token",
    "replayed_from_run_id": "original",
    "parent_span_id": "00f067aa0ba902b7",
    "trace_context": b'{"traceparent": "00-x"}',
    "buffered_at": NOW,
}


async def fetch(pool: Pool, run_id: str) -> asyncpg.Record:
    row = await pool.fetchrow("SELECT * FROM mollifier.runs WHERE id = $1", run_id)
    assert row is not None
    return row


def answered(outcome: object) -> Answer:
    assert isinstance(outcome, Answer)
    return outcome


async def test_every_field_of_a_snapshot_is_in_its_column(store: PostgresStore, pool: Pool) -> None:
    assert set(FULL) | {
        "schema_version",
        "id",
        "organization_id",
        "project_id",
        "environment_id",
        "task",
        "trace_id",
        "span_id",
        "created_at",
    } == set(Snapshot.__struct_fields__)
    full = run(**FULL)
    await store.insert([full], NOW)
    row = await fetch(pool, full.id)
    for name in Snapshot.__struct_fields__:
        value = getattr(full, name)
        if name in ("metadata", "idempotency_key_options", "trace_context"):
            value = value.decode()
        if name not in ("schema_version", "debounce_mode"):
            assert row[name] == (list(value) if isinstance(value, tuple) else value), name
    assert row["friendly_id"] == f"run_{full.id}"
    assert row["status"] == "DELAYED"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "QUEUED"),
        ({"delay_until": NOW + timedelta(seconds=1)}, "DELAYED"),
        ({"delay_until": NOW}, "QUEUED"),
        ({"expires_at": NOW}, "EXPIRED"),
        ({"expires_at": NOW, "delay_until": NOW + timedelta(seconds=1)}, "EXPIRED"),
    ],
)
async def test_the_status_follows_the_clock(changes: dict[str, Any], status: str) -> None:
    assert status_at(run(**changes), NOW) == status


async def test_g12_bad_rows_are_found_and_refused_alone(store: PostgresStore, pool: Pool) -> None:
    runs = [run(metadata=b'{"a": "\\u0000"}') if number in (0, 7, 8) else run() for number in range(12)]
    outcomes = await store.insert(runs, NOW)
    assert [isinstance(outcome, InvalidRequest) for outcome in outcomes] == [
        n in (0, 7, 8) for n in range(12)
    ]
    assert await pool.fetchval("SELECT count(*) FROM mollifier.runs") == 9


async def test_g4_the_unique_index_decides_and_the_loser_gets_the_winner(
    store: PostgresStore, pool: Pool
) -> None:
    winner = run(idempotency_key="k")
    first, second, other_task, other_environment = await store.insert(
        [
            winner,
            run(idempotency_key="k"),
            run(idempotency_key="k", task="t"),
            run("env_2", idempotency_key="k"),
        ],
        NOW,
    )
    assert answered(first) == Answer(winner.id, winner.span_id, None, False)
    assert answered(second) == Answer(winner.id, winner.span_id, None, False, is_cached=True)
    assert not answered(other_task).is_cached
    assert not answered(other_environment).is_cached
    assert await pool.fetchval("SELECT count(*) FROM mollifier.runs") == 3


@pytest.mark.parametrize("text", ["k" * 2048, "\U0001f40d" * 2048, "a:b", "a\x01b", " "])
async def test_keys_of_any_characters_and_length_never_collide(store: PostgresStore, text: str) -> None:
    runs = [
        run(text, task="t", idempotency_key="k"),
        run("t", task=text, idempotency_key="k"),
        run("t", task="k", idempotency_key=text),
    ]
    assert not any(answered(outcome).is_cached for outcome in await store.insert(runs, NOW))
    again = await store.insert([run(text, task="t", idempotency_key="k")], NOW)
    assert answered(again[0]).run_id == runs[0].id


async def test_a_token_is_used_once(store: PostgresStore) -> None:
    outcomes = await store.insert([run(one_time_use_token="t"), run("env_2", one_time_use_token="t")], NOW)
    assert [type(outcome) for outcome in outcomes] == [Answer, OneTimeUseTokenUsed]


async def test_racing_batches_in_opposite_order_all_end(store: PostgresStore, pool: Pool) -> None:
    keys = [f"key-{number}" for number in range(60)]
    batches = [
        [run(idempotency_key=key) for key in (keys if worker % 2 else keys[::-1])] for worker in range(6)
    ]
    outcomes = await asyncio.gather(*(store.insert(batch, NOW) for batch in batches))
    assert await pool.fetchval("SELECT count(*) FROM mollifier.runs") == len(keys)
    assert sum(not answered(outcome).is_cached for batch in outcomes for outcome in batch) == len(keys)


async def test_materialising_is_repeatable_and_lost_keys_become_aliases(
    store: PostgresStore, pool: Pool
) -> None:
    winner, loser, other = run(idempotency_key="k"), run(idempotency_key="k"), run()
    await store.insert([winner], NOW)
    rows = [Row(loser, "QUEUED"), Row(other, "QUEUED")]
    assert await store.materialise(rows, NOW) == [
        Materialised("alias", winner_id=winner.id),
        Materialised("inserted"),
    ]
    assert await store.materialise(rows, NOW) == [Materialised("present"), Materialised("present")]
    aliases = await pool.fetch("SELECT id, run_id, environment_id FROM mollifier.run_aliases")
    assert [tuple(alias) for alias in aliases] == [(loser.id, winner.id, "env_1")]
    assert await store.recall([loser]) == [Answer(loser.id, loser.span_id, None, is_mollified=True)]


@pytest.mark.parametrize(
    ("breaks", "mends"),
    [
        (
            "CREATE FUNCTION mollifier.refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN RAISE 'not now'; END$$;"
            " CREATE TRIGGER refuse BEFORE UPDATE ON mollifier.runs"
            " FOR EACH ROW EXECUTE FUNCTION mollifier.refuse()",
            "DROP FUNCTION mollifier.refuse CASCADE",
        ),
        (
            "ALTER TABLE mollifier.run_aliases ADD CONSTRAINT refuse CHECK (false)",
            "ALTER TABLE mollifier.run_aliases DROP CONSTRAINT refuse",
        ),
    ],
    ids=["before the winner has its changes", "before it is an alias"],
)
async def test_g11_cut_off_on_the_way_to_an_alias_its_changes_are_its_winners_in_the_end(
    store: PostgresStore, pool: Pool, breaks: str, mends: str
) -> None:
    winner, loser = run(idempotency_key="k"), run(idempotency_key="k", tags=("late",))
    await store.insert([winner], NOW)
    row = Row(loser, "QUEUED", revision=1, applied=("1-0",))
    await pool.execute(breaks)
    with pytest.raises(asyncpg.PostgresError):
        await store.materialise([row], NOW)
    await pool.execute(mends)
    for _ in range(2):
        await store.materialise([row], NOW)
        tags = await pool.fetchval("SELECT tags FROM mollifier.runs WHERE id = $1", winner.id)
        assert tags == ["late"]
    assert await pool.fetchval("SELECT run_id FROM mollifier.run_aliases") == winner.id


async def test_postgres_away_is_unavailable_not_refused() -> None:
    pool = await create_pool("postgresql://postgres@127.0.0.1:1/nothing", 1.0)
    away = PostgresStore(pool, Settings.model_validate({}))
    with pytest.raises(StoreUnavailable):
        await away.insert([run()], NOW)
    with pytest.raises(StoreUnavailable):
        await away.recall([run()])
    pool.terminate()


async def test_a_database_that_was_not_migrated_is_unavailable(store: PostgresStore, pool: Pool) -> None:
    await pool.execute("DROP SCHEMA mollifier CASCADE")
    with pytest.raises(StoreUnavailable):
        await store.insert([run()], NOW)


async def test_a_waiting_parent_gets_its_waitpoint_with_the_child(store: PostgresStore, pool: Pool) -> None:
    options: dict[str, Any] = {"parent_run_id": "parent", "resume_parent_on_completion": True}
    child, bad = run(**options), run(**options, metadata=b'{"a": "\\u0000"}')
    waits, refused, plain = await store.insert([child, bad, run()], NOW)
    assert [type(outcome) for outcome in (waits, refused, plain)] == [Answer, InvalidRequest, Answer]
    assert await waitpoints(pool) == {(child.id, "parent", "env_1", "PENDING")}


async def test_a_cached_hit_makes_the_parent_wait_for_the_winner(store: PostgresStore, pool: Pool) -> None:
    winner, done = run(idempotency_key="k"), run(idempotency_key="done")
    await store.insert([winner, done], NOW)
    await pool.execute("UPDATE mollifier.runs SET status = 'COMPLETED' WHERE id = $1", done.id)
    options: dict[str, Any] = {"parent_run_id": "parent", "resume_parent_on_completion": True}
    await store.insert([run(idempotency_key="k", **options), run(idempotency_key="done", **options)], NOW)
    assert await waitpoints(pool) == {
        (winner.id, "parent", "env_1", "PENDING"),
        (done.id, "parent", "env_1", "COMPLETED"),
    }


async def test_who_waits_for_an_id_that_becomes_an_alias_waits_for_the_winner(
    store: PostgresStore, pool: Pool
) -> None:
    winner, loser = run(idempotency_key="k"), run(idempotency_key="k")
    hit = Answer(loser.id, None, None, is_mollified=True, is_cached=True)
    before, after = (run(parent_run_id=parent, resume_parent_on_completion=True) for parent in ("p1", "p2"))
    await store.let_parents_wait([before], [hit])
    await store.insert([winner], NOW)
    await store.materialise([Row(loser, "QUEUED")], NOW)
    await store.let_parents_wait([after], [hit])
    assert await waitpoints(pool) == {
        (winner.id, "p1", "env_1", "PENDING"),
        (winner.id, "p2", "env_1", "PENDING"),
    }


async def test_g7_a_refused_run_does_not_end_the_wait_for_anothers(store: PostgresStore, pool: Pool) -> None:
    child = run(parent_run_id="parent", resume_parent_on_completion=True)
    await store.insert([child], NOW)
    (result,) = await store.materialise([Row(run("env_2", id=child.id), "SYSTEM_FAILURE")], NOW)
    assert result.result == "refused"
    assert await waitpoints(pool) == {(child.id, "parent", "env_1", "PENDING")}


async def test_a_large_batch_is_copied(store: PostgresStore, pool: Pool) -> None:
    await store.insert([run(**FULL)], NOW)
    runs = [run(payload=b'{"n": %d}' % number, tags=("a",)) for number in range(LARGE)]
    with statements() as given:
        outcomes = await store.insert(runs, NOW)
    assert [query for query, _ in given if "INSERT" in query] == []
    assert outcomes == [Answer(one.id, one.span_id, None, is_mollified=False) for one in runs]
    rows = await pool.fetch("SELECT id, payload, tags, status FROM mollifier.runs WHERE tags = $1", ["a"])
    assert {tuple(map(str, row)) for row in rows} == {
        (one.id, str(one.payload), "['a']", "QUEUED") for one in runs
    }


async def test_g3_g4_g12_what_is_in_the_way_of_a_large_batch_disturbs_nobody(
    store: PostgresStore, pool: Pool
) -> None:
    known, winner, used = run(), run(idempotency_key="k"), run()
    await store.insert([known, winner, used], NOW)
    await pool.execute(ALIAS_WITH_TOKEN, used.id)
    special = {
        3: known,
        7: run(idempotency_key="k"),
        11: run(metadata=b'{"a": "\\u0000"}'),
        12: run("env_2", id=known.id),
    }
    runs = [special.get(number) or run() for number in range(LARGE)]
    for one in (runs, [*runs[:-1], run(one_time_use_token="t")]):
        outcomes = await store.insert(one, NOW)
        assert outcomes[3] == Answer(known.id, known.span_id, None, is_mollified=False)
        assert outcomes[7] == Answer(winner.id, winner.span_id, None, is_mollified=False, is_cached=True)
        assert isinstance(outcomes[11], InvalidRequest)
        assert isinstance(outcomes[12], RunIdConflict)
    assert isinstance(outcomes[-1], OneTimeUseTokenUsed)
    assert await pool.fetchval("SELECT count(*) FROM mollifier.runs") == LARGE - len(special) + 3


async def test_g12_a_token_of_an_alias_is_used_up_for_a_large_batch(store: PostgresStore, pool: Pool) -> None:
    """Of which nothing in the table of runs itself would be in the way."""
    winner = run()
    await store.insert([winner], NOW)
    await pool.execute(ALIAS_WITH_TOKEN, winner.id)
    outcomes = await store.insert([run(one_time_use_token="t"), *(run() for _ in range(LARGE))], NOW)
    assert [type(outcome) for outcome in outcomes] == [OneTimeUseTokenUsed] + [Answer] * LARGE


async def waitpoints(pool: Pool) -> set[tuple[Any, ...]]:
    rows = await pool.fetch(
        "SELECT child_run_id, parent_run_id, environment_id, status FROM mollifier.waitpoints"
    )
    return {tuple(row) for row in rows}


BY_KEY = sorted(
    path.name.removesuffix(".sql")
    for path in files("app").joinpath("sql").iterdir()
    if path.name.endswith(".sql") and re.search("mollifier.(runs|run_aliases|waitpoints)", path.read_text())
)
"""The statements about tables that grow."""


@pytest.mark.parametrize("name", BY_KEY)
async def test_a_plan_made_while_tables_are_small_reads_none_of_them_as_a_whole(
    pool: Pool, store: PostgresStore, name: str
) -> None:
    """It is kept until they are analysed: a storm could bring in a million rows before that."""
    await store.insert([run(id=str(number)) for number in range(20)], NOW)
    query = f"EXPLAIN (GENERIC_PLAN) {statement(name)}"
    async with pool.acquire() as connection:
        parameters = (await connection.prepare(query)).get_parameters()
        plan = await connection.fetch(query, *[None] * len(parameters))
    lines = "\n".join(line for (line,) in plan)
    assert "Seq Scan" not in lines
    assert "Hash" not in lines


@pytest.mark.parametrize("key", ["key", "schlüssel \U0001f511", "a\x01\n'\"\\", "k" * 2048])
async def test_the_digest_of_a_key_is_the_one_that_postgres_makes(pool: Pool, key: str) -> None:
    keyed = run(idempotency_key=key)
    made = await pool.fetchval(
        "SELECT mollifier.key_digest($1, $2, $3, $4)",
        *(keyed.organization_id, keyed.environment_id, keyed.task, key),
    )
    assert key_digest(keyed) == made

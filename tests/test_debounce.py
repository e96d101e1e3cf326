"""Debouncing: one delayed run per key, pushed back by every further trigger. DESIGN section 8, G3, G4, G7."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.batch import Answer
from app.debounce import debounce, fold
from app.errors import InvalidRequest, OneTimeUseTokenUsed
from app.postgres import statement
from app.store import PostgresStore
from schemas.snapshot import Snapshot
from tests.adapters import Pool
from tests.builders import run

NOW = datetime.now(UTC).replace(microsecond=0)


def trigger(second: float = 0, delay: float = 60, max_delay: float | None = None, **changes: Any) -> Snapshot:
    """A debounced trigger that came `second` seconds from now."""
    created_at = NOW + timedelta(seconds=second)
    return run(
        **{
            "created_at": created_at,
            "debounce_key": "user-7",
            "delay_until": created_at + timedelta(seconds=delay),
            "debounce_until": None if max_delay is None else created_at + timedelta(seconds=max_delay),
            "payload": b"%d" % second,
            **changes,
        }
    )


def due(second: float) -> datetime:
    return NOW + timedelta(seconds=second)


async def rows(pool: Pool) -> list[dict[str, Any]]:
    return [dict(row) for row in await pool.fetch("SELECT * FROM mollifier.runs ORDER BY created_at, id")]


async def insert(store: PostgresStore, *triggers: Snapshot) -> list[tuple[str, bool]]:
    """(run id, is cached) per trigger."""
    answers = await store.insert(triggers, NOW)
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return [(answer.run_id, answer.is_cached) for answer in answers if isinstance(answer, Answer)]


async def test_a_further_trigger_pushes_the_delayed_run_back(store: PostgresStore, pool: Pool) -> None:
    first, second = trigger(0), trigger(10)
    assert await insert(store, first) == [(first.id, False)]
    (answer,) = await store.insert([second], NOW)
    assert answer == Answer(first.id, first.span_id, due(70), is_mollified=False, is_cached=True)
    (row,) = await rows(pool)
    assert (row["id"], row["status"], row["delay_until"]) == (first.id, "DELAYED", due(70))


@pytest.mark.parametrize(("mode", "payload"), [("trailing", b"10"), ("leading", b"0")])
@pytest.mark.parametrize("in_one_batch", [True, False])
async def test_trailing_replaces_the_payload_and_leading_keeps_it(
    store: PostgresStore, pool: Pool, mode: str, payload: bytes, in_one_batch: bool
) -> None:
    first = trigger(0, debounce_mode=mode)
    second = trigger(10, debounce_mode=mode, payload_type="text/plain", tags=("new",))
    if in_one_batch:
        await insert(store, first, second)
    else:
        await insert(store, first)
        await insert(store, second)
    (row,) = await rows(pool)
    assert (row["payload"], row["delay_until"]) == (payload, due(70))
    assert row["payload_type"] == ("text/plain" if mode == "trailing" else "application/json")
    assert row["tags"] == []


async def test_max_delay_bounds_how_far_it_is_pushed(store: PostgresStore, pool: Pool) -> None:
    for second in (0, 30, 60, 90):
        await insert(store, trigger(second, max_delay=100))
    (row,) = await rows(pool)
    assert (row["delay_until"], row["payload"]) == (due(100), b"90")


async def test_it_is_never_pulled_forward_and_an_old_trigger_does_not_bring_its_payload_back(
    store: PostgresStore, pool: Pool
) -> None:
    await insert(store, trigger(0))
    await insert(store, trigger(20))
    await insert(store, trigger(10, delay=5))
    (row,) = await rows(pool)
    assert (row["delay_until"], row["payload"]) == (due(80), b"20")


async def test_a_run_that_has_left_its_delay_is_left_alone(store: PostgresStore, pool: Pool) -> None:
    first, second, third = trigger(0), trigger(10), trigger(20)
    await insert(store, first)
    await pool.execute("UPDATE mollifier.runs SET status = 'QUEUED'")
    assert await insert(store, second, third) == [(second.id, False), (second.id, True)]
    assert [row["delay_until"] for row in await rows(pool)] == [due(60), due(80)]


async def test_g3_a_trigger_that_was_coalesced_is_not_handled_again(store: PostgresStore, pool: Pool) -> None:
    first, second = trigger(0), trigger(10)
    await insert(store, first)
    await insert(store, second)
    await pool.execute("UPDATE mollifier.runs SET status = 'COMPLETED'")
    known = Answer(first.id, first.span_id, due(70), is_mollified=False, is_cached=True)
    assert await store.recall([second]) == [known]
    assert len(await rows(pool)) == 1


async def test_late_triggers_are_coalesced_too(store: PostgresStore, pool: Pool) -> None:
    first, second = trigger(-600), trigger(-500)
    await insert(store, first)
    await insert(store, second)
    (row,) = await rows(pool)
    assert (row["status"], row["delay_until"], row["payload"]) == ("DELAYED", due(-440), b"-500")


async def test_1000_concurrent_triggers_leave_one_delayed_run(store: PostgresStore, pool: Pool) -> None:
    triggers = [trigger(number, max_delay=86_400) for number in range(1000)]
    batches = [triggers[start::100] for start in range(100)]
    answers = [
        answer
        for batch in await asyncio.gather(*(insert(store, *batch) for batch in batches))
        for answer in batch
    ]
    (row,) = await rows(pool)
    assert {run_id for run_id, _ in answers} == {row["id"]}
    assert sum(not is_cached for _, is_cached in answers) == 1
    assert (row["delay_until"], row["payload"]) == (due(999 + 60), b"999")
    assert (
        await pool.fetchval("SELECT count(*) FROM mollifier.run_aliases WHERE run_id = $1", row["id"]) == 999
    )


async def test_a_batch_is_one_statement(pool: Pool) -> None:
    queries: list[str] = []
    async with pool.acquire() as connection:
        await debounce(connection, [trigger()], NOW)  # asyncpg looks the argument types up
        with connection.query_logger(lambda query: queries.append(query.query)):
            await debounce(connection, [trigger(n, debounce_key=f"key-{n % 40}") for n in range(400)], NOW)
    assert queries == [statement("debounce_runs")]


async def test_keys_environments_and_tasks_are_apart(store: PostgresStore, pool: Pool) -> None:
    others = [trigger(), trigger(debounce_key="user-8"), trigger(task="other"), run("env_2")]
    others[3] = replace(trigger(), environment_id="env_2")
    assert not any(is_cached for _, is_cached in await insert(store, *others))
    assert len(await rows(pool)) == 4


@pytest.mark.parametrize("in_one_batch", [True, False])
async def test_g7_another_organization_cannot_push_it(
    store: PostgresStore, pool: Pool, in_one_batch: bool
) -> None:
    own, foreign = trigger(0), trigger(10, organization_id="org_2")
    if in_one_batch:
        mine, theirs = await store.insert([own, foreign], NOW)
    else:
        (mine,) = await store.insert([own], NOW)
        (theirs,) = await store.insert([foreign], NOW)
    assert isinstance(mine, Answer)
    assert isinstance(theirs, Answer)
    assert not mine.is_cached
    assert not theirs.is_cached
    assert [(row["delay_until"], row["payload"]) for row in await rows(pool)] == [
        (due(60), b"0"),
        (due(70), b"10"),
    ]


async def test_an_idempotency_key_answers_before_the_debounce_key(store: PostgresStore, pool: Pool) -> None:
    keyed, delayed = run(idempotency_key="k"), trigger(0)
    await insert(store, keyed)
    await insert(store, delayed)
    both = trigger(10, idempotency_key="k")
    assert await insert(store, both, trigger(20, idempotency_key="free")) == [
        (keyed.id, True),
        (delayed.id, True),
    ]
    await pool.execute("UPDATE mollifier.runs SET status = 'FAILED' WHERE id = $1", keyed.id)
    await pool.execute("UPDATE mollifier.runs SET status = 'QUEUED' WHERE id = $1", delayed.id)
    assert await insert(store, both) == [(both.id, False)]


async def test_a_token_is_used_once_whether_it_makes_a_run_or_pushes_one(store: PostgresStore) -> None:
    triggers = [trigger(second, one_time_use_token=token) for second, token in enumerate("aabb")]
    answers = [
        *await store.insert(triggers, NOW),
        *await store.insert([trigger(9, one_time_use_token="b")], NOW),
    ]
    answers += await store.insert([run(one_time_use_token="b"), run(one_time_use_token="a")], NOW)
    expected = [Answer, OneTimeUseTokenUsed, Answer, *[OneTimeUseTokenUsed] * 4]
    assert [type(answer) for answer in answers] == expected


async def test_racing_tokens_of_different_debounce_keys_have_one_winner(store: PostgresStore) -> None:
    answers = await asyncio.gather(
        *(
            store.insert([trigger(debounce_key=f"key-{number}", one_time_use_token="t")], NOW)
            for number in range(20)
        )
    )
    types = [type(answer) for (answer,) in answers]
    assert (types.count(Answer), types.count(OneTimeUseTokenUsed)) == (1, 19)


async def test_a_bad_trigger_is_refused_alone(store: PostgresStore, pool: Pool) -> None:
    bad = trigger(5, debounce_key="other", metadata=b'{"a": "\\u0000"}')
    outcomes = await store.insert([trigger(0), bad, trigger(10), run()], NOW)
    assert [type(outcome) for outcome in outcomes] == [Answer, InvalidRequest, Answer, Answer]
    assert [row["delay_until"] for row in await rows(pool) if row["debounce_key"]] == [due(70)]


async def test_an_expired_trigger_neither_pushes_nor_is_pushed(store: PostgresStore, pool: Pool) -> None:
    first, late = trigger(0), trigger(10, expires_at=NOW)
    assert await insert(store, first, late) == [(first.id, False), (late.id, False)]
    assert {row["id"]: row["status"] for row in await rows(pool)} == {first.id: "DELAYED", late.id: "EXPIRED"}


async def test_a_parent_waits_for_the_run_that_was_pushed(store: PostgresStore, pool: Pool) -> None:
    first = trigger(0)
    await insert(store, first)
    await insert(store, trigger(10, parent_run_id="parent", resume_parent_on_completion=True))
    waitpoint = await pool.fetchrow("SELECT child_run_id, parent_run_id FROM mollifier.waitpoints")
    assert tuple(waitpoint or ()) == (first.id, "parent")


seconds = st.integers(0, 50)
triggers = st.lists(
    st.builds(
        trigger,
        seconds,
        st.integers(1, 100),
        st.none() | st.just(120),
        debounce_mode=st.sampled_from(["trailing", "leading"]),
    ),
    min_size=1,
    max_size=6,
)


def one_by_one(triggers: Sequence[Snapshot]) -> tuple[str, datetime | None, bytes | None]:
    """The rules of debouncing, told for one trigger after the other: (run id, delayed until, payload)."""
    first, *others = sorted(triggers, key=lambda one: one.created_at)
    until, payload = first.delay_until, first.payload
    for other in others:
        assert until is not None
        assert other.delay_until is not None
        until = max(until, other.delay_until)
        until = until if first.debounce_until is None else min(until, first.debounce_until)
        payload = other.payload if other.debounce_mode == "trailing" else payload
    return first.id, until, payload


@given(triggers)
def test_a_fold_is_what_comes_of_triggers_one_by_one(triggers: list[Snapshot]) -> None:
    folded = fold(triggers).run
    assert (folded.id, folded.delay_until, folded.payload) == one_by_one(triggers)

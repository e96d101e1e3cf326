"""One suite for every implementation of a port: the fakes keep the promises that the real ones keep."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from app.batch import Answer, Parent
from app.buffer import RedisBuffer
from app.errors import QueueLimitExceeded, RequestError, RunIdConflict
from app.keys import Keys
from app.ports import Buffer, Store
from app.settings import Settings
from app.store import PostgresStore
from schemas.snapshot import Snapshot
from tests.builders import run
from tests.fakes import FakeBuffer, FakeStore

NOW = datetime.now(UTC)

AnyBuffer = FakeBuffer | RedisBuffer


@pytest.fixture(params=["fake", "real"])
def buffers(request: pytest.FixtureRequest) -> Callable[[int], AnyBuffer]:
    if request.param == "fake":
        return FakeBuffer
    make = request.getfixturevalue("make_buffer")
    return lambda limit: make(max_buffered_per_env=limit)


@pytest.fixture(params=["fake", "real"])
def any_store(request: pytest.FixtureRequest) -> Store:
    store: PostgresStore | FakeStore
    store = FakeStore() if request.param == "fake" else request.getfixturevalue("store")
    return store


async def accept(buffer: Buffer, *runs: Snapshot) -> Sequence[Answer | RequestError]:
    return await buffer.accept(runs, [None] * len(runs))


async def test_an_accepted_run_is_found_in_its_environment_only(buffers: Callable[[int], Buffer]) -> None:
    buffer = buffers(0)
    mine, other = run("env_1"), run("env_2")
    assert await accept(buffer, mine, other) == [
        Answer(mine.id, mine.span_id, None, is_mollified=True),
        Answer(other.id, other.span_id, None, is_mollified=True),
    ]
    elsewhere = run("env_2", id=mine.id)
    (conflict,) = await buffer.recall([run("env_1", id=mine.id, organization_id="org_2")], [])
    assert isinstance(conflict, RunIdConflict)
    missing = run("env_1")
    found = await buffer.recall([missing, mine, elsewhere, other], [])
    assert [answer.run_id if isinstance(answer, Answer) else answer for answer in found] == [
        None,
        mine.id,
        None,
        other.id,
    ]


async def test_accepting_twice_changes_nothing(buffers: Callable[[int], Buffer]) -> None:
    buffer = buffers(1)
    first = run(payload=b'"first"')
    answers = await accept(buffer, first)
    assert await accept(buffer, run(id=first.id, payload=b'"second"')) == answers


async def test_a_full_environment_refuses_and_others_do_not(buffers: Callable[[int], Buffer]) -> None:
    buffer = buffers(2)
    outcomes = await accept(buffer, run(), run("env_2"), run(), run())
    assert [type(outcome) for outcome in outcomes] == [Answer, Answer, Answer, QueueLimitExceeded]


async def test_a_reserved_id_is_anothers_until_it_is_released(buffers: Callable[[int], AnyBuffer]) -> None:
    buffer = buffers(0)
    mine, theirs = run("env_1", id="mine"), run("env_2", id="mine")
    assert await buffer.recall([mine], [mine]) == [None]
    assert isinstance((await buffer.recall([theirs], [theirs]))[0], RunIdConflict)
    await buffer.release([theirs])
    assert isinstance((await buffer.recall([theirs], [theirs]))[0], RunIdConflict)
    await buffer.release([mine])
    assert await buffer.recall([theirs], [theirs]) == [None]


async def test_nothing_is_nothing(buffers: Callable[[int], AnyBuffer]) -> None:
    buffer = buffers(0)
    assert list(await accept(buffer)) == []
    await buffer.release([])


async def test_an_inserted_run_is_recalled_in_its_environment_only(any_store: Store) -> None:
    mine, buffered = run("env_1"), run("env_1", buffered_at=NOW, delay_until=NOW)
    assert await any_store.insert([mine, buffered], NOW) == [
        Answer(mine.id, mine.span_id, None, is_mollified=False),
        Answer(buffered.id, buffered.span_id, NOW, is_mollified=True),
    ]
    (conflict,) = await any_store.recall([run("env_1", id=mine.id, organization_id="org_2")])
    assert isinstance(conflict, RunIdConflict)
    found = await any_store.recall([mine, run("env_2", id=mine.id), run("env_1"), buffered])
    assert found[0] == Answer(mine.id, mine.span_id, None, is_mollified=False)
    assert isinstance(found[1], RunIdConflict)
    assert found[2] is None
    assert found[3] == Answer(buffered.id, buffered.span_id, NOW, is_mollified=True)


async def test_inserting_twice_changes_nothing(any_store: Store) -> None:
    mine = run()
    first = await any_store.insert([mine], NOW)
    assert await any_store.insert([run(id=mine.id), mine], NOW) == [*first, *first]
    (conflict,) = await any_store.insert([run("env_2", id=mine.id)], NOW)
    assert isinstance(conflict, RunIdConflict)


async def test_a_parent_is_found_in_its_childs_environment_only(
    buffers: Callable[[int], Buffer], any_store: Store
) -> None:
    buffer = buffers(0)
    buffered, stored = run(depth=1, root_run_id="root", buffered_at=NOW), run()
    await accept(buffer, buffered)
    await any_store.insert([stored], NOW)
    children = [
        run(parent_run_id=buffered.id),
        run(parent_run_id=stored.id),
        run("env_2", parent_run_id=buffered.id),
        run("env_2", parent_run_id=stored.id),
        run(parent_run_id=buffered.id, organization_id="org_2"),
        run(parent_run_id=stored.id, organization_id="org_2"),
    ]
    assert await buffer.find_parents(children) == [Parent(buffered.id, 1, "root"), *[None] * 5]
    assert await any_store.find_parents(children) == [None, Parent(stored.id, 0, stored.id), *[None] * 4]


async def test_g3_an_index_that_was_left_of_an_entry_which_is_gone_hides_no_run(
    client: Redis, make_buffer: Callable[..., RedisBuffer]
) -> None:
    """Accepted again, a run is found again; and it is there once, however often it comes."""
    buffer, mine = make_buffer(), run("env_1")
    names = Keys("mollifier", Settings().partitions).environment("env_1")
    (first,) = await accept(buffer, mine)
    await client.xtrim(names.entries, maxlen=0)
    assert await buffer.recall([mine], []) == [None]
    assert await accept(buffer, mine) == [first]
    assert await buffer.recall([mine], []) == [first]
    assert await accept(buffer, mine) == [first]
    assert await client.xlen(names.entries) == 1

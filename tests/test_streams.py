"""Taking over what dead consumers held. G3: one request is handled by one consumer at a time."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from app.batch import Entry
from app.keys import Keys
from app.streams import RequestStream

KEYS = Keys("mollifier", 16)
MOST = 100


async def hand_out(client: Any, consumer: str, count: int) -> list[str]:
    """Requests that a consumer was given just now; it has no heartbeat. Their ids."""
    ids = [(await client.xadd(KEYS.triggers, {"body": "{}"})).decode() for _ in range(count)]
    await client.xreadgroup(KEYS.group, consumer, {KEYS.triggers: ">"}, count=count)
    return ids


def entries_of(batches: Sequence[Sequence[Entry]]) -> list[Entry]:
    return [entry for batch in batches for entry in batch]


@pytest.fixture
async def streams(client: Redis) -> list[RequestStream]:
    """Eight consumers of one stream."""
    streams = [RequestStream(client, KEYS, KEYS.triggers, f"worker-{n}", 60_000) for n in range(8)]
    await streams[0].ensure_group()
    return streams


async def test_of_many_that_find_it_abandoned_one_gets_an_entry(
    client: Redis, streams: list[RequestStream]
) -> None:
    ids = await hand_out(client, "ghost", 50)
    found = await asyncio.gather(*(stream.recover((), MOST) for stream in streams))
    taken = [entry for _, batches in found for entry in entries_of(batches)]
    assert sorted(entry.id for entry in taken) == sorted(ids)
    assert {entry.deliveries for entry in taken} == {2}
    assert taken[0].fields == {b"body": b"{}"}


async def test_one_that_was_taken_over_meanwhile_stays_where_it_is(
    client: Redis, streams: list[RequestStream]
) -> None:
    """A consumer looked, and came to take only after another had."""
    ids = await hand_out(client, "ghost", 3)
    ((_, seen),) = await streams[0]._abandoned((), MOST)
    (first,) = (await streams[1].recover((), MOST))[1]
    assert [entry.id for entry in first] == ids
    assert await streams[0]._take_over(seen) == []
    pending = await client.xpending_range(KEYS.triggers, KEYS.group, "-", "+", MOST)
    assert {one["consumer"] for one in pending} == {b"worker-1"}


async def test_g3_who_comes_back_while_another_looks_keeps_what_it_is_given_then(
    client: Redis, streams: list[RequestStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis was away for longer than a heartbeat lives: the other looks before this one beats."""
    look = streams[0]._silent

    async def come_back(consumers: Sequence[str]) -> list[str]:
        silent = await look(consumers)
        monkeypatch.setattr(streams[0], "_silent", look)
        await client.set(KEYS.heartbeat("back"), "1")
        await hand_out(client, "back", 3)
        return silent

    await hand_out(client, "back", 1)
    monkeypatch.setattr(streams[0], "_silent", come_back)
    assert await streams[0].recover((), MOST) == ("", [])
    await client.delete(KEYS.heartbeat("back"))
    why, (entries,) = await streams[0].recover((), MOST, 7)
    assert (why, len(entries)) == ("holder_gone", 4)
    assert {entry.life for entry in entries} == {7}


async def test_one_that_is_gone_from_the_stream_is_left_out(
    client: Redis, streams: list[RequestStream]
) -> None:
    ids = await hand_out(client, "ghost", 3)
    await client.xdel(KEYS.triggers, ids[1])
    (entries,) = (await streams[0].recover((), MOST))[1]
    assert [entry.id for entry in entries] == [ids[0], ids[2]]

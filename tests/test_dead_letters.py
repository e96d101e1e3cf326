"""Dead letters as operators handle them, DESIGN section 3.4: the adapter on a real Redis, and the command."""

import asyncio
import json
import os
import pty
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from app.batch import DeadLetter, Entry, Item
from app.buffer import RedisBuffer
from app.dead_letters import UNKNOWN, DeadLetters, Selection
from app.errors import Unreachable
from app.keys import Keys
from app.ports import Letter, Taken
from app.redis_client import Call, Scripts
from app.replies import RedisDesk
from app.turns import RedisTurns
from schemas.snapshot import Snapshot, decode_snapshot, encode_snapshot
from tests.builders import run as a_run
from tests.processes import Workers, staged
from tests.producer import ENVELOPES, TRIGGERS, new_environment, request
from tests.test_claims import keyed
from tests.test_cli import COMMAND, NOBODY, environ, run

KEYS = Keys("mollifier", 16)
HEAD = {
    "source": TRIGGERS,
    "id": "1-1",
    "reason": "undecodable",
    "detail": "body: not JSON",
    "deliveries": "1",
    "at": "2026-01-01T00:00:00.000+00:00",
}

Pairs = list[tuple[bytes, bytes]]


@pytest.fixture
def letters(client: Redis, make_buffer: Callable[..., RedisBuffer]) -> DeadLetters:
    return DeadLetters(Scripts(client), KEYS, make_buffer())


@pytest.fixture
def desk(client: Redis) -> RedisDesk:
    return RedisDesk(Scripts(client), KEYS, TRIGGERS)


async def pairs_of(client: Redis, stream: str) -> list[Pairs]:
    """The entries of a stream, as redis-py does not show them: pairs in order, doubles included."""
    text = "return redis.call('XRANGE', KEYS[1], '-', '+')"
    entries: Any = await client.eval(text, 1, stream)
    return [list(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries]


async def there(client: Redis) -> list[str]:
    """The ids of all dead letters."""
    entries: Any = await client.xrange(KEYS.dead_letters)
    return [one.decode() for one, _ in entries]


async def set_aside(client: Redis, desk: RedisDesk, fields: Mapping[bytes, bytes]) -> str:
    """Have a worker set a request aside; the dead letter's id."""
    item = Item(Entry("1-1", fields, 6), dead_letter=DeadLetter("deliveries", "too often"))
    assert await desk.set_aside([item]) == []
    return (await there(client))[-1]


async def bury(client: Redis, desk: RedisDesk, snapshot: bytes, environment: str = "env_1") -> str:
    """Have a drainer set a buffered run aside; the dead letter's id."""
    await desk.bury([Letter(environment, "1-1", snapshot, None, "refused", "no")])
    return (await there(client))[-1]


async def write(client: Redis, count: int = 1, **changes: str) -> list[str]:
    """Write dead letters with some fields changed; their ids."""
    async with client.pipeline(transaction=False) as pipeline:
        for number in range(count):
            fields: dict[Any, Any] = {**HEAD, **changes, "body": f"{number}"}
            pipeline.xadd(KEYS.dead_letters, fields)
        return [one.decode() for one in await pipeline.execute()]


async def taken(turns: RedisTurns) -> list[Snapshot]:
    """What drainers are handed now."""
    return [decode_snapshot(snapshot) for one in await turns.take(99) for _, snapshot in one.entries]


@asynccontextmanager
async def without_memory(client: Redis) -> AsyncIterator[None]:
    await client.config_set("maxmemory", "1")
    try:
        yield
    finally:
        await client.config_set("maxmemory", "0")


def as_read(fields: Mapping[str, str | bytes]) -> dict[bytes, bytes]:
    """Fields as a worker reads them."""
    return {
        name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in fields.items()
    }


BODY = json.dumps(request("env_1")).encode()
ORIGINALS = {name: as_read(wrap(BODY, "mollifier:reply:1", "1")) for name, wrap in ENVELOPES.items()} | {
    "fields that are called like ours": {
        **{name.encode(): b"\x1b[2J\xff\x00" for name in HEAD},
        b"\xff\x00": b"",
        b"": b"nameless",
    }
}


class TestRequeueingRequests:
    @pytest.mark.parametrize("fields", ORIGINALS.values(), ids=ORIGINALS)
    async def test_the_original_goes_back_byte_for_byte(
        self, client: Redis, letters: DeadLetters, desk: RedisDesk, fields: dict[bytes, bytes]
    ) -> None:
        letter_id = await set_aside(client, desk, fields)
        (letter,) = await letters.read([letter_id])
        assert letter is not None
        assert letter[:6] == (letter_id, TRIGGERS, "1-1", "deliveries", "too often", 6)
        assert await letters.requeue([letter_id]) == [None]
        assert await pairs_of(client, TRIGGERS) == [list(fields.items())]
        assert await there(client) == []

    async def test_to_the_stream_that_it_came_from(self, client: Redis, letters: DeadLetters) -> None:
        assert await letters.requeue(await write(client, source=KEYS.operations)) == [None]
        assert await pairs_of(client, KEYS.operations) == [[(b"body", b"0")]]
        assert await client.exists(TRIGGERS) == 0

    async def test_names_that_occur_twice_stay_two(self, client: Redis, letters: DeadLetters) -> None:
        head = [part for pair in HEAD.items() for part in pair]
        twice = ["reason", "a", "body", "b", "body", "c", "reason", "d"]
        await Scripts(client).demand([Call("XADD", None, [KEYS.dead_letters, "*", *head, *twice])])
        assert await letters.requeue(await there(client)) == [None]
        assert await pairs_of(client, TRIGGERS) == [
            [(b"reason", b"a"), (b"body", b"b"), (b"body", b"c"), (b"reason", b"d")]
        ]

    async def test_a_refusal_deletes_nothing(
        self, client: Redis, letters: DeadLetters, desk: RedisDesk
    ) -> None:
        ids = [*await write(client), await bury(client, desk, encode_snapshot(a_run()))]
        async with without_memory(client):
            request_trouble, run_trouble = await letters.requeue(ids)
        assert request_trouble is not None
        assert request_trouble.startswith("Redis refuses it: ")
        assert run_trouble is not None
        assert run_trouble.startswith("buffer_unavailable: ")
        assert await there(client) == ids
        assert await client.exists(TRIGGERS) == 0

    async def test_a_crash_in_between_loses_nothing(self, client: Redis, letters: DeadLetters) -> None:
        ids = await write(client)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(letters, "drop", _lost)
            with pytest.raises(Unreachable):
                await letters.requeue(ids)
        assert await there(client) == ids
        assert await letters.requeue(ids) == [None]
        assert await client.xlen(TRIGGERS) == 2

    @pytest.mark.parametrize("source", ["other:triggers", "mollifier:dead-letters", "mollifier:gate", ""])
    async def test_only_to_where_requests_come_from(
        self, client: Redis, letters: DeadLetters, source: str
    ) -> None:
        ids = await write(client, source=source)
        (trouble,) = await letters.requeue(ids)
        assert trouble is not None
        assert "not known to this version" in trouble
        assert await there(client) == ids

    async def test_what_something_else_wrote_stays(self, client: Redis, letters: DeadLetters) -> None:
        await client.xadd(KEYS.dead_letters, {"source": TRIGGERS, "body": "{}"})
        await write(client, deliveries="many")
        ids = await there(client)
        for letter in await letters.read(ids):
            assert letter is not None
            assert letter.source is None
            assert letter.original[0] == (b"source", TRIGGERS.encode())
        assert None not in await letters.requeue(ids)
        assert await letters.drop(ids) == [None, None]

    async def test_through_the_front_door(
        self, client: Redis, desk: RedisDesk, redis_url: str, database_url: str, workers: Workers
    ) -> None:
        environment = new_environment()
        async with staged(workers, "triggers", redis_url, database_url) as stage:
            body = json.dumps(request(environment)).encode()
            fields = ENVELOPES["faststream"](body, stage.producer.channel("again"), "again")
            letter_id = await set_aside(client, desk, as_read(fields))
            done = run("dead-letters", "requeue", letter_id, variables={"REDIS_URL": redis_url})
            assert (done.returncode, done.stdout, done.stderr) == (0, "requeued 1 dead letter\n", "")
            reply = await stage.producer.reply("again")
            assert reply["type"] == "run"
            assert (await stage.row(environment))["id"] == reply["run"]["id"]
            assert await client.xlen(KEYS.dead_letters) == 0


async def _lost(ids: Sequence[str]) -> list[str | None]:
    raise Unreachable("Redis: lost")


class TestRequeueingRuns:
    async def test_a_run_goes_back_into_the_buffer_under_its_id(
        self, client: Redis, letters: DeadLetters, desk: RedisDesk, make_turns: Callable[..., RedisTurns]
    ) -> None:
        first, second = a_run(payload=b'"\xc3\xa9"'), a_run("env_2", id="chosen")
        ids = [await bury(client, desk, encode_snapshot(first))]
        ids.append(await bury(client, desk, encode_snapshot(second), "env_2"))
        ids.append(await bury(client, desk, encode_snapshot(first)))
        assert await letters.requeue(ids) == [None, None, None]
        assert await there(client) == []
        assert await client.hget(KEYS.chosen(KEYS.partition("chosen")), "chosen") == b"org_1\0env_2"
        again = {run.id: run for run in await taken(make_turns())}
        for run_before in (first, second):
            run_after = again.pop(run_before.id)
            assert run_after.buffered_at is not None
            assert datetime.now(UTC) - run_after.buffered_at < timedelta(minutes=1)
            assert msgspec.structs.replace(run_after, buffered_at=None) == run_before
        assert again == {}

    async def test_not_while_the_entry_that_was_set_aside_is_readable(
        self,
        client: Redis,
        letters: DeadLetters,
        desk: RedisDesk,
        make_buffer: Callable[..., RedisBuffer],
        make_turns: Callable[..., RedisTurns],
    ) -> None:
        """The buffer would say that it knows the run, and then forget it."""
        mine, turns = a_run(), make_turns(ack_grace_ttl_s=0)
        await make_buffer().accept([mine], [None])
        entries: Sequence[Taken] = await turns.take(9)
        ids = [await bury(client, desk, encode_snapshot(mine))]
        for end in (None, turns.settle):
            if end is not None:
                await end(entries, [])
            (trouble,) = await letters.requeue(ids)
            assert trouble is not None
            assert trouble.startswith("the buffer knows its run")
            assert await there(client) == ids
        await turns.forget()
        assert await letters.requeue(ids) == [None]
        assert await there(client) == []
        assert [run.id for run in await taken(turns)] == [mine.id]

    @pytest.mark.parametrize(
        ("snapshot", "trouble"),
        [
            (b"\xc1 no snapshot", "its snapshot cannot be read: "),
            (encode_snapshot(a_run()) + b"\x00", "its snapshot cannot be read: "),
            (encode_snapshot(a_run(schema_version=2)), "its snapshot was written by a newer version"),
            (
                msgspec.msgpack.encode({**msgspec.structs.asdict(a_run()), "new": 1}),
                "its snapshot was written by a newer version",
            ),
            (
                msgspec.msgpack.encode(
                    {**msgspec.structs.asdict(keyed()), "idempotency_key_expires_at": "2026-01-01T00:00:00"}
                ),
                "its snapshot cannot be read: Expected `datetime` with a timezone",
            ),
            (encode_snapshot(a_run("env_2")), "its snapshot is of a run that does not belong"),
        ],
        ids=["nonsense", "more", "newer meaning", "newer field", "no time zone", "another environment"],
    )
    async def test_what_cannot_be_put_back_stays(
        self, client: Redis, letters: DeadLetters, desk: RedisDesk, snapshot: bytes, trouble: str
    ) -> None:
        good = await bury(client, desk, encode_snapshot(a_run()))
        bad = await bury(client, desk, snapshot)
        went, stays = await letters.requeue([good, bad])
        assert went is None
        assert stays is not None
        assert stays.startswith(trouble)
        assert await there(client) == [bad]

    async def test_what_the_buffer_refuses_stays(
        self, client: Redis, desk: RedisDesk, make_buffer: Callable[..., RedisBuffer]
    ) -> None:
        letters = DeadLetters(Scripts(client), KEYS, make_buffer(max_buffered_per_env=1))
        ids = [await bury(client, desk, encode_snapshot(a_run(id=name))) for name in ("one", "two")]
        went, stays = await letters.requeue(ids)
        assert (went, stays and stays.partition(":")[0]) == (None, "queue_limit_exceeded")
        assert await there(client) == ids[1:]
        for name, holder in (("one", b"org_1\0env_1"), ("two", None)):
            assert await client.hget(KEYS.chosen(KEYS.partition(name)), name) == holder

    async def test_an_id_that_is_anothers_by_now(
        self,
        client: Redis,
        letters: DeadLetters,
        desk: RedisDesk,
        make_buffer: Callable[..., RedisBuffer],
    ) -> None:
        theirs = a_run("env_2", id="chosen")
        await make_buffer().recall([theirs], [theirs])
        ids = [await bury(client, desk, encode_snapshot(a_run(id="chosen")))]
        (trouble,) = await letters.requeue(ids)
        assert trouble is not None
        assert trouble.startswith("run_id_conflict: ")
        assert await there(client) == ids
        assert await client.hget(KEYS.chosen(KEYS.partition("chosen")), "chosen") == b"org_1\0env_2"

    async def test_a_key_that_has_another_run_by_now(
        self,
        client: Redis,
        letters: DeadLetters,
        desk: RedisDesk,
        make_buffer: Callable[..., RedisBuffer],
    ) -> None:
        mine, winner = _keyed(timedelta(hours=1)), _keyed(timedelta(hours=1))
        await make_buffer().accept([winner], [None])
        ids = [await bury(client, desk, encode_snapshot(mine))]
        assert await letters.requeue(ids) == [f"by now run_{winner.id} has its idempotency key"]
        assert await there(client) == ids

    @pytest.mark.parametrize("left", [timedelta(hours=1), -timedelta(seconds=1)], ids=["live", "expired"])
    async def test_a_key_is_claimed_for_the_time_it_has_left(
        self,
        client: Redis,
        letters: DeadLetters,
        desk: RedisDesk,
        make_turns: Callable[..., RedisTurns],
        left: timedelta,
    ) -> None:
        mine = _keyed(left)
        assert await letters.requeue([await bury(client, desk, encode_snapshot(mine))]) == [None]
        (again,) = await taken(make_turns())
        life_ms = await client.pttl(KEYS.claim(mine))
        if left > timedelta():
            assert 0 < life_ms <= left / timedelta(milliseconds=1)
            assert again.idempotency_key == mine.idempotency_key
        else:
            assert life_ms == -2
            assert again.idempotency_key is None


def _keyed(left: timedelta) -> Snapshot:
    """A run that was buffered yesterday, whose idempotency key lives for some time yet."""
    now = datetime.now(UTC)
    return keyed(buffered_at=now - timedelta(days=1), idempotency_key_expires_at=now + left)


class TestSelecting:
    async def test_in_pieces_of_a_bounded_size(
        self, client: Redis, make_buffer: Callable[..., RedisBuffer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = await write(client, 120, detail="x" * 100_000)
        scripts, trips = Scripts(client), []
        run_calls = scripts.run

        async def counted(calls: Sequence[Call]) -> list[Any]:
            answers = await run_calls(calls)
            trips.append((len(calls), sum(len(page) for page in answers if isinstance(page, list))))
            if any(call.name == "read_letters" and call.arguments[3] for call in calls):
                assert len(msgspec.msgpack.encode(answers)) < 1_000_000
            return answers

        monkeypatch.setattr(scripts, "run", counted)
        letters = DeadLetters(scripts, KEYS, make_buffer())
        span = await letters.span(Selection())
        handled = [one async for some in letters.ids(span) for one in await _all(letters, some)]
        assert handled == ids
        assert max(max(trip) for trip in trips) <= 50
        assert len(trips) == 1 + 4 * 3  # the span; per piece a page, the letters, their entries, their end
        assert await client.xlen(TRIGGERS) == 120
        assert await there(client) == []

    async def test_what_is_set_aside_again_meanwhile_waits_for_the_next_time(
        self, client: Redis, letters: DeadLetters
    ) -> None:
        first = await write(client)
        span = await letters.span(Selection())
        again = await write(client)
        assert [some async for some in letters.ids(span)] == [first]
        assert [some async for some in letters.ids(await letters.span(Selection()))] == [first + again]

    @pytest.mark.parametrize(
        ("selection", "selected"),
        [
            (Selection(), "abcd"),
            (Selection(reason="refused"), "bd"),
            (Selection(source="mollifier:operations"), "cd"),
            (Selection(reason="refused", source="mollifier:operations"), "d"),
            (Selection(reason="other"), ""),
            (Selection(older_than_s=3600), "ab"),
            (Selection(newer_than_s=3600), "cd"),
            (Selection(older_than_s=3600, newer_than_s=7200), "b"),
            (Selection(older_than_s=3600, reason="refused"), "b"),
            (Selection(older_than_s=1800, newer_than_s=900), ""),
        ],
        ids=str,
    )
    async def test_by_reason_source_and_age(
        self, client: Redis, letters: DeadLetters, selection: Selection, selected: str
    ) -> None:
        now_ms = int(datetime.now(UTC).timestamp() * 1000)
        for name, hours, changes in (
            ("a", 3, {}),
            ("b", 1.5, {"reason": "refused"}),
            ("c", 0.75, {"source": "mollifier:operations"}),
            ("d", 0, {"source": "mollifier:operations", "reason": "refused"}),
        ):
            fields: dict[Any, Any] = {**HEAD, "detail": name} | changes
            await client.xadd(KEYS.dead_letters, fields, id=f"{now_ms - int(hours * 3_600_000)}-0")
        pages = letters.pages(await letters.span(selection))
        assert "".join([str(letter.detail) async for page in pages for letter in page]) == selected

    async def test_there_are_none(self, letters: DeadLetters) -> None:
        assert [page async for page in letters.pages(await letters.span(Selection()))] == [[]]


async def _all(letters: DeadLetters, ids: list[str]) -> list[str]:
    assert await letters.requeue(ids) == [None] * len(ids)
    return ids


@pytest.mark.one_redis
class TestTheCommand:
    async def test_list(self, client: Redis, redis_url: str) -> None:
        servers = {"REDIS_URL": redis_url}
        assert run("dead-letters", "list", variables=servers).stdout == "no dead letters\n"
        assert run("dead-letters", "list", "--json", variables=servers).stdout == ""
        old: dict[Any, Any] = {**HEAD}
        await client.xadd(KEYS.dead_letters, old, id="1000-0")
        long = "a\x1b[31m\r\n" + "[bold]" + "x" * 200
        (hostile,) = await write(client, reason="refused", source="mollifier:operations", detail=long)
        done = run("dead-letters", "list", variables=servers)
        assert (done.returncode, done.stderr) == (0, "")
        header, first, *rest = done.stdout.splitlines()
        assert header.split() == ["dead", "letter", "age", "source", "reason", "detail"]
        assert first.split("  ")[0] == "1000-0"
        assert TRIGGERS in first
        assert "undecodable" in first
        assert rest[0].startswith(hostile)
        assert r"a\x1b[31m\r\n[bold]" in "".join(rest)
        assert "…" in "".join(rest)

        as_json = run("dead-letters", "list", "--json", "--newer-than", "1h", variables=servers)
        assert [json.loads(line) for line in as_json.stdout.splitlines()] == [
            {
                **HEAD,
                "dead_letter_id": hostile,
                "source": "mollifier:operations",
                "reason": "refused",
                "detail": long,
                "deliveries": 1,
            }
        ]

    async def test_list_says_how_many_more_there_are(self, client: Redis, redis_url: str) -> None:
        ids = await write(client, 130)
        await write(client, 5, reason="refused")
        servers = {"REDIS_URL": redis_url}
        chosen = ("--reason", "undecodable")
        done = run("dead-letters", "list", *chosen, variables=servers)
        assert [line.split()[0] for line in done.stdout.splitlines()[1:51]] == ids[:50]
        assert done.stdout.splitlines()[51:] == ["80 more; --limit shows more at once"]
        done = run("dead-letters", "list", *chosen, "--limit", "120", "--json", variables=servers)
        assert [json.loads(line)["dead_letter_id"] for line in done.stdout.splitlines()] == ids[:120]
        assert done.stderr == "10 more; --limit shows more at once\n"

    async def test_show(self, client: Redis, desk: RedisDesk, redis_url: str) -> None:
        fields = {b"reason": "é\x1b[2J\nb".encode(), b"\xff\n": b"\x89BIN\r\n"}
        letter_id = await set_aside(client, desk, fields)
        done = run("dead-letters", "show", letter_id, variables={"REDIS_URL": redis_url})
        assert (done.returncode, done.stderr) == (0, "")
        head, first, second = done.stdout.split("\n\n")
        assert dict(line.split(maxsplit=1) for line in head.splitlines()[1:-1]) == {
            "source": TRIGGERS,
            "id": "1-1",
            "reason": "deliveries",
            "detail": "too often",
            "deliveries": "6",
        }
        assert first == "reason  (text; 8 bytes)\n  é\\x1b[2J\n  b"
        assert second == "\\xff\\n  (bytes, escaped; 6 bytes)\n  \\x89BIN\\r\\n\n"

        shown = json.loads(
            run("dead-letters", "show", letter_id, "--json", variables={"REDIS_URL": redis_url}).stdout
        )
        assert (shown["dead_letter_id"], shown["id"], shown["deliveries"]) == (letter_id, "1-1", 6)
        assert [(_bytes(pair["name"]), _bytes(pair["value"])) for pair in shown["original"]] == [
            *fields.items()
        ]

    async def test_requeue_says_what_stays(self, client: Redis, redis_url: str) -> None:
        ids = [*await write(client, 2), *await write(client, source="elsewhere\x1b")]
        done = run("dead-letters", "requeue", "--reason", "undecodable", variables={"REDIS_URL": redis_url})
        assert (done.returncode, done.stdout) == (1, "requeued 2 dead letters\n")
        assert done.stderr.startswith(f"mollifier: {ids[2]}: ")
        assert done.stderr.count("\n") == 1
        assert await there(client) == ids[2:]

    async def test_a_connection_that_is_cut(self, client: Redis, redis_url: str) -> None:
        """What may have been appended is not appended once more unasked."""
        ids = await write(client, 2)
        async with _cut_at(b"XADD", redis_url) as url:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *("dead-letters", "requeue", "--all"),
                env=environ({"REDIS_URL": url}),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            said, complaint = await process.communicate()
        assert (process.returncode, said) == (1, b"requeued 0 dead letters\n")
        assert complaint.endswith(f"Which of these were requeued is not known: {' '.join(ids)}\n".encode())
        assert b"Traceback" not in complaint
        assert await there(client) == ids
        assert await client.xlen(TRIGGERS) == 2

    async def test_drop(self, client: Redis, redis_url: str) -> None:
        servers = {"REDIS_URL": redis_url}
        ids = [*await write(client, 3), *await write(client, 3, reason="refused")]
        done = run("dead-letters", "drop", ids[0], ids[0], variables=servers)
        assert (done.returncode, done.stdout, done.stderr) == (0, "dropped 1 dead letter\n", "")
        done = run("dead-letters", "drop", "--reason", "refused", variables=servers)
        assert (done.returncode, done.stdout) == (2, "")
        assert "--yes" in done.stderr
        assert await there(client) == ids[1:]
        done = run("dead-letters", "drop", "--reason", "refused", "--yes", variables=servers)
        assert (done.returncode, done.stdout) == (0, "dropped 3 dead letters\n")
        assert await there(client) == ids[1:3]
        done = run("dead-letters", "drop", "--all", "--yes", variables=servers)
        assert (done.returncode, done.stdout) == (0, "dropped 2 dead letters\n")

    @pytest.mark.parametrize(("answer", "left"), [(b"y\n", 0), (b"n\n", 2)])
    async def test_drop_asks_on_a_terminal(
        self, client: Redis, redis_url: str, answer: bytes, left: int
    ) -> None:
        await write(client, 2)
        ours, theirs = pty.openpty()
        try:
            os.write(ours, answer)
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *("dead-letters", "drop", "--all"),
                env=environ({"REDIS_URL": redis_url}),
                stdin=theirs,
                stderr=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            _, asked = await process.communicate()
        finally:
            os.close(ours)
            os.close(theirs)
        assert asked.startswith(b"Drop 2 dead letters? [y/N]:")
        assert process.returncode == (1 if left else 0)
        assert await client.xlen(KEYS.dead_letters) == left

    @pytest.mark.parametrize("command", ["show", "requeue", "drop"])
    async def test_an_id_that_nobody_knows(self, client: Redis, redis_url: str, command: str) -> None:
        known = await write(client) if command != "show" else []
        done = run("dead-letters", command, "5-1", *known, variables={"REDIS_URL": redis_url})
        assert done.returncode == 1
        assert done.stderr == f"mollifier: 5-1: {UNKNOWN}\n"
        assert await there(client) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            "show",
            "show 12",
            "show 5-1 5-2",
            "requeue",
            "requeue 5-",
            "requeue 5-18446744073709551616",
            "requeue 5-1 --all",
            "requeue --all --reason refused",
            "requeue --older-than soon",
            "drop",
            "drop 5-1 --source mollifier:triggers",
            "drop last",
            "list --newer-than -5s",
            "list --limit 0",
        ],
    )
    def test_a_mistake_of_use(self, arguments: str) -> None:
        done = run("dead-letters", *arguments.split(), variables={"REDIS_URL": f"redis://{NOBODY}"})
        assert (done.returncode, done.stdout) == (2, "")

    @pytest.mark.parametrize("arguments", ["list", "show 5-1", "requeue --all", "drop 5-1"])
    def test_redis_is_away(self, arguments: str) -> None:
        url = f"redis://:secret@{NOBODY}/0"
        done = run("dead-letters", *arguments.split(), variables={"REDIS_URL": url})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"mollifier: Redis at redis://:***@{NOBODY}/0: connection refused. Is REDIS_URL right?\n"
        )


@asynccontextmanager
async def _cut_at(mark: bytes, redis_url: str) -> AsyncIterator[str]:
    """The address of a Redis that does what it is told with `mark` in it, and does not live to say so."""
    host, port = redis_url.removeprefix("redis://").partition("/")[0].split(":")

    async def pass_on(answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answer := await answers.read(65_536):
            writer.write(answer)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, server = await asyncio.open_connection(host, int(port))
        answering = asyncio.create_task(pass_on(answers, writer))
        while commands := await reader.read(65_536):
            if mark in commands:
                answering.cancel()
                await asyncio.wait([answering])
                server.write(commands)
                await answers.read(1)  # it is done
                break
            server.write(commands)
        answering.cancel()
        server.close()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}/0"


def _bytes(spelled: dict[str, str]) -> bytes:
    (kind,) = spelled
    return b64decode(spelled[kind]) if kind == "base64" else spelled["text"].encode()

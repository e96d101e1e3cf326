"""Every limit of docs/wire.md: what is at it is taken, one more is refused, and the message says where."""

import re
from collections.abc import Callable
from typing import Any, get_args

import orjson
import pytest

from app.batch import Batch, Entry, Item
from app.changes import change_metadata
from app.decode import LONGEST_ADDRESS, OTHERS_BYTES, Decode, decode_trigger, read_operation, read_trigger
from app.errors import InvalidRequest, PayloadTooLarge, Undecodable
from app.nesting import MOST_LEVELS, MOST_LEVELS_OF_METADATA, is_deeper
from app.rows import row_at
from app.settings import Settings
from app.switches import Switches
from app.validate import build_run, check_metadata
from schemas.operations import OperationRequest, SetKey
from tests.builders import NOW, body
from tests.builders import run as a_run
from tests.producer import Fields, faststream, plain
from tests.test_asyncapi import validator
from tests.test_docs import table

Json = dict[str, Any]

SETTINGS = Settings.model_validate({"max_payload_bytes": 1000, "max_metadata_bytes": 1000})
LONGEST = 10_000_000
REPLY_TO = "mollifier:reply:me"
MOST_BYTES = 2000 + OTHERS_BYTES
DURATION = "000000000w000000000d000000000h000000000m000000001s"
TRACEPARENT = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-"

BESIDE: dict[str, Json] = {
    "options.idempotency_key_options": {"key": "k", "scope": "run"},
    "options.debounce": {"key": "k", "delay": "0s"},
    "options.batch": {"id": "b", "index": 0},
}
"""What an object needs beside the field that is looked at."""

OPERATIONS: dict[str, Json] = {
    "reason": {"type": "run.cancel", "run_id": "run_a"},
    "delay": {"type": "run.reschedule", "run_id": "run_a"},
    "tags": {"type": "run.add_tags", "run_id": "run_a"},
    "operations": {"type": "run.update_metadata", "run_id": "run_a"},
    "parent_operations": {"type": "run.update_metadata", "run_id": "run_a"},
    "root_operations": {"type": "run.update_metadata", "run_id": "run_a"},
    "run_id": {"type": "run.retrieve"},
    "idempotency_key": {"type": "idempotency_key.reset", "task": "t"},
}
"""An operation that has a field; `run.list` has the others."""


def limits(header: str) -> list[Any]:
    """Per limit of a table: the field, a value that is at the limit, and one that is beyond it."""
    return [
        pytest.param(field, inside, outside, id=f"{field} {limit}")
        for field, (row,) in table("wire.md", header, "limit").items()
        for limit in row.split(" or ")
        for inside, outside in _around(field, limit)
    ]


def _around(field: str, limit: str) -> list[tuple[Any, Any]]:
    least, most, what = re.fullmatch(r"(\S+) to (\S+) ?(\w*)", limit.replace(",", "")).groups()  # type: ignore[union-attr]
    if what == "characters":
        longest = _longest(field, int(most))
        return [(longest, longest + "x")] + (
            [("x" if longest[0] == "x" else DURATION, "")] if int(least) else []
        )
    if what == "elements":
        change = {"type": "delete", "key": "k"}
        return [([change] * int(most), [change] * (int(most) + 1))]
    return [(int(least), int(least) - 1), (int(most), int(most) + 1)]


def _longest(field: str, most: int) -> str:
    name = field.rpartition(".")[2]
    start = "run_" if name.endswith("run_id") else TRACEPARENT if name == "traceparent" else ""
    text = (
        DURATION if name in ("delay", "ttl", "idempotency_key_ttl", "max_delay") else start.ljust(most, "x")
    )
    assert len(text) == most
    return text


def put(content: Json, field: str, value: object) -> Json:
    """A body with one field set: `a.b`, `a[]` or `a[].b`."""
    holder = content
    *way, last = field.split(".")
    for depth, step in enumerate(way):
        if step.endswith("[]"):
            holder[step[:-2]] = [{"type": "delete"}]
            holder = holder[step[:-2]][0]
        else:
            holder = holder.setdefault(step, dict(BESIDE.get(".".join(way[: depth + 1]), {})))
    if last.endswith("[]"):
        holder[last[:-2]] = [value]
    else:
        holder[last] = value
    return content


def check(take: Callable[[bytes], object], message: str, content: Json, field: str, beyond: Json) -> None:
    """One body is taken, by the schema that is documented too, and the other is not."""
    take(orjson.dumps(content))
    assert validator(message).is_valid(content)
    assert not validator(message).is_valid(beyond)
    with pytest.raises(InvalidRequest) as caught:
        take(orjson.dumps(beyond))
    assert caught.value.message.startswith(f"{field.replace('[]', '[0]')}: "), caught.value.message


@pytest.mark.parametrize(("field", "inside", "outside"), limits("field"))
def test_of_a_trigger(field: str, inside: object, outside: object) -> None:
    def take(text: bytes) -> None:
        build_run(Entry("1-1", {}), decode_trigger(text, LONGEST), SETTINGS)

    check(take, "TriggerRequest", put(body(), field, inside), field, put(body(), field, outside))


@pytest.mark.parametrize(("field", "inside", "outside"), limits("field of an operation"))
def test_of_an_operation(field: str, inside: object, outside: object) -> None:
    def content(value: object) -> Json:
        first = re.split(r"[.\[]", field)[0]
        base = {
            "environment": {"id": "e", "organization_id": "o"},
            **OPERATIONS.get(first, {"type": "run.list"}),
        }
        return put(base, field, value)

    kinds = {str(kind.__struct_config__.tag): kind.__name__ for kind in get_args(OperationRequest)}
    check(
        lambda text: read_operation(Item(Entry("1-1", {})), text, LONGEST),
        kinds[content(None)["type"]],
        content(inside),
        field,
        content(outside),
    )


def nested(levels: int, inner: bytes = b"") -> bytes:
    """Arrays and objects in one another, with strings that look like more of them."""
    opening = b'{"[{":[' * (levels // 2) + b"[" * (levels % 2)
    return opening + inner + b"]" * (levels % 2) + b"]}" * (levels // 2)


def trigger(payload: bytes = b"null", metadata: bytes = b"{}") -> bytes:
    content = body(payload="PAYLOAD", options={"metadata": "METADATA"})
    return orjson.dumps(content).replace(b'"PAYLOAD"', payload).replace(b'"METADATA"', metadata)


@pytest.mark.parametrize("inner", [b"", b'"\\\\\\"]]"'], ids=["bare", "with a string that would end it"])
@pytest.mark.parametrize(
    ("wrap", "levels"),
    [
        (lambda value: trigger(payload=value), MOST_LEVELS - 1),
        (lambda value: trigger(metadata=value), MOST_LEVELS_OF_METADATA),
        (lambda value: update(b'"metadata":' + value), MOST_LEVELS - 1),
        (
            lambda value: update(b'"operations":[{"type":"set","key":"k","value":' + value + b"}]"),
            MOST_LEVELS - 3,
        ),
    ],
    ids=["payload", "metadata", "new metadata", "a change of metadata"],
)
def test_of_nesting(wrap: Callable[[bytes], bytes], levels: int, inner: bytes) -> None:
    read = read_operation if wrap(b"").startswith(b'{"type"') else read_trigger
    read(Item(Entry("1-1", {})), wrap(nested(levels, inner)), LONGEST)
    with pytest.raises(InvalidRequest, match=r"^body: nested more than 128 levels deep$"):
        read(Item(Entry("1-1", {})), wrap(nested(levels + 1, inner)), LONGEST)


def update(fields: bytes) -> bytes:
    head = b'{"type":"run.update_metadata","environment":{"id":"e","organization_id":"o"},"run_id":"run_a",'
    return head + fields + b"}"


@pytest.mark.parametrize(
    "text", [b"[" * 10**6, b'{"a":' * 10**5, b'["' + b"[" * 10**6, b"]" * 200 + b"[" * 10**6]
)
def test_of_nesting_in_what_is_no_json(text: bytes) -> None:
    """Nothing that a parser could go down into is handed to one."""
    with pytest.raises(InvalidRequest):
        decode_trigger(text, LONGEST)


def test_of_metadata_after_a_change() -> None:
    """What a change leaves can be replayed: inside a trigger it is within the limit."""

    def after(path: str) -> bytes:
        change = change_metadata([SetKey(key=path, value=1)], LONGEST)
        metadata = change(row_at(a_run(metadata=b'{"[": "{"}'), None, NOW)).run.metadata
        assert metadata is not None
        return metadata

    read_trigger(
        Item(Entry("1-1", {})), trigger(metadata=after("$" + ".a" * MOST_LEVELS_OF_METADATA)), LONGEST
    )
    with pytest.raises(InvalidRequest, match=r"^metadata: nested more than 126 levels deep$"):
        after("$" + ".a" * (MOST_LEVELS_OF_METADATA + 1))
    with pytest.raises(InvalidRequest, match=r"^metadata: nested more than 126 levels deep$"):
        check_metadata("metadata", nested(MOST_LEVELS_OF_METADATA + 1), LONGEST)


@pytest.mark.parametrize("envelope", [plain, faststream])
@pytest.mark.parametrize("read", [read_trigger, read_operation])
class TestOfAnEntry:
    """Whichever the stream and the envelope, before anything is parsed: none of these bodies is JSON."""

    async def outcome(self, read: Any, fields: Fields) -> Item:
        raw = {
            name.encode(): value if isinstance(value, bytes) else value.encode()
            for name, value in fields.items()
        }
        item = Item(Entry("1-1", raw))
        await Decode(SETTINGS, read)(Batch([item], NOW, Switches.of(SETTINGS)))
        assert item.reply_to == REPLY_TO
        return item

    async def test_the_body(self, envelope: Any, read: Any) -> None:
        item = await self.outcome(read, envelope(b"x" * MOST_BYTES, REPLY_TO, "1"))
        assert isinstance(item.outcome, Undecodable)
        item = await self.outcome(read, envelope(b"x" * (MOST_BYTES + 1), REPLY_TO, "1"))
        assert isinstance(item.outcome, PayloadTooLarge)
        assert item.outcome.message == f"body: {MOST_BYTES + 1} bytes are more than any request may have"
        assert item.correlation_id == "1"

    async def test_what_is_beside_it(self, envelope: Any, read: Any) -> None:
        fields: Fields = envelope(b"x", REPLY_TO, "1")
        room = OTHERS_BYTES - sum(len(value) for value in fields.values()) + 1
        item = await self.outcome(read, {**fields, "note": b"n" * room})
        assert isinstance(item.outcome, Undecodable)
        item = await self.outcome(read, {**fields, "note": b"n" * (room + 1)})
        assert isinstance(item.outcome, PayloadTooLarge)
        assert (
            item.outcome.message == f"beside the body: {OTHERS_BYTES + 1} bytes are more than {OTHERS_BYTES}"
        )

    async def test_the_correlation_id(self, envelope: Any, read: Any) -> None:
        item = await self.outcome(read, envelope(b"x", REPLY_TO, "é" * LONGEST_ADDRESS))
        assert (type(item.outcome), item.correlation_id) == (Undecodable, "é" * LONGEST_ADDRESS)
        item = await self.outcome(read, envelope(b"x", REPLY_TO, "é" * (LONGEST_ADDRESS + 1)))
        assert isinstance(item.outcome, InvalidRequest)
        assert item.outcome.message == f"correlation_id: {LONGEST_ADDRESS + 1} characters are more than 1024"
        assert item.correlation_id is None

    async def test_the_reply_channel(self, envelope: Any, read: Any) -> None:
        anything = Settings.model_validate({"reply_channels": ".*"})
        for length, reason in ((LONGEST_ADDRESS, "undecodable"), (LONGEST_ADDRESS + 1, "reply_channel")):
            raw = {name.encode(): value for name, value in envelope(b"x", "c" * length, "1").items()}
            fields = {
                name: value if isinstance(value, bytes) else value.encode() for name, value in raw.items()
            }
            item = Item(Entry("1-1", fields))
            await Decode(anything, read)(Batch([item], NOW, Switches.of(SETTINGS)))
            assert (item.dead_letter and item.dead_letter.reason) == (
                None if reason == "undecodable" else reason
            )


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        (b"1", 0),
        (b'"[[[["', 0),
        (b"[]", 1),
        (b'{"a":[1,{"b":[]}]}', 4),
        (b'["\\\\",[]]', 2),
        (b'["\\"[",[]]', 2),
        (b'["\\"]]]",[[]]]', 3),
        (b'["a","[",["]]"],[[]]]', 3),
    ],
)
def test_how_deep_it_is(text: bytes, levels: int) -> None:
    assert not is_deeper(text, levels)
    assert is_deeper(text, levels - 1)

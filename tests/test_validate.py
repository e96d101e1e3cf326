"""From bytes to a run: what is refused and how the message names it; what a run is made of."""

import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app import run_ids
from app.batch import Batch, Item
from app.decode import Decode, decode_trigger, read_operation
from app.durations import parse_delay, parse_duration, parse_ttl
from app.errors import InvalidRequest, RequestError
from app.settings import Settings
from app.switches import Switches
from app.validate import build_run, check_metadata
from schemas.snapshot import Snapshot
from tests.builders import START_MS, body, entry

SETTINGS = Settings.model_validate({})
CREATED = datetime.fromtimestamp(START_MS / 1000, UTC)
LONGEST = 1_000_000


def build(content: dict[str, Any], settings: Settings = SETTINGS) -> Snapshot:
    one = entry(content)
    return build_run(one, decode_trigger(one.fields[b"body"], LONGEST), settings)


def refused(content: dict[str, Any], settings: Settings = SETTINGS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        build(content, settings)
    return caught.value


def options(**values: Any) -> dict[str, Any]:
    return body(options=values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "task: required"),
        (body(task=1), "task: Expected `str`, got `int`"),
        (body(task=""), "task: Expected `str` of length >= 1"),
        (body(task="t" * 2049), "task: Expected `str` of length <= 2048"),
        (body(surprise=1), "surprise: unknown field"),
        (options(surprise=1), "options.surprise: unknown field"),
        ({**body(), "environment": {"id": "e"}}, "environment.organization_id: required"),
        (
            {**body(), "environment": {**body()["environment"], "type": "TEST"}},
            "environment.type: Invalid enum value 'TEST'",
        ),
        (options(tags=["a", 2]), "options.tags[1]: Expected `str`, got `int`"),
        (options(debounce={"key": "k"}), "options.debounce.delay: required"),
        (options(batch={"id": "b", "index": -1}), "options.batch.index: Expected `int` >= 0"),
        (options(delay="soon"), "options.delay: 'soon' is neither a duration"),
        (options(delay="2026-01-01T00:00:00"), "options.delay: '2026-01-01T00:00:00' has no time zone"),
        (options(ttl="never"), "options.ttl: 'never' is not a duration"),
        (options(ttl=0), "options.ttl: Expected `int` >= 1"),
        (options(ttl="9999w"), "options.ttl: is more than ten years ahead"),
        (options(idempotency_key="k", idempotency_key_ttl="x"), "options.idempotency_key_ttl: 'x' is not"),
        (options(debounce={"key": "k", "delay": "x"}), "options.debounce.delay: 'x' is not"),
        (
            options(debounce={"key": "k", "delay": "5s", "max_delay": "5s"}),
            "options.debounce.max_delay: must be longer than options.debounce.delay",
        ),
        (
            options(delay="1m", debounce={"key": "k", "delay": "5s", "max_delay": "1m"}),
            "options.debounce.max_delay: must be longer than options.delay",
        ),
        (options(run_id="mine"), "options.run_id: must be run_"),
        (options(run_id="run_"), "options.run_id: must be run_"),
        (options(run_id="run_a b"), "options.run_id: must be run_"),
        (options(parent_run_id="x"), "options.parent_run_id: must be run_"),
        (options(metadata=[]), "options.metadata: must be an object"),
        (options(metadata={"a": "\0"}), "options.metadata: contains a NUL character"),
        (options(queue="a\0b"), "options.queue: contains a NUL character"),
        (options(tags=["a", "\0"]), "options.tags[1]: contains a NUL character"),
        (body(trace_context={"traceparent": "nonsense"}), "trace_context.traceparent: not a W3C traceparent"),
        (body(deadline="2026-01-01T00:00:00"), "deadline: Expected `datetime` with a timezone component"),
    ],
)
def test_a_refusal_names_the_field(content: dict[str, Any], message: str) -> None:
    error = refused(content)
    assert error.code == "invalid_request"
    assert error.message.startswith(message), error.message


@pytest.mark.parametrize(
    "content",
    [{**body(), "q" * 9_000: 1}, {**body(), "environment": {**body()["environment"], "type": "q" * 9_000}}],
)
def test_a_refusal_does_not_repeat_a_long_text(content: dict[str, Any]) -> None:
    assert len(refused(content).message) < 1_000


NESTED = "[" * 900 + '"\\u0000"' + "]" * 900


@pytest.mark.parametrize(
    "value", [r'"a\u0000"', r'{"a\u0000": 1}', r'{"a": "\u0000"}', r'{"a": [{"b": ["\u0000"]}]}', NESTED]
)
def test_a_nul_is_refused_wherever_it_is_in_an_operation(value: str) -> None:
    change = f'{{"type": "set", "key": "k", "value": {value}}}'
    tenant = '"environment": {"id": "e", "organization_id": "o"}'
    text = f'{{"type": "run.update_metadata", {tenant}, "run_id": "run_a", "operations": [{change}]}}'
    with pytest.raises(InvalidRequest):
        read_operation(Item(entry()), text.encode(), LONGEST)


@pytest.mark.parametrize(
    "number", ["1e-16384", "0e-20000", "1.5e-16383", "0." + "0" * 16_384, "1e-" + "9" * 30]
)
def test_metadata_hold_no_number_that_jsonb_does_not(number: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^metadata: a number"):
        check_metadata("metadata", b'{"a": [%s]}' % number.encode(), LONGEST)


@pytest.mark.parametrize("value", ["1e-16383", "1e-300", '"1e-20000"', "0." + "0" * 16_383, "1e308"])
def test_metadata_hold_any_other_number(value: str) -> None:
    text = b'{"a": [%s]}' % value.encode()
    assert check_metadata("metadata", text, LONGEST) == text


@pytest.mark.parametrize(
    ("content", "limits", "code"),
    [
        (body(payload="x" * 9), {"max_payload_bytes": 10}, "payload_too_large"),
        (options(metadata={"a": "xxxx"}), {"max_metadata_bytes": 12}, "metadata_too_large"),
        (options(tags=["a", "b", "c"]), {"max_tags": 2}, "too_many_tags"),
    ],
)
def test_limits_hold_at_the_byte(content: dict[str, Any], limits: dict[str, int], code: str) -> None:
    assert refused(content, Settings.model_validate(limits)).code == code
    build(content, Settings.model_validate({name: value + 1 for name, value in limits.items()}))


@pytest.mark.parametrize(
    "raw", [b"", b"nothing", b"{" * 3, b'{"task":"\xff"}', b"[" * 100_000, b'{"task":"\\ud800"}']
)
def test_what_is_not_json_is_undecodable(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^body: "):
        decode_trigger(raw, LONGEST)


@given(raw=st.binary(max_size=200))
def test_no_bytes_escape_as_another_error(raw: bytes) -> None:
    with pytest.raises(RequestError):
        decode_trigger(raw, LONGEST)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(
    field=st.sampled_from(["task", "environment", "options", "trace_context", "deadline", "payload_type"]),
    value=json_values,
)
def test_any_value_in_any_field_is_a_run_or_a_refusal(field: str, value: Any) -> None:
    raw = json.dumps({**body(), field: value}).encode()
    with suppress(InvalidRequest):
        build_run(entry(raw), decode_trigger(raw, LONGEST), SETTINGS)


@given(value=json_values, indent=st.sampled_from([None, 1]))
def test_a_payload_is_kept_byte_for_byte(value: Any, indent: int | None) -> None:
    payload = json.dumps(value, indent=indent).encode()
    raw = json.dumps(body()).encode().replace(b'{"to": "ada@example.com"}', payload)
    assert build_run(entry(raw), decode_trigger(raw, LONGEST), SETTINGS).payload == payload


def test_instants_count_from_the_stream_entry() -> None:
    run = build(options(delay="1h", ttl="2h30m", idempotency_key="k", idempotency_key_ttl="1d"))
    assert run.created_at == CREATED
    assert run.delay_until == CREATED + timedelta(hours=1)
    assert run.ttl_seconds == 9000
    assert run.expires_at == CREATED + timedelta(hours=2, minutes=30)
    assert run.idempotency_key_expires_at == CREATED + timedelta(days=1)
    assert build(options(idempotency_key="k")).idempotency_key_expires_at == CREATED + timedelta(days=30)
    assert build(options(debounce={"key": "k", "delay": "5s"})).delay_until == CREATED + timedelta(seconds=5)


def test_a_debounced_run_is_delayed_and_bounded() -> None:
    run = build(options(debounce={"key": "k", "delay": "5s", "max_delay": "1m", "mode": "leading"}))
    assert (run.delay_until, run.debounce_until) == (
        CREATED + timedelta(seconds=5),
        CREATED + timedelta(minutes=1),
    )
    assert run.debounce_mode == "leading"
    both = build(options(delay="1h", debounce={"key": "k", "delay": "5s"}))
    assert (both.delay_until, both.debounce_until) == (CREATED + timedelta(hours=1), None)


def test_building_twice_builds_the_same() -> None:
    one = entry(options(delay="1h", idempotency_key="k", tags=["a", "a", "b"]))
    request = decode_trigger(one.fields[b"body"], LONGEST)
    first = build_run(one, request, SETTINGS)
    assert first == build_run(replace(one, deliveries=4), request, SETTINGS)
    assert first.tags == ("a", "b")


def test_a_trace_is_continued_or_begun() -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    run = build(body(trace_context={"traceparent": parent}))
    assert (run.trace_id, run.parent_span_id) == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
    begun = build(body())
    assert len(begun.trace_id) == 32
    assert len(begun.span_id) == 16
    assert begun.parent_span_id is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("2h30m", 9000), ("3d", 259_200), ("1w", 604_800), ("0s", 0)],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds
    assert parse_delay(text, CREATED) == CREATED + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "5", "5 m", "-5m", "5ms", "1.5h", "30m2h", "5m5m", "٣d", "1h ", "9" * 12 + "s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_duration(text)


def test_instants_and_ttls() -> None:
    assert parse_delay("2027-01-15T10:00:00+02:00", CREATED) == datetime(2027, 1, 15, 8, tzinfo=UTC)
    assert parse_ttl(90) == 90
    assert parse_ttl("90s") == 90


def test_run_ids_sort_by_time_and_differ_by_place() -> None:
    entries = [
        f"{START_MS}-0",
        f"{START_MS}-1",
        f"{START_MS}-10",
        f"{START_MS + 1}-0",
        f"{START_MS + 100_000}-3",
    ]
    derived = [run_ids.derive("mollifier", one, "env_1") for one in entries]
    assert derived == sorted(derived)
    assert len({*derived, *(run_ids.derive("other", one, "env_1") for one in entries)}) == 10
    assert all(
        run_ids.is_derived(one) and run_ids.parse_friendly(run_ids.friendly(one)) == one for one in derived
    )
    assert not run_ids.is_derived("mine")


@given(ms=st.integers(0, 2**64 - 1), sequence=st.integers(0, 2**64 - 1))
def test_any_entry_id_gives_an_id_and_a_time(ms: int, sequence: int) -> None:
    one = replace(entry(body()), id=f"{ms}-{sequence}")
    run = build_run(one, decode_trigger(one.fields[b"body"], LONGEST), SETTINGS)
    assert run_ids.is_derived(run.id)


async def test_a_reply_channel_must_match_as_a_whole() -> None:
    for channel, allowed in [
        ("mollifier:reply:a", True),
        ("mollifier:reply:" + "a" * 200, True),
        ("mollifier:reply:" + "a" * 201, False),
        ("mollifier:reply:", False),
        ("A1b2C3d4E5f6G7h8I9j0Kl", True),
        ("A1b2C3d4E5f6G7h8I9j0K", False),
        ("xmollifier:reply:a", False),
        ("mollifier:wake", False),
    ]:
        item = Item(entry(reply_to=channel))
        await Decode(SETTINGS)(Batch([item], CREATED, Switches.of(SETTINGS)))
        assert (item.dead_letter is None) == allowed, channel

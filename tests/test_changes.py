"""What changes do to a run, without any server: `app/changes.py` and `app/metadata.py`. G10, G11."""

import json
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import changes
from app.buffered_runs import _overlay
from app.changes import Change
from app.errors import (
    InvalidRequest,
    MetadataTooLarge,
    RequestError,
    RunFinished,
    RunNotDelayed,
    TooManyTags,
)
from app.metadata import apply, parse_path
from app.rows import FINAL, Row, row_at
from app.runs import BufferedRun
from schemas.operations import AnyMetadataOperation, MetadataOperations
from schemas.overlay import decode_overlay, encode_overlay
from tests.builders import NOW, run

HOUR = timedelta(hours=1)
MOST_BYTES = 1_000
STATUSES = ["DELAYED", "QUEUED", "EXECUTING", *sorted(FINAL)]

_operations = msgspec.json.Decoder(MetadataOperations)


def operations(*bodies: dict[str, Any]) -> list[AnyMetadataOperation]:
    """Operations as they come over the wire."""
    return _operations.decode(json.dumps(bodies))


def row(status: Any = "QUEUED", **fields: Any) -> Row:
    return Row(run(**fields), status)


def metadata_of(changed: Row) -> Any:
    return None if changed.run.metadata is None else json.loads(changed.run.metadata)


def applied_to(before: Any, *bodies: dict[str, Any]) -> Any:
    """The metadata after some operations."""
    return apply(deepcopy(before), operations(*bodies))


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$.[]"), min_size=1, max_size=5)
numbers = st.integers(-(2**31), 2**31) | st.floats(-1e9, 1e9, allow_nan=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(names, values, max_size=4)


@st.composite
def key_operations(draw: st.DrawFn) -> dict[str, Any]:
    """One operation on one of a few keys, so that they meet."""
    kind = draw(st.sampled_from(["set", "delete", "append", "remove", "increment", "update"]))
    body: dict[str, Any] = {"type": kind}
    if kind == "update":
        return body | {"value": draw(objects)}
    body["key"] = draw(st.sampled_from(["a", "b", "a b", "$", "$[0]", "é"]))
    if kind == "increment":
        body["value"] = draw(st.integers(-5, 5))
    elif kind != "delete":
        body["value"] = draw(st.sampled_from([None, True, False, 0, 1, "x", [1], {"a": 1}]))
    return body


class TestCancel:
    @pytest.mark.parametrize("status", ["DELAYED", "QUEUED", "EXECUTING"])
    @pytest.mark.parametrize("reason", [None, "because"])
    def test_g10_ends_a_run(self, status: str, reason: str | None) -> None:
        after = changes.cancel(reason, NOW)(row(status))
        assert (after.status, after.cancelled_at, after.cancel_reason) == ("CANCELED", NOW, reason)

    @pytest.mark.parametrize("status", sorted(FINAL))
    def test_leaves_a_run_that_has_ended_as_it_is(self, status: str) -> None:
        """So the first reason is kept, also when it was none."""
        before = row(status)._replace(cancelled_at=NOW, cancel_reason=None)
        assert changes.cancel("late", NOW + HOUR)(before) is before


class TestReschedule:
    @pytest.mark.parametrize(("delay", "status"), [(HOUR, "DELAYED"), (timedelta(), "QUEUED")])
    def test_moves_a_delayed_run(self, delay: timedelta, status: str) -> None:
        after = changes.reschedule(NOW + delay, NOW)(row("DELAYED", delay_until=NOW + 2 * HOUR))
        assert (after.run.delay_until, after.status) == (NOW + delay, status)

    @pytest.mark.parametrize("status", [one for one in STATUSES if one != "DELAYED"])
    def test_refuses_any_other(self, status: str) -> None:
        with pytest.raises(RunFinished if status in FINAL else RunNotDelayed):
            changes.reschedule(NOW + HOUR, NOW)(row(status, delay_until=NOW + HOUR))


class TestAddTags:
    @given(st.lists(st.sampled_from("abcdefgh")), st.lists(st.sampled_from("abcdefgh")))
    def test_the_union_in_order_or_nothing(self, there: list[str], more: list[str]) -> None:
        before = row(tags=tuple(dict.fromkeys(there)))
        union = sorted({*there, *more}, key=[*there, *more].index)
        if len(union) > 5:
            with pytest.raises(TooManyTags, match=f"^tags: .* {len(union)}, more than 5$"):
                changes.add_tags(more, 5)(before)
            return
        after = changes.add_tags(more, 5)(before)
        assert list(after.run.tags) == union
        assert changes.add_tags(more, 5)(after) is after

    @pytest.mark.parametrize("status", sorted(FINAL))
    def test_not_to_a_run_that_has_ended(self, status: str) -> None:
        with pytest.raises(RunFinished):
            changes.add_tags(["a"], 5)(row(status, tags=("a",)))


class TestMetadata:
    @given(objects, st.lists(key_operations(), max_size=6))
    def test_operations_on_keys_against_a_model(self, before: Any, bodies: list[dict[str, Any]]) -> None:
        expected = deepcopy(before)
        for body in bodies:
            expected = _model(expected, body)
        assert orjson.dumps(applied_to(before, *bodies)) == orjson.dumps(expected)

    @given(
        objects,
        names,
        names,
        key_operations().filter(lambda body: body["type"] != "update" and body["key"] in "abé"),
    )
    def test_an_operation_on_a_path_is_one_on_a_key_further_in(
        self, inside: Any, first: str, second: str, body: dict[str, Any]
    ) -> None:
        path = f"$.{first}.{second}.{body['key']}"
        places: list[dict[str, Any]] = [{}, {first: {}}, {"other": [2], first: {"n": 1, second: inside}}]
        for before in places:
            expected = deepcopy(before)
            if body["type"] not in ("delete", "remove") or second in before.get(first, {}):
                holder = expected.setdefault(first, {})
                holder[second] = _model(holder.get(second, {}), body)
            assert applied_to(before, body | {"key": path}) == expected

    @given(st.lists(st.tuples(st.sampled_from(["a", "$.b.c", "$.d[1]"]), st.integers(-9, 9))))
    def test_increments_add_up_in_any_order(self, increments: list[tuple[str, int]]) -> None:
        bodies = [{"type": "increment", "key": key, "value": value} for key, value in increments]
        after = applied_to({}, *bodies)
        assert after == applied_to({}, *reversed(bodies))
        for key in {key for key, _ in increments}:
            found: Any = after
            for step in parse_path(key):
                found = found[step]
            assert found == sum(value for other, value in increments if other == key)

    @given(values, st.lists(st.tuples(key_operations(), st.text("$.ab[]01 ", max_size=8)), max_size=5))
    def test_whatever_is_asked_for_is_done_or_refused_by_name(
        self, inside: Any, asked: list[tuple[dict[str, Any], str]]
    ) -> None:
        bodies = [
            body if body["type"] == "update" or not path else body | {"key": path} for body, path in asked
        ]
        before = {"a": inside, "b": [inside, {"a": inside}]}
        refused: list[int] = []
        try:
            orjson.dumps(applied_to(before, *bodies))
        except InvalidRequest as error:
            match = re.match(r"operations\[(\d+)\]\.key: ", error.message)
            refused += [int(match[1]) if match else -1]
        assert all(bodies[number]["key"].startswith("$.") for number in refused)

    @pytest.mark.parametrize(
        ("before", "body", "after"),
        [
            ({}, {"type": "set", "key": "$.a[2]", "value": 1}, {"a": [None, None, 1]}),
            ({"a": [1, 2]}, {"type": "set", "key": "$.a[0]", "value": 9}, {"a": [9, 2]}),
            ({"a": [1, 2]}, {"type": "delete", "key": "$.a[0]"}, {"a": [2]}),
            ({"a": [1]}, {"type": "delete", "key": "$.a[5]"}, {"a": [1]}),
            ({"a": [[1], [2]]}, {"type": "append", "key": "$.a[1]", "value": 3}, {"a": [[1], [2, 3]]}),
            ({"a": None}, {"type": "set", "key": "$.a.b", "value": 1}, {"a": {"b": 1}}),
            ({"a": "x"}, {"type": "append", "key": "a", "value": "y"}, {"a": ["x", "y"]}),
            ({"a": "x"}, {"type": "increment", "key": "a", "value": 2}, {"a": 2}),
            ({"a": True}, {"type": "increment", "key": "a", "value": 2}, {"a": 2}),
            ({"a": 0.5}, {"type": "increment", "key": "a", "value": 1}, {"a": 1.5}),
            ({"a": [1, 2, 1]}, {"type": "remove", "key": "a", "value": 1}, {"a": [2]}),
            ({"a": [True, 1]}, {"type": "remove", "key": "a", "value": 1}, {"a": [True]}),
            ({"a": 1}, {"type": "remove", "key": "a", "value": 1}, {"a": 1}),
            ({}, {"type": "remove", "key": "$.a.b", "value": 1}, {}),
            ({"$.a": 1}, {"type": "set", "key": "a.b", "value": 1}, {"$.a": 1, "a.b": 1}),
            ({}, {"type": "set", "key": "$a", "value": 1}, {"$a": 1}),
            ({"a": 1}, {"type": "update", "value": {}}, {}),
        ],
    )
    def test_examples(self, before: Any, body: dict[str, Any], after: Any) -> None:
        assert applied_to(before, body) == after

    @pytest.mark.parametrize(
        ("before", "key"),
        [
            ({}, "$."),
            ({}, "$.a."),
            ({}, "$.a..b"),
            ({}, "$.a[x]"),
            ({}, "$.a[-1]"),
            ({}, "$.a[0"),
            ({}, "$.a[1234567]"),
            ({}, "$.a[101]"),
            ({"a": 1}, "$.a.b"),
            ({"a": {}}, "$.a[0]"),
            ({"a": []}, "$.a.b"),
            ({"a": [1]}, "$.a[0].b"),
        ],
    )
    def test_what_leads_nowhere_is_refused(self, before: Any, key: str) -> None:
        good = {"type": "set", "key": "good", "value": 1}
        with pytest.raises(InvalidRequest, match=r"^operations\[1\]\.key: "):
            applied_to(before, good, {"type": "set", "key": key, "value": 1})

    @pytest.mark.parametrize("key", ["$.a.b", "$.a[0]", "$.x.y[0].z"])
    def test_deleting_what_is_not_there_is_no_mistake(self, key: str) -> None:
        assert applied_to({"a": 1}, {"type": "delete", "key": key}) == {"a": 1}

    def test_two_places_never_share_one_value(self) -> None:
        given = operations(
            {"type": "set", "key": "a", "value": {"n": 1}}, {"type": "increment", "key": "$.a.n", "value": 1}
        )
        assert apply({}, given) == {"a": {"n": 2}}
        assert apply({}, given) == {"a": {"n": 2}}, "the operation itself was changed"

    def test_a_version_for_each_change(self) -> None:
        once = changes.replace_metadata(b'{"n":1}')(row(metadata=b"{}"))
        twice = changes.change_metadata(operations({"type": "delete", "key": "n"}), MOST_BYTES)(once)
        assert (once.metadata_version, twice.metadata_version, metadata_of(twice)) == (2, 3, {})

    def test_no_operations_change_nothing(self) -> None:
        before = row(metadata=b'{"n":1}')
        assert changes.change_metadata([], MOST_BYTES)(before) is before

    def test_the_limit_counts_the_bytes_that_it_comes_to(self) -> None:
        most = len(orjson.dumps({"a": "é"}))
        change = operations({"type": "set", "key": "a", "value": "é"})
        assert metadata_of(changes.change_metadata(change, most)(row())) == {"a": "é"}
        with pytest.raises(MetadataTooLarge, match=r"^metadata: "):
            changes.change_metadata(change, most - 1)(row())

    @pytest.mark.parametrize("status", sorted(FINAL))
    @pytest.mark.parametrize(
        "change", [changes.replace_metadata(b"{}"), changes.change_metadata([], MOST_BYTES)]
    )
    def test_not_of_a_run_that_has_ended(self, status: str, change: Change) -> None:
        with pytest.raises(RunFinished):
            change(row(status))

    def test_true_is_not_1_further_in_either(self) -> None:
        before = {"a": [[True], {"b": 1}]}
        bodies = [{"type": "remove", "key": "a", "value": value} for value in ([1], {"b": True})]
        assert applied_to(before, *bodies) == before

    @pytest.mark.parametrize(
        ("before", "body", "after"),
        [
            (b"{}", {"type": "set", "key": "a", "value": 2**70}, b'{"a":1180591620717411303424}'),
            (b"{}", {"type": "increment", "key": "a", "value": 2**70}, b'{"a":1180591620717411303424}'),
            (
                b'{"a":18446744073709551615}',
                {"type": "increment", "key": "a", "value": 1},
                b'{"a":18446744073709551616}',
            ),
        ],
        ids=["a large number", "a large step", "a large sum"],
    )
    def test_large_numbers_are_exact(self, before: bytes, body: dict[str, Any], after: bytes) -> None:
        change = changes.change_metadata(operations(body), MOST_BYTES)
        assert change(row(metadata=before)).run.metadata == after

    def test_a_sum_that_no_program_could_read_is_refused(self) -> None:
        body = {"type": "increment", "key": "a", "value": 1e308}
        with pytest.raises(InvalidRequest):
            changes.change_metadata(operations(body), MOST_BYTES)(row(metadata=b'{"a":1e308}'))

    @pytest.mark.parametrize("number", ["1180591620717411303424", "0.1234567890123456789"])
    def test_what_is_not_touched_stays_to_the_last_digit(self, number: str) -> None:
        before = row(metadata=f'{{"kept":{number}}}'.encode())
        change = changes.change_metadata(operations({"type": "set", "key": "a", "value": 1}), MOST_BYTES)
        assert number.encode() in (change(before).run.metadata or b"")


def _model(before: Any, body: dict[str, Any]) -> Any:
    """One operation on a key, told once more."""
    key: Any = body.get("key")
    value: Any = body.get("value")
    there: Any = before.get(key)
    match body["type"]:
        case "update":
            return value
        case "set":
            return before | {key: value}
        case "delete":
            return {name: one for name, one in before.items() if name != key}
        case "append" if isinstance(there, list):
            return before | {key: [*there, value]}
        case "append":
            return before | {key: [value] if there is None else [there, value]}
        case "remove" if isinstance(there, list):
            return before | {key: [one for one in there if json.dumps(one) != json.dumps(value)]}
        case "increment":
            return before | {key: value + (there if type(there) in (int, float) else 0)}
    return before


def append(value: int) -> Change:
    return changes.change_metadata(
        operations({"type": "append", "key": "done", "value": value}), MOST_BYTES * 1000
    )


class TestOnce:
    @given(st.lists(st.integers(0, 20), max_size=60))
    def test_g11_an_operation_is_made_once_however_often_it_is_handed_out(
        self, handed_out: list[int]
    ) -> None:
        after = row()
        for number in handed_out:
            after = changes.once(append(number), f"{number}-0")(after)
        first_ones = list(dict.fromkeys(handed_out))
        assert (metadata_of(after) or {"done": []})["done"] == first_ones
        assert after.revision == len(first_ones)
        assert list(after.applied) == [f"{number}-0" for number in first_ones]

    def test_the_last_500_are_remembered(self) -> None:
        after = row()
        for number in range(520):
            after = changes.once(append(number), f"{number}-0")(after)
        assert after.applied == tuple(f"{number}-0" for number in range(20, 520))
        for number in range(20, 520):
            assert changes.once(append(number), f"{number}-0")(after) is after

    def test_what_changes_nothing_is_not_remembered(self) -> None:
        before = row(tags=("a",))
        assert changes.once(changes.add_tags(["a"], 5), "1-0")(before) is before

    def test_what_is_refused_is_not_remembered(self) -> None:
        before = row()
        with pytest.raises(RunNotDelayed):
            changes.once(changes.reschedule(NOW, NOW), "1-0")(before)
        assert before.applied == ()

    @pytest.mark.parametrize(
        "change", [changes.reschedule(NOW + HOUR, NOW), changes.add_tags(["b"], 5), append(1)]
    )
    def test_handed_out_again_after_the_run_has_ended(self, change: Change) -> None:
        """The answer is the run, not an error: the change was made."""
        made = changes.once(change, "1-0")(row("DELAYED"))
        ended = changes.once(changes.cancel(None, NOW), "2-0")(made)
        assert changes.once(change, "1-0")(ended) is ended


class TestResetKey:
    def test_takes_key_and_expiry_off(self) -> None:
        before = row(idempotency_key="k", idempotency_key_expires_at=NOW, idempotency_key_options=b"{}")
        after = changes.reset_key(before)
        assert (after.run.idempotency_key, after.run.idempotency_key_expires_at) == (None, None)
        assert (after.run.idempotency_key_options, after.revision) == (b"{}", 1)
        assert changes.reset_key(after) is after


CHANGES: Sequence[Callable[[datetime], Change]] = [
    lambda now: changes.add_tags(["x"], 9),
    lambda now: changes.add_tags(["y", "a"], 9),
    lambda now: changes.replace_metadata(b'{"n":7}'),
    lambda now: append(now.second),
    lambda now: changes.reschedule(now + HOUR, now),
    lambda now: changes.reschedule(now, now),
    lambda now: changes.cancel(None, now),
    lambda now: changes.cancel("because", now),
    lambda now: changes.reset_key,
]


class TestOverlay:
    @given(st.lists(st.integers(0, len(CHANGES) - 1), max_size=8), st.booleans(), st.booleans())
    def test_g11_a_buffered_run_changes_as_a_row_does(
        self, sequence: list[int], is_delayed: bool, is_full: bool
    ) -> None:
        """After every change the overlay, merged with the snapshot, is the run that the change came to."""
        snapshot = run(
            delay_until=NOW + 5 * HOUR if is_delayed else None,
            tags=("a", "b") if is_full else (),
            metadata=b'{"m":[1]}' if is_full else None,
            idempotency_key="k" if is_full else None,
            idempotency_key_expires_at=NOW + 90 * HOUR if is_full else None,
        )
        as_row = row_at(snapshot, None, NOW)
        stored: bytes | None = None
        for step, number in enumerate(sequence):
            now = NOW + timedelta(seconds=step)
            change = CHANGES[number](now)
            if change is not changes.reset_key:
                change = changes.once(change, f"{step}-0")
            overlay = None if stored is None else decode_overlay(stored)
            buffered = BufferedRun(row_at(snapshot, overlay, now), "QUEUED", now, stored)
            assert buffered.row == as_row
            try:
                after = change(as_row)
            except RequestError as error:
                with pytest.raises(type(error)):
                    change(buffered.row)
                continue
            if after is as_row:
                assert change(buffered.row) is buffered.row
                continue
            stored = encode_overlay(_overlay(buffered, change(buffered.row), now))
            as_row = after
        final = None if stored is None else decode_overlay(stored)
        assert row_at(snapshot, final, NOW + timedelta(seconds=len(sequence))) == as_row

    @given(st.timedeltas(timedelta(), 9 * HOUR))
    def test_g10_cancelled_whatever_else_has_come_about(self, later: timedelta) -> None:
        """Its delay has passed, its time to live has, its key has: it stays cancelled."""
        snapshot = run(delay_until=NOW + HOUR, ttl_seconds=7200, expires_at=NOW + 2 * HOUR)
        before = BufferedRun(row_at(snapshot, None, NOW), "QUEUED", NOW, None)
        after = changes.once(changes.cancel("because", NOW), "1-0")(before.row)
        stored = decode_overlay(encode_overlay(_overlay(before, after, NOW)))
        merged = row_at(snapshot, stored, NOW + later)
        assert (merged.status, merged.cancelled_at, merged.cancel_reason) == ("CANCELED", NOW, "because")


class TestNote:
    """G11: an operation on a parent alone, handed out again after the run itself has ended."""

    def test_one_that_was_noted_is_done(self) -> None:
        before = row()
        noted = changes.once(changes.note, "1-1")(before)
        assert noted == before._replace(applied=("1-1",), revision=1)
        ended = noted._replace(status="CANCELED")
        assert changes.once(changes.note, "1-1")(ended) is ended

    @pytest.mark.parametrize("status", sorted(FINAL))
    def test_one_that_comes_too_late_is_refused(self, status: Any) -> None:
        with pytest.raises(RunFinished):
            changes.once(changes.note, "1-1")(row(status))


def test_metadata_that_are_nested_too_deeply_are_refused_as_such() -> None:
    nested = b'{"a": ' + b"[" * 1_000 + b"]" * 1_000 + b"}"
    change = changes.change_metadata(operations({"type": "set", "key": "b", "value": 1}), 10_000)
    with pytest.raises(InvalidRequest, match=r"^operations: "):
        change(row(metadata=nested))

"""Numbers, depths, sizes, times and names at the end of what there is, and beyond."""

from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Any

from tests.fuzz.bodies import MAX_BODY, MAX_METADATA, MAX_PAYLOAD, MAX_TAGS, ON_A_RUN, operation
from tests.fuzz.entries import Body, Draft, encode
from tests.fuzz.material import (
    ANYTHING,
    INVALID,
    MAYBE,
    Material,
    anything,
    exactly,
    metadata_change,
    on,
    place,
    refused,
    with_options,
    with_value,
)


def huge_number(of: Material) -> Draft:
    numbers = (
        "1" + "0" * of.rng.choice([10, 20, 400, 5_000, 40_000]),
        "1e400",
        "-1e999999",
        "1e-400",
        "2.0e3",
    )
    path, body, _ = place(of, ("int",))
    return Draft(
        encode(with_value(path, body, "HERE")).replace(b'"HERE"', of.rng.choice(numbers).encode()),
        INVALID,
        MAYBE,
    )


def number_in_metadata(of: Material) -> Draft:
    """Numbers that JSON allows and not every program can read, jsonb for one."""
    number = of.rng.choice(
        ["1e400", "1e-400", "1e-20000", "-0.0", "1" + "0" * 5_000, "1e308", "1e-17000", "1E+5"]
    )
    where = "HERE"
    if of.stream == "triggers":
        body: object = with_options(of, metadata={"n": where})
    else:
        changes = [
            {"type": "set", "key": "n", "value": where},
            {"type": "set", "key": "n", "value": {"m": [where]}},
            {"type": "append", "key": "m", "value": where},
            {"type": "increment", "key": "count", "value": where},
            {"type": "increment", "key": "small", "value": where},
        ]
        some: Body = of.rng.choice(
            [{"metadata": {"n": where, "m": []}}, {"operations": [of.rng.choice(changes)]}]
        )
        body = metadata_change(of, **some)
    return Draft(encode(body).replace(b'"HERE"', number.encode()), ANYTHING, MAYBE)


def deep(of: Material) -> Draft:
    depth = of.rng.choice([30, 120, 450, 850, 920, 960, 990, 1_010, 1_500, 5_000, 60_000])
    left, right = of.rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    nested = left * depth + of.rng.choice([b"1", b'"\\u0000"']) + right * depth
    if of.rng.random() < 0.2:
        return anything(nested if of.rng.random() < 0.5 else left * depth)
    if of.stream == "triggers":
        places: Sequence[object] = (
            {**of.body(), "payload": "HERE"},
            {**of.body(), "nope": "HERE"},
            with_options(of, metadata={"a": "HERE"}),
            with_options(of, tags="HERE"),
            with_options(of, queue="HERE"),
        )
    else:
        change = {"type": of.rng.choice(["set", "append", "remove"]), "key": "deep", "value": "HERE"}
        places = (
            metadata_change(of, metadata={"a": "HERE"}),
            metadata_change(of, operations=[change]),
            metadata_change(of, operations=[change], parent_operations=[change]),
            {**operation(of.rng, of.tenant, of.number), "nope": "HERE"},
            {**on(of, "run.replay"), "payload": "HERE"},
        )
    return anything(encode(of.rng.choice(places)).replace(b'"HERE"', nested))


def deep_path(of: Material) -> Draft:
    """Paths as long as they may be, which grow what they lead through with every operation."""
    steps = [".a", "[0]", "[99]", "[000001]", ".b[1]"]
    keys = ["$" + "".join(of.rng.choices(steps, k=100)) for _ in range(of.rng.choice([1, 20]))]
    keys += of.rng.choices(
        ["$.", "$.a..b", "$.a[", "$.[0]", "$.a[9999999]", "$.list[-1]", "$.x.y.z[100]"], k=2
    )
    return anything(
        metadata_change(of, operations=[{"type": "set", "key": key[:512], "value": 1} for key in keys])
    )


def oversize(of: Material) -> Draft:
    if of.stream == "operations":
        large = {"a": "x" * MAX_METADATA}
        return of.rng.choice(
            [
                exactly(metadata_change(of, metadata=large), "metadata_too_large"),
                exactly(
                    metadata_change(of, operations=[{"type": "update", "value": large}]),
                    *("metadata_too_large", "run_finished"),
                ),
                exactly(metadata_change(of, metadata="x" * MAX_BODY), "payload_too_large"),
                exactly(
                    {**on(of, "run.add_tags"), "tags": [f"{n}" for n in range(99)]},
                    *("too_many_tags", "run_finished"),
                ),
                exactly({**on(of, "run.replay"), "payload": "x" * MAX_PAYLOAD}, "payload_too_large"),
                refused(
                    metadata_change(of, operations=[{"type": "delete", "key": "a"}] * 1_001), "operations:"
                ),
            ]
        )
    return of.rng.choice(
        [
            exactly({**of.body(), "payload": "x" * MAX_PAYLOAD}, "payload_too_large"),
            exactly({**of.body(), "payload": ["x" * 1_000] * 200}, "payload_too_large"),
            exactly({**of.body(), "payload": "x" * of.rng.choice([MAX_BODY, 400_000])}, "payload_too_large"),
            exactly(with_options(of, metadata={"a": "x" * MAX_METADATA}), "metadata_too_large"),
            exactly(with_options(of, tags=[f"{n}" for n in range(MAX_TAGS + 1)]), "too_many_tags"),
            exactly(with_options(of, tags=["x"] * 9_000), "too_many_tags"),
        ]
    )


def long_text(of: Material) -> Draft:
    path, body, _ = place(of, ("text",))
    return refused(with_value(path, body, of.rng.choice(["x", "é", "\U0001f600"]) * 9_000), str(path[0]))


def wrong_time(of: Material) -> Draft:
    bad = [
        "10 minutes",
        "5m2h",
        "1y",
        "-5m",
        "5300w",
        "999999999w",
        "\u0661m",
        " 5m",
        "5m\n",
        "",
        "1e3s",
        "0x5s",
    ]
    bad += ["2030-01-01T00:00:00", "2030-13-01T00:00:00Z", "9999-12-31T23:59:59Z", "99999-01-01T00:00:00Z"]
    time = of.rng.choice(bad)
    if of.stream == "operations":
        return refused({**on(of, "run.reschedule"), "delay": time}, "delay")
    name = of.rng.choice(["delay", "ttl", "idempotency_key_ttl", "debounce"])
    value: Any = {"key": "k", "delay": time} if name == "debounce" else time
    return refused(with_options(of, **{name: value}), f"options.{name}")


def edge_of_time(of: Material) -> Draft:
    edges = [
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
        "0001-01-01T00:00:00Z",
        "1970-01-01T00:00:00Z",
    ]
    edges += [
        "9999-12-31T23:59:59.999999Z",
        "2026-01-01T24:00:00Z",
        "2016-12-31T23:59:60Z",
        "0000-00-00T00:00:00Z",
    ]
    edge = of.rng.choice(edges)
    if of.stream == "triggers":
        return anything(of.rng.choice([{**of.body(), "deadline": edge}, with_options(of, delay=edge)]))
    listing = {"type": "run.list", "environment": of.tenant.environment()}
    places = [{"since": edge}, {"until": edge}, {"since": edge, "until": of.rng.choice(edges)}]
    return anything(
        of.rng.choice([{**on(of, "run.reschedule"), "delay": edge}, {**listing, **of.rng.choice(places)}])
    )


def forged_cursor(of: Material) -> Draft:
    """Some of these can be read: what they lead to is then a page of one's own runs."""
    texts = [
        b"",
        b":",
        b"1:x\0",
        b"1:" + b"\xff",
        b"-1:",
        b"9" * 300 + b":x",
        b"253402300799999999:z",
        b"0:" + b"'" * 99,
    ]
    texts += [b"-62135596800000001:a", b"-62135596800000000:a", of.noise(60), b"1_000:x", " ٣:x".encode()]
    raw = ["!", "=", "é", "\u202e", "A" * 511, "%00", "a\nb"]
    cursors = [*raw, *(urlsafe_b64encode(text).decode().rstrip("=") or "=" for text in texts)]
    body = {"type": "run.list", "environment": of.tenant.environment(), "cursor": of.rng.choice(cursors)}
    return Draft(encode(body), INVALID | {"run_list"})


def wrong_id(of: Material) -> Draft:
    bad = [
        "",
        "run_",
        "abc",
        "run_a b",
        "run_é",
        "run_" + "a" * 129,
        "run_-a",
        "RUN_a",
        "run_a\n",
        "run_../x",
        "run_*",
    ]
    if of.stream == "operations":
        return refused({**on(of, of.rng.choice(ON_A_RUN)), "run_id": of.rng.choice(bad)}, "run_id")
    name = of.rng.choice(["run_id", "parent_run_id", "replayed_from_run_id"])
    reserved = [f"run_m{of.number:031x}"] if name == "run_id" else []
    return refused(with_options(of, **{name: of.rng.choice([*bad, *reserved])}), f"options.{name}")

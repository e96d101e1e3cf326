"""JSON that is no such request."""

import json
from collections.abc import Sequence

from tests.fuzz.bodies import operation, trigger
from tests.fuzz.entries import Body, Draft, encode
from tests.fuzz.material import (
    Material,
    anything,
    is_strict,
    metadata_change,
    place,
    refused,
    undecodable,
    walk,
    with_options,
    with_value,
)

WRONG: dict[str, Sequence[object]] = {
    "text": (7, 1.5, True, [], {}, ["x"], [None]),
    "int": ("7", 1.5, True, [], {}, 10**30, -(10**30)),
    "bool": ("true", 0, 1.0, [], {}),
    "object": ("{}", 1, True, [[]]),
    "list": ("a", 1, True, {}, {"0": "a"}),
}


def wrong_type(of: Material) -> Draft:
    path, body, kind = place(of, tuple(WRONG))
    return refused(with_value(path, body, of.rng.choice(WRONG[kind])), str(path[0]))


def missing_field(of: Material) -> Draft:
    body = of.body()
    required = ["task", "environment"] if of.stream == "triggers" else ["type", "environment"]
    name = of.rng.choice([*required, "environment.id", "environment.organization_id"])
    holder = body["environment"] if "." in name else body
    del holder[name.rpartition(".")[2]]
    return refused(body, name)


def unknown_field(of: Material) -> Draft:
    body = of.body()
    holders = [value for path, value in walk(body) if isinstance(value, dict) and is_strict(path)]
    name = of.rng.choice(
        ["colour", "__proto__", "Task", "", "a.b", "x`y", "- at `$.z`", "é" * 3, "q" * 9_000, "n\n", '"']
    )
    of.rng.choice([body, *holders])[name] = of.rng.choice([1, None, {"task": "x"}, [[]]])
    return refused(body)


def escaped_nul(of: Material) -> Draft:
    path, body, _ = place(of, ("text",))
    return refused(with_value(path, body, of.rng.choice(["\0", "a\0", "a\0b"])), str(path[0]))


def nul_in_metadata(of: Material) -> Draft:
    bad: Body = of.rng.choice([{"a\0": 1}, {"a": "\0"}, {"a": [{"b": ["\0"]}]}, {"a": {"\0": {}}}])
    if of.stream == "triggers":
        return refused(with_options(of, metadata=bad), "options.metadata:")
    change: Body = of.rng.choice(
        [
            {"metadata": bad},
            {"operations": [{"type": "set", "key": "nul", "value": bad}]},
            {"operations": [{"type": "append", "key": "nul", "value": bad}]},
            {"operations": [{"type": "update", "value": bad}]},
            {"operations": [{"type": "set", "key": "nul\0", "value": 1}]},
        ]
    )
    return refused(metadata_change(of, **change))


def duplicate_keys(of: Material) -> Draft:
    body = encode(of.body())
    name = of.rng.choice(list(json.loads(body)))
    bad = of.rng.choice([b"7.5", b"[[]]"]) if name not in ("payload", "metadata") else b"x"
    twice = b'"' + name.encode() + b'": ' + bad
    parts = [b"{", twice, b", ", body[1:]] if of.rng.random() < 0.5 else [body[:-1], b", ", twice, b"}"]
    both = b"".join(parts)
    if name == "type":
        return anything(both)  # of two, one is taken
    return undecodable(both) if bad == b"x" else refused(both)


def repeated_keys(of: Material) -> Draft:
    """The same key a thousand times, each time with a value that is right."""
    body = encode(of.body())
    name, value = of.rng.choice(list(json.loads(body).items()))
    more = b", ".join([encode({name: value})[1:-1]] * of.rng.choice([2, 20, 200]))
    return anything(b"{" + more + b", " + body[1:])


def of_the_other_stream(of: Material) -> Draft:
    other = trigger if of.stream == "operations" else operation
    return refused(other(of.rng, of.tenant, of.number))


def unknown_operation(of: Material) -> Draft:
    body = {**operation(of.rng, of.tenant, of.number)}
    body["type"] = of.rng.choice(["run.destroy", "", "RUN.CANCEL", "run", "x" * 5_000, None, 7, ["run.list"]])
    return refused(body)

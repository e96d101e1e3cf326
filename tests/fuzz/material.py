"""What kinds of hostile bodies are made from, and what may come of them.

Where a kind says exactly what must come of it, that is the wire's promise. Where bytes are thrown about, much
may come of them: `ANYTHING`, which is every answer but those that say that something here is out of order.
"""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.fuzz import bodies
from tests.fuzz.entries import Body, Draft, Tenant, encode

INVALID = frozenset({"invalid_request"})
SET_ASIDE = frozenset({"undecodable"})
MAYBE = SET_ASIDE | {""}
SUCCESS = frozenset({"run", "run_details", "run_list", "idempotency_key_reset"})
ANYTHING = (
    SUCCESS
    | INVALID
    | {"payload_too_large", "metadata_too_large", "too_many_tags", "run_not_found", "parent_run_not_found"}
    | {"run_id_conflict", "one_time_use_token_used", "run_not_delayed", "run_finished", "deadline_exceeded"}
    | {"run_busy"}
)

Path = tuple[str | int, ...]


class Material(NamedTuple):
    """What a kind makes a body from."""

    rng: random.Random
    stream: str
    tenant: Tenant
    number: int

    def body(self) -> Body:
        """A valid one, of this stream."""
        return bodies.VALID[self.stream](self.rng, self.tenant, self.number)

    def noise(self, most: int = 300) -> bytes:
        return self.rng.randbytes(self.rng.randrange(most))


def refused(body: object, names: str = "") -> Draft:
    return Draft(body if isinstance(body, bytes) else encode(body), INVALID, names=names)


def undecodable(body: bytes) -> Draft:
    return Draft(body, INVALID, SET_ASIDE)


def anything(body: object) -> Draft:
    return Draft(body if isinstance(body, bytes) else encode(body), ANYTHING, MAYBE)


def exactly(body: object, *replies: str) -> Draft:
    return Draft(encode(body), frozenset(replies))


_FREE = ("payload", "metadata", "feature_flags", "value")


def walk(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """All that is in a body, but for what may be any JSON."""
    inside: Iterator[tuple[Any, object]] = iter(())
    if isinstance(value, dict):
        inside = iter(value.items())
    elif isinstance(value, list):
        inside = enumerate(value)
    for name, one in inside:
        if name in ("payload", "metadata", "value"):
            continue
        yield (*path, name), one
        if name != "feature_flags":
            yield from walk(one, (*path, name))


def is_strict(path: Path) -> bool:
    return not any(name in _FREE for name in path)


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "bool", int: "int", dict: "object", list: "list"}
    return kinds.get(type(value), "")


def place(of: Material, kinds: Sequence[str]) -> tuple[Path, Body, str]:
    """Where a new body holds a value of such a kind, the body, and the kind; a ttl may be of two."""
    while True:
        body = of.body()
        found = [(path, _kind(value)) for path, value in walk(body) if path[-1] != "ttl"]
        places = [(path, kind) for path, kind in found if kind in kinds]
        if places:
            path, kind = of.rng.choice(places)
            return path, body, kind


def with_value(path: Path, body: Body, value: object) -> Body:
    holder: Any = body
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    return body


def inserted(of: Material, what: bytes) -> bytes:
    body = json.dumps(of.body(), ensure_ascii=False).encode()
    while True:
        at = of.rng.randrange(1, len(body))
        if body[at] < 0x80 and body[at - 1] < 0x80 and body[at - 1] != ord("\\"):
            return body[:at] + what + body[at:]


def with_options(of: Material, **options: object) -> Body:
    body = bodies.trigger(of.rng, of.tenant, of.number)
    body["options"] |= options
    return body


def on(of: Material, kind: str) -> Body:
    fields = bodies.OPERATIONS[kind](of.rng, of.tenant, of.number)
    return {"type": kind, "environment": of.tenant.environment(), **fields}


def metadata_change(of: Material, **fields: object) -> Body:
    run = of.tenant.run_id("work")
    return {"type": "run.update_metadata", "environment": of.tenant.environment(), "run_id": run, **fields}

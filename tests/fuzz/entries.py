"""What is sent: one stream entry with what must come of it, and the tenants that entries speak of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack
from typing import Any, NamedTuple

Body = dict[str, Any]
Fields = tuple[tuple[bytes, bytes], ...]

IDENTITY = b"\x89BIN\r\n\x1a\n"
HEAD_BYTES = len(IDENTITY) + 10

LETTER_FIELDS = (b"source", b"id", b"reason", b"detail", b"deliveries", b"at")


class Tenant(NamedTuple):
    """An environment. Its secret is in all of its data, and in nobody else's."""

    name: str

    @property
    def secret(self) -> str:
        return f"the secret of {self.name}"

    @property
    def environment_id(self) -> str:
        return f"env_{self.name}"

    @property
    def organization_id(self) -> str:
        return f"org_{self.name}"

    @property
    def key(self) -> str:
        """The idempotency key of its kept run."""
        return f"key {self.name}"

    def run_id(self, which: str) -> str:
        """One of the runs that it has from the beginning: `kept`, which nobody may change, or `work`."""
        return f"run_{self.name}-{which}"

    def environment(self, **fields: Any) -> Body:
        """As it is named in a request."""
        return {"id": self.environment_id, "organization_id": self.organization_id, **fields}


VICTIMS = tuple(Tenant(f"victim{number}") for number in range(4))
"""Those that good requests come from. What they have may show up in no reply to others."""

ATTACKERS = tuple(Tenant(f"attacker{number}") for number in range(24))
"""Those that hostile requests come from, as far as these name anybody."""


class Draft(NamedTuple):
    """The body of a request, and what may come of it if it can be answered.

    `replies` are error codes, and the types of replies that are none. `letters` are reasons of dead letters,
    "" for none. `names` is what the error's message begins with.
    """

    body: bytes
    replies: frozenset[str]
    letters: frozenset[str] = frozenset({""})
    names: str = ""


@dataclass(slots=True, eq=False)
class Entry:
    """One entry. `channel`: where its reply is due, with one of the correlation ids; None: nowhere.

    `replies` may have "": there may be none, and then there is a dead letter.
    """

    kind: str
    stream: str
    fields: Fields
    channel: str | None
    correlation_ids: frozenset[str | None]
    replies: frozenset[str]
    letters: frozenset[str]
    names: str = ""
    asker: Tenant | None = None
    is_good: bool = False
    id: str = ""
    digest: bytes = b""
    sent_at: float = 0.0

    def sent(self, entry_id: str) -> None:
        """It is on its way: of what it holds only the digest is kept."""
        self.id = entry_id
        self.digest = digest(dict(self.fields))
        self.fields = ()


def digest(fields: Mapping[bytes, bytes]) -> bytes:
    """What tells fields from others."""
    return blake2b(repr(sorted(fields.items())).encode(), digest_size=16).digest()


def encode(body: object) -> bytes:
    return json.dumps(body).encode()


def plain(body: bytes | None, reply_to: bytes | None, correlation_id: bytes | None) -> Fields:
    """The envelope for any Redis client; what is None is left out."""
    given = ((b"body", body), (b"reply_to", reply_to), (b"correlation_id", correlation_id))
    return tuple((name, value) for name, value in given if value is not None)


def faststream(body: bytes, headers: Mapping[bytes, bytes | None]) -> bytes:
    """FastStream's message; headers that are None are left out."""
    given = {name: value for name, value in headers.items() if value is not None}
    head = pack(">H", len(given))
    for name, value in given.items():
        head += pack(">H", len(name)) + name + pack(">H", len(value)) + value
    return IDENTITY + pack(">HII", 1, HEAD_BYTES, HEAD_BYTES + len(head)) + head + body

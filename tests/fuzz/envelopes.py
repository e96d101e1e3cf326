"""The table of odd entries: broken envelopes, and addresses of all sorts."""

from collections.abc import Callable
from struct import pack
from typing import NamedTuple

from tests.fuzz.bodies import operation, trigger
from tests.fuzz.entries import HEAD_BYTES, IDENTITY, LETTER_FIELDS, Entry, Fields, encode, faststream, plain
from tests.fuzz.garbled import no_object
from tests.fuzz.material import INVALID, SET_ASIDE, Material, refused, undecodable
from tests.fuzz.misfits import wrong_type

UNANSWERABLE = frozenset({"unanswerable"})
FORBIDDEN = frozenset({"reply_channel"})
NOBODY: frozenset[str] = frozenset()

FORBIDDEN_CHANNELS = (
    *("elsewhere", "other:reply:1", "mollifier:wake", "mollifier:triggers", "mollifier:*"),
    *("mollifier:reply", "mollifier:reply:", "mollifier:replyx1", "mollifier:reply:" + "x" * 201),
    *("MOLLIFIER:REPLY:x", " mollifier:reply:x", "__keyspace@0__:mollifier:triggers"),
    *("a" * 21, "a" * 23, "é" * 22, "x" * 60_000),
)


class Address(NamedTuple):
    """A channel on which a reply is due, and with which correlation id."""

    channel: str
    correlation_id: str | None

    @property
    def headers(self) -> dict[bytes, bytes | None]:
        correlation_id = None if self.correlation_id is None else self.correlation_id.encode()
        return {b"reply_to": self.channel.encode(), b"correlation_id": correlation_id}


def entry(
    kind: str,
    of: Material,
    fields: Fields,
    address: Address | None,
    replies: frozenset[str],
    letters: frozenset[str],
    names: str = "",
) -> Entry:
    channel, correlation_id = address or (None, None)
    correlation_ids = frozenset({correlation_id})
    return Entry(kind, of.stream, fields, channel, correlation_ids, replies, letters, names, of.tenant)


Make = Callable[[Material, Address], Entry]


def forbidden_channel(of: Material, address: Address) -> Entry:
    """Whatever it holds: nothing is said there, and nothing is done."""
    channel = of.rng.choice(FORBIDDEN_CHANNELS).encode()
    good = trigger if of.stream == "triggers" else operation
    body = of.rng.choice([encode(good(of.rng, of.tenant, of.number)), b"no JSON", b"7", b"", None])
    if body is not None and len(channel) < 60_000 and of.rng.random() < 0.5:
        fields: Fields = ((b"__data__", faststream(body, {**address.headers, b"reply_to": channel})),)
    else:
        fields = plain(body, channel, b"1")
    return entry("forbidden_channel", of, fields, None, NOBODY, FORBIDDEN)


def no_body(of: Material, address: Address) -> Entry:
    headers = address.headers
    more = tuple((of.noise(20), of.noise(20)) for _ in range(of.rng.randrange(5)))
    more += ((b"Body", b"{}"), (b"data", b"{}"), (b"payload", b"{}"))
    if of.rng.random() < 0.5:
        return entry("no_body", of, more, None, NOBODY, SET_ASIDE)
    fields = (*plain(None, *headers.values()), *more)
    return entry("no_body", of, fields, address, INVALID, SET_ASIDE)


def address_not_utf8(of: Material, address: Address) -> Entry:
    bad, body = address.channel.encode() + b"\xff", encode(of.body())
    what = of.rng.randrange(3)
    if what == 0:
        return entry("address_not_utf8", of, plain(body, bad, b"1"), None, NOBODY, SET_ASIDE)
    if what == 1:
        data = faststream(body, {**address.headers, of.rng.choice([b"reply_to", b"\xff"]): bad})
        return entry("address_not_utf8", of, ((b"__data__", data),), None, NOBODY, SET_ASIDE)
    fields = plain(body, address.channel.encode(), b"\xff")
    return entry("address_not_utf8", of, fields, address._replace(correlation_id=None), INVALID, SET_ASIDE)


def binary_noise(of: Material, address: Address) -> Entry:
    """No message at all, or one that ends within its head; a plain address beside it can be answered."""
    whole = faststream(encode(of.body()), address.headers)
    start = int.from_bytes(whole[14:18], "big")
    huge = pack(">HII", 1, of.rng.choice([0, HEAD_BYTES, 2**31, 2**32 - 1]), 2**32 - 1)
    data = of.rng.choice(
        [
            of.noise(400),
            IDENTITY + of.noise(9),
            whole[: of.rng.randrange(start)],
            IDENTITY + huge + whole[HEAD_BYTES:],
            IDENTITY + pack(">HII", of.rng.choice([0, 2, 65_535]), HEAD_BYTES, start) + whole[HEAD_BYTES:],
            whole[:HEAD_BYTES] + b"\xff\xff" + whole[HEAD_BYTES + 2 :],
            IDENTITY + pack(">HII", 1, HEAD_BYTES, HEAD_BYTES) + whole[HEAD_BYTES:],
            b'{"data": {}, "headers": {}}',
            b"",
        ]
    )
    if of.rng.random() < 0.5:
        return entry("binary_noise", of, ((b"__data__", data),), None, NOBODY, SET_ASIDE)
    fields = ((b"__data__", data), *plain(None, *address.headers.values()))
    return entry("binary_noise", of, fields, address, INVALID, SET_ASIDE)


def flipped_head(of: Material, address: Address) -> Entry:
    """Numbers of the message's head changed: who knows what it says then, but it is answered or set aside."""
    data = bytearray(faststream(no_object(of).body, address.headers))
    for _ in range(of.rng.randint(1, 3)):
        data[of.rng.randrange(len(IDENTITY), HEAD_BYTES + 4)] = of.rng.choice([0, 1, 17, 18, 19, 20, 21, 255])
    fields: Fields = ((b"__data__", bytes(data)),)
    letters = SET_ASIDE | UNANSWERABLE | {""}
    made = entry("flipped_head", of, fields, address, INVALID | {""}, letters)
    made.correlation_ids |= {None}
    return made


def both_envelopes(of: Material, address: Address) -> Entry:
    """The binary one counts; what the plain one says is not heard."""
    data = faststream(refused({"no": "request"}).body, address.headers)
    other = of.rng.choice(FORBIDDEN_CHANNELS[:3]).encode()
    fields = ((b"__data__", data), *plain(encode(of.body()), other, b"another"))
    return entry("both_envelopes", of, fields, address, INVALID, frozenset({""}))


def repeated_fields(of: Material, address: Address) -> Entry:
    """Of a name that is there twice, the last value counts."""
    good = encode(of.body())
    first = plain(good, of.rng.choice(FORBIDDEN_CHANNELS[:3]).encode(), b"first")
    if of.rng.random() < 0.3:
        last = plain(good, *address.headers.values())
        return entry("repeated_fields", of, (*last, *first), None, NOBODY, FORBIDDEN)
    draft = of.rng.choice([wrong_type(of), undecodable(b"{")])
    last = plain(draft.body, address.channel.encode(), (address.correlation_id or "").encode())
    return entry("repeated_fields", of, (*first, *last), address, draft.replies, draft.letters)


def names_of_a_dead_letter(of: Material, address: Address) -> Entry:
    """Fields that a dead letter has of its own."""
    fields = (*plain(b"no JSON", *address.headers.values()), *((name, b"forged") for name in LETTER_FIELDS))
    return entry("names_of_a_dead_letter", of, fields, address, INVALID, SET_ASIDE)


def many_fields(of: Material, address: Address) -> Entry:
    count = of.rng.choice([10, 300, 4_000])
    more = tuple((b"f%d" % number, of.noise(10)) for number in range(count))
    if of.rng.random() < 0.5:
        return entry("many_fields", of, (*plain(b"[]", None, None), *more), None, NOBODY, UNANSWERABLE)
    fields = (*more, *plain(b"[]", *address.headers.values()))
    return entry("many_fields", of, fields, address, INVALID, frozenset({""}))


def empty_entry(of: Material, address: Address) -> Entry:
    fields: Fields = of.rng.choice(
        [((b"", b""),), ((b"body", b""),), ((b"\0", b"\0"),), ((b"reply_to", b""),)]
    )
    return entry("empty_entry", of, fields, None, NOBODY, SET_ASIDE)


def large_rubbish(of: Material, address: Address) -> Entry:
    """More bytes than any request may have."""
    rubbish = of.rng.randbytes(1_000) * of.rng.choice([200, 500])
    fields = plain(rubbish, address.channel.encode(), None)
    return entry(
        *("large_rubbish", of, fields, address._replace(correlation_id=None)),
        *(frozenset({"payload_too_large"}), frozenset({""})),
    )


ENVELOPES: dict[Make, float] = {
    forbidden_channel: 8,
    no_body: 4,
    address_not_utf8: 4,
    binary_noise: 8,
    flipped_head: 4,
    both_envelopes: 2,
    repeated_fields: 3,
    names_of_a_dead_letter: 2,
    many_fields: 1,
    empty_entry: 2,
    large_rubbish: 0.3,
}
"""Each kind of broken or odd entry, with its weight."""

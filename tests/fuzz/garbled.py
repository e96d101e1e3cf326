"""Bytes that are thrown about: hardly any of it is JSON."""

from collections.abc import Sequence

from tests.fuzz.entries import Draft, encode
from tests.fuzz.material import (
    INVALID,
    MAYBE,
    Material,
    anything,
    inserted,
    place,
    refused,
    undecodable,
    with_value,
)


def random_bytes(of: Material) -> Draft:
    return Draft(of.noise(2_000), INVALID, MAYBE)


def cut_off(of: Material) -> Draft:
    whole = encode(of.body())
    return undecodable(whole[: of.rng.randrange(len(whole))])


def flipped(of: Material) -> Draft:
    body = bytearray(encode(of.body()))
    for _ in range(of.rng.randint(1, 6)):
        body[of.rng.randrange(len(body))] = of.rng.choice([of.rng.randrange(256), *b'"{}[],:0\\'])
    return anything(bytes(body))


def spliced(of: Material) -> Draft:
    one, other = encode(of.body()), encode(of.body())
    return anything(one[: of.rng.randrange(len(one))] + other[of.rng.randrange(len(other)) :])


def followed_by_more(of: Material) -> Draft:
    return undecodable(encode(of.body()) + of.rng.choice([b"x", b"{}", b",", b"\x00", b'"', b"]", b"\xff"]))


def bad_utf8(of: Material) -> Draft:
    bad = of.rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\x80"])
    return undecodable(inserted(of, bad))


def raw_nul(of: Material) -> Draft:
    return undecodable(inserted(of, b"\x00"))


def lone_surrogate(of: Material) -> Draft:
    bad = of.rng.choice([rb"\ud800", rb"\udc00\ud800", rb"\ud83dx", rb"\u12", rb"\q", rb"\u00zz"])
    path, body, _ = place(of, ("text",))
    return undecodable(encode(with_value(path, body, "HERE")).replace(b"HERE", bad))


def no_object(of: Material) -> Draft:
    bad: Sequence[object] = (None, 7, -1.5, True, [], [1, [2]], "x", "{}", [{}], 10**30)
    return refused(of.rng.choice(bad), "body:")


def not_quite_json(of: Material) -> Draft:
    bad = (
        b"NaN",
        b"[1,]",
        b"+1",
        b"01",
        b"1.",
        b".5",
        b"tru",
        b"'x'",
        b"{1:2}",
        b"/**/1",
        b"Infinity",
        b"--1",
    )
    field, rest = of.rng.choice(bad), encode(of.body())
    return undecodable(b'{"payload": ' + field + b", " + rest[1:])

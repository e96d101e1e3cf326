"""The two envelopes of a request: plain stream fields, and FastStream's binary message.

The binary layout (version 1): the identity of 8 bytes; big-endian, a 2-byte version, a 4-byte
offset of the headers, a 4-byte offset of the data; at the headers a 2-byte count, then each name
and value as a 2-byte length and UTF-8; the data reach to the end. Offsets count from the start.
Source: FastStream 0.7.8, `faststream.redis.parser.binary`.
"""

from collections.abc import Mapping
from struct import Struct, error

from app.errors import Undecodable

PLAIN = frozenset((b"body", b"reply_to", b"correlation_id"))
"""The fields of a plain entry."""

_FASTSTREAM = b"__data__"
_IDENTITY = b"\x89BIN\r\n\x1a\n"
_HEAD = Struct(">HII")
_SHORT = Struct(">H")


Envelope = tuple[bytes, str | None, str | None]
"""A request's body, and where its reply goes: `reply_to` and `correlation_id`."""


def open_envelope(fields: Mapping[bytes, bytes]) -> Envelope:
    """Read either envelope.

    Raises:
        Undecodable: there is no body, or the binary message is damaged. What can still be answered
            then is what `address` finds.
    """
    binary = fields.get(_FASTSTREAM)
    if binary is not None:
        return _open_faststream(binary)
    body = fields.get(b"body")
    if body is None:
        raise Undecodable("body: the entry has no such field")
    return body, _text(fields, b"reply_to"), _text(fields, b"correlation_id")


def address(fields: Mapping[bytes, bytes]) -> tuple[str | None, str | None]:
    """`reply_to` and `correlation_id` of an entry that has no readable body, if it is plain."""
    return _readable(fields, b"reply_to"), _readable(fields, b"correlation_id")


def _readable(fields: Mapping[bytes, bytes], name: bytes) -> str | None:
    try:
        return _text(fields, name)
    except Undecodable:
        return None


def _text(fields: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = fields.get(name)
    if not value:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Undecodable(f"{name.decode()}: not UTF-8") from None


def _open_faststream(data: bytes) -> Envelope:
    try:
        if not data.startswith(_IDENTITY):
            raise Undecodable("__data__: not a FastStream message")
        version, position, start = _HEAD.unpack_from(data, len(_IDENTITY))
        if version != 1:
            raise Undecodable(f"__data__: version {version} is not known")
        (count,) = _SHORT.unpack_from(data, position)
        position += _SHORT.size
        headers: dict[str, str] = {}
        for _ in range(count):
            name, position = _string(data, position)
            headers[name], position = _string(data, position)
    except (error, UnicodeDecodeError):
        raise Undecodable("__data__: the FastStream message is damaged") from None
    if not position <= start <= len(data):
        raise Undecodable("__data__: the FastStream message is damaged")
    return data[start:], headers.get("reply_to") or None, headers.get("correlation_id") or None


def _string(data: bytes, position: int) -> tuple[str, int]:
    (length,) = _SHORT.unpack_from(data, position)
    start = position + _SHORT.size
    end = start + length
    if end > len(data):
        raise Undecodable("__data__: the FastStream message is damaged")
    return data[start:end].decode(), end

"""Step 1: from a stream entry to a typed request, one entry at a time, whatever it holds."""

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from app.batch import Batch, DeadLetter, Item
from app.envelope import PLAIN, address, open_envelope
from app.errors import InvalidRequest, PayloadTooLarge, RequestError, Undecodable
from app.nesting import MOST_LEVELS, is_deeper
from app.settings import Settings
from schemas.operations import OperationRequest
from schemas.requests import TriggerRequest

OTHERS_BYTES = 131_072
"""Most bytes of a body beside payload and metadata, and of an entry beside its body."""

LONGEST_ADDRESS = 1_024
"""Most characters of `reply_to`, whatever MOLLIFIER_REPLY_CHANNELS says, and of `correlation_id`."""

_LONGEST_PATH, _LONGEST_WORDS = 200, 300
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object (?P<how>contains unknown|missing required) field `(?P<name>.*)`$", re.DOTALL)
_MISTAKE = {"contains unknown": "unknown field", "missing required": "required"}

_triggers = msgspec.json.Decoder(TriggerRequest)
_operations: "msgspec.json.Decoder[OperationRequest]" = msgspec.json.Decoder(OperationRequest)

Request = TypeVar("Request")


def read_trigger(item: Item, body: bytes, longest: int) -> None:
    """Fill in the request of a trigger."""
    item.request = decode_trigger(body, longest)


def read_operation(item: Item, body: bytes, longest: int) -> None:
    """Fill in an operation."""
    item.operation = decode_body(body, longest, _operations)


class Decode:
    """Fills in each item's address and request, or its outcome."""

    def __init__(self, settings: Settings, read: Callable[[Item, bytes, int], None] = read_trigger) -> None:
        self._read = read
        self._reply_channels = settings.reply_channel_pattern
        self._longest = settings.max_payload_bytes + settings.max_metadata_bytes + OTHERS_BYTES

    async def __call__(self, batch: Batch) -> None:
        for item in batch.items:
            self._decode(item)

    def _decode(self, item: Item) -> None:
        fields = item.entry.fields
        try:
            body, item.reply_to, item.correlation_id = open_envelope(fields)
            if self._may_reply(item):
                _refuse_long(item, body)
                self._read(item, body, self._longest)
        except RequestError as error:
            item.outcome = error
            if item.reply_to is None:
                item.reply_to, item.correlation_id = address(fields)
                self._may_reply(item)

    def _may_reply(self, item: Item) -> bool:
        reply_to = item.reply_to
        if reply_to is None or (
            len(reply_to) <= LONGEST_ADDRESS and self._reply_channels.fullmatch(reply_to)
        ):
            return True
        item.dead_letter = DeadLetter("reply_channel", "reply_to: this channel may not be replied on")
        item.reply_to = None
        return False


def _refuse_long(item: Item, body: bytes) -> None:
    """Refuse what is too much beside the body; a reply does not repeat it."""
    if item.correlation_id is not None and len(item.correlation_id) > LONGEST_ADDRESS:
        length, item.correlation_id = len(item.correlation_id), None
        raise InvalidRequest(f"correlation_id: {length} characters are more than {LONGEST_ADDRESS}")
    if item.entry.fields.keys() <= PLAIN:
        return  # there is nothing beside the body but these two, whose lengths are known by now
    others = sum(map(len, item.entry.fields.values())) - len(body)
    if others > OTHERS_BYTES:
        raise PayloadTooLarge(f"beside the body: {others} bytes are more than {OTHERS_BYTES}")


def decode_trigger(body: bytes, longest: int) -> TriggerRequest:
    """The trigger request in a body; see `decode_body`."""
    return decode_body(body, longest, _triggers)


def decode_body(body: bytes, longest: int, decoder: "msgspec.json.Decoder[Request]") -> Request:
    """The request in a body.

    Raises:
        Undecodable: not UTF-8 or not JSON.
        InvalidRequest: nested too deeply; or JSON, but not such a request: the message names the field.
        PayloadTooLarge: longer than any request within the limits could be.
    """
    if len(body) > longest:
        raise PayloadTooLarge(f"body: {len(body)} bytes are more than any request may have")
    if is_deeper(body, MOST_LEVELS):
        raise InvalidRequest(f"body: nested more than {MOST_LEVELS} levels deep")
    try:
        if not body.isascii():
            body.decode()
        request = decoder.decode(body)
        if b"\\u0000" in body:
            _refuse_nul(request, "")
    except msgspec.ValidationError as error:
        raise InvalidRequest(_explain(str(error))) from None
    except msgspec.DecodeError as error:
        raise Undecodable(f"body: not JSON: {error}") from None
    except (UnicodeError, OverflowError, ValueError) as error:
        raise Undecodable(f"body: not JSON: {error}") from None
    return request


def _explain(message: str) -> str:
    """msgspec's sentence, turned so that the field comes first: `options.delay: Expected ...`.

    Both may repeat what the request holds, so both are cut.
    """
    match = _PATH.match(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    field = _FIELD.match(what)
    if field:
        path = f"{path}.{field['name']}" if path else field["name"]
        what = _MISTAKE[field["how"]]
    return f"{path[:_LONGEST_PATH] or 'body'}: {what[:_LONGEST_WORDS]}"


def _refuse_nul(value: object, path: str) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise InvalidRequest(f"{path[:_LONGEST_PATH]}: contains a NUL character")
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            _refuse_nul(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, element in enumerate(value):
            _refuse_nul(element, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, element in value.items():
            _refuse_nul(name, path)
            _refuse_nul(element, path)

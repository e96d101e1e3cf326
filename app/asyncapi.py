"""The wire as an AsyncAPI 3 document, made from the schemas: `make docs` writes docs/asyncapi.json.

Limits that are settings are those of the defaults. What only `validate.py` checks (that a parent exists, that
a time to live is not zero) is not in it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import orjson

from app import examples
from app.batch import DeadLetter
from app.decode import LONGEST_ADDRESS, OTHERS_BYTES
from app.errors import CODES
from app.keys import Keys
from app.nesting import MOST_LEVELS, MOST_LEVELS_OF_METADATA
from app.ports import Letter
from app.settings import Settings
from schemas import operations
from schemas.replies import ErrorReply, KeyResetReply, RunDetailsReply, RunListReply, RunReply
from schemas.requests import TriggerRequest

Json = dict[str, Any]

_SETTINGS = Settings.model_construct()
_KEYS = Keys(_SETTINGS.namespace, _SETTINGS.partitions)

_REPLIES: Mapping[type[operations.Operation], type] = {
    operations.Retrieve: RunDetailsReply,
    operations.Cancel: RunDetailsReply,
    operations.Reschedule: RunDetailsReply,
    operations.AddTags: RunDetailsReply,
    operations.UpdateMetadata: RunDetailsReply,
    operations.Replay: RunReply,
    operations.List: RunListReply,
    operations.ResetKey: KeyResetReply,
}
"""What an operation is answered with, if not with an error."""

_LONGEST_BODY = _SETTINGS.max_payload_bytes + _SETTINGS.max_metadata_bytes + OTHERS_BYTES

_ENVELOPES = f"""\
An entry is in one of two envelopes. **Plain**: the fields `body` (the payload), `reply_to` and
`correlation_id` (the headers). **FastStream**: the one field `__data__`: the bytes 89 42 49 4E 0D 0A 1A 0A,
then, big-endian, a 2-byte version (1) and the 4-byte offsets, from the start, of the headers and of the body.
At the headers a 2-byte count, and as many names and values, each a 2-byte length and UTF-8. The body reaches
to the end.

The server must choose the entry's id (`*`). A body may have {_LONGEST_BODY:,} bytes and be {MOST_LEVELS}
levels deep. What is beside it may have {OTHERS_BYTES:,} bytes."""


def document() -> Json:
    """The document, as JSON."""
    operation_types: tuple[type[operations.Operation], ...] = get_args(operations.OperationRequest)
    replies = (RunReply, RunDetailsReply, RunListReply, KeyResetReply, ErrorReply)
    _, schemas = msgspec.json.schema_components(
        [TriggerRequest, *operation_types, *replies], ref_template="#/components/schemas/{name}"
    )
    schemas = _without_discriminators(schemas)
    _add_limits(schemas)
    messages = {
        TriggerRequest.__name__: _request(TriggerRequest, examples.TRIGGERS),
        **{kind.__name__: _request(kind, {"example": examples.OPERATIONS[kind]}) for kind in operation_types},
        **{kind.__name__: _message(kind, _reply_headers(), examples.REPLIES[kind]) for kind in replies},
        "DeadLetter": _dead_letter(),
    }
    names = [kind.__name__ for kind in operation_types]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Mollifier",
            "version": "1",
            "description": "A front door for a task queue. The same in words: docs/wire.md.",
        },
        "defaultContentType": "application/json",
        "servers": {"redis": {"host": "127.0.0.1:6379", "protocol": "redis"}},
        "channels": {
            "triggers": _channel(_KEYS.triggers, [TriggerRequest.__name__], f"A stream.\n\n{_ENVELOPES}"),
            "operations": _channel(_KEYS.operations, names, f"A stream.\n\n{_ENVELOPES}"),
            "replies": _channel(
                None,
                [kind.__name__ for kind in replies],
                "A Pub/Sub channel that the producer names and is subscribed to. Each request is answered at"
                " least once as long as it is; what is published while it is not, is lost.",
            ),
            "deadLetters": _channel(_KEYS.dead_letters, ["DeadLetter"], "A stream, never trimmed."),
        },
        "operations": {
            "trigger": _operation("triggers", TriggerRequest, RunReply),
            **{
                str(kind.__struct_config__.tag).replace(".", "_"): _operation("operations", kind, reply)
                for kind, reply in _REPLIES.items()
            },
            "setAside": {
                "action": "send",
                "channel": {"$ref": "#/channels/deadLetters"},
                "messages": [{"$ref": "#/channels/deadLetters/messages/DeadLetter"}],
            },
        },
        "components": {"schemas": schemas, "messages": messages},
    }


def _without_discriminators(value: Any) -> Any:
    """AsyncAPI has another kind of them. What tells structs apart is their `type`, an enum of one."""
    if isinstance(value, dict):
        return {
            name: _without_discriminators(part) for name, part in value.items() if name != "discriminator"
        }
    return [_without_discriminators(part) for part in value] if isinstance(value, list) else value


def _add_limits(schemas: Json) -> None:
    """What the structs leave to settings, and what a code means."""
    payload = f"JSON, kept byte for byte; {_SETTINGS.max_payload_bytes:,} bytes at most."
    metadata = (
        f"{_SETTINGS.max_metadata_bytes:,} bytes and {MOST_LEVELS_OF_METADATA} levels at most;"
        " numbers fit a double."
    )
    for name, schema in schemas.items():
        properties = schema.get("properties", {})
        if name in ("TriggerRequest", "Replay"):
            properties["payload"]["description"] = payload
        if name in ("Options", "UpdateMetadata"):
            properties["metadata"]["description"] = metadata
        if name in ("Options", "AddTags"):
            properties["tags"]["maxItems"] = _SETTINGS.max_tags
    schemas["ErrorDetail"]["x-codes"] = [
        {"code": code, "status": error.status, "retryable": error.retryable} for code, error in CODES.items()
    ]


def _channel(address: str | None, messages: list[str], description: str) -> Json:
    return {
        "address": address,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
    }


def _operation(channel: str, request: type, reply: type) -> Json:
    """A request that is received, and the reply that it asks for."""
    answers = [reply.__name__, ErrorReply.__name__]
    return {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{request.__name__}"}],
        "reply": {
            "address": {"location": "$message.header#/reply_to"},
            "channel": {"$ref": "#/channels/replies"},
            "messages": [{"$ref": f"#/channels/replies/messages/{name}"} for name in answers],
        },
    }


def _message(kind: type[msgspec.Struct], headers: Json, bodies: Mapping[str, bytes]) -> Json:
    return {
        "title": kind.__name__,
        "summary": (kind.__doc__ or "").partition("\n")[0],
        **headers,
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
        "examples": [{"name": name, "payload": orjson.loads(body)} for name, body in bodies.items()],
    }


def _request(kind: type[msgspec.Struct], bodies: Mapping[str, bytes]) -> Json:
    address = {"type": "string", "maxLength": LONGEST_ADDRESS}
    reply_to = {
        **address,
        "pattern": f"^(?:{_SETTINGS.reply_channel_pattern.pattern})$",
        "description": "The channel of the reply; without it there is none.",
    }
    correlation_id = {**address, "description": "Any text; comes back in the reply."}
    message = _message(
        kind,
        {
            "correlationId": {"location": "$message.header#/correlation_id"},
            "headers": {
                "type": "object",
                "properties": {"reply_to": reply_to, "correlation_id": correlation_id},
            },
        },
        bodies,
    )
    headers = {"reply_to": examples.REPLY_TO, "correlation_id": examples.CORRELATION_ID}
    for example in message["examples"]:
        example["headers"] = headers
    return message


def _reply_headers() -> Json:
    return {"correlationId": {"location": "$message.payload#/correlation_id"}}


def _dead_letter() -> Json:
    reasons = [*get_args(get_type_hints(DeadLetter)["reason"]), *get_args(get_type_hints(Letter)["reason"])]
    string = {"type": "string"}
    return {
        "title": "DeadLetter",
        "summary": "What could not be handled: six fields, and then those of the original as they came.",
        "contentType": "application/octet-stream",
        "payload": {
            "type": "object",
            "properties": {
                "source": {**string, "description": "The stream it was in."},
                "id": {**string, "description": "Its entry id there."},
                "reason": {"enum": list(dict.fromkeys(reasons))},
                "detail": string,
                "deliveries": {**string, "pattern": r"^\d+$"},
                "at": {**string, "format": "date-time"},
            },
            "required": ["source", "id", "reason", "detail", "deliveries", "at"],
            "additionalProperties": True,
        },
    }


def text() -> bytes:
    """The document as it is stored."""
    return orjson.dumps(document(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(text())

"""An example of everything that travels, made by the code that makes the real ones."""

from collections.abc import Mapping

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from app import bodies, run_ids
from app.batch import Answer, Entry, Item, Shown
from app.decode import decode_trigger
from app.details import details
from app.errors import CODES, RequestError
from app.respond import encode_reply
from app.rows import row_at
from app.runs import BufferedRun
from app.settings import Settings
from app.validate import build_run, entry_time
from schemas import operations
from schemas.replies import ErrorReply, KeyResetReply, RunDetailsReply, RunListReply, RunReply
from schemas.requests import Environment

CORRELATION_ID, REPLY_TO = "1", "mollifier:reply:me:1"

_ENTRY = Entry("1767225600000-0", {})
_NOW = entry_time(_ENTRY.ms)
_ENVIRONMENT = Environment(id="env_1", organization_id="org_1", project_id="proj_1")
_TENANT = {"id": "env_1", "organization_id": "org_1"}
_ID = run_ids.derive("mollifier", _ENTRY.id, _ENVIRONMENT.id)
_RUN_ID = run_ids.friendly(_ID)

_encode = msgspec.json.encode

TRIGGERS: Mapping[str, bytes] = {
    "least": _encode(bodies.request("send-email", environment=_ENVIRONMENT)),
    "delayed": _encode(
        bodies.request(
            "send-email",
            {"to": "ada@example.com"},
            environment=_ENVIRONMENT,
            idempotency_key="order-42",
            idempotency_key_ttl="24h",
            delay="10m",
            tags=["welcome"],
            metadata={"order": 42},
            trace_context={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        )
    ),
}

_FIELDS: Mapping[type[operations.Operation], Mapping[str, object]] = {
    operations.Retrieve: {"run_id": _RUN_ID},
    operations.Cancel: {"run_id": _RUN_ID, "reason": "no longer wanted"},
    operations.Reschedule: {"run_id": _RUN_ID, "delay": "1h"},
    operations.AddTags: {"run_id": _RUN_ID, "tags": ["vip"]},
    operations.UpdateMetadata: {
        "run_id": _RUN_ID,
        "operations": [operations.Increment(key="$.progress.done", value=1)],
    },
    operations.Replay: {"run_id": _RUN_ID, "payload": Raw(b'{"to":"grace@example.com"}')},
    operations.List: {"limit": 2, "status": "QUEUED"},
    operations.ResetKey: {"task": "send-email", "idempotency_key": "order-42"},
}
OPERATIONS: Mapping[type[operations.Operation], bytes] = {
    kind: bodies.operation(kind, _TENANT, **fields) for kind, fields in _FIELDS.items()
}


def _reply(outcome: Answer | RequestError | None = None, shown: Shown | None = None) -> bytes:
    item = Item(_ENTRY, reply_to=REPLY_TO, correlation_id=CORRELATION_ID, outcome=outcome, shown=shown)
    reply = encode_reply(item, _NOW)
    assert reply is not None
    return reply


_RUN = build_run(
    _ENTRY, decode_trigger(TRIGGERS["delayed"], len(TRIGGERS["delayed"])), Settings.model_construct()
)
_DETAILS = details(BufferedRun(row_at(_RUN, None, _NOW), "QUEUED", _NOW, None))
_ANSWER = Answer(_ID, run_ids.span_id(_ID), None, is_mollified=False)

REPLIES: Mapping[type, Mapping[str, bytes]] = {
    RunReply: {
        "passed_through": _reply(_ANSWER),
        "mollified": _reply(replace(_ANSWER, is_mollified=True)),
        "cached": _reply(replace(_ANSWER, is_cached=True)),
    },
    RunDetailsReply: {"buffered": _reply(shown=RunDetailsReply(correlation_id=None, run=_DETAILS))},
    RunListReply: {
        "last_page": _reply(shown=RunListReply(correlation_id=None, runs=[_DETAILS], next_cursor=None))
    },
    KeyResetReply: {
        "freed": _reply(
            shown=KeyResetReply(correlation_id=None, task=_RUN.task, idempotency_key="order-42", run_id=_ID)
        )
    },
    ErrorReply: {code: _reply(error()) for code, error in CODES.items()},
}

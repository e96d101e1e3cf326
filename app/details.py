"""A run as operations show it, from a row or from the buffer: field by field the same."""

from msgspec import Raw

from app.rows import Row
from app.run_ids import friendly
from app.runs import Found, StoredRun
from schemas.run import NOTHING, RunDetails

_FROM_RUN = tuple(
    name
    for name in RunDetails.__struct_fields__
    if name
    not in (
        "friendly_id",
        "status",
        "payload",
        "metadata",
        "metadata_version",
        "tags",
        "idempotency_key_options",
        "trace_context",
        "cancelled_at",
        "cancel_reason",
        "error",
        "materialised_at",
        "updated_at",
        "is_buffered",
    )
)


def details(found: Found) -> RunDetails:
    """What is shown of a run."""
    row: Row = found.row
    run = row.run
    return RunDetails(
        **{name: getattr(run, name) for name in _FROM_RUN},
        friendly_id=friendly(run.id),
        status=row.status,
        payload=_json(run.payload),
        metadata=_json(run.metadata),
        metadata_version=row.metadata_version,
        tags=list(run.tags),
        idempotency_key_options=_json(run.idempotency_key_options),
        trace_context=_json(run.trace_context),
        cancelled_at=row.cancelled_at,
        cancel_reason=row.cancel_reason,
        error=_json(None if row.error is None else row.error.encode()),
        materialised_at=found.materialised_at if isinstance(found, StoredRun) else None,
        updated_at=found.updated_at,
        is_buffered=not isinstance(found, StoredRun),
    )


def _json(text: bytes | None) -> Raw:
    return NOTHING if text is None else Raw(text)

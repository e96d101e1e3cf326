"""A run as operations show it, wire version 1: the same whether it is buffered or a row."""

from datetime import datetime

from msgspec import Raw, Struct

from schemas.operations import Status

NOTHING = Raw(b"null")
"""A free-form field without a value."""


class RunDetails(Struct, frozen=True, kw_only=True):
    """Every column of `mollifier.runs`. Free-form fields are the JSON that they are, `NOTHING` where there is
    none: msgspec can write `Raw | None`, but not read it.

    Only `is_buffered`, `materialised_at` and `updated_at` change when a buffered run becomes a row.
    """

    id: str
    friendly_id: str
    organization_id: str
    project_id: str
    environment_id: str
    environment_type: str
    task: str
    status: Status
    payload: Raw
    payload_type: str
    metadata: Raw
    metadata_version: int
    tags: list[str]
    idempotency_key: str | None
    idempotency_key_expires_at: datetime | None
    idempotency_key_options: Raw
    delay_until: datetime | None
    ttl_seconds: int | None
    expires_at: datetime | None
    queue: str | None
    concurrency_key: str | None
    worker_queue: str | None
    machine: str | None
    priority: int
    max_attempts: int | None
    max_duration: int | None
    locked_to_version: str | None
    is_test: bool
    depth: int
    parent_run_id: str | None
    root_run_id: str | None
    resume_parent_on_completion: bool
    batch_id: str | None
    batch_index: int | None
    debounce_key: str | None
    debounce_until: datetime | None
    one_time_use_token: str | None
    replayed_from_run_id: str | None
    trace_id: str
    span_id: str
    parent_span_id: str | None
    trace_context: Raw
    cancelled_at: datetime | None
    cancel_reason: str | None
    error: Raw
    created_at: datetime
    buffered_at: datetime | None
    materialised_at: datetime | None
    updated_at: datetime
    is_buffered: bool

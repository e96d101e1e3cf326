"""A run as it will be inserted: what the buffer stores and what becomes the row.

Stored by one version of this program and read by another, so: fields are only ever added, each
with a default that never changes (a field at its default is left out); unknown ones are ignored;
`schema_version` rises when a meaning changes. A snapshot is never re-encoded after acceptance. It
holds no secrets.
"""

import msgspec

from schemas.requests import Instant

SCHEMA_VERSION = 1


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One run. Names and meanings are those of the columns of `mollifier.runs`, but for `debounce_mode`:
    what a trigger does to the delayed run of its key, `trailing` or `leading`.

    `payload`, `metadata`, `idempotency_key_options` and `trace_context` are JSON text, as bytes.
    All instants are in UTC and count from `created_at`, the time of the request's stream entry.
    """

    schema_version: int
    id: str
    organization_id: str
    project_id: str
    environment_id: str
    environment_type: str = "PRODUCTION"
    task: str
    payload: bytes | None = None
    payload_type: str = "application/json"
    metadata: bytes | None = None
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None
    idempotency_key_expires_at: Instant | None = None
    idempotency_key_options: bytes | None = None
    delay_until: Instant | None = None
    ttl_seconds: int | None = None
    expires_at: Instant | None = None
    queue: str | None = None
    concurrency_key: str | None = None
    worker_queue: str | None = None
    machine: str | None = None
    priority: int = 0
    max_attempts: int | None = None
    max_duration: int | None = None
    locked_to_version: str | None = None
    is_test: bool = False
    depth: int = 0
    parent_run_id: str | None = None
    root_run_id: str | None = None
    resume_parent_on_completion: bool = False
    batch_id: str | None = None
    batch_index: int | None = None
    debounce_key: str | None = None
    debounce_mode: str = "trailing"
    debounce_until: Instant | None = None
    one_time_use_token: str | None = None
    replayed_from_run_id: str | None = None
    trace_id: str
    span_id: str
    parent_span_id: str | None = None
    trace_context: bytes | None = None
    created_at: Instant
    buffered_at: Instant | None = None


encode_snapshot = msgspec.msgpack.Encoder().encode
decode_snapshot = msgspec.msgpack.Decoder(Snapshot).decode

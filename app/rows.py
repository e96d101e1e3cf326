"""A run as a row of `mollifier.runs`: its columns, and the status it has at a given time."""

from datetime import datetime
from hashlib import sha256
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from schemas.overlay import Overlay
from schemas.snapshot import Snapshot

Status = Literal[
    "DELAYED", "QUEUED", "EXECUTING", "COMPLETED", "FAILED", "CANCELED", "EXPIRED", "SYSTEM_FAILURE"
]

FINAL = frozenset(("COMPLETED", "FAILED", "CANCELED", "EXPIRED", "SYSTEM_FAILURE"))

FROM_SNAPSHOT = (
    "id",
    "organization_id",
    "project_id",
    "environment_id",
    "environment_type",
    "task",
    "payload",
    "payload_type",
    "tags",
    "idempotency_key",
    "idempotency_key_expires_at",
    "delay_until",
    "ttl_seconds",
    "expires_at",
    "queue",
    "concurrency_key",
    "worker_queue",
    "machine",
    "priority",
    "max_attempts",
    "max_duration",
    "locked_to_version",
    "is_test",
    "depth",
    "parent_run_id",
    "root_run_id",
    "resume_parent_on_completion",
    "batch_id",
    "batch_index",
    "debounce_key",
    "debounce_until",
    "one_time_use_token",
    "replayed_from_run_id",
    "trace_id",
    "span_id",
    "parent_span_id",
    "created_at",
    "buffered_at",
)
"""Columns that hold a snapshot's field as it is."""

JSON_FROM_SNAPSHOT = ("metadata", "idempotency_key_options", "trace_context")
"""Columns of type jsonb, from a field that holds JSON text."""

COLUMNS = (
    *FROM_SNAPSHOT,
    "status",
    *JSON_FROM_SNAPSHOT,
    "cancelled_at",
    "cancel_reason",
    "error",
    "metadata_version",
    "revision",
    "applied",
)
"""What a new row is given; the order of the type `mollifier.new_run`."""

_fields = attrgetter(*FROM_SNAPSHOT)


class Row(NamedTuple):
    """A run and what only a row has. `error` is JSON text; `revision` counts the changes by operations, and
    `applied` are the last of those, by stream entry.
    """

    run: Snapshot
    status: Status
    cancelled_at: datetime | None = None
    cancel_reason: str | None = None
    error: str | None = None
    metadata_version: int = 1
    revision: int = 0
    applied: tuple[str, ...] = ()

    def values(self) -> tuple[Any, ...]:
        """The values of `COLUMNS`."""
        run = self.run
        return (
            *_fields(run),
            self.status,
            _text(run.metadata),
            _text(run.idempotency_key_options),
            _text(run.trace_context),
            self.cancelled_at,
            self.cancel_reason,
            self.error,
            self.metadata_version,
            self.revision,
            self.applied,
        )

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to the run."""
        return self.status in FINAL


class Materialised(NamedTuple):
    """What became of a row: `present` was there already, `alias` lost its key to the winner."""

    result: Literal["inserted", "present", "alias", "refused"]
    winner_id: str | None = None
    error: str | None = None


def key_digest(run: Snapshot) -> bytes:
    """What `mollifier.key_digest` makes of a run's idempotency key, without which Postgres would make it."""
    parts = f"{run.organization_id}\0{run.environment_id}\0{run.task}\0{run.idempotency_key}"
    return sha256(parts.encode()).digest()


def status_at(run: Snapshot, now: datetime) -> Status:
    """The status of a run that nothing has happened to yet. DESIGN section 8."""
    if run.expires_at is not None and run.expires_at <= now:
        return "EXPIRED"
    if run.delay_until is not None and run.delay_until > now:
        return "DELAYED"
    return "QUEUED"


def row_at(run: Snapshot, overlay: Overlay | None, now: datetime) -> Row:
    """The row that a buffered run has at a given time, with what was changed since it was accepted.

    A cancelled run is `CANCELED` whatever else has come about (G10).
    """
    if overlay is None:
        return Row(run, status_at(run, now))
    changed = replace(
        run,
        delay_until=overlay.delay_until or run.delay_until,
        tags=run.tags if overlay.tags is None else overlay.tags,
        metadata=run.metadata if overlay.metadata is None else overlay.metadata,
        idempotency_key=None if overlay.is_key_reset else run.idempotency_key,
        idempotency_key_expires_at=None if overlay.is_key_reset else run.idempotency_key_expires_at,
    )
    return Row(
        changed,
        status_at(changed, now) if overlay.cancelled_at is None else "CANCELED",
        overlay.cancelled_at,
        overlay.cancel_reason,
        None,
        overlay.metadata_version,
        overlay.revision,
        overlay.applied,
    )


def _text(json: bytes | None) -> str | None:
    return None if json is None else json.decode()

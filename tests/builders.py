"""Requests and runs for tests: a valid one, with what matters to the test changed."""

import json
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import count
from typing import Any

from app.batch import Entry
from app.run_ids import derive, span_id, trace_id
from schemas.snapshot import SCHEMA_VERSION, Snapshot

START_MS = 1_800_000_000_000
NOW = datetime.fromtimestamp(START_MS / 1000, UTC)

_sequence = count()

EVERY_OPTION: dict[str, Any] = {
    "idempotency_key": "order-42",
    "idempotency_key_ttl": "24h",
    "idempotency_key_options": {"key": "order", "scope": "attempt"},
    "delay": "2h30m",
    "ttl": "1d",
    "queue": "emails",
    "concurrency_key": "user-7",
    "worker_queue": "main",
    "machine": "small-1x",
    "priority": -3,
    "max_attempts": 3,
    "max_duration": 300,
    "lock_to_version": "20260101.1",
    "test": True,
    "tags": ["b", "a", "é"],
    "metadata": {"any": ["json", 1, None]},
    "batch": {"id": "batch_1", "index": 4},
    "replayed_from_run_id": "run_old",
}
"""Options of a trigger, all that go together."""


def bound_id(organization: str, environment: str, number: int = 0) -> str:
    """The bound id (without `run_`) of a tenant with so many in place of time and chance."""
    head = f"{number:028x}"
    parts = f"{organization}\0{environment}\0{head}".encode()
    return f"b{head}{blake2b(parts, digest_size=8, person=b'bound').hexdigest()}"


def body(environment: str = "env_1", organization: str = "org_1", **changes: Any) -> dict[str, Any]:
    """The body of a trigger request."""
    return {
        "task": "send-email",
        "environment": {"id": environment, "organization_id": organization, "project_id": "proj_1"},
        "payload": {"to": "ada@example.com"},
        **changes,
    }


def entry(
    content: Any = None, *, deliveries: int = 1, reply_to: str | None = "mollifier:reply:test", **extra: Any
) -> Entry:
    """A plain stream entry with a new id. `content` is a body to encode, or bytes to take as they are."""
    raw = (
        content if isinstance(content, bytes) else json.dumps(body() if content is None else content).encode()
    )
    fields = {b"body": raw, **{name.encode(): value for name, value in extra.items()}}
    if reply_to is not None:
        fields[b"reply_to"] = reply_to.encode()
    return Entry(f"{START_MS}-{next(_sequence)}", fields, deliveries)


def run(environment: str = "env_1", **changes: Any) -> Snapshot:
    """A run with a new derived id."""
    created_at = datetime.fromtimestamp(START_MS / 1000, UTC)
    run_id = changes.pop("id", None) or derive("test", f"{START_MS}-{next(_sequence)}", environment)
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "id": run_id,
        "organization_id": "org_1",
        "project_id": "proj_1",
        "environment_id": environment,
        "task": "send-email",
        "payload": b'{"to": "ada@example.com"}',
        "trace_id": trace_id(run_id),
        "span_id": span_id(run_id),
        "created_at": created_at,
        **changes,
    }
    return Snapshot(**values)

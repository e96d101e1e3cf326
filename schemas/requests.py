"""The body of a trigger request, wire version 1.

Unknown fields are refused by name, except among an organization's feature flags, which are
its own. Free-form JSON (payload, metadata) is kept as the bytes that came.

What a pattern or a description says is checked later, with a better message (`app/validate.py`).
"""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

LONGEST_S = 10 * 366 * 86_400
"""What ten years are, at most."""

RUN_ID = r"run_([A-Za-z0-9][A-Za-z0-9_-]{0,127})"
DURATION = r"(?:(\d{1,9})w)?(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?"
TRACEPARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?"

Identifier = Annotated[str, Meta(min_length=1, max_length=2048)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Label = Annotated[str, Meta(min_length=1, max_length=512)]
RunId = Annotated[str, Meta(max_length=132, extra_json_schema={"pattern": f"^{RUN_ID}$"})]
Duration = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=50,
        description="Such as 30s, 5m, 2h30m, 3d or 1w; ten years at most.",
        extra_json_schema={"pattern": f"^{DURATION}$"},
    ),
]
Delay = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=50,
        description="A duration such as 10m, or an ISO 8601 instant with its offset; ten years at most.",
    ),
]
Seconds = Annotated[int, Meta(ge=1, le=LONGEST_S)]
Metadata = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
PositiveInt = Annotated[int, Meta(ge=1, le=2_147_483_647)]
NonNegativeInt = Annotated[int, Meta(ge=0, le=2_147_483_647)]
SmallInt = Annotated[int, Meta(ge=-2_147_483_648, le=2_147_483_647)]
Instant = Annotated[datetime, Meta(tz=True)]

EnvironmentType = Literal["DEVELOPMENT", "STAGING", "PREVIEW", "PRODUCTION"]


class FeatureFlags(Struct, frozen=True, kw_only=True, gc=False):
    """Of an organization's flags, the one that matters here."""

    mollifier_enabled: bool | None = None


class Environment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The environment a trigger belongs to, as its producer knows it."""

    id: Identifier
    organization_id: Identifier
    project_id: Identifier
    type: EnvironmentType = "PRODUCTION"
    feature_flags: FeatureFlags = FeatureFlags()


class IdempotencyKeyOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What the producer's own SDK derived the key from; stored, never interpreted."""

    key: Identifier
    scope: Literal["run", "attempt", "global"]


class Debounce(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One delayed run per key, pushed back by every further trigger."""

    key: Label
    delay: Duration
    mode: Literal["trailing", "leading"] = "trailing"
    max_delay: Duration | None = None


class BatchItem(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The place of a run in the batch it was triggered with."""

    id: Name
    index: NonNegativeInt


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a run that may be left out."""

    run_id: RunId | None = None
    idempotency_key: Identifier | None = None
    idempotency_key_ttl: Duration | None = None
    idempotency_key_options: IdempotencyKeyOptions | None = None
    delay: Delay | None = None
    ttl: Duration | Seconds | None = None
    queue: Name | None = None
    concurrency_key: Label | None = None
    worker_queue: Name | None = None
    machine: Name | None = None
    priority: SmallInt = 0
    max_attempts: PositiveInt | None = None
    max_duration: PositiveInt | None = None
    lock_to_version: Name | None = None
    test: bool = False
    tags: list[Name] = []
    metadata: Metadata | UnsetType = UNSET
    parent_run_id: RunId | None = None
    resume_parent_on_completion: bool = False
    debounce: Debounce | None = None
    one_time_use_token: Label | None = None
    batch: BatchItem | None = None
    replayed_from_run_id: RunId | None = None


class TraceContext(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """W3C Trace Context (https://www.w3.org/TR/trace-context/)."""

    traceparent: (
        Annotated[str, Meta(max_length=512, extra_json_schema={"pattern": f"^{TRACEPARENT}$"})] | None
    ) = None
    tracestate: Annotated[str, Meta(max_length=8192)] | None = None


class TriggerRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One requested execution of a task."""

    task: Identifier
    environment: Environment
    payload: Raw | UnsetType = UNSET
    payload_type: Name = "application/json"
    options: Options = Options()
    trace_context: TraceContext | None = None
    deadline: Instant | None = None

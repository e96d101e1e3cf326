"""The bodies of operations on runs, wire version 1: reads and changes, told apart by `type`.

Unknown fields are refused by name, as in trigger requests.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from schemas.requests import (
    Delay,
    EnvironmentType,
    FeatureFlags,
    Identifier,
    Instant,
    Metadata,
    Name,
    RunId,
)

Path = Annotated[str, Meta(min_length=1, max_length=512)]
Reason = Annotated[str, Meta(min_length=1, max_length=1024)]
Limit = Annotated[int, Meta(ge=1, le=100)]
Cursor = Annotated[str, Meta(min_length=1, max_length=512)]

Status = Literal[
    "DELAYED", "QUEUED", "EXECUTING", "COMPLETED", "FAILED", "CANCELED", "EXPIRED", "SYSTEM_FAILURE"
]


class Tenant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The environment that an operation is about; nothing outside it is seen. As in a trigger request."""

    id: Identifier
    organization_id: Identifier
    project_id: Identifier | None = None
    type: EnvironmentType | None = None
    feature_flags: FeatureFlags = FeatureFlags()


class Operation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """What all operations have."""

    environment: Tenant


class Retrieve(Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run.retrieve"):
    run_id: RunId


class Cancel(Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run.cancel"):
    run_id: RunId
    reason: Reason | None = None


class Reschedule(Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run.reschedule"):
    run_id: RunId
    delay: Delay


class AddTags(Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run.add_tags"):
    run_id: RunId
    tags: list[Name]


class MetadataOperation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """One change of metadata. `key` is a key of the object, or a path: `$.a.b[0]`."""


class SetKey(MetadataOperation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="set"):
    key: Path
    value: Any


class DeleteKey(MetadataOperation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="delete"):
    key: Path


class Append(MetadataOperation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="append"):
    """Add to the list there; what is no list becomes one with it."""

    key: Path
    value: Any


class Remove(MetadataOperation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="remove"):
    """Take all that equal `value` out of the list there."""

    key: Path
    value: Any


class Increment(MetadataOperation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="increment"):
    """Add to the number there; what is no number counts as 0."""

    key: Path
    value: int | float


class Update(MetadataOperation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="update"):
    """Replace the whole object."""

    value: dict[str, Any]


AnyMetadataOperation = SetKey | DeleteKey | Append | Remove | Increment | Update
MetadataOperations = Annotated[list[AnyMetadataOperation], Meta(max_length=1000)]


class UpdateMetadata(
    Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run.update_metadata"
):
    """`operations`, even if empty, win over `metadata`, which replaces the whole object."""

    run_id: RunId
    metadata: Metadata | UnsetType = UNSET
    operations: MetadataOperations | None = None
    parent_operations: MetadataOperations = []
    root_operations: MetadataOperations = []


class Replay(Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run.replay"):
    run_id: RunId
    payload: Raw | UnsetType = UNSET


class List(Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="run.list"):
    """The newest first. `since` and `until` bound `created_at`: from `since` on, before `until`."""

    limit: Limit = 20
    cursor: Cursor | None = None
    status: Status | None = None
    task: Identifier | None = None
    tag: Name | None = None
    since: Instant | None = None
    until: Instant | None = None


class ResetKey(Operation, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="idempotency_key.reset"):
    task: Identifier
    idempotency_key: Identifier


OperationRequest = Retrieve | Cancel | Reschedule | AddTags | UpdateMetadata | Replay | List | ResetKey

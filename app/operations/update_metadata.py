"""`run.update_metadata`: replace metadata, or change a run's, its parent's and its root's by operations."""

from contextlib import suppress

import msgspec

from app import changes
from app.batch import Shown
from app.errors import InvalidRequest, RequestError, Unreachable
from app.operations.scene import Scene, Turn, parse_run_id, show
from app.runs import Found
from app.validate import check_metadata
from schemas.operations import MetadataOperations, UpdateMetadata


async def update_metadata(scene: Scene, turn: Turn) -> Shown:
    """The run's own change first, then its parent's and its root's; one without a parent is its own."""
    request: UpdateMetadata = turn.request
    run_id = parse_run_id(request.run_id)
    change = changes.once(_own_change(request, scene.settings.max_metadata_bytes), turn.id)
    found = await scene.runs.change(turn.tenancy, run_id, change, turn.now)
    run = found.row.run
    for kin, other_id, operations in (
        ("parent", run.parent_run_id or run.id, request.parent_operations),
        ("root", run.root_run_id or run.id, request.root_operations),
    ):
        if operations:
            with suppress(RequestError):
                changed = await _change_kin(scene, turn, kin, other_id, operations)
                found = changed if other_id == run.id else found
    return show(found)


def _own_change(request: UpdateMetadata, most_bytes: int) -> changes.Change:
    if request.operations:
        return changes.change_metadata(request.operations, most_bytes)
    if request.operations is None and not isinstance(request.metadata, msgspec.UnsetType):
        return changes.replace_metadata(check_metadata("metadata", bytes(request.metadata), most_bytes))
    if request.parent_operations or request.root_operations:
        return changes.note
    if request.operations is not None:
        return changes.change_metadata((), most_bytes)
    raise InvalidRequest("metadata: required, or operations")


async def _change_kin(
    scene: Scene, turn: Turn, kin: str, run_id: str, operations: MetadataOperations
) -> Found:
    """Change the parent or root. The run's own change is made by now, so the answer cannot be an error that
    asks for another try: the operation itself comes again, and makes what is missing.

    Raises:
        RequestError: the change is impossible.
        Unreachable: it was not made, for now.
    """
    change = changes.change_metadata(operations, scene.settings.max_metadata_bytes)
    try:
        return await scene.runs.change(
            turn.tenancy, run_id, changes.once(change, f"{turn.id} {kin}"), turn.now
        )
    except RequestError as error:
        if error.retryable:
            raise Unreachable(f"the {kin} run: {error}") from error
        raise

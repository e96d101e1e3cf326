"""`idempotency_key.reset`: make a key free, in both stores and in the hand-over between them."""

from datetime import datetime, timedelta

from app.batch import Shown
from app.changes import reset_key as take_key_off
from app.errors import BufferUnavailable, RunNotFound, Unreachable
from app.operations.scene import Scene, Turn
from app.rows import Row
from schemas.operations import ResetKey
from schemas.replies import KeyResetReply
from schemas.snapshot import SCHEMA_VERSION, Snapshot


async def reset_key(scene: Scene, turn: Turn) -> Shown:
    """Which buffered run has the key is looked up first: whatever else has it is a row, now or by then. Only
    these two lose it, and not a run that comes by it meanwhile. What could not be done because a store was
    away is done by trying again.

    Raises:
        RunNotFound: nothing has the key.
        StoreUnavailable, BufferUnavailable: it could not be looked for everywhere.
    """
    request: ResetKey = turn.request
    named = _named(request, turn)
    # Handed out again, it may have been done already, and a run that was requested since may have the key.
    until = turn.asked_at if turn.item.is_redelivered else None
    try:
        holder = await scene.claims.holder(named)
    except Unreachable as error:
        raise BufferUnavailable from error
    in_store = await scene.keys.reset_key(turn.tenancy, request.task, request.idempotency_key, until)
    in_buffer = None if holder is None else await _reset_in_buffer(scene, turn, named, holder, until)
    if in_buffer is None and in_store is None and not turn.item.is_redelivered:
        raise RunNotFound("idempotency_key: no run of this environment has this key")
    return KeyResetReply(
        correlation_id=None,
        task=request.task,
        idempotency_key=request.idempotency_key,
        run_id=in_buffer or in_store,
    )


async def _reset_in_buffer(
    scene: Scene, turn: Turn, named: Snapshot, run_id: str, until: datetime | None
) -> str | None:
    """The run that had the key in the buffer, and has lost it wherever it is by now; None: it has not."""

    def change(row: Row) -> Row:
        return row if until is not None and row.run.created_at > until else take_key_off(row)

    try:
        found = await scene.runs.change(turn.tenancy, run_id, change, turn.now)
        if found.row.run.idempotency_key is not None:
            return None
        await scene.claims.end(named, run_id)
    except RunNotFound:
        return None
    except Unreachable as error:
        raise BufferUnavailable from error
    return found.row.run.id


def _named(request: ResetKey, turn: Turn) -> Snapshot:
    """A run in name only, for what is called after tenant, task and key."""
    return Snapshot(
        schema_version=SCHEMA_VERSION,
        id="",
        organization_id=turn.tenancy.organization_id,
        project_id="",
        environment_id=turn.tenancy.environment_id,
        task=request.task,
        idempotency_key=request.idempotency_key,
        idempotency_key_expires_at=turn.now + timedelta(days=1),
        trace_id="",
        span_id="",
        created_at=turn.now,
    )

"""`idempotency_key.reset`: make a key free, in both stores and in the hand-over between them."""

from datetime import timedelta

from app.batch import Shown
from app.changes import reset_key as take_key_off
from app.errors import BufferUnavailable, RunNotFound, Unreachable
from app.operations.scene import Scene, Turn
from schemas.operations import ResetKey
from schemas.replies import KeyResetReply
from schemas.snapshot import SCHEMA_VERSION, Snapshot


async def reset_key(scene: Scene, turn: Turn) -> Shown:
    """The buffer first: a run that is handed over meanwhile takes its key to Postgres, where it is next.

    Raises:
        RunNotFound: nothing has the key.
        StoreUnavailable, BufferUnavailable: it could not be looked for everywhere.
    """
    request: ResetKey = turn.request
    named = _named(request, turn)
    in_buffer = await _reset_in_buffer(scene, turn, named)
    in_store = await scene.keys.reset_key(turn.tenancy, request.task, request.idempotency_key)
    if in_buffer is None and in_store is None:
        raise RunNotFound("idempotency_key: no run of this environment has this key")
    return KeyResetReply(
        correlation_id=None,
        task=request.task,
        idempotency_key=request.idempotency_key,
        run_id=in_store or in_buffer,
    )


async def _reset_in_buffer(scene: Scene, turn: Turn, named: Snapshot) -> str | None:
    """The buffered run that had the key and lost it; None if there is none."""
    try:
        run_id = await scene.claims.holder(named)
        if run_id is None:
            return None
        try:
            found = await scene.runs.change(turn.tenancy, run_id, take_key_off, turn.now)
        except RunNotFound:
            return None
        await scene.claims.end(named, run_id)
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

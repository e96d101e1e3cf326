"""`run.replay`: a run's own request through the front door again, as a new run.

The new request is appended to the trigger stream with the caller's reply channel, so that it goes the way of
every other and is answered from there. Its run id is chosen by the operation's entry: one run, however
often the operation is handed out.
"""

from hashlib import blake2b

import msgspec
from msgspec import UNSET, Raw

from app.batch import Answer, Shown
from app.operations.scene import Scene, Turn, parse_run_id
from app.rows import Row
from app.run_ids import friendly
from schemas.operations import Replay
from schemas.requests import Environment, Options, TriggerRequest

_encode = msgspec.json.Encoder().encode


async def replay(scene: Scene, turn: Turn) -> Answer | Shown:
    """The answer is nobody's: the reply comes from the front door."""
    request: Replay = turn.request
    found = await scene.runs.find(turn.tenancy, parse_run_id(request.run_id), turn.now)
    digest = blake2b(f"{scene.settings.namespace}\0{turn.id}".encode(), digest_size=12).hexdigest()
    body = _encode(_request(found.row, request, f"replay{digest}"))
    item = turn.item
    await scene.front_door.trigger(body, item.reply_to, item.correlation_id)
    item.reply_to = None
    return Answer(found.row.run.id, None, None, is_mollified=False)


def _request(row: Row, request: Replay, run_id: str) -> TriggerRequest:
    """What the run was asked for with, as far as it is the run's own: not its key, delay, parent or batch."""
    run = row.run
    payload = Raw(run.payload) if run.payload is not None else UNSET
    return TriggerRequest(
        task=run.task,
        environment=Environment(
            id=run.environment_id,
            organization_id=run.organization_id,
            project_id=run.project_id,
            type=run.environment_type,  # type: ignore[arg-type]
            feature_flags=request.environment.feature_flags,
        ),
        payload=payload if isinstance(request.payload, msgspec.UnsetType) else request.payload,
        payload_type=run.payload_type,
        options=Options(
            run_id=friendly(run_id),
            ttl=run.ttl_seconds,
            queue=run.queue,
            concurrency_key=run.concurrency_key,
            worker_queue=run.worker_queue,
            machine=run.machine,
            priority=run.priority,
            max_attempts=run.max_attempts,
            max_duration=run.max_duration,
            lock_to_version=run.locked_to_version,
            test=run.is_test,
            tags=list(run.tags),
            metadata=UNSET if run.metadata is None else Raw(_compact(run.metadata)),
            replayed_from_run_id=friendly(run.id),
        ),
    )


def _compact(json: bytes) -> bytes:
    """JSON without the spaces that Postgres' jsonb puts in, which could take it over the limit."""
    return msgspec.json.format(json, indent=-1)

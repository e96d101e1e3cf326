"""`run.list`: the newest runs of an environment, buffered and stored ones merged.

The buffer is read first, and then Postgres: a run only ever moves that way, so one that is being handed
over may be seen twice, and is never missed.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta

from app.batch import Shown
from app.details import details
from app.errors import InvalidRequest
from app.operations.scene import Filter, Position, Scene, Turn
from app.run_ids import friendly, parse_friendly
from app.runs import Found
from schemas.operations import List
from schemas.replies import RunListReply

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


async def list_runs(scene: Scene, turn: Turn) -> Shown:
    request: List = turn.request
    wanted = Filter(
        limit=request.limit + 1,
        before=None if request.cursor is None else _position(request.cursor),
        status=request.status,
        task=request.task,
        tag=request.tag,
        since=_in_utc("since", request.since),
        until=_in_utc("until", request.until),
    )
    found: dict[str, Found] = {
        one.row.run.id: one for one in await scene.buffered.newest(turn.tenancy, wanted, turn.now)
    }
    found |= {one.row.run.id: one for one in await scene.stored.newest(turn.tenancy, wanted, turn.now)}
    page = sorted(found.values(), key=place, reverse=True)[: request.limit]
    is_last = len(found) <= request.limit
    return RunListReply(
        correlation_id=None,
        runs=[details(one) for one in page],
        next_cursor=None if is_last else _cursor(place(page[-1])),
    )


def place(found: Found) -> Position:
    """Where a run stands in the order."""
    run = found.row.run
    return Position(run.created_at, run.id)


def _cursor(position: Position) -> str:
    microseconds = (position.created_at - _EPOCH) // timedelta(microseconds=1)
    return urlsafe_b64encode(f"{microseconds}:{position.run_id}".encode()).decode().rstrip("=")


def _position(cursor: str) -> Position:
    try:
        text = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        microseconds, _, run_id = text.partition(":")
        parse_friendly(friendly(run_id))
        return Position(_EPOCH + timedelta(microseconds=int(microseconds)), run_id)
    except (ValueError, OverflowError):
        raise InvalidRequest("cursor: not one that a list was answered with") from None


def _in_utc(field: str, instant: datetime | None) -> datetime | None:
    try:
        return None if instant is None else instant.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest(f"{field}: before the year 1 or after the year 9999") from None

"""Step 9: every outcome becomes a reply, or a dead letter when nobody can be told. Guarantee G1."""

from datetime import datetime

import msgspec
from msgspec.structs import replace

from app import run_ids
from app.batch import Answer, Batch, DeadLetter, Item
from app.errors import RequestError, Undecodable
from app.ports import Desk, Reservations
from app.telemetry import Telemetry
from schemas.replies import MOLLIFIED, ErrorDetail, ErrorReply, RunReference, RunReply

_encode = msgspec.json.Encoder().encode


class Respond:
    """Sets dead letters aside, then answers and acknowledges all items that have an outcome."""

    def __init__(self, reservations: Reservations, desk: Desk, telemetry: Telemetry) -> None:
        self._reservations = reservations
        self._desk = desk
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        finished = [item for item in batch.items if not item.suspended]
        dead = [item for item in finished if _is_dead(item)]
        if dead:
            lost = await self._desk.set_aside(dead)
            finished = [item for item in finished if item not in lost]
        replies = [(item, encode_reply(item, batch.now)) for item in finished]
        if batch.switches.enabled:
            runs = [item.run for item in finished if item.run is not None and _is_settled_id(item)]
            await self._reservations.release(runs)
        await self._desk.respond(replies)
        self._telemetry.responded(finished)


def encode_reply(item: Item, now: datetime) -> bytes | None:
    """The JSON of an item's reply; None when there is nobody to send it to."""
    if item.reply_to is None:
        return None
    if item.shown is not None:
        return _encode(replace(item.shown, correlation_id=item.correlation_id))
    outcome = item.outcome
    if isinstance(outcome, Answer):
        is_delayed = outcome.delay_until is not None and outcome.delay_until > now
        return _encode(
            RunReply(
                correlation_id=item.correlation_id,
                run=RunReference(
                    id=outcome.run_id, friendly_id=run_ids.friendly(outcome.run_id), span_id=outcome.span_id
                ),
                status="DELAYED" if is_delayed else "QUEUED",
                is_cached=outcome.is_cached,
                is_mollified=outcome.is_mollified,
                notice=MOLLIFIED if outcome.is_mollified and not outcome.is_cached else msgspec.UNSET,
            )
        )
    assert outcome is not None
    return _encode(
        ErrorReply(
            correlation_id=item.correlation_id,
            error=ErrorDetail(
                code=outcome.code,
                message=outcome.message,
                status=outcome.status,
                retryable=outcome.retryable,
            ),
        )
    )


def _is_dead(item: Item) -> bool:
    """Whether an item becomes a dead letter; gives it the reason when it has none yet."""
    if item.dead_letter is None and isinstance(item.outcome, RequestError):
        if isinstance(item.outcome, Undecodable):
            item.dead_letter = DeadLetter("undecodable", item.outcome.message)
        elif item.reply_to is None:
            item.dead_letter = DeadLetter("unanswerable", f"{item.outcome.code}: {item.outcome.message}")
    return item.dead_letter is not None


def _is_settled_id(item: Item) -> bool:
    """Whether a caller-chosen id need not be held any longer: its run is a row, or came to nothing.

    After an error that another try may mend it is held: another attempt may just be buffering its run. The
    sweeper ends what is left of that.
    """
    outcome, run = item.outcome, item.run
    if isinstance(outcome, RequestError) and outcome.retryable:
        return False
    is_buffered = isinstance(outcome, Answer) and outcome.is_mollified
    is_own = isinstance(outcome, Answer) and run is not None and outcome.run_id == run.id
    return item.needs_reservation and not (is_buffered and is_own)

"""What changes do to a run, told once for buffered runs and rows alike. DESIGN section 3.3.

Each takes the run as it is and returns it as it is to be, or the same one if there is nothing to do.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
from msgspec.structs import replace

from app.errors import InvalidRequest, MetadataTooLarge, RunFinished, RunNotDelayed, TooManyTags
from app.metadata import apply
from app.nesting import MOST_LEVELS_OF_METADATA, is_deeper
from app.rows import Row, status_at
from schemas.operations import AnyMetadataOperation

# Numbers that nobody touches stay as they are, to the last digit.
_decode = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode

Change = Callable[[Row], Row]

_REMEMBERED = 500
"""Operations that a run remembers: as many as a batch has, for all of one may be handed out again."""


def once(change: Change, operation_id: str) -> Change:
    """A change that is made once, however often its operation is handed out."""

    def changed(row: Row) -> Row:
        if operation_id in row.applied:
            return row
        after = change(row)
        if after is row:
            return row
        return after._replace(revision=row.revision + 1, applied=(*row.applied, operation_id)[-_REMEMBERED:])

    return changed


def cancel(reason: str | None, now: datetime) -> Change:
    """Cancel, unless the run has ended; the first reason is kept."""

    def change(row: Row) -> Row:
        return (
            row if row.is_final else row._replace(status="CANCELED", cancelled_at=now, cancel_reason=reason)
        )

    return change


def reschedule(delay_until: datetime, now: datetime) -> Change:
    """Delay a delayed run until another instant.

    Raises:
        RunFinished, RunNotDelayed: from the change.
    """

    def change(row: Row) -> Row:
        _refuse_final(row)
        if row.status != "DELAYED":
            raise RunNotDelayed
        run = replace(row.run, delay_until=delay_until)
        return row._replace(run=run, status=status_at(run, now))

    return change


def add_tags(tags: Sequence[str], most: int) -> Change:
    """Add tags behind those that are there; each stays once.

    Raises:
        RunFinished, TooManyTags: from the change; nothing is added then.
    """

    def change(row: Row) -> Row:
        _refuse_final(row)
        union = tuple(dict.fromkeys((*row.run.tags, *tags)))
        if len(union) > most:
            raise TooManyTags(f"tags: with these the run would have {len(union)}, more than {most}")
        return row if union == row.run.tags else row._replace(run=replace(row.run, tags=union))

    return change


def replace_metadata(metadata: bytes) -> Change:
    """Replace the metadata, JSON text of an object.

    Raises:
        RunFinished: from the change.
    """

    def change(row: Row) -> Row:
        _refuse_final(row)
        return _with_metadata(row, metadata)

    return change


def note(row: Row) -> Row:
    """Change nothing but what is remembered of an operation, whose work is on other runs.

    Raises:
        RunFinished: from the change.
    """
    _refuse_final(row)
    return row._replace()


def change_metadata(operations: Sequence[AnyMetadataOperation], most_bytes: int) -> Change:
    """Change the metadata by operations.

    Raises:
        RunFinished, InvalidRequest, MetadataTooLarge: from the change.
    """

    def change(row: Row) -> Row:
        _refuse_final(row)
        if not operations:
            return row
        try:
            before = {} if row.run.metadata is None else _decode(row.run.metadata)
            metadata = _encode(apply(before, operations))
        except (OverflowError, RecursionError) as error:
            raise InvalidRequest(f"operations: what they come to cannot be written: {error}") from None
        if is_deeper(metadata, MOST_LEVELS_OF_METADATA):
            raise InvalidRequest(f"metadata: nested more than {MOST_LEVELS_OF_METADATA} levels deep")
        if len(metadata) > most_bytes:
            raise MetadataTooLarge(f"metadata: {len(metadata)} bytes are more than {most_bytes}")
        return _with_metadata(row, metadata)

    return change


def reset_key(row: Row) -> Row:
    """Take the idempotency key off a run."""
    if row.run.idempotency_key is None:
        return row
    run = replace(row.run, idempotency_key=None, idempotency_key_expires_at=None)
    return row._replace(run=run, revision=row.revision + 1)


def _with_metadata(row: Row, metadata: bytes) -> Row:
    return row._replace(run=replace(row.run, metadata=metadata), metadata_version=row.metadata_version + 1)


def _refuse_final(row: Row) -> None:
    if row.is_final:
        raise RunFinished

"""What was changed on a buffered run after it was accepted; merged when the run is read or materialised.

Like a snapshot it is stored by one version of this program and read by another: fields are only ever
added, each with a default that means no change.
"""

import msgspec

from schemas.requests import Instant


class Overlay(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """All changes to one run so far; `revision` counts them. What is None was not changed.

    `tags` are all of its tags, `metadata` is JSON text as bytes. `is_key_reset`: the run has no idempotency
    key any more. `applied` are the last operations, by stream entry.
    """

    revision: int
    changed_at: Instant | None = None
    cancelled_at: Instant | None = None
    cancel_reason: str | None = None
    delay_until: Instant | None = None
    tags: tuple[str, ...] | None = None
    metadata: bytes | None = None
    metadata_version: int = 1
    is_key_reset: bool = False
    applied: tuple[str, ...] = ()


encode_overlay = msgspec.msgpack.Encoder().encode
decode_overlay = msgspec.msgpack.Decoder(Overlay).decode

"""Buffered runs, read and changed one at a time, and listed."""

from collections.abc import Sequence
from datetime import datetime
from typing import cast, get_args

from redis.exceptions import ResponseError

from app.errors import BufferUnavailable
from app.keys import Keys
from app.operations.scene import Filter
from app.redis_client import Call, Scripts
from app.rows import Row, row_at
from app.runs import BufferedRun, Found, State, Tenancy
from app.validate import entry_time
from schemas.overlay import Overlay, decode_overlay, encode_overlay
from schemas.snapshot import Snapshot, decode_snapshot

_AT_ONCE = 500


class RedisBufferedRuns:
    """Implements `runs.BufferedRuns` and `scene.Listing` with `lua/read.lua` and `change.lua`."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def find(self, tenancy: Tenancy, run_id: str, now: datetime) -> BufferedRun | None:
        """See `runs.BufferedRuns.find`."""
        (found,) = await self._scripts.demand([Call("read", self._names(tenancy.environment_id), [run_id])])
        if found is None:
            return None
        state, snapshot, overlay = found
        run = decode_snapshot(snapshot)
        if run.organization_id != tenancy.organization_id:
            return None
        return buffered_run(state.decode(), run, overlay, now)

    async def change(self, before: BufferedRun, after: Row, now: datetime) -> BufferedRun | None:
        """See `runs.BufferedRuns.change`."""
        run = before.row.run
        keys = self._names(run.environment_id)
        loses_key = run.idempotency_key is not None and after.run.idempotency_key is None
        if loses_key:
            keys.append(self._keys.claim(run))
        overlay = encode_overlay(_overlay(before, after, now))
        (changed,) = await self._scripts.run([Call("change", keys, [run.id, before.overlay or b"", overlay])])
        if isinstance(changed, ResponseError):
            raise BufferUnavailable from changed
        return BufferedRun(after, "QUEUED", now, overlay) if changed else None

    async def newest(self, tenancy: Tenancy, wanted: Filter, now: datetime) -> Sequence[Found]:
        """See `scene.Listing.newest`. Reads the environment's entries from the newest on, until no older one
        can belong to the answer: a run is accepted after it was requested.
        """
        names = self._keys.environment(tenancy.environment_id)
        (done,) = await self._scripts.demand([Call("HGET", None, [names.drain, "done"])])
        oldest = "-" if done is None else f"({done.decode()}"
        found: list[BufferedRun] = []
        newest = "+"
        while True:
            (entries,) = await self._scripts.demand(
                [Call("XREVRANGE", None, [names.entries, newest, oldest, "COUNT", _AT_ONCE])]
            )
            if not entries:
                break
            run_ids = [fields[b"run_id"] for _, fields in entries]
            (overlays,) = await self._scripts.demand([Call("HMGET", None, [names.overlays, *run_ids])])
            for (_, fields), overlay in zip(entries, overlays, strict=True):
                try:
                    one = buffered_run("QUEUED", decode_snapshot(fields[b"snapshot"]), overlay, now)
                except ValueError:  # as msgspec's own errors are
                    continue  # the drainer is going to set it aside
                if _passes(one, tenancy, wanted):
                    found.append(one)
            found = sorted(found, key=_place, reverse=True)[: wanted.limit]
            last_id = entries[-1][0].decode()
            accepted_at = entry_time(int(last_id.partition("-")[0]))
            is_full = len(found) == wanted.limit and accepted_at < found[-1].row.run.created_at
            if is_full or (wanted.since is not None and accepted_at < wanted.since):
                break
            newest = f"({last_id}"
        return found

    def _names(self, environment_id: str) -> list[str]:
        names = self._keys.environment(environment_id)
        return [names.entries, names.index, names.drain, names.overlays]


def buffered_run(state: str, run: Snapshot, stored: bytes | None, now: datetime) -> BufferedRun:
    """What the buffer holds of a run, as it is at a time."""
    overlay = None if stored is None else decode_overlay(stored)
    assert state in get_args(State)
    updated_at = (overlay and overlay.changed_at) or run.buffered_at or run.created_at
    return BufferedRun(row_at(run, overlay, now), cast("State", state), updated_at, stored)


def _place(one: BufferedRun) -> tuple[datetime, str]:
    return one.row.run.created_at, one.row.run.id


def _passes(one: BufferedRun, tenancy: Tenancy, wanted: Filter) -> bool:
    row, run = one.row, one.row.run
    return (
        run.organization_id == tenancy.organization_id
        and (wanted.before is None or _place(one) < wanted.before)
        and (wanted.status is None or row.status == wanted.status)
        and (wanted.task is None or run.task == wanted.task)
        and (wanted.tag is None or wanted.tag in run.tags)
        and (wanted.since is None or run.created_at >= wanted.since)
        and (wanted.until is None or run.created_at < wanted.until)
    )


def _overlay(before: BufferedRun, after: Row, now: datetime) -> Overlay:
    """All that differs from the snapshot, once the run has become `after`."""
    was = Overlay(revision=0) if before.overlay is None else decode_overlay(before.overlay)
    old, new = before.row.run, after.run
    return Overlay(
        revision=after.revision,
        changed_at=now,
        cancelled_at=after.cancelled_at,
        cancel_reason=after.cancel_reason,
        delay_until=was.delay_until if new.delay_until == old.delay_until else new.delay_until,
        tags=was.tags if new.tags == old.tags else new.tags,
        metadata=was.metadata if new.metadata == old.metadata else new.metadata,
        metadata_version=after.metadata_version,
        is_key_reset=was.is_key_reset or (old.idempotency_key is not None and new.idempotency_key is None),
        applied=after.applied,
    )

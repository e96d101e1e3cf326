"""Step 2: from a request to the run it asks for, within the limits and with durations as instants.

Every instant counts from the time of the stream entry, so that a request which is handled again
asks for the same run. DESIGN section 5.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import TypeVar

import msgspec
import orjson

from app import run_ids
from app.batch import Batch, Entry
from app.durations import parse_delay, parse_duration, parse_ttl
from app.errors import (
    InvalidRequest,
    MetadataTooLarge,
    PayloadTooLarge,
    RequestError,
    RunIdConflict,
    TooManyTags,
)
from app.nesting import MOST_LEVELS_OF_METADATA, is_deeper
from app.settings import Settings
from schemas.requests import TRACEPARENT, Options, TraceContext, TriggerRequest
from schemas.snapshot import SCHEMA_VERSION, Snapshot

KEY_TTL_S = 30 * 86_400

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST_MS = 253_402_300_799_000 - 20 * 366 * 86_400_000
_TRACEPARENT = re.compile(TRACEPARENT)
_FINEST = 16_383
"""Digits behind the point that a number may have in jsonb."""

_PERHAPS_TOO_FINE = re.compile(rb"[eE]-0*[1-9]\d{2}|\.\d{16000}")
_NUL_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

Value = TypeVar("Value")
Parsed = TypeVar("Parsed")


class Validate:
    """Fills in the run that each request asks for, or its outcome."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __call__(self, batch: Batch) -> None:
        for item in batch.open():
            assert item.request is not None
            try:
                item.run = build_run(item.entry, item.request, self._settings)
            except RequestError as error:
                item.outcome = error


def build_run(entry: Entry, request: TriggerRequest, settings: Settings) -> Snapshot:
    """The run that a request asks for.

    Raises:
        InvalidRequest, PayloadTooLarge, MetadataTooLarge, TooManyTags: the message names the field.
        RunIdConflict: the chosen id is bound to another tenant.
    """
    options, environment = request.options, request.environment
    created_at = entry_time(entry.ms)
    run_id = _run_id(entry, request, settings)
    trace_id, parent_span_id, trace_context = _trace(run_id, request.trace_context)
    ttl_seconds = None if options.ttl is None else _parsed("options.ttl", parse_ttl, options.ttl)
    delay_until, debounce_until = _delay(options, created_at)
    if len(options.tags) > settings.max_tags:
        raise TooManyTags(f"options.tags: {len(options.tags)} are more than {settings.max_tags}")
    return Snapshot(
        schema_version=SCHEMA_VERSION,
        id=run_id,
        organization_id=environment.organization_id,
        project_id=environment.project_id,
        environment_id=environment.id,
        environment_type=environment.type,
        task=request.task,
        payload=_payload(request, settings),
        payload_type=request.payload_type,
        metadata=_metadata(options, settings),
        tags=tuple(dict.fromkeys(options.tags)) if options.tags else (),
        idempotency_key=options.idempotency_key,
        idempotency_key_expires_at=_key_expiry(options, created_at),
        idempotency_key_options=msgspec.json.encode(options.idempotency_key_options)
        if options.idempotency_key_options
        else None,
        delay_until=delay_until,
        ttl_seconds=ttl_seconds,
        expires_at=None if ttl_seconds is None else created_at + timedelta(seconds=ttl_seconds),
        queue=options.queue,
        concurrency_key=options.concurrency_key,
        worker_queue=options.worker_queue,
        machine=options.machine,
        priority=options.priority,
        max_attempts=options.max_attempts,
        max_duration=options.max_duration,
        locked_to_version=options.lock_to_version,
        is_test=options.test,
        parent_run_id=_parse("options.parent_run_id", run_ids.parse_friendly, options.parent_run_id),
        resume_parent_on_completion=options.resume_parent_on_completion,
        batch_id=options.batch.id if options.batch else None,
        batch_index=options.batch.index if options.batch else None,
        debounce_key=options.debounce.key if options.debounce else None,
        debounce_mode=options.debounce.mode if options.debounce else "trailing",
        debounce_until=debounce_until,
        one_time_use_token=options.one_time_use_token,
        replayed_from_run_id=_parse(
            "options.replayed_from_run_id", run_ids.parse_friendly, options.replayed_from_run_id
        ),
        trace_id=trace_id,
        span_id=run_ids.span_id(run_id),
        parent_span_id=parent_span_id,
        trace_context=trace_context,
        created_at=created_at,
    )


@lru_cache(maxsize=1_024)
def entry_time(ms: int) -> datetime:
    """The time of a stream entry; producers may write ids of any size, so it is bounded."""
    return _EPOCH + timedelta(milliseconds=min(ms, _LATEST_MS))


def _run_id(entry: Entry, request: TriggerRequest, settings: Settings) -> str:
    if request.options.run_id is not None:
        run_id = _parsed("options.run_id", run_ids.parse_friendly, request.options.run_id)
        if run_ids.is_foreign(run_id, request.environment.organization_id, request.environment.id):
            raise RunIdConflict
        return run_id
    return run_ids.derive(settings.namespace, entry.id, request.environment.id)


def _payload(request: TriggerRequest, settings: Settings) -> bytes | None:
    if isinstance(request.payload, msgspec.UnsetType):
        return None
    payload = bytes(request.payload)
    if len(payload) > settings.max_payload_bytes:
        raise PayloadTooLarge(f"payload: {len(payload)} bytes are more than {settings.max_payload_bytes}")
    return payload


def _metadata(options: Options, settings: Settings) -> bytes | None:
    if isinstance(options.metadata, msgspec.UnsetType):
        return None
    return check_metadata("options.metadata", bytes(options.metadata), settings.max_metadata_bytes)


def check_metadata(field: str, metadata: bytes, most_bytes: int) -> bytes:
    """Metadata, if it is an object that Postgres' jsonb can hold.

    Raises:
        InvalidRequest, MetadataTooLarge: the message names `field`.
    """
    if len(metadata) > most_bytes:
        raise MetadataTooLarge(f"{field}: {len(metadata)} bytes are more than {most_bytes}")
    if not metadata.startswith(b"{"):
        raise InvalidRequest(f"{field}: must be an object")
    if is_deeper(metadata, MOST_LEVELS_OF_METADATA):
        raise InvalidRequest(f"{field}: nested more than {MOST_LEVELS_OF_METADATA} levels deep")
    if _NUL_ESCAPE.search(metadata):
        raise InvalidRequest(f"{field}: contains a NUL character")
    try:
        orjson.loads(metadata)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{field}: {error}") from None
    if _PERHAPS_TOO_FINE.search(metadata):
        try:
            _read_numbers(metadata)
        except ValueError:
            raise InvalidRequest(f"{field}: a number has more than {_FINEST} decimals") from None
    return metadata


def _refuse_too_fine(number: str) -> None:
    try:
        exponent = Decimal(number).as_tuple().exponent
    except ArithmeticError as error:
        raise ValueError(number) from error
    if not isinstance(exponent, int) or -exponent > _FINEST:
        raise ValueError(number)


_read_numbers = msgspec.json.Decoder(float_hook=_refuse_too_fine).decode


def _delay(options: Options, created_at: datetime) -> tuple[datetime | None, datetime | None]:
    """Until when a run is delayed, and how far its debounce key may push it back (None: no limit)."""
    delay_until = _parse("options.delay", lambda text: parse_delay(text, created_at), options.delay)
    debounce = options.debounce
    if debounce is None:
        return delay_until, None
    pushed = created_at + timedelta(seconds=_parsed("options.debounce.delay", parse_duration, debounce.delay))
    longest = _parse("options.debounce.max_delay", parse_duration, debounce.max_delay)
    limit = None if longest is None else created_at + timedelta(seconds=longest)
    if limit is not None and limit <= pushed:
        raise InvalidRequest("options.debounce.max_delay: must be longer than options.debounce.delay")
    if limit is not None and delay_until is not None and limit <= delay_until:
        raise InvalidRequest("options.debounce.max_delay: must be longer than options.delay")
    return max(pushed, delay_until or pushed), limit


def _key_expiry(options: Options, created_at: datetime) -> datetime | None:
    seconds = _parse("options.idempotency_key_ttl", parse_ttl, options.idempotency_key_ttl)
    if options.idempotency_key is None:
        return None
    return _after(created_at, KEY_TTL_S if seconds is None else seconds)


@lru_cache(maxsize=1_024)
def _after(instant: datetime, seconds: int) -> datetime:
    """Requests of one millisecond share their instants, as far as that goes."""
    return instant + timedelta(seconds=seconds)


def _trace(run_id: str, context: TraceContext | None) -> tuple[str, str | None, bytes | None]:
    if context is None or context.traceparent is None:
        return run_ids.trace_id(run_id), None, None
    match = _TRACEPARENT.fullmatch(context.traceparent)
    if match is None:
        raise InvalidRequest("trace_context.traceparent: not a W3C traceparent")
    return match[1], match[2], msgspec.json.encode(context)


def _parse(field: str, parse: Callable[[Value], Parsed], value: Value | None) -> Parsed | None:
    return None if value is None else _parsed(field, parse, value)


def _parsed(field: str, parse: Callable[[Value], Parsed], value: Value) -> Parsed:
    try:
        return parse(value)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error}") from None

"""Debouncing in Postgres: a debounce key has one delayed run, and every further trigger pushes it back.

The triggers of a batch that share a key are folded into one, as if they had come one by one.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg
from msgspec.structs import replace

from app.batch import Answer
from app.errors import InternalError, OneTimeUseTokenUsed, RequestError
from app.inserts import TRIES, answer, fetch_apart, free_keys, is_hindered, look_up
from app.postgres import Connection, is_unavailable, refusal, statement
from app.rows import Row
from schemas.snapshot import Snapshot

Key = tuple[str, str, str, str]


class Fold(NamedTuple):
    """What triggers of one debounce key come to.

    `run` is what they make if the key has no run; else they push its run back to `until`, and replace its
    payload if `trailing_at` is later than the trigger that it is from.
    """

    run: Snapshot
    trailing_at: datetime | None
    until: datetime


def fold(triggers: Sequence[Snapshot]) -> Fold:
    """Fold triggers of one key, at least one. The oldest makes the run."""
    ordered = sorted(triggers, key=lambda trigger: trigger.created_at)
    first = ordered[0]
    trailing = [trigger for trigger in ordered if trigger.debounce_mode == "trailing"]
    newest = trailing[-1] if trailing else first
    until = max(trigger.delay_until for trigger in ordered if trigger.delay_until is not None)
    run = replace(
        first,
        payload=newest.payload,
        payload_type=newest.payload_type,
        delay_until=min(until, first.debounce_until or until),
    )
    return Fold(run, newest.created_at if trailing else None, until)


async def debounce(
    connection: Connection, triggers: Sequence[Snapshot], now: datetime, tries: int = TRIES
) -> list[Answer | RequestError]:
    """Give triggers their keys' runs in one statement; per trigger, in order, its run or its refusal.

    What a first try runs into by surprise (an id, idempotency key or token that another request has just
    taken) is looked up by the next.
    """
    suspects = [
        position
        for position, trigger in enumerate(triggers)
        if tries < TRIES or trigger.idempotency_key is not None or trigger.one_time_use_token is not None
    ]
    settled = await _hindered(connection, {position: triggers[position] for position in suspects}, now)
    groups: dict[Key, list[Snapshot]] = {}
    for position, trigger in enumerate(triggers):
        if position not in settled:
            groups.setdefault(_key(trigger), []).append(trigger)
    try:
        records = await fetch_apart(connection, statement("debounce_runs"), *_arguments(groups))
    except (asyncpg.UniqueViolationError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError) as error:
        if tries > 1:
            return await debounce(connection, triggers, now, tries - 1)
        if is_unavailable(error):
            raise
        return [settled.get(position, InternalError()) for position in range(len(triggers))]
    except Exception as error:
        if is_unavailable(error):
            raise
        if len(triggers) == 1:
            return [refusal(error)]
        half = len(triggers) // 2
        return [
            *await debounce(connection, triggers[:half], now),
            *await debounce(connection, triggers[half:], now),
        ]
    runs = {_key_of_record(record): record for record in records}
    return [
        settled.get(position) or _answer(trigger, runs[_key(trigger)])
        for position, trigger in enumerate(triggers)
    ]


async def _hindered(
    connection: Connection, triggers: Mapping[int, Snapshot], now: datetime
) -> dict[int, Answer | RequestError]:
    """Answers to the triggers that neither make a run nor push one back, by position."""
    if not triggers:
        return {}
    settled: dict[int, Answer | RequestError] = {}
    tokens: set[str] = set()
    free = []
    records = await look_up(connection, list(triggers.values()), now)
    for (position, trigger), record in zip(triggers.items(), records, strict=True):
        token = trigger.one_time_use_token
        if is_hindered(record):
            settled[position] = answer(trigger, record)
        elif token is not None and token in tokens:
            settled[position] = OneTimeUseTokenUsed()
        else:
            tokens.update([token] if token else [])
            if record["winner_key_is_free"]:
                free.append(trigger)
    if free:
        await free_keys(connection, free, now)
    return settled


def _arguments(groups: Mapping[Key, Sequence[Snapshot]]) -> tuple[Any, ...]:
    """The arguments of `debounce_runs`. In order of keys, so that racing batches do not deadlock."""
    folds = [fold(groups[key]) for key in sorted(groups)]
    triggers = [trigger for triggers in groups.values() for trigger in triggers]
    return (
        [Row(one.run, "DELAYED").values() for one in folds],
        [one.trailing_at for one in folds],
        [one.run.id for one in folds],
        [one.until for one in folds],
        [trigger.id for trigger in triggers],
        [trigger.organization_id for trigger in triggers],
        [trigger.environment_id for trigger in triggers],
        [trigger.task for trigger in triggers],
        [trigger.debounce_key for trigger in triggers],
        [trigger.one_time_use_token for trigger in triggers],
    )


def _key(run: Snapshot) -> Key:
    return run.organization_id, run.environment_id, run.task, run.debounce_key or ""


def _key_of_record(record: asyncpg.Record) -> Key:
    return record["organization_id"], record["environment_id"], record["task"], record["debounce_key"]


def _answer(trigger: Snapshot, record: asyncpg.Record) -> Answer:
    return Answer(
        record["id"], record["span_id"], record["delay_until"], False, is_cached=record["id"] != trigger.id
    )

"""Rules about idempotency keys, debounce keys and one-time-use tokens."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any

from tests.chaos.evidence import Row, Story, Violation, marker, seconds
from tests.chaos.journal import Attempt

Key = tuple[str, str, str]

CLAIM_OUTLIVES_KEY_S = 2.0
"""A claim lives for CLAIM_MIN_TTL_S at least, however short its key's life is."""

_MAY_COME_AGAIN_S = 1.0
"""Requests that take longer may have been handed out more than once."""

_ENDS_ITS_KEY = ("FAILED", "EXPIRED", "SYSTEM_FAILURE")


def _keyed(story: Story) -> dict[Key, list[Attempt]]:
    found: defaultdict[Key, list[Attempt]] = defaultdict(list)
    for attempt in story.attempts:
        key = attempt.options.get("idempotency_key")
        if attempt.stream == "triggers" and key is not None and "task" in attempt.body:
            found[attempt.environment, attempt.body["task"], key].append(attempt)
    return dict(found)


def resets(story: Story) -> dict[Key, list[tuple[float, float]]]:
    """From when to when each key may have been reset by an operation."""
    found: defaultdict[Key, list[tuple[float, float]]] = defaultdict(list)
    for attempt in story.attempts:
        if attempt.kind == "reset" and attempt.fate != "refused":
            told = attempt.told("idempotency_key_reset")
            errors = attempt.told("error")
            # One that was handed out again finds nothing if it was done the first time.
            may_be_again = any(one.at - attempt.sending_at > _MAY_COME_AGAIN_S for one in errors)
            if errors and not told and not may_be_again and "store_unavailable" not in attempt.codes:
                continue
            until = told[0].at if told else float("inf")
            body = attempt.body
            key = (attempt.environment, body["task"], body["idempotency_key"])
            found[key].append((attempt.sending_at, until))
    return dict(found)


def _rows_by_key(story: Story, keyed: dict[Key, list[Attempt]]) -> dict[Key, list[Row]]:
    """The rows that were made by requests of each key, by the time at which they were accepted."""
    found: dict[Key, list[Row]] = {}
    for key, attempts in keyed.items():
        requests = {attempt.request for attempt in attempts}
        rows = [row for request in requests for row in story.rows_of.get(request, [])]
        found[key] = sorted(rows, key=lambda row: _accepted_at(story, row))
    return found


def _accepted_at(story: Story, row: Row) -> float:
    """`buffered_at` is by the clock of a worker, which may have jumped; the other times are the servers'."""
    at: datetime = min(row["buffered_at"] or row["materialised_at"], row["materialised_at"])
    return min(seconds(max(at, row["created_at"])), _accepted_by(story, row))


def _accepted_by(story: Story, row: Row) -> float:
    """When a row's run had been accepted at the latest: somebody had been told of it, or it was a row."""
    attempts = story.by_request.get(marker(row) or "", [])
    told = [
        one.at for attempt in attempts for one in attempt.told("run") if one.reply["run"]["id"] == row["id"]
    ]
    return min(told, default=seconds(row["materialised_at"]))


def one_run_per_key(story: Story) -> Iterator[Violation]:
    """A second run of a key was accepted only after the first one's key had expired, been reset, or its run
    had failed."""
    keyed, reset = _keyed(story), resets(story)
    for key, rows in _rows_by_key(story, keyed).items():
        for first, second in pairwise(row for row in rows if row["status"] not in _ENDS_ITS_KEY):
            if not _was_freed(story, key, keyed, reset, first, second):
                yield Violation(
                    "one run per key",
                    f"{key}",
                    f"{first['id']} ({first['status']}) and {second['id']} ({second['status']}),"
                    f" accepted {_accepted_at(story, first):.3f} and {_accepted_at(story, second):.3f}",
                )


def _was_freed(
    story: Story,
    key: Key,
    keyed: dict[Key, list[Attempt]],
    reset: dict[Key, list[tuple[float, float]]],
    first: Row,
    second: Row,
) -> bool:
    if any(row["status"] == "CANCELED" and row["idempotency_key"] is None for row in (first, second)):
        return True  # who was cancelled before it lost its key to the other is a row of its own
    start, end = seconds(first["created_at"]), _accepted_by(story, second)
    # Two that were accepted side by side, without claims, are made one when the later of them becomes a row.
    are_rows = max(seconds(first["materialised_at"]), seconds(second["materialised_at"]))
    if any(since <= max(end, are_rows) + 1 and start <= until for since, until in reset.get(key, ())):
        return True
    life_s = _life_s(keyed[key])
    if life_s is not None and are_rows >= start + life_s and story.was_off(start, end):
        return True  # nobody claimed; and the later of them became a row when a third may have had the key
    return life_s is not None and (end >= start + life_s - 0.1 or story.jumped(start - 5, end + 5))


def _life_s(attempts: list[Attempt]) -> float | None:
    """The shortest life that any of a key's requests gave it, if it can have ended within the storm."""
    lives = [attempt.options.get("idempotency_key_ttl", "30d") for attempt in attempts]
    seconds_only = [float(life.removesuffix("s")) for life in lives if life.endswith("s")]
    return min(seconds_only, default=None)


def replies_name_the_keys_run(story: Story) -> Iterator[Violation]:
    """Every reply to a request with a key names a run of that key, one whose key had not ended by then."""
    keyed, reset = _keyed(story), resets(story)
    made = _rows_by_key(story, keyed)
    for key, attempts in keyed.items():
        ids = {row["id"] for row in made[key]}
        for attempt in attempts:
            for told in attempt.told("run"):
                row = story.resolve(told.reply["run"]["id"])
                if row is not None and row["id"] not in ids:
                    yield Violation(
                        "replies name the key's run", attempt.name, f"told {row['id']}, which has another key"
                    )
                elif row is not None and not _was_live(
                    story, key, reset, told.reply["run"]["id"], row, attempt, told.at
                ):
                    yield Violation(
                        "replies name the key's run",
                        attempt.name,
                        f"told {row['id']}, whose key had ended before it was sent",
                    )


def _was_live(
    story: Story,
    key: Key,
    reset: dict[Key, list[tuple[float, float]]],
    run_id: str,
    row: Row,
    attempt: Attempt,
    told_at: float,
) -> bool:
    expires_at = _key_expiry(story, row) if run_id == row["id"] else _alias_key_expiry(story, run_id)
    if expires_at is None or reset.get(key):
        return True
    is_in_time = attempt.sending_at <= expires_at + CLAIM_OUTLIVES_KEY_S
    return is_in_time or story.jumped(attempt.sending_at - 30, told_at)


def _key_expiry(story: Story, row: Row) -> float | None:
    """When the key of a row ended at the latest; None: not within the storm.

    Its claim lives as long from when the buffer has it as it would have from when it was to be buffered.
    """
    attempts = story.by_request.get(marker(row) or "")
    life = attempts[0].options.get("idempotency_key_ttl", "30d") if attempts else "30d"
    if not life.endswith("s"):
        return None
    accepted = _accepted_by(story, row) if row["buffered_at"] else 0.0
    return max(seconds(row["created_at"]), accepted) + float(life[:-1])


def _alias_key_expiry(story: Story, run_id: str) -> float | None:
    """When the key of a run ended at the latest that became an alias; None: not within the storm."""
    ends = [
        told_at + float(life[:-1])
        for attempt, told_at in story.told_first.get(run_id, ())
        if (life := attempt.options.get("idempotency_key_ttl", "30d")).endswith("s")
    ]
    return max(ends, default=None)


def one_delayed_run_per_debounce_key(story: Story) -> Iterator[Violation]:
    """A debounce key has one delayed run, which each reply names, with the newest payload and delay."""
    groups: defaultdict[Key, list[Attempt]] = defaultdict(list)
    for attempt in story.attempts:
        if "debounce" in attempt.options and attempt.stream == "triggers":
            key = (attempt.environment, attempt.body["task"], attempt.options["debounce"]["key"])
            groups[key].append(attempt)
    delayed: defaultdict[Key, list[Row]] = defaultdict(list)
    for row in story.end.rows:
        if row["debounce_key"] is not None:
            delayed[row["environment_id"], row["task"], row["debounce_key"]].append(row)
    for key, rows in delayed.items():
        if sum(row["status"] == "DELAYED" for row in rows) > 1:
            yield Violation("debounce", f"{key}", f"delayed: {[row['id'] for row in rows]}")
    for key, attempts in groups.items():
        rows = delayed[key]
        for attempt in attempts:
            for told in attempt.told("run"):
                run = story.resolve(told.reply["run"]["id"])
                if run is None or run["debounce_key"] != key[2]:
                    yield Violation(
                        "debounce", attempt.name, f"told {told.reply['run']['id']}, not of its key"
                    )
                else:
                    yield from _pushed_back(story, attempt, run)


def _pushed_back(story: Story, attempt: Attempt, run: Row) -> Iterator[Violation]:
    """Whether a run is as late as a trigger that it answered asked for, and has no older trailing payload."""
    if attempt.entry is None or run["status"] != "DELAYED" or len(story.by_request[attempt.request]) > 1:
        return
    at = int(attempt.entry.partition("-")[0]) / 1000
    debounce: dict[str, Any] = attempt.options["debounce"]
    until = at + float(debounce["delay"].removesuffix("s"))
    if run["debounce_until"] is not None:
        until = min(until, seconds(run["debounce_until"]))
    if seconds(run["delay_until"]) < until - 0.01:
        yield Violation("debounce", attempt.name, f"{run['id']} is delayed until {run['delay_until']} only")
    if debounce["mode"] == "trailing":
        newest = run["debounced_at"] or run["created_at"]
        if seconds(newest) < at - 0.01:
            yield Violation("debounce", attempt.name, f"{run['id']} has the payload of {newest}")


def one_run_per_token(story: Story) -> Iterator[Violation]:
    """All runs that were told to the users of one token are one."""
    told_of: defaultdict[str, set[str]] = defaultdict(set)
    for attempt in story.attempts:
        token = attempt.options.get("one_time_use_token")
        if token is not None:
            named = {told.reply["run"]["id"] for told in attempt.told("run")}
            told_of[token] |= {(story.resolve(one) or {"id": one})["id"] for one in named}
    for token, runs in told_of.items():
        if len(runs) > 1:
            yield Violation("one run per token", token, f"{sorted(runs)}")
    used: defaultdict[str, list[str]] = defaultdict(list)
    for row in story.end.rows:
        if row["one_time_use_token"] is not None:
            used[row["one_time_use_token"]].append(row["id"])
    for token, ids in used.items():
        if len(ids) > 1:
            yield Violation("one run per token", token, f"rows {ids}")

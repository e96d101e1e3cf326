"""Rules about operations: what was acknowledged is in the row, what was cancelled stays so."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from tests.chaos.evidence import Row, Story, Violation, seconds
from tests.chaos.journal import Attempt

_NOTHING_WAS_DONE = frozenset(
    ("run_busy", "run_finished", "run_not_found", "run_not_delayed", "too_many_tags", "invalid_request")
)

_FINAL = frozenset(("COMPLETED", "FAILED", "CANCELED", "EXPIRED", "SYSTEM_FAILURE"))


def _of(story: Story, *kinds: str) -> Iterator[tuple[Attempt, Row]]:
    """The operations of some kinds, each with the row of its run."""
    for attempt in story.attempts:
        if attempt.kind in kinds:
            row = story.resolve(attempt.body["run_id"].removeprefix("run_"))
            if row is not None:
                yield attempt, row


def cancelled_stays_cancelled(story: Story) -> Iterator[Violation]:
    """A run that was shown as cancelled is so at the end, with the same reason, and in all later replies."""
    first: dict[str, tuple[float, str | None]] = {}
    for attempt in story.attempts:
        for told in attempt.told("run_details"):
            run = told.reply["run"]
            if run["status"] != "CANCELED":
                continue
            since, reason = first.get(run["id"], (told.at, run["cancel_reason"]))
            first[run["id"]] = (min(since, told.at), reason)
            row = story.resolve(run["id"])
            if row is None or row["status"] != "CANCELED" or row["cancel_reason"] != run["cancel_reason"]:
                now = None if row is None else (row["status"], row["cancel_reason"])
                yield Violation(
                    "cancelled stays cancelled",
                    attempt.name,
                    f"{run['id']}: {run['cancel_reason']}, now {now}",
                )
    for attempt in story.attempts:
        for told in attempt.told("run_details"):
            run = told.reply["run"]
            if (
                run["id"] in first
                and run["status"] != "CANCELED"
                and attempt.sending_at > first[run["id"]][0]
            ):
                yield Violation(
                    "cancelled stays cancelled",
                    attempt.name,
                    f"{run['id']} is shown as {run['status']} again",
                )


def acknowledged_is_in_the_row(story: Story) -> Iterator[Violation]:
    """Tags, keys and list elements of metadata that were acknowledged are there."""
    for attempt, row in _of(story, "tag", "set", "append"):
        if not attempt.told("run_details"):
            continue
        metadata = json.loads(row["metadata"] or "{}")
        there: Any = {"tag": row["tags"], "set": metadata, "append": metadata.get("list", [])}[attempt.kind]
        is_overwritten = attempt.kind == "append" and _took_in_an_alias(row)
        if attempt.request not in there and not is_overwritten:
            yield Violation("acknowledged is in the row", attempt.name, f"not in {row['id']}: {there}")


def _took_in_an_alias(row: Row) -> bool:
    """Whether an alias' own metadata were added to a row's, key by key: of a list or counter one is left."""
    return any(not re.fullmatch(r"\d+-\d+( \w+)?", operation) for operation in row.get("applied", ()))


def appended_once(story: Story) -> Iterator[Violation]:
    """No list element is there twice, and none that nobody sent."""
    sent = {attempt.request for attempt in story.attempts if attempt.kind == "append"}
    for row in story.end.rows:
        if row["replayed_from_run_id"] is not None:
            continue  # it began with what the other run's list was then
        elements = json.loads(row["metadata"] or "{}").get("list", [])
        for element in set(elements):
            tries = [
                one
                for one in story.by_request.get(element, [])
                if one.fate != "refused" and not _NOTHING_WAS_DONE.intersection(one.codes)
            ]
            if element not in sent or elements.count(element) > len(tries):
                yield Violation(
                    "changes are made once", row["id"], f"{element} is there {elements.count(element)} times"
                )


def counted_right(story: Story) -> Iterator[Violation]:
    """A counter shows every acknowledged increment, and none that was not sent or that was refused."""
    for kind, name in (("increment", "count"), ("parent", "children")):
        least: defaultdict[str, int] = defaultdict(int)
        most: defaultdict[str, int] = defaultdict(int)
        for attempt, row in _of(story, kind):
            target = row if kind == "increment" else _kin(story, row)
            if target is None:
                continue
            told = attempt.told("run_details")
            # What is impossible on a parent, because it has ended, is left out without an error.
            is_left_out = kind == "parent" and (target["status"] in _FINAL or _may_have_expired(story, row))
            least[target["id"]] += bool(told) and not is_left_out
            if told or (attempt.fate != "refused" and not _NOTHING_WAS_DONE.intersection(attempt.codes)):
                most[target["id"]] += 1
        for row in story.end.rows:
            if row["replayed_from_run_id"] is not None:
                continue  # it began with what the other run's metadata were then
            count = json.loads(row["metadata"] or "{}").get(name, 0)
            low, high = 0 if _took_in_an_alias(row) else least[row["id"]], most[row["id"]]
            if not low <= count <= high:
                yield Violation(
                    "changes are made once", row["id"], f"{name} is {count}, not from {low} to {high}"
                )


def _may_have_expired(story: Story, row: Row) -> bool:
    """Whether a run's parent is an alias by now: in the buffer it may have been one that had expired."""
    return row["parent_run_id"] in story.aliases


def _kin(story: Story, row: Row) -> Row | None:
    """The run that a change of a run's parent is made on; the run itself if it has none."""
    parent_id = row["parent_run_id"]
    return row if parent_id is None else story.resolve(parent_id)


def rescheduled_stays_so(story: Story) -> Iterator[Violation]:
    """A run's delay is the last acknowledged one, or one that was sent after that."""
    changes: defaultdict[str, list[tuple[Attempt, float]]] = defaultdict(list)
    for attempt, row in _of(story, "reschedule"):
        until = datetime.fromisoformat(attempt.body["delay"])
        changes[row["id"]].append((attempt, seconds(until)))
    for run_id, tries in changes.items():
        row, told = story.rows[run_id], [one for one in tries if one[0].told("run_details")]
        if not told or row["delay_until"] is None:
            continue
        now = seconds(row["delay_until"])
        which = [attempt for attempt, until in tries if abs(until - now) < 0.001]
        if not which:
            yield Violation("acknowledged is in the row", run_id, f"nobody asked for {row['delay_until']}")
            continue
        heard = max(
            (one.at for attempt in which for one in attempt.told("run_details")), default=float("inf")
        )
        later = [
            attempt.name
            for attempt, _ in told
            if attempt not in which
            and min(one.sending_at for one in story.by_request[attempt.request]) > heard
        ]
        if later:
            yield Violation(
                "acknowledged is in the row", run_id, f"rescheduled by {which[0].name}, then {later}"
            )


def told_is_found(story: Story) -> Iterator[Violation]:
    """Whoever asks for a run that a reply has named finds it."""
    known: dict[str, float] = {}
    for attempt in story.attempts:
        for told in attempt.told("run"):
            friendly = told.reply["run"]["friendly_id"]
            known[friendly] = min(told.at, known.get(friendly, told.at))
    for attempt in story.attempts:
        code = {"operations": "run_not_found", "triggers": "parent_run_not_found"}[attempt.stream]
        named = attempt.options.get("parent_run_id") if attempt.stream == "triggers" else None
        named = named or (attempt.body.get("run_id") if attempt.stream == "operations" else None)
        if attempt.kind in ("foreign operation", "foreign", "wrong", "reset") or named not in known:
            continue
        if code not in attempt.codes or known[named] > attempt.sending_at:
            continue
        # A worker that is switched off does not look into the buffer (G5).
        if attempt.stream == "operations" or not story.was_off(attempt.sending_at, attempt.replies[-1].at):
            yield Violation("told is found", attempt.name, f"{named} was told before, and is {code}")

"""Rules about runs: accepted ones exist, once, as they were asked for, and nothing else does."""

import json
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from tests.chaos.evidence import Row, Story, Violation, marker, seconds
from tests.chaos.journal import Attempt
from tests.chaos.rules.keys import resets

_AS_SENT = {
    "queue": "queue",
    "concurrency_key": "concurrency_key",
    "worker_queue": "worker_queue",
    "machine": "machine",
    "priority": "priority",
    "max_attempts": "max_attempts",
    "max_duration": "max_duration",
    "lock_to_version": "locked_to_version",
    "test": "is_test",
    "one_time_use_token": "one_time_use_token",
}
"""Options whose column holds them as they were sent."""


def accepted_is_kept(story: Story) -> Iterator[Violation]:
    """Every run that a reply named is a row, or an alias that resolves to one, of the same environment."""
    for attempt in story.attempts:
        for told in attempt.told("run"):
            run_id = told.reply["run"]["id"]
            row = story.resolve(run_id)
            if told.reply["run"]["friendly_id"] != f"run_{run_id}":
                yield Violation(
                    "accepted is kept", attempt.name, f"friendly id of {run_id}: {told.reply['run']}"
                )
            if row is None:
                yield Violation("accepted is kept", attempt.name, f"told {run_id}, which is nowhere")
            elif (
                row["environment_id"] != attempt.environment or row["organization_id"] != attempt.organization
            ):
                yield Violation("accepted is kept", attempt.name, f"told {run_id} of {row['environment_id']}")


def accepted_is_as_asked(story: Story) -> Iterator[Violation]:
    """The row of a run that was made for a request holds what it asked for."""
    for request, rows in story.rows_of.items():
        attempts = story.by_request.get(request)
        if attempts is None or attempts[0].stream != "triggers":
            continue
        for row in rows:
            for difference in _differences(attempts[0], row):
                yield Violation("accepted is as asked", request, f"row {row['id']}: {difference}")


def _differences(attempt: Attempt, row: Row) -> Iterator[str]:
    body, options = attempt.body, attempt.options
    if "debounce" in options:
        return  # its row may be the first trigger's, with this one's payload
    wanted: dict[str, Any] = {
        "environment_id": attempt.environment,
        "organization_id": attempt.organization,
        "project_id": body["environment"]["project_id"],
        "task": body["task"],
    }
    wanted |= {column: options[name] for name, column in _AS_SENT.items() if name in options}
    if "batch" in options:
        wanted |= {"batch_id": options["batch"]["id"], "batch_index": options["batch"]["index"]}
    if "parent_run_id" in options:
        wanted["resume_parent_on_completion"] = options["resume_parent_on_completion"]
    for column, value in wanted.items():
        if row[column] != value:
            yield f"{column} is {row[column]!r}, not {value!r}"
    if json.loads(row["payload"]) != body["payload"]:
        yield f"payload {row['payload']!r}"
    if not set(options["tags"]) <= set(row["tags"]):
        yield f"tags {row['tags']}"
    if "run_id" in options and f"run_{row['id']}" != options["run_id"]:
        yield f"its id was to be {options['run_id']}"
    if "delay" in options and row["delay_until"] is None:
        yield "it has no delay"
    if "ttl" in options and row["expires_at"] is None:
        yield "it does not expire"


def one_request_one_run(story: Story) -> Iterator[Violation]:
    """A request with a run id of its own has one row at most; another has one for each entry at most."""
    for request, rows in story.rows_of.items():
        attempts = story.by_request.get(request, [])
        if not attempts or attempts[0].stream != "triggers":
            continue
        appended = [attempt for attempt in attempts if attempt.fate != "refused"]
        most = 1 if "run_id" in attempts[0].options else len(appended)
        if len(rows) > most:
            yield Violation(
                "one request, one run",
                request,
                f"{len(rows)} rows of at most {most}: {[row['id'] for row in rows]}",
            )
    freed = resets(story)
    for attempt in story.attempts:
        if attempt.stream != "triggers" or not attempt.told("run"):
            continue
        key = (attempt.environment, attempt.body.get("task"), attempt.options.get("idempotency_key"))
        if attempt.kind in ("short", "expiring") or key in freed:
            continue  # its key may have come free between two deliveries: see the rules of keys
        named = {told.reply["run"]["id"] for told in attempt.told("run")}
        if len(named) > 1 and len({(story.resolve(one) or {"id": one})["id"] for one in named}) > 1:
            yield Violation("one request, one run", attempt.name, f"its replies name {sorted(named)}")


def no_run_without_request(story: Story) -> Iterator[Violation]:
    """Every row was asked for by a producer, and every alias stands for a row of its own environment."""
    for row in story.end.rows:
        request = marker(row)
        attempts = story.by_request.get(request or "", [])
        appended = [attempt for attempt in attempts if attempt.fate != "refused"]
        if not appended:
            yield Violation(
                "no run without request", row["id"], f"nobody asked for it; its payload: {request}"
            )
        elif row["environment_id"] != appended[0].environment:
            yield Violation("no run without request", row["id"], f"asked for in {appended[0].environment}")
    for alias in story.end.aliases:
        row_or_none = story.rows.get(alias.run_id)
        if row_or_none is None or row_or_none["environment_id"] != alias.environment_id:
            yield Violation(
                "no run without request", alias.id, f"an alias of {alias.run_id}, which is not there"
            )


MAY_HAVE_COME_TRUE = frozenset(("store_unavailable",))
"""Errors after which there may be a run all the same: Postgres did not say in time what it had done."""


def refused_is_not_run(story: Story) -> Iterator[Violation]:
    """An entry that was answered with an error has no run: neither a told one nor a silent one."""
    made: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for request, rows in story.rows_of.items():
        for row in rows:
            made[request, _ms(row["created_at"])].append(row["id"])
    for attempt in story.attempts:
        if attempt.stream != "triggers" or "debounce" in attempt.options:
            continue
        codes = [code for code in attempt.codes if code not in MAY_HAVE_COME_TRUE]
        if not codes:
            continue
        if attempt.told("run"):
            yield Violation("refused is not run", attempt.name, f"told {codes} and a run: {attempt.replies}")
        if attempt.entry is None:
            continue
        ms = int(attempt.entry.partition("-")[0])
        twins = [one for one in story.by_request[attempt.request] if _entry_ms(one) == ms]
        if len(twins) == 1 and made.get((attempt.request, ms)):
            yield Violation(
                "refused is not run", attempt.name, f"told {codes}, and is {made[attempt.request, ms]}"
            )


def _ms(at: datetime) -> int:
    return round(seconds(at) * 1000)


def _entry_ms(attempt: Attempt) -> int | None:
    return None if attempt.entry is None else int(attempt.entry.partition("-")[0])


def order_is_kept(story: Story) -> Iterator[Violation]:
    """A buffered run that was accepted before another of its environment was even sent became a row first, or
    with it."""
    by_environment: defaultdict[str, list[tuple[float, float, Row]]] = defaultdict(list)
    for attempt in story.attempts:
        for told in attempt.told("run"):
            row = story.rows.get(told.reply["run"]["id"])
            is_own = told.reply["is_mollified"] and not told.reply["is_cached"]
            if is_own and row is not None and row["buffered_at"] is not None:
                first = min(one.sending_at for one in story.by_request[attempt.request])
                by_environment[row["environment_id"]].append((first, told.at, row))
    for accepted in by_environment.values():
        yield from _overtaken(accepted)


def _overtaken(accepted: list[tuple[float, float, Row]]) -> Iterator[Violation]:
    by_reply = sorted(accepted, key=lambda one: one[1])
    latest: Row | None = None
    position = 0
    for sent, _, row in sorted(accepted, key=lambda one: one[0]):
        while position < len(by_reply) and by_reply[position][1] < sent:
            one = by_reply[position][2]
            if latest is None or one["materialised_at"] > latest["materialised_at"]:
                latest = one
            position += 1
        if latest is not None and row["materialised_at"] < latest["materialised_at"]:
            yield Violation(
                "order is kept",
                marker(row) or row["id"],
                f"{row['id']} overtook {latest['id']} ({marker(latest)}) in {row['environment_id']}, by"
                f" {(latest['materialised_at'] - row['materialised_at']).total_seconds():.3f} s",
            )

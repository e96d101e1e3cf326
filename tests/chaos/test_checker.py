"""The checker itself: a story in which all is well, and for each rule a violation that it must find."""

import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.chaos.checker import RULES, Rule, check, report
from tests.chaos.evidence import Alias, Row, Story
from tests.chaos.evidence import End as TheEnd
from tests.chaos.journal import Attempt, Record, Told, lines_of, read
from tests.chaos.journal import Journal as TheJournal
from tests.chaos.rules import changes, ends, keys, runs, tenants
from tests.chaos.tenants import tenants as make_tenants

NOW = 1_800_000_000.0
HERE, ELSEWHERE = make_tenants(1)[:2]

_EMPTY = (
    "queue",
    "concurrency_key",
    "worker_queue",
    "machine",
    "max_attempts",
    "max_duration",
    "locked_to_version",
    "parent_run_id",
    "replayed_from_run_id",
    "metadata",
    "delay_until",
    "expires_at",
    "debounce_key",
    "debounced_at",
    "debounce_until",
    "batch_id",
    "batch_index",
    "cancel_reason",
    "idempotency_key",
    "one_time_use_token",
)


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


class Teller:
    """Tells a story piece by piece; every piece is consistent in itself."""

    def __init__(self) -> None:
        self.story = Story(Record(), TheEnd())

    def attempt(
        self, request: str, kind: str, stream: str, body: Any, when: float, number: int = 0
    ) -> Attempt:
        attempt = Attempt(
            name=f"{request}.{number}",
            request=request,
            kind=kind,
            stream=stream,
            environment=HERE.id,
            organization=HERE.organization_id,
            body=body,
            reply_to=f"mollifier:reply:{request}",
            is_repeated=False,
            sending_at=NOW + when,
            fate="sent",
            entry=f"{int((NOW + when) * 1000)}-0",
        )
        self.story.record.attempts[attempt.name] = attempt
        return attempt

    def trigger(self, request: str, when: float, kind: str = "plain", **options: Any) -> Attempt:
        body = {
            "task": "send-email",
            "environment": HERE.as_sent(None),
            "payload": {"request": request, "secret": HERE.secret},
            "options": {"tags": [], **options},
        }
        return self.attempt(request, kind, "triggers", body, when)

    def operation(self, request: str, when: float, kind: str, run_id: str, **fields: Any) -> Attempt:
        body = {"type": kind, "environment": {"id": HERE.id}, "run_id": f"run_{run_id}", **fields}
        return self.attempt(request, kind, "operations", body, when)

    def run(self, attempt: Attempt, run_id: str, *, cached: bool = False, mollified: bool = True) -> None:
        run = {"id": run_id, "friendly_id": f"run_{run_id}", "span_id": "0"}
        reply = {
            "type": "run",
            "run": run,
            "is_cached": cached,
            "is_mollified": mollified,
            "status": "QUEUED",
        }
        attempt.replies.append(Told(attempt.sending_at + 0.1, reply))

    def error(self, attempt: Attempt, code: str) -> None:
        error = {"code": code, "message": "no", "status": 400, "retryable": False}
        attempt.replies.append(Told(attempt.sending_at + 0.1, {"type": "error", "error": error}))

    def details(self, attempt: Attempt, run_id: str, **fields: Any) -> None:
        run = {"id": run_id, "status": "QUEUED", "cancel_reason": None, **fields}
        attempt.replies.append(Told(attempt.sending_at + 0.1, {"type": "run_details", "run": run}))

    def row(self, attempt: Attempt, run_id: str, **fields: Any) -> Row:
        options, body = attempt.options, attempt.body
        created_at = datetime.fromtimestamp(attempt.sending_at, UTC)
        columns: Row = dict.fromkeys(_EMPTY)
        columns |= {
            "id": run_id,
            "environment_id": HERE.id,
            "organization_id": HERE.organization_id,
            "project_id": body["environment"]["project_id"],
            "task": body["task"],
            "status": "QUEUED",
            "payload": json.dumps(body["payload"]).encode(),
            "tags": list(options["tags"]),
            "priority": 0,
            "is_test": False,
            "resume_parent_on_completion": False,
            "idempotency_key": options.get("idempotency_key"),
            "one_time_use_token": options.get("one_time_use_token"),
            "debounce_key": options.get("debounce", {}).get("key"),
            "created_at": created_at,
            "buffered_at": created_at,
            "materialised_at": created_at + timedelta(seconds=1),
        }
        columns |= fields
        self.story.end.rows.append(columns)
        return columns


def told() -> Story:
    """A story in which all is well, with something for every rule to look at."""
    teller = Teller()
    one = teller.trigger("p1-1", 0)
    teller.run(one, "one")
    teller.row(
        one,
        "one",
        tags=["p1-5"],
        metadata='{"p1-6": 1, "list": ["p1-7"], "count": 1}',
        delay_until=at(5000),
    )
    two = teller.trigger("p1-2", 1, run_id="run_two")
    teller.run(two, "two")
    teller.row(two, "two", status="CANCELED", cancel_reason="p1-4", materialised_at=at(3))
    keyed = teller.trigger("p1-3", 2, idempotency_key="k")
    teller.run(keyed, "keyed")
    teller.row(keyed, "keyed", materialised_at=at(4))
    again = teller.trigger("p1-13", 4, idempotency_key="k")
    teller.run(again, "keyed", cached=True)
    short = teller.trigger("p1-16", 5, kind="short", idempotency_key="s", idempotency_key_ttl="3s")
    teller.run(short, "short1")
    teller.row(short, "short1", idempotency_key=None)
    shorter = teller.trigger("p1-17", 9, kind="short", idempotency_key="s", idempotency_key_ttl="3s")
    teller.run(shorter, "short2")
    teller.row(shorter, "short2")
    lost = teller.trigger("p1-18", 9, idempotency_key="k")
    teller.run(lost, "alias")
    teller.story.end.aliases.append(Alias("alias", "keyed", HERE.id))
    token = teller.trigger("p1-14", 6, one_time_use_token="t")
    teller.run(token, "token", mollified=False)
    teller.row(token, "token", buffered_at=None)
    debounce = {"key": "d", "delay": "600s", "mode": "trailing"}
    bounced = teller.trigger("p1-15", 7, debounce=debounce)
    teller.run(bounced, "bounced", mollified=False)
    teller.row(bounced, "bounced", status="DELAYED", buffered_at=None, delay_until=at(607))
    cancel = teller.operation("p1-4", 5, "cancel", "two")
    teller.details(cancel, "two", status="CANCELED", cancel_reason="p1-4")
    teller.details(teller.operation("p1-5", 5, "tag", "one"), "one")
    teller.details(teller.operation("p1-6", 5, "set", "one"), "one")
    teller.details(teller.operation("p1-7", 5, "append", "one"), "one")
    teller.details(teller.operation("p1-8", 5, "increment", "one"), "one")
    moved = teller.operation("p1-9", 5, "reschedule", "one", delay=at(5000).isoformat())
    teller.details(moved, "one")
    teller.details(
        teller.operation("p1-10", 8, "retrieve", "two"), "two", status="CANCELED", cancel_reason="p1-4"
    )
    teller.error(teller.operation("p1-11", 8, "foreign operation", "elsewhere"), "run_not_found")
    teller.error(teller.trigger("p1-12", 8, kind="wrong"), "invalid_request")
    story = teller.story
    story.end.exits = {"triggers1": 0}
    story.end.pending = {"mollifier:triggers entries": 0}
    story.end.keys = {"mollifier:triggers": "stream", "mollifier:{3}:gate:env_1": "string"}
    return story


def find(story: Story, request: str) -> Attempt:
    return story.record.attempts[f"{request}.0"]


def row_of(story: Story, run_id: str) -> Row:
    return next(row for row in story.end.rows if row["id"] == run_id)


def again(story: Story, request: str, run_id: str, **fields: Any) -> Row:
    """A second row of a request."""
    original = next(row for row in story.end.rows if f'"{request}"'.encode() in row["payload"])
    second = {**copy.deepcopy(original), "id": run_id, **fields}
    story.end.rows.append(second)
    return second


def tell(story: Story, request: str, reply: dict[str, Any]) -> None:
    attempt = find(story, request)
    attempt.replies.append(Told(attempt.sending_at + 0.2, reply))


def one_more(story: Story, request: str, when: float, kind: str, **options: Any) -> tuple[Teller, Attempt]:
    teller = Teller()
    teller.story = story
    return teller, teller.trigger(request, when, kind, **options)


Plant = Callable[[Story], object]


def _lose_the_row(story: Story) -> None:
    story.end.rows.remove(row_of(story, "one"))


def _lose_the_winner(story: Story) -> None:
    story.end.aliases.clear()


def _move_elsewhere(story: Story) -> None:
    row_of(story, "one")["environment_id"] = ELSEWHERE.id


def _wrong_friendly_id(story: Story) -> None:
    find(story, "p1-1").replies[0].reply["run"]["friendly_id"] = "run_other"


def _another_payload(story: Story) -> None:
    row_of(story, "one")["payload"] = b'{"request": "p1-1"}'


def _another_task(story: Story) -> None:
    row_of(story, "one")["task"] = "other"


def _twice(story: Story) -> None:
    again(story, "p1-2", "two-again")


def _another_run_told(story: Story) -> None:
    run = {"id": "two", "friendly_id": "run_two", "span_id": "0"}
    tell(
        story,
        "p1-1",
        {"type": "run", "run": run, "is_cached": False, "is_mollified": True, "status": "QUEUED"},
    )


def _nobody_asked(story: Story) -> None:
    again(story, "p1-1", "nobody")["payload"] = b'{"request": "p9-1"}'


def _refused_by_redis(story: Story) -> None:
    find(story, "p1-1").fate = "refused"


def _dangling_alias(story: Story) -> None:
    story.end.aliases.append(Alias("other", "nothing", HERE.id))


def _error_and_run(story: Story) -> None:
    tell(story, "p1-1", {"type": "error", "error": {"code": "buffer_unavailable", "retryable": True}})


def _error_and_silent_run(story: Story) -> None:
    find(story, "p1-1").replies.clear()
    _error_and_run(story)


def _overtaken(story: Story) -> None:
    row_of(story, "one")["materialised_at"] = at(30)


def _two_of_a_key(story: Story) -> None:
    teller = Teller()
    teller.story = story
    teller.row(find(story, "p1-13"), "second")


def _key_not_over(story: Story) -> None:
    row_of(story, "short2")["buffered_at"] = at(6)
    find(story, "p1-17").replies[0] = Told(NOW + 6, find(story, "p1-17").replies[0].reply)


def _names_another_keys_run(story: Story) -> None:
    find(story, "p1-13").replies[0].reply["run"].update(id="one", friendly_id="run_one")


def _names_a_run_of_the_past(story: Story) -> None:
    find(story, "p1-17").sending_at += 60
    find(story, "p1-17").replies[0].reply["run"].update(id="short1", friendly_id="run_short1")


def _two_delayed(story: Story) -> None:
    again(story, "p1-15", "bounced2")


def _pulled_forward(story: Story) -> None:
    row_of(story, "bounced")["delay_until"] = at(500)


def _older_payload(story: Story) -> None:
    row_of(story, "bounced")["debounced_at"] = at(1)


def _not_of_its_debounce_key(story: Story) -> None:
    find(story, "p1-15").replies[0].reply["run"].update(id="one", friendly_id="run_one")


def _token_used_twice(story: Story) -> None:
    teller, attempt = one_more(story, "p1-30", 9, "token", one_time_use_token="t")
    teller.run(attempt, "token2", mollified=False)
    teller.row(attempt, "token2")


def _uncancelled(story: Story) -> None:
    row_of(story, "two")["status"] = "QUEUED"


def _other_reason(story: Story) -> None:
    row_of(story, "two")["cancel_reason"] = "another"


def _shown_uncancelled(story: Story) -> None:
    find(story, "p1-10").replies[0].reply["run"]["status"] = "QUEUED"


def _tag_lost(story: Story) -> None:
    row_of(story, "one")["tags"] = []


def _set_lost(story: Story) -> None:
    row_of(story, "one")["metadata"] = '{"list": ["p1-7"], "count": 1}'


def _append_lost(story: Story) -> None:
    row_of(story, "one")["metadata"] = '{"p1-6": 1, "list": [], "count": 1}'


def _appended_twice(story: Story) -> None:
    row_of(story, "one")["metadata"] = '{"p1-6": 1, "list": ["p1-7", "p1-7"], "count": 1}'


def _increment_lost(story: Story) -> None:
    row_of(story, "one")["metadata"] = '{"p1-6": 1, "list": ["p1-7"]}'


def _incremented_twice(story: Story) -> None:
    row_of(story, "one")["metadata"] = '{"p1-6": 1, "list": ["p1-7"], "count": 2}'


def _delay_lost(story: Story) -> None:
    row_of(story, "one")["delay_until"] = at(4000)


def _older_delay(story: Story) -> None:
    teller = Teller()
    teller.story = story
    later = teller.operation("p1-31", 20, "reschedule", "one", delay=at(6000).isoformat())
    teller.details(later, "one")


def _not_found(story: Story) -> None:
    find(story, "p1-10").replies.clear()
    tell(story, "p1-10", {"type": "error", "error": {"code": "run_not_found", "retryable": False}})


def _parent_not_found(story: Story) -> None:
    teller, attempt = one_more(
        story, "p1-32", 9, "child", parent_run_id="run_one", resume_parent_on_completion=False
    )
    teller.error(attempt, "parent_run_not_found")


def _tells_of_another(story: Story) -> None:
    find(story, "p1-10").replies[0].reply["run"]["metadata"] = {"secret": ELSEWHERE.secret}


def _foreign_is_shown(story: Story) -> None:
    find(story, "p1-11").replies[:] = [
        Told(NOW + 9, {"type": "run_details", "run": {"id": "x", "status": "QUEUED"}})
    ]


def _unanswered(story: Story) -> None:
    find(story, "p1-12").replies.clear()


def _unanswered_run(story: Story) -> None:
    find(story, "p1-1").replies.clear()


def _silence_without_run(story: Story) -> None:
    _, attempt = one_more(story, "p1-19", 9, "silent")
    attempt.reply_to = None


def _unanswered_long_before_it_was_deaf(story: Story) -> None:
    _unanswered(story)
    story.record.deaf.append(("p1", NOW + 60, NOW + 61))


def _never_answered(story: Story) -> None:
    find(story, "p1-2").replies.clear()
    find(story, "p1-2").is_repeated = True
    story.record.deaf.append(("p1", NOW, NOW + 50))


def _pending(story: Story) -> None:
    story.end.pending["mollifier:triggers pending"] = 1


def _claim_left(story: Story) -> None:
    story.end.keys["mollifier:{3}:claim:0123"] = "string"


def _heartbeat_left(story: Story) -> None:
    story.end.keys["mollifier:heartbeat:host-1-2"] = "string"


def _entries_left(story: Story) -> None:
    story.end.keys["mollifier:{3}:entries:env_1"] = "stream"


def _accepted_is_buried(story: Story) -> None:
    letter = {"source": "mollifier:{3}:entries:env_1", "id": "1-0", "reason": "refused", "detail": ""}
    story.end.dead_letters.append(letter)


def _wrong_is_run(story: Story) -> None:
    teller = Teller()
    teller.story = story
    teller.row(find(story, "p1-12"), "wrong")


def _killed_at_the_end(story: Story) -> None:
    story.end.exits["triggers1"] = -9


PLANTS: list[tuple[Rule, Plant]] = [
    (runs.accepted_is_kept, _lose_the_row),
    (runs.accepted_is_kept, _lose_the_winner),
    (runs.accepted_is_kept, _move_elsewhere),
    (runs.accepted_is_kept, _wrong_friendly_id),
    (runs.accepted_is_as_asked, _another_payload),
    (runs.accepted_is_as_asked, _another_task),
    (runs.one_request_one_run, _twice),
    (runs.one_request_one_run, _another_run_told),
    (runs.no_run_without_request, _nobody_asked),
    (runs.no_run_without_request, _refused_by_redis),
    (runs.no_run_without_request, _move_elsewhere),
    (runs.no_run_without_request, _dangling_alias),
    (runs.refused_is_not_run, _error_and_run),
    (runs.refused_is_not_run, _error_and_silent_run),
    (runs.order_is_kept, _overtaken),
    (keys.one_run_per_key, _two_of_a_key),
    (keys.one_run_per_key, _key_not_over),
    (keys.replies_name_the_keys_run, _names_another_keys_run),
    (keys.replies_name_the_keys_run, _names_a_run_of_the_past),
    (keys.one_delayed_run_per_debounce_key, _two_delayed),
    (keys.one_delayed_run_per_debounce_key, _pulled_forward),
    (keys.one_delayed_run_per_debounce_key, _older_payload),
    (keys.one_delayed_run_per_debounce_key, _not_of_its_debounce_key),
    (keys.one_run_per_token, _token_used_twice),
    (changes.cancelled_stays_cancelled, _uncancelled),
    (changes.cancelled_stays_cancelled, _other_reason),
    (changes.cancelled_stays_cancelled, _shown_uncancelled),
    (changes.acknowledged_is_in_the_row, _tag_lost),
    (changes.acknowledged_is_in_the_row, _set_lost),
    (changes.acknowledged_is_in_the_row, _append_lost),
    (changes.appended_once, _appended_twice),
    (changes.counted_right, _increment_lost),
    (changes.counted_right, _incremented_twice),
    (changes.rescheduled_stays_so, _delay_lost),
    (changes.rescheduled_stays_so, _older_delay),
    (changes.told_is_found, _not_found),
    (changes.told_is_found, _parent_not_found),
    (tenants.nothing_of_others, _tells_of_another),
    (tenants.others_are_not_there, _foreign_is_shown),
    (ends.every_request_is_answered, _unanswered),
    (ends.every_request_is_answered, _unanswered_run),
    (ends.every_request_is_answered, _silence_without_run),
    (ends.every_request_is_answered, _unanswered_long_before_it_was_deaf),
    (ends.every_request_is_answered, _never_answered),
    (ends.nothing_is_left, _pending),
    (ends.nothing_is_left, _claim_left),
    (ends.nothing_is_left, _heartbeat_left),
    (ends.nothing_is_left, _entries_left),
    (ends.dead_letters_are_known, _accepted_is_buried),
    (ends.forbidden_is_not_run, _wrong_is_run),
    (ends.exits_are_clean, _killed_at_the_end),
]


def test_nothing_is_found_where_all_is_well() -> None:
    assert report(check(told())) == "no violations"


def test_a_reply_that_came_while_its_producer_was_deaf_is_missed() -> None:
    story = told()
    _unanswered(story)
    story.record.deaf.append(("p1", NOW + 9, NOW + 10))
    assert report(check(story)) == "no violations"
    assert ends.missed(story) == 1


@pytest.mark.parametrize(("rule", "plant"), PLANTS, ids=lambda one: one.__name__.strip("_"))
def test_a_planted_violation_is_found(rule: Rule, plant: Plant) -> None:
    story = told()
    plant(story)
    assert list(rule(Story(story.record, story.end)))


def test_every_rule_has_a_planted_violation() -> None:
    assert set(RULES) == {rule for rule, _ in PLANTS}


def test_the_journal_tells_what_was_written(tmp_path: Any) -> None:
    journal = TheJournal(tmp_path / "p1.journal")
    attempt = Teller().trigger("p1-1", 0)
    journal.hearing("p1")
    journal.sending(attempt)
    journal.sent("p1-1.0", "1-0")
    journal.told("p1-1.0", {"type": "run"})
    journal.deaf("p1")
    journal.sending(Teller().trigger("p1-2", 1))
    journal.refused("p1-2.0", "OOM")
    journal.hearing("p1")
    record = read(tmp_path)
    first, second = record.attempts.values()
    assert (first.request, first.fate, first.entry) == ("p1-1", "sent", "1-0")
    assert [one.reply for one in first.replies] == [{"type": "run"}]
    assert second.fate == "refused"
    assert [name for name, _, _ in record.deaf] == ["p1"]
    assert len(list(lines_of(tmp_path, "p1-1"))) == 3

"""Rules about how it ends: every request answered, and nothing left behind."""

import re
from collections.abc import Iterator

from tests.chaos.evidence import Story, Violation
from tests.chaos.journal import Attempt

_MAY_STAY = re.compile(
    r"mollifier:(triggers|operations|dead-letters|gate|processes|\{\d+\}:gate:.*"
    r"|\{turns\}(:(weights|clocks|idle|bucket))?)"
)
"""Streams with their groups, counters that run out, and what the drain remembers of organizations."""

_LOST_REPLY_S = 1.0
_UNNOTICED_S = 3.0
"""How long a producer may have been deaf before it noticed: its pings were not answered for so long."""

_ANSWERED_WITHIN_S = 20.0


def every_request_is_answered(story: Story) -> Iterator[Violation]:
    """Every request has a reply, or a dead letter, or its reply may have come while its producer was deaf."""
    for request, attempts in _unheard(story):
        if not _may_have_missed(story, attempts):
            detail = f"neither answered nor set aside: {attempts[0].kind}"
            yield Violation("every request is answered", request, detail)
    yield from _unrepeatable(story)


def missed(story: Story) -> int:
    """Requests whose only reply came, as we take it, while their producers were deaf."""
    return sum(_may_have_missed(story, attempts) for _, attempts in _unheard(story))


def _unheard(story: Story) -> Iterator[tuple[str, list[Attempt]]]:
    """Requests that Redis had and nobody heard of again, with their attempts."""
    buried = {letter.get("id") for letter in story.end.dead_letters}
    bodies = [letter.get("body", "") + letter.get("__data__", "") for letter in story.end.dead_letters]
    for request, attempts in story.by_request.items():
        appended = [attempt for attempt in attempts if attempt.fate != "refused"]
        if not appended or any(attempt.replies for attempt in appended):
            continue
        if any(attempt.entry in buried for attempt in appended if attempt.entry is not None):
            continue
        if any(f'"{request}"' in body for body in bodies):
            continue
        if all(attempt.fate == "unsure" for attempt in appended):
            continue  # perhaps Redis never had it
        if attempts[0].kind != "silent" or request not in story.rows_of:
            yield request, appended


def _unrepeatable(story: Story) -> Iterator[Violation]:
    """What a producer repeats until it has an answer has one in the end."""
    last = max((attempt.sending_at for attempt in story.attempts), default=0.0)
    for request, attempts in story.by_request.items():
        if not attempts[0].is_repeated or any(attempt.replies for attempt in attempts):
            continue
        if attempts[0].sending_at < last - 90 or any(attempt.fate == "sent" for attempt in attempts[-2:]):
            yield Violation(
                "every request is answered", request, f"sent {len(attempts)} times, never answered"
            )


def _may_have_missed(story: Story, attempts: list[Attempt]) -> bool:
    """Whether the producer could not hear for a time in which a reply may have come."""
    if attempts[0].kind == "silent":
        return False
    first = min(attempt.sending_at for attempt in attempts)
    last = max(attempt.sending_at for attempt in attempts)
    producer = attempts[0].producer
    hears_all = any(attempt.reply_to is not None for attempt in attempts)
    return not hears_all or any(
        name == producer
        and begin - _UNNOTICED_S <= last + _ANSWERED_WITHIN_S
        and end + _LOST_REPLY_S >= first
        for name, begin, end in story.record.deaf
    )


def nothing_is_left(story: Story) -> Iterator[Violation]:
    """Nothing is pending, the buffer is empty, and there are no claims, reservations or heartbeats."""
    for what, count in story.end.pending.items():
        if count:
            yield Violation("nothing is left", what, f"{count}")
    for key, kind in story.end.keys.items():
        if not _MAY_STAY.fullmatch(key):
            yield Violation("nothing is left", key, kind)


def dead_letters_are_known(story: Story) -> Iterator[Violation]:
    """Only requests become dead letters, and only those that are wrong or were tried too often."""
    for letter in story.end.dead_letters:
        if letter["reason"] in ("refused", "deliveries") and letter["source"].rpartition(":")[2] not in (
            "triggers",
            "operations",
        ):
            yield Violation("dead letters", letter["id"], f"a run that was accepted: {letter}")
        elif letter["reason"] not in ("undecodable", "reply_channel", "unanswerable", "deliveries"):
            yield Violation("dead letters", letter["id"], f"{letter['reason']}: {letter['detail']}")


def forbidden_is_not_run(story: Story) -> Iterator[Violation]:
    """What asks for a reply where none may be sent, and what cannot be read, does not run."""
    for attempt in story.attempts:
        if attempt.kind in ("garbage", "wrong", "foreign") or (
            attempt.kind == "forbidden" and attempt.reply_to is not None
        ):
            rows = story.rows_of.get(attempt.request)
            if rows:
                yield Violation("refused is not run", attempt.name, f"{attempt.kind}, and is {rows[0]['id']}")


def exits_are_clean(story: Story) -> Iterator[Violation]:
    """Every process that was asked to leave did so by itself, with status 0."""
    for name, status in story.end.exits.items():
        if status != 0:
            yield Violation("exits are clean", name, f"exit status {status}")

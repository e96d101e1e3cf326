"""The small form of `make fuzz`, and that its judge finds what it is there to find."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.fuzz.entries import ATTACKERS, VICTIMS, Entry, encode, plain
from tests.fuzz.envelopes import ENVELOPES
from tests.fuzz.forge import Forge
from tests.fuzz.fuzz import Fuzz
from tests.fuzz.kinds import BODIES
from tests.fuzz.material import INVALID
from tests.fuzz.verdict import Judge, report
from tests.processes import Workers

CHANNEL = "mollifier:reply:1"
ERROR = {"code": "invalid_request", "message": "task: required", "status": 400, "retryable": False}
REPLY = {"type": "error", "correlation_id": "1", "error": ERROR}


async def test_hostile_requests_harm_nobody(redis_url: str, database_url: str, workers: Workers) -> None:
    outcome = await Fuzz(redis_url, database_url, workers, seed=1, count=5_000).run()
    assert not outcome.violations, report(outcome.violations)


def test_every_kind_is_among_them_and_a_seed_makes_the_same_ones() -> None:
    one, again = (Forge(1).batch(5_000) for _ in range(2))
    kinds = {make.__name__ for make in (*BODIES, *ENVELOPES)}
    assert {entry.kind for entry in one} == {*kinds, "good"}
    assert [entry.fields for entry in one] == [entry.fields for entry in again]


def sent(judge: Judge) -> Entry:
    """A request that was sent, which is to be refused on its channel."""
    fields = plain(encode({}), CHANNEL.encode(), b"1")
    to = (frozenset({"1"}), INVALID, frozenset({""}))
    entry = Entry("empty", "triggers", fields, CHANNEL, *to, "task", ATTACKERS[0])
    judge.expect(entry)
    entry.sent("5-0")
    return entry


def letter(reason: bytes = b"undecodable", **changes: bytes) -> list[bytes]:
    head = {
        "source": b"mollifier:triggers",
        "id": b"5-0",
        "reason": reason,
        "detail": b"",
        "deliveries": b"1",
    }
    head |= {"at": b"2026-01-01T00:00:00Z", "body": encode({}), "reply_to": CHANNEL.encode()}
    head |= {"correlation_id": b"1", **changes}
    return [part for name, value in head.items() for part in (name.encode(), value)]


def told(**changes: Any) -> Callable[[Judge], None]:
    return lambda judge: judge.heard(CHANNEL, encode({**REPLY, **changes}), 1.0)


def told_error(**changes: Any) -> Callable[[Judge], None]:
    return told(error={**ERROR, **changes})


@pytest.mark.parametrize(
    ("happens", "rule"),
    [
        ([], "each has one outcome"),
        ([told(), told()], "each has one outcome"),
        ([lambda judge: judge.read_letters([letter(), letter()])], "each has one outcome"),
        ([told(), lambda judge: judge.read_letters([letter()])], "outcomes are as they should be"),
        ([told_error(code="internal_error", status=500, retryable=True)], "outcomes are as they should be"),
        ([told_error(code="made_up")], "replies are as documented"),
        ([told_error(status=500)], "replies are as documented"),
        ([told_error(stack="...")], "replies are as documented"),
        ([told(more=1)], "replies are as documented"),
        ([lambda judge: judge.heard(CHANNEL, b"no JSON", 1.0)], "replies are as documented"),
        ([told_error(message="x" * 2_000)], "messages are short"),
        ([told_error(message="something is wrong")], "messages name the field"),
        ([told(correlation_id="2")], "correlation ids come back"),
        ([told_error(message=f"task: {VICTIMS[0].secret}")], "tenants are walls"),
        ([told(), lambda judge: judge.heard("elsewhere", b"{}", 1.0)], "nobody is spoken to who did not ask"),
        (
            [told(), lambda judge: judge.heard("mollifier:wake", b"{}", 1.0)],
            "nobody is spoken to who did not ask",
        ),
        ([told(), lambda judge: judge.read_letters([letter(body=b"{")])], "dead letters hold what came"),
        (
            [told(), lambda judge: judge.read_letters([letter(id=b"6-0", reply_to=b"x")])],
            "dead letters are of requests",
        ),
    ],
)
def test_the_judge_finds(happens: list[Callable[[Judge], None]], rule: str) -> None:
    judge = Judge()
    sent(judge)
    for one in happens:
        one(judge)
    judge.conclude()
    assert rule in {one.rule for one in judge.violations}


def test_the_judge_is_content() -> None:
    judge = Judge()
    sent(judge)
    judge.heard("mollifier:wake", b"", 0.5)
    judge.heard(CHANNEL, json.dumps(REPLY).encode(), 1.0)
    judge.conclude()
    assert judge.violations == []

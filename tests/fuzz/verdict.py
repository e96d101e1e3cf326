"""What must have come of what was sent. Knows the wire (docs/wire.md), and nothing of the code."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from tests.fuzz.entries import LETTER_FIELDS, VICTIMS, Entry, digest
from tests.processes import ROOT

_LONGEST_MESSAGE = 1_000
_SHOWN = 8

_RUN = {"type", "correlation_id", "run", "status", "is_cached", "is_mollified"}
_PRIVATE = {
    one: (one.secret.encode(), one.run_id("kept")[4:].encode(), one.run_id("work")[4:].encode())
    for one in VICTIMS
}
"""What only its owner may be told: its secret, and the ids of its runs."""

_KEYS = {
    "error": {"type", "correlation_id", "error"},
    "run": _RUN,
    "run_details": {"type", "correlation_id", "run"},
    "run_list": {"type", "correlation_id", "runs", "next_cursor"},
    "idempotency_key_reset": {"type", "correlation_id", "task", "idempotency_key", "run_id"},
}


class Told(NamedTuple):
    """A reply: the error's code, or the type of any other; the run that it names; seconds that it took."""

    what: str
    run_id: str | None
    seconds: float


class Violation(NamedTuple):
    rule: str
    subject: str
    detail: str


class Judge:
    """Hears all replies and reads all dead letters, and holds them against what was sent."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.entries: list[Entry] = []
        self.told: dict[str, list[Told]] = {}
        self._due: dict[str, Entry] = {}
        self._letters: dict[Entry, list[str]] = {}
        self._errors = _documented_errors()

    def expect(self, entry: Entry) -> None:
        """It is about to be sent."""
        self.entries.append(entry)
        if entry.channel is not None:
            self._due[entry.channel] = entry
            self.told[entry.channel] = []

    def is_answered(self, entry: Entry) -> bool:
        return entry.channel is None or bool(self.told[entry.channel])

    def complain(self, rule: str, subject: str, detail: object) -> None:
        self.violations.append(Violation(rule, subject, str(detail)[:400]))

    def heard(self, channel: str, message: bytes, at: float) -> None:
        """Something was said on some channel."""
        entry = self._due.get(channel)
        if entry is None:
            if (channel, message) != ("mollifier:wake", b""):
                self.complain("nobody is spoken to who did not ask", channel[:80], message[:200])
            return
        try:
            reply = orjson.loads(message)  # which reads what is nested, however deep the stack is here
            what, run_id = self._read(entry, reply)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.complain("replies are as documented", _name(entry), f"{error!r}: {message[:200]!r}")
            what, run_id = "unreadable", None
        self.told[channel].append(Told(what, run_id, at - entry.sent_at))
        for victim in VICTIMS:
            if victim is not entry.asker and any(one in message for one in _PRIVATE[victim]):
                self.complain("tenants are walls", _name(entry), message)

    def _read(self, entry: Entry, reply: dict[str, Any]) -> tuple[str, str | None]:
        kind = reply["type"]
        wrong = reply.keys() - _KEYS[kind] - ({"notice"} if kind == "run" else set())
        if wrong or _KEYS[kind] - reply.keys():
            self.complain("replies are as documented", _name(entry), f"its fields: {sorted(reply)}")
        if reply["correlation_id"] not in entry.correlation_ids:
            self.complain("correlation ids come back", _name(entry), reply["correlation_id"])
        if kind == "error":
            return self._read_error(entry, reply["error"]), None
        return kind, reply["run"]["id"] if kind == "run" else None

    def _read_error(self, entry: Entry, error: dict[str, Any]) -> str:
        code: str = error["code"]
        if error.keys() != {"code", "message", "status", "retryable"}:
            self.complain("replies are as documented", _name(entry), f"fields of its error: {sorted(error)}")
        if self._errors.get(code) != (error["status"], error["retryable"]):
            self.complain("replies are as documented", _name(entry), error)
        if not 0 < len(error["message"]) <= _LONGEST_MESSAGE:
            self.complain("messages are short", _name(entry), f"{len(error['message'])} characters")
        if code == "invalid_request" and not error["message"].startswith(entry.names):
            self.complain("messages name the field", _name(entry), f"{entry.names}? {error['message']}")
        return code

    def read_letters(self, letters: Iterable[Sequence[bytes]]) -> None:
        """All dead letters there are, as they came from Redis. What was not sent here must be of a replay."""
        by_id = {f"mollifier:{entry.stream} {entry.id}": entry for entry in self.entries}
        for letter in letters:
            head, original = letter[:12], dict(zip(letter[12::2], letter[13::2], strict=True))
            if tuple(head[::2]) != LETTER_FIELDS:
                self.complain("dead letters are as documented", "its fields", head)
            source, entry_id, reason = (value.decode() for value in head[1:6:2])
            entry = by_id.get(f"{source} {entry_id}")
            if entry is None:
                entry = self._due.get(original.get(b"reply_to", b"").decode(errors="replace"))
            elif digest(original) != entry.digest:
                self.complain("dead letters hold what came", _name(entry), original)
            if entry is None:
                self.complain("dead letters are of requests", f"{source} {entry_id}", original)
            else:
                self._letters.setdefault(entry, []).append(reason)

    def conclude(self) -> None:
        """Hold what came of each entry against what should have."""
        for entry in self.entries:
            told = [one.what for one in self.told[entry.channel]] if entry.channel is not None else []
            letters = self._letters.get(entry, [])
            outcome = f"replies {told}, dead letters {letters}"
            due = f"replies {sorted(entry.replies)}, dead letters {sorted(entry.letters)}"
            if len(told) > 1 or len(letters) > 1 or not (told or letters):
                self.complain("each has one outcome", _name(entry), f"{outcome}; due: {due}")
            elif not ({"".join(told)} <= (entry.replies or {""}) and {"".join(letters)} <= entry.letters):
                self.complain("outcomes are as they should be", _name(entry), f"{outcome}; due: {due}")

    def latencies(self) -> list[float]:
        """How long the good requests waited for their replies, sorted."""
        good = (entry for entry in self.entries if entry.is_good and entry.channel is not None)
        return sorted(one.seconds for entry in good for one in self.told[entry.channel or ""])

    def accepted(self) -> set[str]:
        """The runs that replies have named."""
        return {one.run_id for told in self.told.values() for one in told if one.run_id is not None}

    def tally(self) -> Counter[str]:
        """How many replies and dead letters there were, by what they say."""
        replies = Counter(one.what for told in self.told.values() for one in told)
        return replies + Counter(f"dead letter: {one}" for some in self._letters.values() for one in some)


def report(violations: list[Violation]) -> str:
    """The violations for people: of each rule how many, and the first of them."""
    lines = []
    for rule, count in Counter(one.rule for one in violations).items():
        lines.append(f"{rule}: {count}")
        lines += [f"    {one.subject}: {one.detail}" for one in violations if one.rule == rule][:_SHOWN]
    return "\n".join(lines) or "no violations"


def _name(entry: Entry) -> str:
    return f"{entry.kind} ({entry.stream} {entry.id})"


def _documented_errors() -> dict[str, tuple[int, bool]]:
    """The table of errors of docs/wire.md: status, and whether it may be sent again."""
    page = (ROOT / "docs/wire.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \| (yes|no) \|", page, re.MULTILINE)
    return {code: (int(status), retryable == "yes") for code, status, retryable in rows}

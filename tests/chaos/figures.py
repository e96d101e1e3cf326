"""The figures of a storm, as tables for docs/reliability.md."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.chaos.evidence import Story, Violation
from tests.chaos.storm import Outcome


def figures(outcome: Outcome, violations: Sequence[Violation]) -> str:
    """What happened, and how soon it was well again."""
    story = outcome.story
    attempts = list(story.attempts)
    triggers = [one for one in attempts if one.stream == "triggers"]
    replies = [told.reply for one in attempts for told in one.replies]
    codes = Counter(reply["error"]["code"] for reply in replies if reply["type"] == "error")
    lines = [
        "| | |",
        "|---|---|",
        f"| triggers sent | {len(triggers):,} |",
        f"| operations sent | {len(attempts) - len(triggers):,} |",
        f"| replies | {len(replies):,} |",
        f"| answered twice or more | {sum(len(one.replies) > 1 for one in attempts):,} |",
        f"| runs in Postgres | {len(story.end.rows):,} |",
        f"| of these through the buffer | {sum(row['buffered_at'] is not None for row in story.end.rows):,} |",
        f"| aliases | {len(story.end.aliases):,} |",
        f"| dead letters | {dict(Counter(letter['reason'] for letter in story.end.dead_letters))} |",
        f"| faults | {len(story.faults)} |",
        f"| violations | {len(violations)} |",
        "",
        f"errors told: {dict(codes.most_common())}",
        "",
        "| fault | times | promised | first answer | first row | last answer of what was under way |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sorted({fault.kind for fault in story.faults}):
        happened = [fault for fault in story.faults if fault.kind == kind]
        recoveries = [one for one in outcome.recoveries if one.kind == kind]
        lines.append(
            f"| {kind} | {len(happened)} | {happened[0].promise_s:.1f} s"
            f" | {_slowest(one.answered_s for one in recoveries)}"
            f" | {_slowest(one.drained_s for one in recoveries)}"
            f" | {_slowest(_last_answer(story, fault.injected_at, fault.healed_at) for fault in happened)} |"
        )
    return "\n".join(lines)


def _slowest(times: Iterable[float | None]) -> str:
    known = [float("inf") if one is None else max(one, 0.0) for one in times]
    return f"{max(known):.2f} s" if known else "-"


def _last_answer(story: Story, injected: float, healed: float) -> float:
    """How long after a fault was healed the last of the requests was answered that were under way then."""
    late = [
        attempt.replies[0].at - healed
        for attempt in story.attempts
        if attempt.fate == "sent"
        and attempt.replies
        and injected - 1 <= attempt.sending_at <= max(healed, injected + 0.1)
        and attempt.replies[0].at > healed
    ]
    return max(late, default=0.0)

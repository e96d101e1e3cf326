"""The figures of a storm, as tables for docs/reliability.md."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.chaos.evidence import Happened, Story, Violation
from tests.chaos.faults import KINDS
from tests.chaos.probes import recovery
from tests.chaos.rules.ends import missed
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
        f"| replies that were missed, as their producers were deaf | {missed(story):,} |",
        f"| runs in Postgres | {len(story.end.rows):,} |",
        f"| of these through the buffer | {sum(bool(row['buffered_at']) for row in story.end.rows):,} |",
        f"| aliases | {len(story.end.aliases):,} |",
        f"| dead letters | {dict(Counter(letter['reason'] for letter in story.end.dead_letters))} |",
        f"| faults | {len(story.faults)} |",
        f"| violations | {len(violations)} |",
        "",
        f"errors told: {dict(codes.most_common())}",
        "",
        "| fault | times | first answer | first row | last answer of what was under way |",
        "|---|---|---|---|---|",
    ]
    promises = {kind.name: kind.promise for kind in KINDS}
    answered, drained = sorted(outcome.pulse.answered), sorted(outcome.pulse.drained)
    for kind in sorted({fault.kind for fault in story.faults}):
        happened = [fault for fault in story.faults if fault.kind == kind]
        promise = promises[kind]
        lines.append(
            f"| {kind} | {len(happened)}"
            f" | {_slowest(recovery(answered, fault, story.faults) for fault in happened)}"
            f" of {promise.answer_s:.1f} s"
            f" | {_slowest(recovery(drained, fault, story.faults) for fault in happened)}"
            f" of {promise.row_s:.1f} s"
            f" | {_slowest(_last_answer(story, fault) for fault in happened)} |"
        )
    return "\n".join(lines)


def _slowest(times: Iterable[float | None]) -> str:
    known = [one for one in times if one is not None]
    return f"{max(known):.2f} s" if known else "-"


def _last_answer(story: Story, fault: Happened) -> float | None:
    """How long after a fault was healed the last of the requests was answered that were under way then; None
    where another fault came in between."""
    late = [
        attempt.replies[0].at
        for attempt in story.attempts
        if attempt.fate == "sent"
        and attempt.replies
        and fault.injected_at - 1 <= attempt.sending_at <= max(fault.healed_at, fault.injected_at + 0.1)
        and attempt.replies[0].at > fault.healed_at
    ]
    return recovery([max(late)], fault, story.faults) if late else None

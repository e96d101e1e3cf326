"""The checker: what a storm's producers sent and were told, compared with what is in the servers at the end.

It knows the wire (docs/wire.md) and the tables (docs/design.md), and nothing of the code. `python -m
tests.chaos.checker FOLDER` checks a storm again; with the name of a request it shows the journal's lines.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos import journal
from tests.chaos.evidence import Story, Violation, load
from tests.chaos.rules import changes, ends, keys, runs, tenants

Rule = Callable[[Story], Iterator[Violation]]

RULES: tuple[Rule, ...] = (
    runs.accepted_is_kept,
    runs.accepted_is_as_asked,
    runs.one_request_one_run,
    runs.no_run_without_request,
    runs.refused_is_not_run,
    runs.order_is_kept,
    keys.one_run_per_key,
    keys.replies_name_the_keys_run,
    keys.one_delayed_run_per_debounce_key,
    keys.one_run_per_token,
    changes.cancelled_stays_cancelled,
    changes.acknowledged_is_in_the_row,
    changes.appended_once,
    changes.counted_right,
    changes.rescheduled_stays_so,
    changes.told_is_found,
    tenants.nothing_of_others,
    tenants.others_are_not_there,
    ends.every_request_is_answered,
    ends.nothing_is_left,
    ends.dead_letters_are_known,
    ends.forbidden_is_not_run,
    ends.exits_are_clean,
)

_SHOWN = 8


def check(story: Story) -> list[Violation]:
    """Everything that violates a rule."""
    return [violation for rule in RULES for violation in rule(story)]


def report(violations: list[Violation]) -> str:
    """The violations for people: of each rule how many, and the first of them."""
    lines = []
    for rule, count in Counter(one.rule for one in violations).items():
        lines.append(f"{rule}: {count}")
        some = [one for one in violations if one.rule == rule][:_SHOWN]
        lines += [f"    {one.subject}: {one.detail}" for one in some]
    return "\n".join(lines) or "no violations"


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        for request in sys.argv[2:]:
            print(*journal.lines_of(folder, request), sep="\n")
        return
    violations = check(load(folder, journal.read(folder)))
    print(report(violations))
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()

"""Rules about the walls between tenants."""

import json
from collections.abc import Iterator

from tests.chaos.evidence import Story, Violation
from tests.chaos.tenants import secrets_in


def nothing_of_others(story: Story) -> Iterator[Violation]:
    """No reply gives away anything of another environment."""
    for attempt in story.attempts:
        own = secrets_in(attempt.environment)
        for told in attempt.replies:
            others = secrets_in(json.dumps(told.reply)) - own
            if others:
                yield Violation("tenants are walls", attempt.name, f"told of {others}: {told.reply}")


def others_are_not_there(story: Story) -> Iterator[Violation]:
    """What exists elsewhere looks as if it did not exist."""
    for attempt in story.attempts:
        wanted = {"foreign operation": "run_not_found", "foreign": "parent_run_not_found"}.get(attempt.kind)
        if wanted is None:
            continue
        for told in attempt.replies:
            error = told.reply.get("error")
            if error is None or not (error["code"] == wanted or error["retryable"]):
                yield Violation("tenants are walls", attempt.name, f"told {told.reply}")

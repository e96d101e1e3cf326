"""A short storm with faults, as part of every check; the long ones are run by hand: `make chaos SEED=n`."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.checker import check, report
from tests.chaos.faults import KINDS
from tests.chaos.figures import figures
from tests.chaos.schedule import plan
from tests.chaos.storm import Options, Storm

SEED, SECONDS, RATE = 2, 60.0, 150.0
"""The rate leaves a machine with two cores some room: what is slow there is the servers, not a fault."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where others than root may go, too: Postgres' data is in it."""
    with tempfile.TemporaryDirectory(prefix="mollifier-storm-") as name:
        yield Path(name).resolve()


@pytest.mark.timeout(420)
async def test_nothing_is_violated_in_a_short_storm(folder: Path) -> None:
    """G1 to G8, G10, G11 and G13, from outside; docs/reliability.md has the rules."""
    outcome = await Storm(Options(SEED, SECONDS, folder, RATE)).run()
    violations = check(outcome.story)
    assert not violations, f"{figures(outcome, violations)}\n\n{report(violations)}"
    assert outcome.is_quiet
    assert len(outcome.story.faults) == len(plan(SEED, SECONDS, KINDS))


def test_a_seed_is_a_plan() -> None:
    assert plan(1, 600, KINDS) == plan(1, 600, KINDS)
    assert plan(1, 600, KINDS) != plan(2, 600, KINDS)


def test_no_kind_of_fault_comes_again_before_all_have_come() -> None:
    planned = [one.kind for one in plan(1, 600, KINDS)]
    assert len(planned) > 2 * len(KINDS)
    for start in range(0, len(planned) - len(KINDS), len(KINDS)):
        assert set(planned[start : start + len(KINDS)]) == set(KINDS)


def test_faults_are_over_before_the_storm_is() -> None:
    for one in plan(SEED, SECONDS, KINDS):
        assert one.at_s > 0
        assert one.at_s + one.lasts_s <= SECONDS

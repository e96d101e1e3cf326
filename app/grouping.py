"""Runs by partition and environment, the way that scripts are given them: one call for each partition."""

from collections.abc import Sequence

from app.keys import Keys
from schemas.snapshot import Snapshot

Grouped = dict[int, dict[str, list[int]]]
"""Positions of runs, by partition and environment id, each in order."""


def grouped(keys: Keys, runs: Sequence[Snapshot]) -> Grouped:
    """Group runs by where they belong."""
    by_environment: dict[str, list[int]] = {}
    for position, run in enumerate(runs):
        environment_id = run.environment_id
        if environment_id in by_environment:
            by_environment[environment_id].append(position)
        else:
            by_environment[environment_id] = [position]
    groups: Grouped = {}
    for environment_id, positions in by_environment.items():
        partition = keys.environment(environment_id).partition
        groups.setdefault(partition, {})[environment_id] = positions
    return groups


def in_order(groups: Grouped) -> list[list[int]]:
    """Per partition, the positions of its runs in the order of its script's answers."""
    return [
        [position for positions in environments.values() for position in positions]
        for environments in groups.values()
    ]

"""Environments and runs by partition, the way that scripts are given them: one call for each partition."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from app.keys import Keys
from schemas.snapshot import Snapshot

Grouped = dict[int, dict[str, list[int]]]
"""Positions of runs, by partition and environment id, each in order."""


def by_partition(keys: Keys, environment_ids: Iterable[str]) -> dict[int, list[str]]:
    """Group environments, each group in order."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for environment_id in environment_ids:
        groups[keys.environment(environment_id).partition].append(environment_id)
    return groups


def grouped(keys: Keys, runs: Sequence[Snapshot]) -> Grouped:
    """Group runs by where they belong."""
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for position, run in enumerate(runs):
        positions[run.environment_id].append(position)
    return {
        partition: {environment_id: positions[environment_id] for environment_id in environment_ids}
        for partition, environment_ids in by_partition(keys, positions).items()
    }


def in_order(groups: Grouped) -> list[list[int]]:
    """Per partition, the positions of its runs in the order of its script's answers."""
    return [
        [position for positions in environments.values() for position in positions]
        for environments in groups.values()
    ]

"""The buffer's front: accepting runs and finding them again. What drainers do is in `turns.py`."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec.structs import replace
from redis.exceptions import ResponseError

from app.batch import Answer, Claim, Parent
from app.errors import (
    BufferUnavailable,
    ClaimLost,
    QueueLimitExceeded,
    RequestError,
    RunIdConflict,
    Unreachable,
)
from app.grouping import Grouped, grouped, in_order
from app.keys import Keys, tenant
from app.redis_client import Call, Scripts
from app.settings import Settings
from schemas.snapshot import Snapshot, decode_snapshot, encode_snapshot

_WAIT_MS = 2000
_ACCEPTED, _FULL, _LOST = 1, -1, -2


class RedisBuffer:
    """Implements `ports.Buffer` with `lua/accept.lua`, `find.lua`, `reserve.lua` and `release.lua`."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings) -> None:
        self._scripts = scripts
        self._keys = keys
        self._settings = settings
        self._waits: list[tuple[int, Call]] = []
        if settings.buffer_wait_replicas:
            copies = settings.buffer_wait_replicas
            self._waits.append((copies, Call("WAIT", None, [copies, _WAIT_MS])))
        if settings.buffer_wait_aof:
            self._waits.append((1, Call("WAITAOF", None, [1, 0, _WAIT_MS])))

    async def accept(
        self, runs: Sequence[Snapshot], claims: Sequence[Claim | None]
    ) -> Sequence[Answer | RequestError]:
        """See `ports.Buffer.accept`."""
        groups = grouped(self._keys, runs)
        calls = []
        for partition, environments in groups.items():
            keys = [self._keys.ready(partition), self._keys.arrivals(partition), self._keys.totals(partition)]
            claim_keys: list[str] = []
            head = (self._settings.max_buffered_per_env, self._keys.wake, len(environments))
            arguments: list[str | bytes | int] = list(head)
            for environment, positions in environments.items():
                names = self._keys.environment(environment)
                keys += (names.entries, names.index, names.drain)
                arguments += (environment, runs[positions[0]].organization_id, len(positions))
                for position in positions:
                    run = runs[position]
                    expected, life_ms = _claim(run, claims[position])
                    arguments += (run.id, encode_snapshot(run), expected, life_ms)
                    if life_ms:
                        claim_keys.append(self._keys.claim(run))
            calls.append(Call("accept", [*keys, *claim_keys], arguments))
        answers = await self._run(calls)
        outcomes: list[Answer | RequestError] = [BufferUnavailable()] * len(runs)
        for positions, answer in zip(in_order(groups), answers, strict=True):
            if isinstance(answer, ResponseError):
                continue
            for position, result in zip(positions, answer, strict=True):
                outcomes[position] = _outcome(runs[position], result)
        return outcomes

    async def recall(
        self, runs: Sequence[Snapshot], reserve: Sequence[Snapshot]
    ) -> Sequence[Answer | RequestError | None]:
        """See `ports.Buffer.recall`."""
        groups = grouped(self._keys, runs)
        calls = self._find(groups, [run.id for run in runs])
        reservations = self._chosen("reserve", reserve)
        answers = await self._run([*calls, *(call for call, _ in reservations)])
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise Unreachable(f"Redis: {answer}") from answer
        outcomes: list[Answer | RequestError | None] = [None] * len(runs)
        for positions, answer in zip(in_order(groups), answers[: len(calls)], strict=True):
            for position, snapshot in zip(positions, answer, strict=True):
                if snapshot is not None:
                    outcomes[position] = _known(runs[position], decode_snapshot(snapshot))
        taken = {
            (run.id, _tenant(run))
            for (_, reserved), answer in zip(reservations, answers[len(calls) :], strict=True)
            for run, is_mine in zip(reserved, answer, strict=True)
            if not is_mine
        }
        return [
            RunIdConflict() if outcome is None and (run.id, _tenant(run)) in taken else outcome
            for run, outcome in zip(runs, outcomes, strict=True)
        ]

    async def find_parents(self, children: Sequence[Snapshot]) -> Sequence[Parent | None]:
        """See `ports.Buffer.find_parents`."""
        groups = grouped(self._keys, children)
        answers = await self._scripts.demand(
            self._find(groups, [run.parent_run_id or "" for run in children])
        )
        parents: list[Parent | None] = [None] * len(children)
        for positions, answer in zip(in_order(groups), answers, strict=True):
            for position, snapshot in zip(positions, answer, strict=True):
                parent = None if snapshot is None else decode_snapshot(snapshot)
                if parent is not None and parent.organization_id == children[position].organization_id:
                    parents[position] = Parent(parent.id, parent.depth, parent.root_run_id or parent.id)
        return parents

    def _find(self, groups: Grouped, run_ids: Sequence[str]) -> list[Call]:
        calls = []
        for environments in groups.values():
            keys: list[str] = []
            arguments: list[str | bytes | int] = []
            for environment, positions in environments.items():
                names = self._keys.environment(environment)
                keys += (names.entries, names.index)
                arguments += (len(positions), *(run_ids[position] for position in positions))
            calls.append(Call("find", keys, arguments))
        return calls

    async def release(self, runs: Sequence[Snapshot]) -> None:
        """See `ports.Buffer.release`."""
        await self._scripts.run([call for call, _ in self._chosen("release", runs)])

    def _chosen(self, script: str, runs: Iterable[Snapshot]) -> list[tuple[Call, list[Snapshot]]]:
        by_partition: defaultdict[int, list[Snapshot]] = defaultdict(list)
        for run in runs:
            by_partition[self._keys.partition(run.id)].append(run)
        return [
            (
                Call(
                    script,
                    [self._keys.chosen(partition)],
                    [
                        part
                        for run in some
                        for part in (run.id, tenant(run.organization_id, run.environment_id))
                    ],
                ),
                some,
            )
            for partition, some in by_partition.items()
        ]

    async def _run(self, calls: list[Call]) -> list[Any]:
        """Run calls; hold the answers back until replicas or the disk have what was written, if asked to.

        All travel on one connection, which is what WAIT and WAITAOF count by.
        """
        answers = await self._scripts.run([*calls, *(call for _, call in self._waits)])
        for needed, call in reversed(self._waits):
            have = answers.pop()
            if isinstance(have, ResponseError):
                raise Unreachable(f"Redis: {call.name}: {have}")
            if (have[0] if isinstance(have, list) else have) < needed:
                raise Unreachable(f"Redis: {call.name}: too few copies of what was written")
        return answers


def answer_of(run: Snapshot) -> Answer:
    """A buffered run as the answer to its own request."""
    return Answer(run.id, run.span_id, run.delay_until, is_mollified=True)


def _claim(run: Snapshot, claim: Claim | None) -> tuple[str, int]:
    """What the script is to expect of a run's claim, and how many ms it lives once published; 0: no key."""
    if run.idempotency_key_expires_at is None or run.buffered_at is None:
        return "", 0
    left = run.idempotency_key_expires_at - run.buffered_at
    return (claim and claim.expected) or "", max(1, int(left.total_seconds() * 1000))


def _tenant(run: Snapshot) -> str:
    return tenant(run.organization_id, run.environment_id)


def _known(asked: Snapshot, found: Snapshot) -> Answer | RequestError:
    return answer_of(found) if found.organization_id == asked.organization_id else RunIdConflict()


def _outcome(run: Snapshot, result: int | bytes | list[bytes]) -> Answer | RequestError:
    if isinstance(result, list):
        winner_id, snapshot = result
        return _winner(winner_id, snapshot) if winner_id else _known(run, decode_snapshot(snapshot))
    if result == _ACCEPTED:
        return answer_of(run)
    if result == _LOST:
        return ClaimLost()
    return QueueLimitExceeded() if result == _FULL else BufferUnavailable()


def _winner(winner_id: bytes, snapshot: bytes) -> Answer:
    """The answer to a run whose key was taken by the time it came to the buffer."""
    if not snapshot:
        return Answer(winner_id.decode(), None, None, is_mollified=False, is_cached=True)
    return replace(answer_of(decode_snapshot(snapshot)), is_cached=True)

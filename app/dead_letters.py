"""Dead letters as operators handle them: looked through, put back, dropped. `replies.py` writes them.

The dead letters and the streams they came from are in different slots of a Redis Cluster, so an original is
put back first and its dead letter deleted after: at worst it is put back twice, and it is never lost.
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import replace
from redis.exceptions import ResponseError

from app import run_ids
from app.batch import Answer
from app.errors import RequestError
from app.keys import Keys
from app.ports import Buffer, Reservations
from app.redis_client import Call, Scripts
from schemas.snapshot import SCHEMA_VERSION, Snapshot, decode_snapshot

UNKNOWN = "there is no such dead letter"

_AT_ONCE = 50
_HEAD = {"source", "id", "reason", "detail", "deliveries", "at"}
_HEAD_BYTES = 16_384
"""Most bytes of a value that a page shows: more than any source has; a detail may be cut."""

_COUNT = re.compile(r"\d{1,18}", re.ASCII)

Pairs = tuple[tuple[bytes, bytes], ...]
Troubles = dict[str, str]
"""By the ids of dead letters, why they stay."""


class Letter(NamedTuple):
    """One dead letter, by the names of the wire; `original` has the pairs of what was set aside, in order.

    One that this program did not write is None but for its id, and all its pairs are `original`.
    """

    dead_letter_id: str
    source: str | None
    id: str | None
    reason: str | None
    detail: str | None
    deliveries: int | None
    at: str | None
    original: Pairs

    @property
    def ms(self) -> int:
        """When it was written, in ms since 1970."""
        return int(self.dead_letter_id.partition("-")[0])


@dataclass(frozen=True, slots=True)
class Selection:
    """The dead letters for which all that is asked holds; with nothing asked, all of them."""

    reason: str | None = None
    source: str | None = None
    older_than_s: int | None = None
    newer_than_s: int | None = None


class Span(NamedTuple):
    """A selection, and the ids between which it lies at `now_ms` by the server's clock.

    What is written later is beyond it; so nothing is requeued again that failed again meanwhile.
    """

    selection: Selection
    now_ms: int
    first: str
    last: str

    def has(self, letter: Letter) -> bool:
        """Whether a letter that lies within is selected."""
        reason, source = self.selection.reason, self.selection.source
        return reason in (None, letter.reason) and source in (None, letter.source)


class RunBuffer(Buffer, Reservations, Protocol):
    """Where a buffered run is put back."""


class DeadLetters:
    """The stream of dead letters, handled in pieces of a bounded number, however many there are.

    Every method raises `Unreachable` when Redis does not answer.
    """

    def __init__(self, scripts: Scripts, keys: Keys, buffer: RunBuffer) -> None:
        self._scripts = scripts
        self._keys = keys
        self._buffer = buffer

    async def span(self, selection: Selection) -> Span:
        """Where a selection lies now."""
        newest = Call("XREVRANGE", None, [self._keys.dead_letters, "+", "-", "COUNT", 1])
        time, found = await self._scripts.demand([Call("TIME", None, []), newest])
        now_ms = _ms(time)
        first, last = "-", found[0][0].decode() if found else "-"
        if selection.newer_than_s is not None:
            first = str(now_ms - 1000 * selection.newer_than_s)
        if selection.older_than_s is not None:
            last = str(now_ms - 1000 * selection.older_than_s)
        return Span(selection, now_ms, first, last)

    async def pages(self, span: Span) -> AsyncIterator[list[Letter]]:
        """The heads of the selected letters, the oldest first, without originals. A page may be empty."""
        first = span.first
        while True:
            (page,) = await self._scripts.demand([self._page(first, span.last, _AT_ONCE, _HEAD_BYTES)])
            letters = [_letter(*parts) for parts in page]
            yield [letter for letter in letters if span.has(letter)]
            if len(letters) < _AT_ONCE:
                return
            first = f"({letters[-1].dead_letter_id}"

    async def ids(self, which: Sequence[str] | Span) -> AsyncIterator[list[str]]:
        """The ids of what is selected, or those that are given, in pieces for `requeue` and `drop`."""
        if isinstance(which, Span):
            async for page in self.pages(which):
                yield [letter.dead_letter_id for letter in page]
        else:
            for start in range(0, len(which), _AT_ONCE):
                yield list(which[start : start + _AT_ONCE])

    async def read(self, ids: Sequence[str]) -> list[Letter | None]:
        """Per id, in order, the whole letter; None where there is none."""
        answers = await self._scripts.demand([self._page(one, one, 1, "") for one in ids])
        return [_letter(*page[0]) if page else None for page in answers]

    async def requeue(self, ids: Sequence[str]) -> list[str | None]:
        """Put originals back where they came from; per id, in order, None, or why its letter stays.

        A request becomes a new entry, so its deliveries count from one again. A buffered run keeps its id.

        Raises:
            Unreachable: some may have been put back whose letters are still there.
        """
        letters = {letter.dead_letter_id: letter for letter in await self.read(ids) if letter is not None}
        streams = (self._keys.triggers, self._keys.operations)
        requests = [letter for letter in letters.values() if letter.source in streams]
        runs = [letter for letter in letters.values() if letter.source not in streams]
        troubles: Troubles = {}
        for put_back, some in ((self._append, requests), (self._accept, runs)):
            if some:
                troubles |= await put_back(some)
                await self.drop(
                    [letter.dead_letter_id for letter in some if letter.dead_letter_id not in troubles]
                )
        return [troubles.get(one) if one in letters else UNKNOWN for one in ids]

    async def drop(self, ids: Sequence[str]) -> list[str | None]:
        """Delete letters; per id, in order, None, or that there is none."""
        calls = [Call("XDEL", None, [self._keys.dead_letters, one]) for one in ids]
        return [None if deleted else UNKNOWN for deleted in await self._scripts.demand(calls)]

    def _page(self, first: str, last: str, most: int, most_bytes: int | str) -> Call:
        return Call("read_letters", [self._keys.dead_letters], [first, last, most, most_bytes])

    async def _append(self, letters: Sequence[Letter]) -> Troubles:
        """Append requests to their streams."""
        answers = await self._scripts.run([_entry(letter) for letter in letters])
        return {
            letter.dead_letter_id: f"Redis refuses it: {answer}"
            for letter, answer in zip(letters, answers, strict=True)
            if isinstance(answer, ResponseError)
        }

    async def _accept(self, letters: Sequence[Letter]) -> Troubles:
        """Put runs back into the buffer."""
        (time,) = await self._scripts.demand([Call("TIME", None, [])])
        now = datetime.fromtimestamp(_ms(time) / 1000, UTC)
        troubles: Troubles = {}
        runs: dict[str, Snapshot] = {}
        for letter in letters:
            try:
                runs[letter.dead_letter_id] = self._run(letter, now)
            except (ValueError, TypeError) as error:  # a TypeError: an instant without its time zone
                troubles[letter.dead_letter_id] = str(error)
        troubles |= await self._known(runs)
        new = {one: run for one, run in runs.items() if one not in troubles}
        return troubles | await self._refused(new)

    async def _known(self, runs: Mapping[str, Snapshot]) -> Troubles:
        """Runs that the buffer knows stay here: their entry there may be the one that was set aside, which is
        still readable in its grace time. Chosen ids are reserved again.
        """
        chosen = [run for run in runs.values() if run_ids.needs_reservation(run.id)]
        found = await self._buffer.recall(list(runs.values()), chosen)
        known = {one: outcome for one, outcome in zip(runs, found, strict=True) if outcome is not None}
        still = (
            "the buffer knows its run; if it is not queued again, try when MOLLIFIER_ACK_GRACE_TTL_S is over"
        )
        return {
            one: still if isinstance(outcome, Answer) else _said(outcome) for one, outcome in known.items()
        }

    async def _refused(self, runs: Mapping[str, Snapshot]) -> Troubles:
        """Have runs accepted; those that were not."""
        outcomes = await self._buffer.accept(list(runs.values()), [None] * len(runs))
        refused: Troubles = {}
        for (one, run), outcome in zip(runs.items(), outcomes, strict=True):
            if isinstance(outcome, RequestError):
                refused[one] = _said(outcome)
            elif outcome.run_id != run.id:
                refused[one] = f"by now {run_ids.friendly(outcome.run_id)} has its idempotency key"
        await self._buffer.release([runs[one] for one in refused])
        return refused

    def _run(self, letter: Letter, now: datetime) -> Snapshot:
        """The run of a letter, as the buffer accepts it `now`.

        Raises:
            ValueError: there is none that can be put back.
        """
        if [name for name, _ in letter.original] != [b"snapshot"]:
            raise ValueError("what it holds, or where that came from, is not known to this version")
        run = _decode(letter.original[0][1])
        if self._keys.environment(run.environment_id).entries != letter.source:
            raise ValueError("its snapshot is of a run that does not belong where it came from")
        expires_at = run.idempotency_key_expires_at
        if expires_at is not None and expires_at <= now:  # as when it is materialised: see app/drain.py
            run = replace(run, idempotency_key=None, idempotency_key_expires_at=None)
        return replace(run, buffered_at=now)


def _letter(dead_letter_id: bytes, *parts: bytes) -> Letter:
    """The first six pairs are ours by their place, whatever those of the original are called."""
    pairs = tuple(zip(parts[::2], parts[1::2], strict=True))
    head = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in pairs[:6]}
    if head.keys() != _HEAD or not _COUNT.fullmatch(head["deliveries"]):
        return Letter(dead_letter_id.decode(), None, None, None, None, None, None, pairs)
    deliveries = int(head.pop("deliveries"))
    return Letter(dead_letter_id.decode(), deliveries=deliveries, original=pairs[6:], **head)


def _entry(letter: Letter) -> Call:
    """What appends the original of a letter to its stream."""
    assert letter.source is not None
    return Call("XADD", None, [letter.source, "*", *(part for pair in letter.original for part in pair)])


def _decode(snapshot: bytes) -> Snapshot:
    try:
        run = decode_snapshot(snapshot)
        fields = msgspec.msgpack.decode(snapshot, type=dict[str, msgspec.Raw])
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"its snapshot cannot be read: {error}") from None
    if run.schema_version > SCHEMA_VERSION or fields.keys() - {*Snapshot.__struct_fields__}:
        raise ValueError("its snapshot was written by a newer version, which must put it back")
    return run


def _said(error: RequestError) -> str:
    return f"{error.code}: {error.message}"


def _ms(time: tuple[int, int]) -> int:
    """The server's TIME in ms."""
    return int(time[0]) * 1000 + int(time[1]) // 1000

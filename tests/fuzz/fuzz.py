"""Sends it all to real processes, and looks after those: alive, quiet, and no larger than they were."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tests.fuzz.bodies import MAX_METADATA, MAX_PAYLOAD, MAX_TAGS
from tests.fuzz.entries import VICTIMS, Entry
from tests.fuzz.forge import Forge
from tests.fuzz.verdict import Judge, Violation
from tests.processes import Worker, Workers
from tests.waiting import eventually, fetch

Condition = Callable[[], Awaitable[None]]

LINES = "triggers operations drainer sweeper"

SETTINGS: dict[str, object] = {
    "max_payload_bytes": MAX_PAYLOAD,
    "max_metadata_bytes": MAX_METADATA,
    "max_tags": MAX_TAGS,
    "trip_threshold": 20,
    "ack_grace_ttl_s": 2,
    "stale_sweep_interval_s": 1,
}

_SHORT = ("triggers", "operations")
STREAMS = tuple(f"mollifier:{stream}" for stream in _SHORT)

WARM_UP = 0.2
"""The share of the requests after which processes are to have the size that they keep."""

GROWTH_BYTES = 16 * 2**20
"""How much a process may grow after that: its heap finds its size only in some ten thousand requests."""

P99_S = 5.0
"""Within which 99 of 100 good requests are to be answered."""

_BATCH = 100
_BACKLOG = 400


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. `sizes`: resident bytes of each process after the warm-up and at the end."""

    violations: list[Violation]
    seconds: float
    sizes: dict[str, tuple[int, int]]
    latencies: list[float]
    tally: dict[str, int]


class Fuzz:
    """One run, on servers that are empty."""

    def __init__(self, redis_url: str, database_url: str, workers: Workers, seed: int, count: int) -> None:
        self._redis: Any = Redis.from_url(redis_url, protocol=2)
        self._database_url = database_url
        self._redis_url = redis_url
        self._workers = workers
        self._forge = Forge(seed)
        self._count = count
        self._judge = Judge()
        self._arrived = asyncio.Event()

    async def run(self) -> Outcome:
        """Send, wait, look."""
        began = time.monotonic()
        processes = await self._workers.start_ready(LINES, self._redis_url, self._database_url, **SETTINGS)
        async with self._redis, self._listening():
            await self._send_and_wait(self._forge.first())
            kept = await self._kept()
            warm = await self._storm(processes)
            await self._until(self._all_is_done, within_s=60)
            sizes = {one.line: (warm[one.line], _size(one)) for one in processes}
            await self._fence()
            await self._read_letters()
            await self._look_at_rows(kept)
        self._judge.conclude()
        for process in processes:
            self._look_at(process, *sizes[process.line])
        latencies = self._judge.latencies()
        if latencies[int(len(latencies) * 0.99)] > P99_S:
            self._judge.complain("good requests are answered in time", "p99", f"{latencies[-20:]}")
        seconds, tally = time.monotonic() - began, dict(self._judge.tally().most_common())
        return Outcome(self._judge.violations, seconds, sizes, latencies, tally)

    async def _storm(self, processes: Sequence[Worker]) -> dict[str, int]:
        """All requests, with streams that are none in between; the processes' sizes after the warm-up."""
        warm: dict[str, int] = {}
        troubles = [(0.4, self._renamed), (0.7, self._replaced)]
        for sent in range(0, self._count, _BATCH):
            if not warm and sent % (5 * _BATCH) == 0:
                # A process grows to what its largest batch took: it is to come before the warm-up ends.
                await self._send([self._forge.largest(stream) for stream in _SHORT for _ in range(24)])
            if not warm and sent >= WARM_UP * self._count:
                warm = {one.line: _size(one) for one in processes}
            if troubles and sent >= troubles[0][0] * self._count:
                await self._without_streams(troubles.pop(0)[1], processes)
            await self._send(self._forge.batch(min(_BATCH, self._count - sent)))
        return warm

    async def _send(self, entries: Sequence[Entry]) -> None:
        """Send as one round trip; returns once few enough requests wait."""
        now = time.monotonic()
        async with self._redis.pipeline(transaction=False) as pipeline:
            for entry in entries:
                entry.sent_at = now
                self._judge.expect(entry)
                parts = [part for field in entry.fields for part in field]
                pipeline.execute_command("XADD", f"mollifier:{entry.stream}", "*", *parts)
            ids = await pipeline.execute()
        for entry, entry_id in zip(entries, ids, strict=True):
            entry.sent(entry_id.decode())
        await self._until(self._few_wait, within_s=30, every_s=0.002)

    async def _send_and_wait(self, entries: Sequence[Entry]) -> None:
        await self._send(entries)
        async with asyncio.timeout(30):
            while not all(self._judge.is_answered(entry) for entry in entries):
                self._arrived.clear()
                await self._arrived.wait()

    async def _few_wait(self) -> None:
        assert await self._backlog() <= _BACKLOG

    async def _backlog(self) -> int:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for stream in STREAMS:
                pipeline.xlen(stream)
            return sum(await pipeline.execute())

    async def _until(self, condition: Condition, within_s: float, every_s: float = 0.02) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: it did not come true; with what waits for the longest time, and the logs' ends.
        """
        try:
            await eventually(condition, within_s, every_s)
        except AssertionError as error:
            oldest = [await self._redis.xrange(stream, count=10) for stream in STREAMS]
            ids = {entry_id.decode() for entries in oldest for entry_id, _ in entries}
            kinds = sorted({entry.kind for entry in self._judge.entries if entry.id in ids})
            raise AssertionError(f"some wait and wait: {kinds}\n{self._workers.report()}") from error

    async def _all_is_done(self) -> None:
        """Nothing waits, nothing is pending, nothing is in the buffer any more."""
        assert await self._backlog() == 0
        for stream in STREAMS:
            assert (await self._redis.xpending(stream, "mollifier"))["pending"] == 0
        for key in [key async for key in self._redis.scan_iter("mollifier:{*}:ready", count=1_000)]:
            assert await self._redis.zcard(key) == 0, key

    # What is wrong with the streams for a while.

    async def _without_streams(self, wrong: Any, processes: Sequence[Worker]) -> None:
        """Streams that are none: nobody minds for long."""
        await self._until(self._all_is_done, within_s=30)
        async with wrong():
            for stream in STREAMS:
                with suppress(ResponseError):
                    await self._redis.xadd(stream, {"body": "{}"})
                    self._judge.complain("a stream of a wrong type refuses", stream, "it took an entry")
            refused = await self._refusals()
            await eventually(lambda: self._readers_are_refused(refused + 10), within_s=20)
            for process in processes:
                if await process.live() != 200:
                    self._judge.complain("processes stay live", process.line, "while its stream was none")
        await self._send_and_wait([self._forge.good(stream) for stream in _SHORT])

    @asynccontextmanager
    async def _renamed(self) -> AsyncIterator[None]:
        """Strings in place of the streams, which then come back with their groups."""
        for stream in STREAMS:
            await self._redis.rename(stream, f"aside:{stream}")
            await self._redis.set(stream, "no stream")
        yield
        for stream in STREAMS:
            await self._redis.rename(f"aside:{stream}", stream)

    @asynccontextmanager
    async def _replaced(self) -> AsyncIterator[None]:
        """Hashes in place of the streams, which are gone for good, and their groups with them."""
        for stream in STREAMS:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.delete(stream).hset(stream, "no", "stream")
                await pipeline.execute()
        yield
        await self._redis.delete(*STREAMS)

    async def _refusals(self) -> int:
        errors = await self._redis.info("errorstats")
        return int(errors.get("errorstat_WRONGTYPE", {}).get("count", 0))

    async def _readers_are_refused(self, count: int) -> None:
        assert await self._refusals() >= count

    # What has come of it.

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Hear every channel there is."""
        async with self._redis.pubsub() as pubsub:
            await pubsub.psubscribe("*")
            assert await pubsub.get_message(timeout=5) is not None
            listening = asyncio.create_task(self._listen(pubsub))
            try:
                yield
            finally:
                listening.cancel()
                with suppress(asyncio.CancelledError):
                    await listening

    async def _listen(self, pubsub: Any) -> None:
        async for message in pubsub.listen():
            channel = message["channel"].decode(errors="replace")
            if channel == "fence":
                self._fenced.set()
            else:
                self._judge.heard(channel, message["data"], time.monotonic())
                self._arrived.set()

    async def _fence(self) -> None:
        """Wait until all that was said before has been heard."""
        self._fenced = asyncio.Event()
        await self._redis.publish("fence", "")
        async with asyncio.timeout(30):
            await self._fenced.wait()

    async def _read_letters(self) -> None:
        """By a script, for the client would make one field of two with the same name."""
        script = "return redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', 200)"
        start = "-"
        while letters := await self._redis.eval(script, 1, "mollifier:dead-letters", start):
            self._judge.read_letters(fields for _, fields in letters)
            start = f"({letters[-1][0].decode()}"

    async def _kept(self) -> list[dict[str, Any]]:
        """What nobody may have touched."""
        ids = [victim.run_id("kept").removeprefix("run_") for victim in VICTIMS]

        async def are_there() -> list[dict[str, Any]]:
            query = "SELECT * FROM mollifier.runs WHERE id = ANY ($1::text[]) ORDER BY id"
            rows = [dict(row) for row in await fetch(self._database_url, query, ids)]
            assert len(rows) == len(ids)
            return rows

        return await eventually(are_there)

    async def _look_at_rows(self, kept: Sequence[dict[str, Any]]) -> None:
        query = "SELECT id, status, error FROM mollifier.runs"
        rows = {row["id"]: row for row in await fetch(self._database_url, query)}
        aliases = {row[0] for row in await fetch(self._database_url, "SELECT id FROM mollifier.run_aliases")}
        accepted = self._judge.accepted()
        for run_id in accepted - rows.keys() - aliases:
            self._judge.complain("accepted is kept", run_id, "there is no such row")
        for run_id in rows.keys() - accepted:
            self._judge.complain("no run without its reply", run_id, "no reply has named it")
        for row in rows.values():
            if row["status"] == "SYSTEM_FAILURE":
                self._judge.complain("accepted can be stored", row["id"], row["error"])
        if await self._kept() != kept:
            self._judge.complain("nobody touches what is another's", "kept runs", await self._kept())

    def _look_at(self, process: Worker, warm: int, end: int) -> None:
        name = f"{process.line}, pid {process.pid}"
        if not process.is_running:
            self._judge.complain("no process dies", name, f"it ended with {process.process.returncode}")
        if end - warm > GROWTH_BYTES:
            self._judge.complain("memory stays flat", name, f"from {mib(warm)} to {mib(end)}")
        for line in process.log():
            if (
                line["level"] not in ("info", "warning")
                or "exception" in line
                or line["event"] == "recovered"
            ):
                self._judge.complain("no process stumbles", name, line)


def _size(process: Worker) -> int:
    if not process.is_running:
        return 0
    return int(psutil.Process(process.pid).memory_info().rss)


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

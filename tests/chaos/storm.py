"""The storm: servers, processes, producers and faults, from the first start to the last exit."""

import asyncio
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.embedded import Postgres, Valkey, spawn
from app.migrate import migrate
from tests.chaos import journal
from tests.chaos.evidence import Happened, Story, read_end, save
from tests.chaos.faults import CLAIM_TTL_S, HEARTBEAT_S, KINDS, STORE_TIMEOUT_S, Kind, Scene
from tests.chaos.fleet import Fleet
from tests.chaos.probes import Probe, Pulse
from tests.chaos.proxy import Link
from tests.chaos.schedule import Planned, plan
from tests.processes import ROOT

LINES = "triggers triggers triggers drainer drainer operations operations sweeper sweeper"

SETTINGS = {
    "MOLLIFIER_HEARTBEAT_TTL_MS": int(HEARTBEAT_S * 1000),
    "MOLLIFIER_CLAIM_TTL_S": CLAIM_TTL_S,
    "MOLLIFIER_CLAIM_MIN_TTL_S": 1,
    "MOLLIFIER_CLAIM_WAIT_MS": 2000,
    "MOLLIFIER_STORE_TIMEOUT_MS": int(STORE_TIMEOUT_S * 1000),
    "MOLLIFIER_RECLAIM_IDLE_MS": 10_000,
    "MOLLIFIER_TRIP_WINDOW_MS": 500,
    "MOLLIFIER_TRIP_THRESHOLD": 4,
    "MOLLIFIER_HOLD_MS": 500,
    "MOLLIFIER_TRIGGER_BATCH_SIZE": 50,
    "MOLLIFIER_DRAIN_BATCH_SIZE": 50,
    "MOLLIFIER_ACK_GRACE_TTL_S": 2,
    "MOLLIFIER_STALE_SWEEP_INTERVAL_S": 2,
    "MOLLIFIER_MAX_TAGS": 50,
}

_GONE_MS = 3_000
"""A consumer that lives reads every second."""
_FINISH_S = 90.0
_QUIET_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What kind of storm. `rate` is in requests a second, of all producers together."""

    seed: int
    seconds: float
    folder: Path
    rate: float = 200.0
    kinds: Sequence[Kind] = KINDS
    faults: bool = True


@dataclass(slots=True)
class Outcome:
    """What came of a storm."""

    story: Story
    pulse: Pulse = field(default_factory=Pulse)
    seconds: float = 0.0
    is_quiet: bool = True


class Storm:
    """One storm."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._happened: list[Happened] = []
        self._pulse = Pulse()
        self._producers: list[subprocess.Popen[bytes]] = []
        self._links: list[Link] = []

    async def run(self) -> Outcome:
        """From start to end; the servers and processes are gone when it returns."""
        options, started = self._options, time.monotonic()
        shutil.rmtree(options.folder, ignore_errors=True)
        options.folder.mkdir(parents=True)
        redis_options = {"appendonly": "yes", "appendfsync": "always", "auto-aof-rewrite-percentage": "0"}
        postgres_options = {"max_connections": "110", "fsync": "on", "log_lock_waits": "on"}
        valkey = Valkey(options.folder / "valkey", options=redis_options)
        postgres = Postgres(options.folder / "postgres", options=postgres_options)
        rng = random.Random(f"storm {options.seed}")
        with valkey, postgres:
            await migrate(postgres.url)
            fleet = Fleet(options.folder, {name: str(value) for name, value in SETTINGS.items()})
            try:
                jump_s = rng.choice([-1, 1]) * rng.uniform(30, 4000)
                await fleet.add(LINES, valkey.port, postgres.port, jump_s)
                scene = Scene(valkey, postgres, fleet)
                is_quiet = await self._blow(scene)
                exits = await fleet.leave()
                end = await read_end(valkey.url, postgres.url, exits)
            finally:
                for producer in self._producers:
                    producer.kill()
                await fleet.end()
                for link in self._links:
                    await link.close()
        record = await asyncio.to_thread(journal.read, options.folder)
        story = Story(record, end, self._happened)
        save(story, options.folder)
        return Outcome(story, self._pulse, time.monotonic() - started, is_quiet)

    async def _blow(self, scene: Scene) -> bool:
        """Producers and faults, until all is said and done; whether it became quiet."""
        await self._start_producers(scene)
        log = journal.Journal(self._options.folder / "probe.journal")
        probe = Probe(scene.valkey.url, scene.postgres.url, log)
        self._pulse = probe.pulse
        probing = asyncio.create_task(probe.run())
        began = time.time()
        if self._options.faults:
            await self._inject(scene)
        await asyncio.sleep(max(0.0, began + self._options.seconds - time.time()))
        for producer in self._producers:
            producer.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _FINISH_S
        for producer in self._producers:
            try:
                await asyncio.to_thread(producer.wait, max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                producer.kill()
        probing.cancel()
        await probe.close()
        return await _becomes_quiet(scene)

    async def _start_producers(self, scene: Scene) -> None:
        options = self._options
        for number, share in enumerate((0.3, 0.3, 0.3, 0.1), start=1):
            link = Link(f"p{number}", scene.valkey.port)
            await link.open()
            self._links.append(link)
            command = [sys.executable, "-m", "tests.chaos.producers", "--name", f"p{number}"]
            command += ["--redis-url", f"redis://127.0.0.1:{link.port}/0", "--seed", str(options.seed)]
            command += ["--journal", str(options.folder / f"p{number}.journal")]
            command += ["--rate", str(options.rate * share), *(["--faststream"] if number == 4 else [])]
            with (options.folder / f"p{number}.log").open("ab") as log:
                producer = spawn(command, ROOT, log, user=None, death=signal.SIGKILL)
            self._producers.append(producer)

    async def _inject(self, scene: Scene) -> None:
        """Follow the plan."""
        options = self._options
        began = asyncio.get_running_loop().time()
        tasks = []
        for planned in plan(options.seed, options.seconds, options.kinds):
            await asyncio.sleep(max(0.0, began + planned.at_s - asyncio.get_running_loop().time()))
            tasks.append(asyncio.create_task(self._suffer(scene, planned)))
        await asyncio.gather(*tasks)

    async def _suffer(self, scene: Scene, planned: Planned) -> None:
        kind, begun = planned.kind, time.time()
        async with kind.inject(scene, random.Random(planned.seed)) as target:
            injected = time.time()
            self._log(f"{kind.name}: {target}, for {planned.lasts_s:.1f} s")
            await asyncio.sleep(planned.lasts_s)
        over = time.time()
        healed = injected if kind.heals_at_once else over
        self._happened.append(Happened(kind.name, target, begun, injected, healed, over))
        self._log(f"  {kind.name} is over")

    def _log(self, line: str) -> None:
        with (self._options.folder / "faults.log").open("a") as log:
            log.write(f"{time.time():.3f} {line}\n")


async def _becomes_quiet(scene: Scene) -> bool:
    """Wait until nothing is on its way any more; whether that came to be."""
    deadline = time.monotonic() + _QUIET_S
    redis: Any
    async with scene.redis() as redis:
        while time.monotonic() < deadline:
            left = [
                await redis.xlen("mollifier:triggers"),
                await redis.xlen("mollifier:operations"),
                *[1 for pattern in ("claim", "entries", "chosen") async for _ in _keys(redis, pattern)],
                *[
                    consumer["idle"] > _GONE_MS  # who was killed is dropped by the sweeper
                    for stream in ("mollifier:triggers", "mollifier:operations")
                    for consumer in await redis.xinfo_consumers(stream, "mollifier")
                ],
            ]
            if not any(left):
                return True
            await asyncio.sleep(0.25)
    return False


def _keys(redis: Any, what: str) -> Any:
    return redis.scan_iter(match=f"mollifier:{{*}}:{what}*", count=1000)

"""The Procfile's lines as real operating system processes, which tests kill, freeze and ask how they are."""

import asyncio
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Self

from prometheus_client.parser import text_string_to_metric_families

from tests.producer import Producer, producing
from tests.waiting import eventually, runs_of

ROOT = Path(__file__).parent.parent
HTTP_TIMEOUT_S = 4.0
LOG_TAIL = 8_000

# Below every system's range of outgoing ports, and beside those of the embedded servers.
_ports = count(random.randrange(16_000, 28_000))


class Worker:
    """One process of a Procfile line; started at once, and killed at the end whatever happens."""

    def __init__(
        self,
        line: str,
        redis_url: str,
        database_url: str,
        folder: Path,
        settings: dict[str, object],
        stdout: int | None = None,
    ) -> None:
        self.line = line
        self.port = _free_port()
        self.log_file = folder / f"{line}-{self.port}.log"
        command = procfile()[line]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MOLLIFIER_", "PYTEST_"))
        }
        environment |= {
            "REDIS_URL": redis_url,
            "DATABASE_URL": database_url,
            "PORT": str(self.port),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        environment |= {f"MOLLIFIER_{name.upper()}": str(value) for name, value in settings.items()}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                shlex.split(command),
                cwd=ROOT,
                env=environment,
                stdout=log if stdout is None else stdout,
                stderr=subprocess.STDOUT if stdout is None else log,
            )
        self.pid = self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    async def wait_ready(self, within_s: float = 15) -> Self:
        """Poll `/health/ready` until it says so."""

        async def is_ready() -> None:
            assert self.is_running, f"{self.line} has ended with {self.process.returncode}:\n{self.text()}"
            status, body = await self.get("/health/ready")
            assert status == 200, f"{self.line} is not ready: {body}"

        await eventually(is_ready, within_s, every_s=0.05)
        return self

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page of the process' HTTP side; OSError when there is no answer."""
        return await asyncio.to_thread(_get, f"http://127.0.0.1:{self.port}{path}")

    async def live(self) -> int:
        return (await self.get("/health/live"))[0]

    async def ready(self) -> int:
        return (await self.get("/health/ready"))[0]

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry the given labels."""
        _, page = await self.get("/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP; returns once the process stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: ask the process to leave."""
        self.process.terminate()

    async def ended(self, within_s: float = 35) -> int:
        """The exit status, once the process has ended."""

        async def status() -> int:
            status = self.process.poll()
            assert status is not None, f"{self.line} still runs after {within_s} s"
            return status

        return await eventually(status, within_s)

    def text(self) -> str:
        """Everything that was logged."""
        return self.log_file.read_text(errors="replace")

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log's lines, or those of one event; a line that is not JSON is a failure of the process."""
        lines = [json.loads(line) for line in self.text().splitlines()]
        return [line for line in lines if event is None or line.get("event") == event]

    @asynccontextmanager
    async def stays_live(self) -> AsyncIterator[None]:
        """Asserts that the process runs and `/health/live` says 200 all the time while the block runs."""
        seen: list[int | str] = []

        async def watch() -> None:
            while True:
                try:
                    seen.append(await self.live())
                except OSError as error:
                    seen.append(repr(error))
                await asyncio.sleep(0.1)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        assert self.is_running
        assert set(seen) == {200}, f"/health/live of {self.line}: {seen}"


class Workers:
    """A factory of workers: what it started is killed when it ends."""

    open: ClassVar[list["Workers"]] = []
    """The factories that have not ended: whose logs a failing test wants to show."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[Worker] = []
        self.open.append(self)

    def start(self, line: str, redis_url: str, database_url: str, **settings: object) -> Worker:
        """Start one line of the Procfile; `settings` are variables without `MOLLIFIER_`, in any case."""
        return self._start(Worker(line, redis_url, database_url, self._folder, settings))

    def start_speaking_to(self, stdout: int, line: str, redis_url: str, database_url: str) -> Worker:
        """Start one line of the Procfile whose standard output is a file descriptor of the test's."""
        return self._start(Worker(line, redis_url, database_url, self._folder, {}, stdout))

    def _start(self, worker: Worker) -> Worker:
        self.started.append(worker)
        return worker

    async def start_ready(
        self, lines: str, redis_url: str, database_url: str, **settings: object
    ) -> list[Worker]:
        """Start several lines (`"triggers triggers drainer"`) and wait until all are ready."""
        workers = [self.start(line, redis_url, database_url, **settings) for line in lines.split()]
        for worker in workers:
            await worker.wait_ready()
        return workers

    def end(self) -> None:
        """Kill what still runs."""
        for worker in self.started:
            worker.kill()
        self.open.remove(self)

    def report(self) -> str:
        """The end of every process' log."""
        return "\n".join(
            f"--- {one.line}, pid {one.pid}, exit status {one.process.poll()}\n{one.text()[-LOG_TAIL:]}"
            for one in self.started
        )


@dataclass(frozen=True)
class Stage:
    """A pair of servers, processes on them, and one producer that talks to those."""

    redis_url: str
    database_url: str
    producer: Producer
    triggers: list[Worker]
    drainers: list[Worker]

    @property
    def all(self) -> list[Worker]:
        return [*self.triggers, *self.drainers]

    async def rows(self, *environments: str, count: int, within_s: float = 10) -> list[dict[str, Any]]:
        """The rows of some environments, without those of `Producer.trip`, once there are `count` of them."""

        async def all_there() -> list[dict[str, Any]]:
            rows = [row for row in await runs_of(self.database_url, *environments) if row["task"] != "trip"]
            assert len(rows) == count, f"{len(rows)} rows of {environments}, not {count}"
            return rows

        return await eventually(all_there, within_s, every_s=0.05)

    async def row(self, environment: str) -> dict[str, Any]:
        """The one row of an environment, without those of `Producer.trip`, once it is there."""
        return (await self.rows(environment, count=1))[0]


@asynccontextmanager
async def staged(
    workers: Workers, lines: str, redis_url: str, database_url: str, **settings: object
) -> AsyncIterator[Stage]:
    """Processes that are ready, one for each line of the Procfile named in `lines`."""
    started = await workers.start_ready(lines, redis_url, database_url, **settings)
    by_line = {line: [one for one in started if one.line == line] for line in ("triggers", "drainer")}
    namespace = str(settings.get("namespace", "mollifier"))
    async with producing(redis_url, namespace) as producer:
        yield Stage(redis_url, database_url, producer, by_line["triggers"], by_line["drainer"])


TRIPS_AT_TWO: Mapping[str, object] = {"trip_window_ms": 10_000, "trip_threshold": 1, "hold_ms": 600_000}
"""Settings with which an environment passes through until it is tripped, then is mollified for ever."""


def procfile() -> dict[str, str]:
    """The Procfile: name -> command."""
    lines = (ROOT / "Procfile").read_text().splitlines()
    return {
        name.strip(): command.strip() for name, _, command in (line.partition(":") for line in lines if line)
    }


def _free_port() -> int:
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is no free port")


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()

"""A process that is measured."""

import asyncio
import os
import platform
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from urllib.request import urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families

from app.embedded import free_port, spawn

READY_S = 20.0

_LAST_WORDS = 4000

_ROOT = Path(__file__).parent.parent


class Process:
    """A module run as a program, `workers.triggers` say. It is killed when we end, however that happens."""

    def __init__(self, module: str, folder: Path, variables: Mapping[str, str]) -> None:
        self.module = module
        self._port = free_port()
        self._log = folder / f"{module}-{self._port}.log"
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MOLLIFIER_")}
        with self._log.open("wb") as log:
            self._process = spawn(
                [sys.executable, "-m", module],
                _ROOT,
                log,
                user=None,
                death=signal.SIGKILL,
                environment={**ours, **variables, "PORT": str(self._port)},
            )

    @property
    def cpu_s(self) -> float:
        """Processor time used so far, user and system."""
        return cpu_s(self._process.pid)

    @property
    def last_words(self) -> str:
        """The end of its log."""
        return f"--- {self.module}\n{self._log.read_text(errors='replace')[-_LAST_WORDS:]}"

    def check(self) -> None:
        """Fail if the process has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.module} has ended by itself")

    async def ready(self) -> None:
        """Return once `/health/ready` says so."""

        async def is_ready() -> bool:
            self.check()
            try:
                await asyncio.to_thread(self._get, "/health/ready")
            except OSError:
                return False
            return True

        await until(is_ready, f"{self.module} to be ready", READY_S, every_s=0.05)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry the given labels."""
        page = await asyncio.to_thread(self._get, "/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def leave(self) -> None:
        """Ask the process to finish what it holds, and wait until it has."""
        self._process.terminate()
        await asyncio.to_thread(self._process.wait)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _get(self, path: str) -> str:
        with urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as response:
            return str(response.read(), "utf-8")


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far, user and system, all its threads."""
    if platform.system() == "Linux":
        return time.clock_gettime((~pid << 3) | 2)  # its own clock, exact; what others give counts 10 ms
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def machine_s() -> float:
    """Processor time that everything on this machine has used so far."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, within_s: float = 120, every_s: float = 0.005
) -> None:
    """Wait for a condition; TimeoutError names what did not come."""
    deadline = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {within_s:.0f} s for {what}")
        await asyncio.sleep(every_s)

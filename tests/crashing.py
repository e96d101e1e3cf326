"""Processes that end at a chosen point, as in a crash.

    CRASH_AT="before write 1" python -m tests.crashing triggers

is one of them. Without a line of the Procfile it is a nursery: what takes long is importing, and that is done
once, before the line `ready`. Each line of standard input is an order, a JSON object; it becomes a process by
fork, and its process id is the answer. All of them end with their nursery.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.crash_points import CRASH_AT, Crash, arm
from tests.processes import ROOT
from tests.waiting import eventually
from workers.drainer import Drainer
from workers.operations import Operations
from workers.process import Process, run
from workers.sweeper import Sweeper
from workers.triggers import Triggers

LINES: dict[str, type[Process]] = {
    "triggers": Triggers,
    "operations": Operations,
    "drainer": Drainer,
    "sweeper": Sweeper,
}


@dataclass(frozen=True)
class Child:
    """A process of a nursery."""

    pid: int
    log_file: Path
    crash: Crash | None

    def send(self, signal_number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    async def is_gone(self) -> None:
        """Asserts that there is no such process."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            raise AssertionError(f"{self.pid} still runs, {self.crash} was not reached")

    async def crashed(self, within_s: float = 20) -> None:
        """Return once the process is dead; AssertionError if it did not die of its crash."""
        assert self.crash is not None
        await eventually(self.is_gone, within_s, every_s=0.05)
        assert self.log().endswith(f"{self.crash.last_words}\n"), self.log()

    def log(self) -> str:
        """Everything that was logged."""
        return self.log_file.read_text(errors="replace")


class Nursery:
    """Starts processes quickly, on one pair of servers."""

    def __init__(self, folder: Path, redis_url: str, database_url: str) -> None:
        self._folder = folder
        self._urls = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "PORT": "0"}
        self._numbers = count(1)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MOLLIFIER_", "PYTEST_"))
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crashing"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def start(self, line: str, crash: Crash | None = None, **settings: object) -> Child:
        """A process of a line of the Procfile; one that will crash, if it is told where."""
        variables = {f"MOLLIFIER_{name.upper()}": str(value) for name, value in settings.items()}
        variables |= self._urls | ({CRASH_AT: str(crash)} if crash else {})
        log = self._folder / f"{next(self._numbers)}-{line}.log"
        log.touch()
        order = {"line": line, "variables": variables, "log": str(log)}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return Child(int(self._answer()), log, crash)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """End all of them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    if len(sys.argv) > 1:
        be(sys.argv[1])
    else:
        nurse()


def be(line: str) -> None:
    """Run a process to its end."""
    if CRASH_AT in os.environ:
        arm(Crash.parse(os.environ[CRASH_AT]))
    run(LINES[line])


def nurse() -> None:
    """Fork a process for each order."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that have ended are gone at once
    children = []
    gc.freeze()
    print("ready", flush=True)
    try:
        for order in sys.stdin:
            child = os.fork()
            if child == 0:
                become(**json.loads(order))
            children.append(child)
            print(child, flush=True)
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def become(line: str, variables: dict[str, str], log: str) -> None:
    """What a fork does: run a process to its end, with its output in `log`."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ |= variables
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        be(line)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()

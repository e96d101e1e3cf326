"""The lines of a Procfile as processes of this machine: started, watched, and stopped in order."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import urlopen

from app.cli.complaints import Complaint
from app.embedded import port_is_free, spawn

READY_S = 30.0

_POLL_S = 0.05
_HTTP_S = 2.0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the Procfile, and the port of its process."""

    name: str
    command: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Processes:
    """One process for each line. What they print goes to the file that `output` opens for each name.

    On Linux they also end (by SIGTERM) when this process is killed.
    """

    def __init__(
        self,
        lines: Iterable[Line],
        folder: Path,
        environment: Mapping[str, str],
        output: Callable[[str], IO[bytes]],
    ) -> None:
        self.lines = list(lines)
        self._folder = folder
        self._environment = environment
        self._output = output
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start them all and return when each says that it is ready.

        Raises:
            Complaint: a command is not there, or a process has ended or is not ready in time.
        """
        for line in self.lines:
            with self._output(line.name) as output:
                self._running[line.name] = self._spawn(line, output)
        deadline = time.monotonic() + READY_S
        waiting = list(self.lines)
        while waiting:
            self.check()
            waiting = [line for line in waiting if not _is_ready(line)]
            if waiting and time.monotonic() > deadline:
                raise Complaint(f"{waiting[0].name} is not ready after {READY_S:.0f} s")
            time.sleep(_POLL_S if waiting else 0)

    def check(self) -> None:
        """See that all are running.

        Raises:
            Complaint: one of them has ended.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise Complaint(f"{name} has ended by itself, with exit status {process.returncode}")

    def stop(self, within_s: float) -> None:
        """Ask them to finish, in the order of the Procfile, and kill those that have not ended in time.

        A second Ctrl-C meanwhile kills them at once.
        """
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + within_s
        try:
            for process in self._running.values():
                process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        finally:
            for process in self._running.values():
                process.kill()
                process.wait()

    def _spawn(self, line: Line, output: IO[bytes]) -> subprocess.Popen[bytes]:
        program, *arguments = shlex.split(line.command)
        environment = {**self._environment, "PORT": str(line.port)}
        found = shutil.which(program, path=environment["PATH"])
        if found is None:
            raise Complaint(f"Procfile: {line.name}: there is no program {program}")
        return spawn(
            [found, *arguments],
            self._folder,
            output,
            user=None,
            death=signal.SIGTERM,
            environment=environment,
        )


def procfile() -> Path:
    """The Procfile of this folder, else the one beside the installed program.

    Raises:
        Complaint: there is neither.
    """
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "Procfile").is_file():
            return folder / "Procfile"
    raise Complaint("there is no Procfile in this folder")


def parse(path: Path, ports: Iterable[int]) -> list[Line]:
    """The lines of a Procfile, each with the next of `ports` that is free."""
    from honcho.environ import parse_procfile  # type: ignore[import-untyped]

    commands = parse_procfile(path.read_text(encoding="utf-8")).processes
    if not commands:
        raise Complaint(f"{path} has no lines")
    free = (port for port in ports if port_is_free(port))
    return [Line(name, command, port) for (name, command), port in zip(commands.items(), free, strict=False)]


def environment(redis_url: str, database_url: str, **settings: str) -> dict[str, str]:
    """The variables that the processes get: ours, these, and first on the path the Python that runs us."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": programs, "REDIS_URL": redis_url, "DATABASE_URL": database_url, **settings}


def _is_ready(line: Line) -> bool:
    try:
        with urlopen(f"{line.url}/health/ready", timeout=_HTTP_S):
            return True
    except HTTPError as error:
        error.close()
        return False
    except (OSError, HTTPException):
        return False

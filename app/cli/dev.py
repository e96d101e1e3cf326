"""`mollifier dev`: everything on this machine, in the foreground, with data that stays."""

import os
import re
import shutil
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from honcho.printer import Printer  # type: ignore[import-untyped]

    from app.cli.installation import Installation

FOLDER = Path(".mollifier")
VALKEY_PORT, POSTGRES_PORT = 6380, 5433
PORTS = range(5000, 65_536, 100)

_LOOK_EVERY_S = 0.2
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def dev() -> None:
    """Run everything here, servers included, until Ctrl-C. Data stay in .mollifier/."""
    from app.cli.installation import installation, interruptible

    settings = {"MOLLIFIER_LOG_FORMAT": "console", "PYTHONUNBUFFERED": "1"}
    printing = Printing()
    with interruptible():
        try:
            with installation(
                FOLDER,
                printing.open,
                settings,
                printing.say,
                valkey_port=VALKEY_PORT,
                postgres_port=POSTGRES_PORT,
                ports=PORTS,
            ) as running:
                for line in _welcome(running):
                    printing.say(line)
                while True:
                    running.processes.check()
                    time.sleep(_LOOK_EVERY_S)
        except KeyboardInterrupt:
            pass
        finally:
            printing.finish()


class Printing:
    """What the processes print, line by line, each with the time and the name, in colour on a terminal."""

    def __init__(self) -> None:
        from honcho.colour import get_colours  # type: ignore[import-untyped]

        self._colours = get_colours()
        self._printer = _printer()
        self._in_colour = sys.stdout.isatty()
        self._threads: list[threading.Thread] = []
        self._turn = threading.Lock()

    def open(self, name: str) -> IO[bytes]:
        """What a process of this name may write to; it is read until the process has closed it."""
        reading, writing = os.pipe()
        self._printer.width = max(self._printer.width, len(name))
        thread = threading.Thread(
            target=self._print_all, args=(name, next(self._colours), reading), name=name, daemon=True
        )
        self._threads.append(thread)
        thread.start()
        return os.fdopen(writing, "wb")

    def say(self, line: str) -> None:
        """Print a line of our own."""
        self._print("mollifier", None, line)

    def finish(self) -> None:
        """Return once all that was written is printed."""
        for thread in self._threads:
            thread.join(timeout=1)

    def _print_all(self, name: str, colour: str, reading: int) -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                text = line.decode(errors="replace")
                self._print(name, colour, text if self._in_colour else _COLOURS.sub("", text))

    def _print(self, name: str, colour: str | None, line: str) -> None:
        from honcho.printer import Message

        with self._turn:
            self._printer.write(Message("line", line or " ", datetime.now(), name, colour))


def _printer() -> "Printer":
    from honcho.printer import Printer

    return Printer(sys.stdout, width=len("mollifier"))


def _welcome(running: "Installation") -> list[str]:
    me = "mollifier" if shutil.which("mollifier") == sys.argv[0] else os.path.relpath(sys.argv[0])
    width = max(len(line.name) for line in running.processes.lines)
    return [
        *running.prepared,
        "",
        f"{'Redis':{width}}  {running.redis_url}",
        f"{'Postgres':{width}}  {running.database_url}",
        *(
            f"{line.name:{width}}  {line.url}/health/ready  {line.url}/metrics"
            for line in running.processes.lines
        ),
        "",
        "Try it from another terminal:",
        f"""  REDIS_URL={running.redis_url} {me} trigger send-email --payload '{{"to": "ada"}}'""",
        "Ctrl-C stops everything; the data stay in .mollifier/.",
        "",
    ]

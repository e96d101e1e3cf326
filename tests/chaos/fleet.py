"""The processes of the storm: each has links of its own to the servers, and can be killed and replaced."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from app.embedded import free_port, spawn
from tests.chaos.proxy import Link
from tests.processes import ROOT

_READY_S = 40.0
_EXIT_S = 45.0
_SWITCHED_ON = 'mollifier_switch{switch="enabled"} 1.0'


@dataclass(slots=True, eq=False)
class Member:
    """One place in the fleet, filled by one process after another."""

    line: str
    name: str
    redis: Link
    postgres: Link
    log: Path
    settings: dict[str, str]
    can_jump: bool = False
    port: int = field(default_factory=free_port)
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    process: "subprocess.Popen[bytes] | None" = None
    is_frozen: bool = False
    exits: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Start a process."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MOLLIFIER_", "PYTEST_", "CHAOS_"))
        }
        environment |= {
            "REDIS_URL": f"redis://127.0.0.1:{self.redis.port}/0",
            "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{self.postgres.port}/postgres",
            "PORT": str(self.port),
            **self.settings,
        }
        module = f"workers.{self.line}"
        run = ["-m", "tests.chaos.skewed", module] if self.can_jump else ["-m", module]
        with self.log.open("ab") as log:
            self.process = spawn(
                [sys.executable, *run],
                ROOT,
                log,
                user=None,
                death=signal.SIGKILL,
                environment=environment,
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, what: signal.Signals) -> None:
        """Send a signal, if there is anybody to get it."""
        if self.process is not None and self.is_running:
            self.process.send_signal(what)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def leave(self) -> None:
        """SIGTERM, and wait for the exit, whose status is kept. Who does not go in time is killed."""
        process = self.process
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            self.exits.append(await asyncio.to_thread(process.wait, _EXIT_S))
        except subprocess.TimeoutExpired:
            self.exits.append(-int(signal.SIGKILL))
            self.kill()

    async def wait_ready(self) -> bool:
        """Wait until the process says that it is ready; whether it did in time."""
        deadline = asyncio.get_running_loop().time() + _READY_S
        while asyncio.get_running_loop().time() < deadline:
            if await asyncio.to_thread(_is_ready, self.port):
                return True
            await asyncio.sleep(0.1)
        return False


class Fleet:
    """All members."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._folder = folder
        self._settings = settings
        self.members: list[Member] = []

    async def add(self, lines: str, redis_port: int, postgres_port: int, jump_s: float) -> None:
        """Start one process for each line; the first of each kind can have its clock jump."""
        for line in lines.split():
            number = sum(member.line == line for member in self.members) + 1
            name = f"{line}{number}"
            member = Member(
                line,
                name,
                Link(f"{name}-redis", redis_port),
                Link(f"{name}-postgres", postgres_port),
                self._folder / f"{name}.log",
                {**self._settings, "CHAOS_CLOCK_JUMP_S": str(jump_s)},
                can_jump=number == 1 and line != "sweeper",
            )
            await member.redis.open()
            await member.postgres.open()
            member.start()
            self.members.append(member)
        for member in self.members:
            assert await member.wait_ready(), f"{member.name} is not ready: see {member.log}"

    def of(self, *lines: str) -> list[Member]:
        """The members of some lines, or all."""
        return [member for member in self.members if not lines or member.line in lines]

    async def is_on(self, within_s: float = 20.0) -> None:
        """Wait until no trigger worker is switched off: who is cut off from Postgres hears of it late."""
        deadline = asyncio.get_running_loop().time() + within_s
        for member in self.of("triggers"):
            while asyncio.get_running_loop().time() < deadline:
                if _SWITCHED_ON in await asyncio.to_thread(_read, member.port, "/metrics"):
                    break
                await asyncio.sleep(0.1)

    async def leave(self) -> dict[str, int]:
        """Ask all to leave; how each of them ended."""
        await asyncio.gather(*(member.leave() for member in self.members))
        return {member.name: member.exits[-1] for member in self.members if member.exits}

    async def end(self) -> None:
        """Kill what is left."""
        for member in self.members:
            member.kill()
            await member.redis.close()
            await member.postgres.close()


def _is_ready(port: int) -> bool:
    return bool(_read(port, "/health/ready"))


def _read(port: int, path: str) -> str:
    """A page of a process' HTTP side; empty when it does not answer well."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as page:
            return str(page.read(), "utf-8")
    except HTTPError as error:
        error.close()
        return ""
    except OSError:
        return ""

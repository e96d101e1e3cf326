"""All of Mollifier on this machine: both servers, migrated, and the processes of the Procfile."""

import asyncio
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.cli.migrate import prepare
from app.cli.processes import Processes, environment, parse, procfile
from app.embedded import Postgres, Valkey, free_port, port_is_free
from app.settings import Settings

_BIT_S = 5


@dataclass(frozen=True, slots=True)
class Installation:
    """Where things are while it runs. `prepared` says what had to be done to the servers."""

    redis_url: str
    database_url: str
    processes: Processes
    prepared: list[str]


@contextmanager
def installation(
    folder: Path,
    output: Callable[[str], IO[bytes]],
    settings: Mapping[str, str],
    say: Callable[[str], None],
    *,
    valkey_port: int | None = None,
    postgres_port: int | None = None,
    ports: Iterable[int] | None = None,
) -> Iterator[Installation]:
    """Start everything, with its data in `folder`, and stop it in order, the servers last.

    `output` opens the file for what a process prints, `settings` are variables for all of them, `say` tells
    the progress. The servers' ports are wished for: others are taken when they are busy. `ports` are those
    for the processes, in order, of which busy ones are left out. What is not given is any free port.

    Raises:
        EmbeddedServerError, Complaint: something does not start.
    """
    file = procfile()
    lines = parse(file, iter(free_port, None) if ports is None else ports)
    configured = Settings.load()
    with ExitStack() as stack:
        say("starting Valkey and Postgres")
        valkey = stack.enter_context(Valkey(folder / "valkey", _if_free(valkey_port)))
        postgres = stack.enter_context(Postgres(folder / "postgres", _if_free(postgres_port)))
        servers = {"redis_url": valkey.url, "database_url": postgres.url}
        prepared = asyncio.run(prepare(configured.model_copy(update=servers)))
        say(f"starting {', '.join(line.name for line in lines)}")
        processes = Processes(lines, file.parent, environment(**servers, **settings), output)
        stack.callback(processes.stop, configured.shutdown_timeout_s + _BIT_S)
        stack.callback(say, "stopping")
        processes.start()
        yield Installation(valkey.url, postgres.url, processes, prepared)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT are both a KeyboardInterrupt, also in a shell's background job."""
    before = {one: signal.signal(one, signal.default_int_handler) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _if_free(port: int | None) -> int | None:
    return port if port is not None and port_is_free(port) else None

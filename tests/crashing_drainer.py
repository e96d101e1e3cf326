"""A nursery of drainers that end at a chosen step, as a crash would: `python -m tests.crashing_drainer`.

What takes long is importing, and that is done once, before the line `ready`. Each line of standard input is
an order, a JSON object; it becomes a drainer by fork, and its process id is the answer. All of them end with
their nursery.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from itertools import count
from typing import Any

from app.buffer import RedisBuffer
from app.replies import RedisDesk
from app.store import PostgresStore
from app.turns import RedisTurns
from workers.drainer import Drainer
from workers.process import run

STEPS: dict[str, tuple[type, str]] = {
    "take": (RedisTurns, "take"),
    "write": (PostgresStore, "materialise"),
    "bury": (RedisDesk, "bury"),
    "settle": (RedisTurns, "settle"),
    "release": (RedisBuffer, "release"),
}


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that have ended are gone at once
    children = []
    print("ready", flush=True)
    try:
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                become_drainer(**json.loads(line))
            children.append(child)
            print(child, flush=True)
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def become_drainer(settings: dict[str, str], log: str, crash: tuple[str, str, int] | None) -> None:
    """Run a drainer to its end; `crash` is that before or after a step, at the nth call of it."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ |= settings
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if crash is not None:
            when, step, call = crash
            end_at(*STEPS[step], when, call)
        run(Drainer)
    finally:
        os._exit(0)


def end_at(owner: type, name: str, when: str, call: int) -> None:
    """Have the process end before or after the nth call of a method."""
    method = getattr(owner, name)
    calls = count(1)

    async def mortal(self: Any, *arguments: Any, **options: Any) -> Any:
        is_last = next(calls) == call
        if is_last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await method(self, *arguments, **options)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, mortal)


if __name__ == "__main__":
    main()

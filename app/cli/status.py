"""`mollifier status` and `mollifier top`: an installation at a glance, once or again and again."""

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from app.status.look import Lookout

_LOOK_AGAIN_S = 1.0
"""Time between the two looks of `status`, from which it takes its rates."""

Limit: TypeAlias = Annotated[int, typer.Option(min=1, help="Show at most so many environments.")]
By: TypeAlias = Annotated[
    Literal["depth", "dwell", "rate"],
    typer.Option(help="What makes one worse: entries, age of the oldest, or triggers a second."),
]


def status(
    limit: Limit = 20,
    by: By = "depth",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
) -> None:
    """Show how the buffer, the worst environments, the streams and the processes are.

    Takes a second, to see how fast that changes. Exit status 1 when a server did not answer.
    """
    import asyncio

    raise typer.Exit(asyncio.run(_status(limit, by, as_json)))


def top(
    limit: Limit = 50,
    by: By = "depth",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show the same, live, until `q` or Ctrl-C. Servers that go away are shown as such and waited for."""
    import asyncio

    from rich.console import Console

    from app.cli.complaints import Complaint

    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        raise Complaint("top needs a terminal; `mollifier status` prints one look")
    asyncio.run(_top(console, limit, by, every))


async def _status(limit: int, by: str, as_json: bool) -> int:
    import asyncio

    import msgspec
    from rich.console import Console

    from app.cli.dashboard import dashboard

    async with _lookout() as lookout:
        await lookout.glance()
        await asyncio.sleep(_LOOK_AGAIN_S)
        seen = await lookout.look(limit, by)
    if as_json:
        sys.stdout.write(msgspec.json.encode(seen).decode() + "\n")
    else:
        Console(highlight=False).print(dashboard(seen))
    return 1 if seen.redis or seen.postgres else 0


async def _top(console: "Console", limit: int, by: str, every_s: float) -> None:
    import asyncio

    from rich.live import Live

    from app.cli.dashboard import dashboard

    async def look_on(lookout: "Lookout", live: Live) -> None:
        while True:
            seen = await lookout.look(limit, by)
            live.update(dashboard(seen, console.height), refresh=True)
            await asyncio.sleep(every_s)

    async with _lookout() as lookout:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            looking = asyncio.create_task(look_on(lookout, live))
            with _leaving(looking.cancel), suppress(asyncio.CancelledError):
                await looking


@contextmanager
def _leaving(leave: Callable[[], object]) -> Iterator[None]:
    """Call `leave` at `q`, Ctrl-C or SIGTERM. The terminal is as it was afterwards."""
    import asyncio
    import os
    import signal
    import termios
    import tty

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, leave)
    if not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()

    def read() -> None:
        if b"q" in os.read(keyboard, 64).lower():
            leave()

    was = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, read)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, was)


@asynccontextmanager
async def _lookout() -> "AsyncIterator[Lookout]":
    from app.keys import Keys
    from app.postgres import create_pool
    from app.redis_connection import connect
    from app.settings import Settings
    from app.status.look import LIMIT_S, Lookout

    settings = Settings.load()
    redis = connect(settings.redis_url)
    pool = await create_pool(settings.database_url, LIMIT_S, size=1)
    try:
        yield Lookout(settings, Keys(settings.namespace, settings.partitions), redis, pool)
    finally:
        pool.terminate()
        await redis.aclose()

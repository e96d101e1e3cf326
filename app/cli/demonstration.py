"""The course of `mollifier demo`: start everything, storm, wait for the drain, report, clean up."""

import asyncio
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import asyncpg
import uvloop
from rich.console import Console
from rich.live import Live

from app.cli.installation import Installation, installation, interruptible
from app.cli.processes import Processes
from app.cli.report import Figures, Verdict, console, figures, progress, progress_line, report, verdict
from app.cli.storm import Plan, Tally, storm
from app.client import Mollifier
from app.postgres import connect
from app.settings import Settings

DRAINED_WITHIN_S = 90.0

_LOOK_EVERY_S = 0.25
_LINE_EVERY_S = 2.0
_CONNECT_S = 10.0
_LOG_LINES = 20
_INTERRUPTED = 130

_COUNT = "SELECT count(*) AS rows, count(buffered_at) AS drained FROM mollifier.runs"


def demonstrate(plan: Plan, *, keep: bool) -> int:
    """Run the demo; the exit status."""
    out = console()
    folder = Path(tempfile.mkdtemp(prefix="mollifier-demo-"))
    quiet = {"MOLLIFIER_LOG_LEVEL": "warning", "PYTHONUNBUFFERED": "1"}
    status = 1
    with interruptible():
        try:
            with installation(
                folder, lambda name: (folder / f"{name}.log").open("wb"), quiet, out.print
            ) as running:
                tally, seen, checked = uvloop.run(_demonstrate(plan, running, out))
            out.print(report(tally, seen, checked))
            status = 0 if checked.is_good and not tally.errors else 1
        except KeyboardInterrupt:
            out.print("interrupted")
            status = _INTERRUPTED
        finally:
            if status == 1:
                _print_logs(folder, out)
            if keep:
                out.print(f"data and logs are in {folder}", soft_wrap=True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
    return status


async def _demonstrate(plan: Plan, running: Installation, out: Console) -> tuple[Tally, Figures, Verdict]:
    tally = Tally()
    connection = await connect(running.database_url, _CONNECT_S)
    try:
        many = f"{plan.environments} environments, half of them from one"
        senders = many if plan.environments > 1 else "one environment"
        out.print(f"a storm of {plan.triggers:,} triggers from {senders}")
        async with Mollifier(running.redis_url, Settings.load().namespace, retry=False) as mollifier:
            weather = asyncio.create_task(storm(mollifier, plan, tally))
            try:
                await _watch(weather, plan, tally, connection, running.processes, out)
            finally:
                weather.cancel()
                with suppress(asyncio.CancelledError):
                    await weather
        return tally, await figures(connection), await verdict(connection, tally)
    finally:
        connection.terminate()


async def _watch(
    weather: "asyncio.Task[None]",
    plan: Plan,
    tally: Tally,
    connection: "asyncpg.Connection[asyncpg.Record]",
    processes: Processes,
    out: Console,
) -> None:
    """Show where things stand until all is answered and drained.

    Raises:
        Complaint: a process has ended, or the buffer is not drained in time.
    """
    clock = asyncio.get_running_loop().time
    view = View(out, plan.triggers)
    deadline = None
    with view:
        while True:
            record = await connection.fetchrow(_COUNT)
            assert record is not None
            view.show(tally, record["drained"], clock())
            processes.check()
            if weather.done():
                weather.result()
                if record["rows"] >= len(tally.run_ids):
                    return
                deadline = deadline or clock() + DRAINED_WITHIN_S
                if clock() > deadline:
                    out.print(f"not everything was drained within {DRAINED_WITHIN_S:.0f} s")
                    return
            await asyncio.wait([weather], timeout=_LOOK_EVERY_S)
            if weather.done():
                await asyncio.sleep(_LOOK_EVERY_S)


class View:
    """Progress that stands still on a terminal, and is a line every few seconds elsewhere."""

    def __init__(self, out: Console, total: int) -> None:
        self._out = out
        self._total = total
        self._live = Live(console=out, auto_refresh=False, transient=True) if out.is_terminal else None
        self._samples: list[tuple[float, int]] = []
        self._next_line = 0.0

    def __enter__(self) -> "View":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, tally: Tally, drained: int, now: float) -> None:
        """Show how things stand at a time of the event loop."""
        self._samples = [one for one in self._samples if one[0] > now - 1] + [(now, drained)]
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        rate = (after - before) / (last - first) if last > first else 0.0
        if self._live is not None:
            self._live.update(progress(tally, self._total, drained, rate), refresh=True)
        elif now >= self._next_line:
            self._next_line = now + _LINE_EVERY_S
            self._out.print(progress_line(tally, self._total, drained), soft_wrap=True)


def _print_logs(folder: Path, out: Console) -> None:
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        if lines:
            out.print(f"--- {log.stem}", *lines, sep="\n", soft_wrap=True, markup=False)

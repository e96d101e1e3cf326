"""`python -m bench`: run comparisons, print what was found; exit status 1 if a bound was missed.

With `--guard` only if something of it is lost that was reached.
"""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from bench.comparison import Comparison, Scale
from bench.findings import Outcome
from bench.report import line, page
from bench.stage import Stage, opened
from bench.table import COMPARISONS

_LIBRARIES = ("faststream", "redis", "hiredis", "asyncpg", "procrastinate", "psycopg", "pgqueuer", "streaq")


application = typer.Typer(add_completion=False)


@application.command()
def main(
    only: Annotated[str, typer.Option(help="Comparisons, separated by commas; all if left out.")] = "",
    pairs: Annotated[int, typer.Option(min=1, help="Repeats of every side.")] = 5,
    share: Annotated[float, typer.Option(min=0.05, max=10, help="Of the usual amount of work.")] = 1.0,
    guard: Annotated[
        bool, typer.Option("--guard", help="Fail only for what was reached and is lost.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="The page to write; for a run of all.")] = None,
) -> None:
    """Measure Mollifier beside others."""
    chosen = _chosen(only)
    if write is not None and (len(chosen) < len(COMPARISONS) or share != 1):
        raise typer.BadParameter(
            "the page is that of a whole run: no --only, no --share", param_hint="--write"
        )
    outcomes, versions = uvloop.run(_run(chosen, Scale(pairs, share)))
    if write is not None:
        command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
        write.write_text(page(outcomes, command, pairs, os.cpu_count() or 1, versions), encoding="utf-8")
    missed = [
        line(verdict, outcome.name)
        for outcome in outcomes
        for verdict in outcome.verdicts
        if not (verdict.stands if guard else verdict.holds)
    ]
    for one in missed:
        print(one, file=sys.stderr)
    raise typer.Exit(1 if missed else 0)


def _chosen(only: str) -> list[Comparison]:
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {comparison.name: comparison for comparison in COMPARISONS}
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name} is none of {', '.join(known)}", param_hint="--only")
    return [known[name] for name in names] or list(COMPARISONS)


async def _run(chosen: list[Comparison], scale: Scale) -> tuple[list[Outcome], dict[str, str]]:
    outcomes = []
    async with opened() as stage:
        versions = await _versions(stage)
        for comparison in chosen:
            outcome = await comparison.run(stage, scale)
            _show(outcome)
            outcomes.append(outcome)
    return outcomes, versions


def _show(outcome: Outcome) -> None:
    print(f"{outcome.name} ({outcome.seconds:.0f} s)", *outcome.notes, sep="\n  ")
    for verdict in outcome.verdicts:
        print(f"  {line(verdict)}")
    for figure in outcome.figures:
        print(f"      {figure.name}: {figure.median:,.1f} {figure.unit}", flush=True)


async def _versions(stage: Stage) -> dict[str, str]:
    server = await stage.redis.info("server")
    redis = ("Valkey", "valkey_version") if "valkey_version" in server else ("Redis", "redis_version")
    return {
        "Python": platform.python_version(),
        redis[0]: server[redis[1]],
        "Postgres": str(await stage.sql.fetchval("SHOW server_version")),
        **{name: version(name) for name in _LIBRARIES},
    }


if __name__ == "__main__":
    application()

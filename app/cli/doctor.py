"""`mollifier doctor`: what is wrong with the servers, the fleet and the settings, and what to do about it."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from schemas.diagnosis import Diagnosis

# In the order of the lines: what is worst stands last, above the prompt.
_STYLES = {"ok": "green", "warning": "bold yellow", "failure": "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Let warnings count as failures.")] = False,
) -> None:
    """Check servers, fleet and settings; each line is ok, a warning or a failure with its remedy.

    Run it with the environment of the processes. Exit status 1 when there is a failure (with --strict: or a
    warning), else 0.
    """
    import asyncio

    import msgspec

    from app.doctor import diagnose
    from app.settings import Settings

    diagnosis = asyncio.run(diagnose(Settings.load()))
    if as_json:
        sys.stdout.write(msgspec.json.encode(diagnosis).decode() + "\n")
    else:
        _print(diagnosis)
    if diagnosis.level == "failure" or (strict and diagnosis.level == "warning"):
        raise typer.Exit(1)


def _print(diagnosis: "Diagnosis") -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from app.cli.legible import printable

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    remedy = None
    for one in sorted(diagnosis.findings, key=lambda one: list(_STYLES).index(one.level)):
        said = Text(printable(one.seen))
        if one.remedy not in (None, remedy):  # what is said already is not said for each line again
            said.append(f"\n-> {one.remedy}", "bold")
        remedy = one.remedy
        table.add_row(Text(one.level, _STYLES[one.level]), one.check, said)
    console = Console(highlight=False)
    console.print(table)
    counts = Counter(one.level for one in diagnosis.findings)
    console.print(
        f"\nfailures: {counts['failure']}, warnings: {counts['warning']}, ok: {counts['ok']}",
        style=_STYLES[diagnosis.level],
    )

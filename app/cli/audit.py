"""`mollifier audit`: what operators changed, who did it, and when."""

from typing import Annotated, Any

import typer

from app.cli.legible import printable
from app.cli.operators import Json, decide, print_json


def audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Show at most so many.")] = 20,
    as_json: Json = False,
) -> None:
    """Show what operators changed, the newest first: who, when, what, and the values before and after.

    With --json, one object a line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    changes = decide(lambda operators: operators.audit(limit))
    if as_json:
        for change in changes:
            print_json({field: value for field, value in change._asdict().items() if field != "is_new"})
        return
    if not changes:
        print("nobody has changed anything")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("at (UTC)", no_wrap=True)
    for column in ("who", "database user", "what", "before", "after"):
        table.add_column(column, overflow="fold")
    for change in changes:
        cells = (
            change.who or "?",
            change.database_user,
            change.what,
            _spelled(change.before),
            _spelled(change.after),
        )
        table.add_row(f"{change.at:%Y-%m-%d %H:%M:%S}", *(Text(printable(cell)) for cell in cells))
    Console(highlight=False).print(table)


def _spelled(value: Any) -> str:
    import orjson

    return "" if value is None else orjson.dumps(value).decode()

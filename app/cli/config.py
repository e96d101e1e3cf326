"""`mollifier config`: every setting, as the processes would read it."""

import sys
from typing import Annotated

import typer


def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object per variable.")] = False,
) -> None:
    """Show every setting: its value, what it is by default, and what it means."""
    import orjson

    from app.settings import Settings

    settings = Settings.load()
    shown, defaults = settings.masked(), Settings.model_construct().masked()
    fields = {Settings.variable(name): field for name, field in Settings.model_fields.items()}
    rows: list[dict[str, str | bool]] = [
        {
            "name": name,
            "value": value,
            "default": defaults[name],
            "is_default": value == defaults[name],
            "description": fields[name].description or "",
        }
        for name, value in shown.items()
    ]
    if as_json:
        sys.stdout.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        _print(rows)


def _print(rows: list[dict[str, str | bool]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("variable", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("description", style="dim")
    for row in rows:
        style = "" if row["is_default"] else "bold green"
        table.add_row(
            Text(str(row["name"]), style),
            Text(_spoken(str(row["value"])), style),
            "" if row["is_default"] else Text("changed", "green"),
            Text(str(row["description"])),
        )
    Console().print(table)


def _spoken(value: str) -> str:
    return {"": "(empty)", "True": "1", "False": "0"}.get(value, value)

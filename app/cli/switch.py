"""`mollifier switch`: the master switch and shadow mode of the whole fleet."""

from enum import StrEnum
from typing import Annotated

import typer

from app.cli.operators import Json, by, decide, print_shown, read, tell


class Position(StrEnum):
    """Where the switch can be put."""

    ON = "on"
    OFF = "off"
    SHADOW = "shadow"
    DEFAULT = "default"


_MEANING = {
    "on": "on: the gate decides",
    "off": "off: everything passes through",
    "shadow": "shadow: the gate decides and records, and everything passes through",
    "default": "default: each process goes by its MOLLIFIER_ENABLED and MOLLIFIER_SHADOW_MODE",
}


def switch(
    position: Annotated[Position | None, typer.Argument(help="Where to put it.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Switch Mollifier on, off or to shadow mode in the whole fleet; without an argument, show where it is.

    Works while Redis is down. Kept through restarts, until `default`.
    """
    if position is None:
        decided, change = decide(lambda operators: read(operators, "switch"))
        where = decided.switch or "default"
        if as_json:
            print_shown({"switch": where}, change)
        else:
            print(f"{_MEANING[where]} ({by(change)})")
    else:
        value = None if position is Position.DEFAULT else position.value
        tell(_MEANING[position.value], decide(lambda operators: operators.set("switch", value)))

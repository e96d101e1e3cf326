"""What the commands share with which operators decide: they need Postgres, and nothing else."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from app.cli.legible import printable

if TYPE_CHECKING:
    from app.operator_changes import Change, OperatorChanges
    from app.switches import OperatorSettings

Result = TypeVar("Result")

LARGEST = 2_147_483_647
"""Of the numbers that operators set, as of the settings that they take the place of."""

_LONGEST = 2000


def name(text: str) -> str:
    """An id of an environment or organization, as an argument."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise typer.BadParameter("is not UTF-8") from None
    if not 1 <= length <= _LONGEST:
        raise typer.BadParameter(f"an id has 1 to {_LONGEST:,} bytes; this has {length:,}")
    return text


Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def decide(act: "Callable[[OperatorChanges], Awaitable[Result]]") -> Result:
    """Do something with the settings of operators.

    Raises:
        Complaint: Postgres cannot be reached, or refuses.
    """
    return asyncio.run(_decide(act))


async def _decide(act: "Callable[[OperatorChanges], Awaitable[Result]]") -> Result:
    from app.cli.complaints import reaching
    from app.operator_changes import OperatorChanges
    from app.postgres import connect
    from app.settings import Settings

    settings = Settings.load()
    timeout_s = settings.store_timeout_ms / 1000
    with reaching("DATABASE_URL", settings):
        connection = await connect(settings.database_url, timeout_s, timeout_s)
        try:
            return await act(OperatorChanges(connection, _who()))
        finally:
            await connection.close(timeout=timeout_s)


async def read(operators: "OperatorChanges", what: str) -> "tuple[OperatorSettings, Change | None]":
    """What operators have decided, and the last change of one thing."""
    return await operators.read(), await operators.last(what)


def tell(outcome: str, change: "Change | None") -> None:
    """Print what holds, and from when on."""
    if change is not None and change.is_new:
        print(f"{outcome}, in every process within two seconds")
    else:
        print(f"{outcome}, as before ({by(change)})")


def by(change: "Change | None") -> str:
    """Who decided something, and when."""
    if change is None:
        return "nobody has decided otherwise"
    who = f"{change.database_user}, not by the command" if change.who is None else change.who
    return f"by {printable(who)} at {change.at:%Y-%m-%d %H:%M:%S} UTC"


def print_json(value: Any) -> None:
    """One line of JSON."""
    import orjson

    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def print_shown(value: dict[str, Any], change: "Change | None") -> None:
    """One line of JSON: what is decided, and who did it when."""
    who = dict.fromkeys(("at", "who", "database_user")) if change is None else change._asdict()
    print_json(value | {field: who[field] for field in ("at", "who", "database_user")})


def _who() -> str:
    """The operator: the login name, and the host."""
    import os
    import socket
    from getpass import getuser

    try:
        login = getuser()
    except (KeyError, OSError):  # nobody has this number, as happens in containers
        login = str(os.getuid())
    return f"{login}@{socket.gethostname()}"

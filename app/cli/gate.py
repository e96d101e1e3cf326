"""`mollifier gate`: threshold, window and hold of one environment, or of all of an organization."""

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from app.cli.legible import printable
from app.cli.operators import LARGEST, Json, by, decide, name, print_json, print_shown, read, tell

if TYPE_CHECKING:
    from app.operator_changes import Change, OperatorChanges, Scope
    from app.switches import OperatorSettings, Override

Environment: TypeAlias = Annotated[
    str | None, typer.Option(parser=name, metavar="ID", help="The gate of this environment.")
]
Organization: TypeAlias = Annotated[
    str | None, typer.Option(parser=name, metavar="ID", help="The gates of all environments of this one.")
]
Threshold: TypeAlias = Annotated[
    int | None, typer.Option(min=1, max=LARGEST, metavar="N", help="Instead of MOLLIFIER_TRIP_THRESHOLD.")
]
Window: TypeAlias = Annotated[
    int | None, typer.Option(min=1, max=LARGEST, metavar="N", help="Instead of MOLLIFIER_TRIP_WINDOW_MS.")
]
Hold: TypeAlias = Annotated[
    int | None, typer.Option(min=1, max=LARGEST, metavar="N", help="Instead of MOLLIFIER_HOLD_MS.")
]

gate = typer.Typer(
    help="The gate of an environment or organization: threshold, window and hold.", no_args_is_help=True
)


@gate.command("set")
def set_gate(
    environment: Environment = None,
    organization: Organization = None,
    threshold: Threshold = None,
    window_ms: Window = None,
    hold_ms: Hold = None,
) -> None:
    """Set parts of a gate; the others stay as they are.

    An environment's own come before its organization's, and these before the environment variables.
    """
    from app.switches import Override

    scope, one = _which(environment, organization)
    rate = Override(window_ms, threshold, hold_ms)
    if rate == Override():
        raise typer.BadParameter("say what to set", param_hint="--threshold, --window-ms or --hold-ms")
    change = decide(lambda operators: operators.set_gate(scope, one, rate))
    after = {} if change is None else change.after
    tell(f"the gate of {scope} {printable(one)} has {_parts(after)}", change)


@gate.command()
def clear(environment: Environment = None, organization: Organization = None) -> None:
    """Take back what was set on a gate."""
    scope, one = _which(environment, organization)
    change = decide(lambda operators: operators.reset_gate(scope, one))
    tell(f"nothing is set on the gate of {scope} {printable(one)}", change)


@gate.command()
def show(environment: Environment = None, organization: Organization = None, as_json: Json = False) -> None:
    """Show what is set on one gate, and who set it last; or what is set on all.

    With --json, one object a line.
    """
    if environment is None and organization is None:
        _show_all(as_json)
        return
    scope, one = _which(environment, organization)
    decided, change = decide(lambda operators: _read(operators, scope, one))
    of_scope = decided.environments if scope == "environment" else decided.organizations
    parts = _set_parts(of_scope.get(one))
    if as_json:
        print_shown({"scope": scope, "id": one, **parts}, change)
    else:
        print(f"{_parts(parts)} ({by(change)})")


def _show_all(as_json: bool) -> None:
    decided = decide(lambda operators: operators.read())
    for scope, of_scope in (("organization", decided.organizations), ("environment", decided.environments)):
        for one, override in sorted(of_scope.items()):
            parts = _set_parts(override)
            if as_json:
                print_json({"scope": scope, "id": one, **parts})
            else:
                print(f"{scope} {printable(one)}: {_parts(parts)}")
    if not (as_json or decided.organizations or decided.environments):
        print("nothing is set on any gate")


def _which(environment: str | None, organization: str | None) -> "tuple[Scope, str]":
    if environment is not None and organization is None:
        return "environment", environment
    if organization is not None and environment is None:
        return "organization", organization
    raise typer.BadParameter("say which gate: one of the two", param_hint="--environment or --organization")


async def _read(
    operators: "OperatorChanges", scope: "Scope", one: str
) -> "tuple[OperatorSettings, Change | None]":
    from app.operator_changes import of_gate

    return await read(operators, of_gate(scope, one))


def _set_parts(override: "Override | None") -> dict[str, Any]:
    """What is set of a gate, by name."""
    parts = {} if override is None else override._asdict()
    return {part: value for part, value in parts.items() if value is not None}


def _parts(parts: dict[str, Any]) -> str:
    return ", ".join(f"{part} {parts[part]}" for part in sorted(parts, reverse=True)) or "nothing set"

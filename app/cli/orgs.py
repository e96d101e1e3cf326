"""`mollifier orgs`: which organizations take part, and their weights in the drain."""

from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from app.cli.legible import printable
from app.cli.operators import LARGEST, Json, by, decide, name, print_shown, read, tell

if TYPE_CHECKING:
    from app.operator_changes import Change, OperatorChanges
    from app.switches import OperatorSettings

Org: TypeAlias = Annotated[str, typer.Argument(parser=name, metavar="ORG", help="The organization's id.")]

_BY_DEFAULT = "as its requests' flags and MOLLIFIER_DEFAULT_ENROLLED say"

orgs = typer.Typer(help="Organizations: whether they take part, and their weight.", no_args_is_help=True)


@orgs.command()
def enable(org: Org) -> None:
    """Have an organization take part, whatever its requests' flags say."""
    tell(f"{printable(org)} takes part", decide(lambda operators: operators.enrol(org, True)))


@orgs.command()
def disable(org: Org) -> None:
    """Let everything of an organization pass through, whatever its requests' flags say."""
    tell(f"{printable(org)} does not take part", decide(lambda operators: operators.enrol(org, False)))


@orgs.command()
def weight(
    org: Org,
    weight: Annotated[
        int, typer.Argument(min=1, max=LARGEST, metavar="N", help="1 is what all others have.")
    ],
) -> None:
    """Give an organization so many shares of the drain."""
    outcome = f"{printable(org)} has the weight {weight}"
    tell(outcome, decide(lambda operators: operators.weigh(org, weight)))


@orgs.command()
def default(org: Org) -> None:
    """Take back what was decided on an organization's enrolment and weight."""
    outcome = f"{printable(org)} takes part {_BY_DEFAULT}, with weight 1"
    tell(outcome, decide(lambda operators: operators.reset_organization(org)))


@orgs.command()
def show(org: Org, as_json: Json = False) -> None:
    """Show what is decided on an organization, and who decided it last."""
    decided, change = decide(lambda operators: _read(operators, org))
    enrolled, weight = decided.enrolment.get(org), decided.weights.get(org, 1)
    if as_json:
        print_shown({"organization": org, "enrolled": enrolled, "weight": weight}, change)
        return
    says = {True: "yes", False: "no", None: _BY_DEFAULT}
    print(f"takes part  {says[enrolled]}\nweight      {weight}\ndecided     {by(change)}")


async def _read(operators: "OperatorChanges", org: str) -> "tuple[OperatorSettings, Change | None]":
    from app.operator_changes import of_organization

    return await read(operators, of_organization(org))

"""`mollifier demo`: a storm meets the front door, on servers of its own, and every run is accounted for."""

from typing import Annotated

import typer


def demo(
    triggers: Annotated[int, typer.Option(min=1, help="How many triggers the storm has.")] = 20_000,
    environments: Annotated[int, typer.Option(min=1, help="How many environments send them.")] = 20,
    organizations: Annotated[int, typer.Option(min=1, help="How many organizations those belong to.")] = 8,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the data and the logs.")] = False,
) -> None:
    """Send a storm of triggers through a fresh installation and check that none is lost or doubled.

    Exit status 1 when a run is missing or doubled, or a trigger got an error or no reply.
    """
    from app.cli.demonstration import demonstrate
    from app.cli.storm import Plan

    raise typer.Exit(demonstrate(Plan(triggers, environments, min(organizations, environments)), keep=keep))

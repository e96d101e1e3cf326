"""`mollifier drain`: what operators decide about the drain of the whole fleet."""

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.operators import LARGEST, Json, by, decide, print_shown, tell

if TYPE_CHECKING:
    from app.operator_changes import Change, OperatorChanges
    from app.switches import OperatorSettings

_DEFAULT = "default"

drain = typer.Typer(help="The drain of the whole fleet: pause it, and set its rate.", no_args_is_help=True)


def _rate(text: str) -> str:
    is_number = text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= LARGEST
    if text != _DEFAULT and not is_number:
        raise typer.BadParameter(f"{text!r} is not a whole number from 0 to {LARGEST}, nor `{_DEFAULT}`")
    return text


@drain.command()
def pause() -> None:
    """Let every drainer finish its batches and stand still, until `resume`. Triggers go on."""
    tell("the drain stands still", decide(lambda operators: operators.set("drain.paused", True)))


@drain.command()
def resume() -> None:
    """Let every drainer go on."""
    tell("the drain goes on", decide(lambda operators: operators.set("drain.paused", None)))


@drain.command()
def rate(
    rate: Annotated[str, typer.Argument(parser=_rate, metavar="N", help="Rows a second, 0 or `default`.")],
) -> None:
    """Have all drainers together write so many rows a second at most; 0: no limit.

    `default` leaves it to MOLLIFIER_DRAIN_MAX_RATE.
    """
    value = None if rate == _DEFAULT else int(rate)
    tell(_spoken(value), decide(lambda operators: operators.set("drain.rate", value)))


@drain.command()
def show(as_json: Json = False) -> None:
    """Show what is decided on the drain, and who decided it last."""
    decided, paused, limited = decide(_read)
    if as_json:
        print_shown({"drain": "paused", "value": decided.drain_paused}, paused)
        print_shown({"drain": "rate", "value": decided.drain_rate}, limited)
    else:
        print(f"the drain {'stands still' if decided.drain_paused else 'goes on'} ({by(paused)})")
        print(f"{_spoken(decided.drain_rate)} ({by(limited)})")


async def _read(operators: "OperatorChanges") -> "tuple[OperatorSettings, Change | None, Change | None]":
    return await operators.read(), await operators.last("drain.paused"), await operators.last("drain.rate")


def _spoken(rate: int | None) -> str:
    if rate is None:
        return "the rate of the drain is that of MOLLIFIER_DRAIN_MAX_RATE"
    return (
        f"the drain writes at most {rate:,} rows a second" if rate else "the rate of the drain has no limit"
    )

"""`mollifier runs`: look at runs and change them, wherever they are."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from app.cli.calls import (
    ENV,
    ORG,
    TIMEOUT_S,
    Env,
    Json,
    Org,
    Timeout,
    call,
    parsed_payload,
    print_json,
    print_reply,
)
from app.cli.legible import ago, printable

if TYPE_CHECKING:
    from app.client import Mollifier
    from schemas.run import RunDetails

_USUAL_LENGTH = len("run_") + 32
"""Of run ids; their callers may choose longer ones, which are folded and never cut."""

runs = typer.Typer(help="Runs of an environment: look at them and change them.", no_args_is_help=True)


def _status(text: str) -> str:
    from typing import get_args

    from schemas.operations import Status

    if text.upper() not in get_args(Status):
        raise typer.BadParameter(f"{text!r} is none of {', '.join(get_args(Status))}")
    return text.upper()


def _instant(text: str) -> datetime:
    """An instant, or a duration back from now."""
    from app.durations import parse_delay, parse_duration

    now = datetime.now(UTC)
    try:
        return now - timedelta(seconds=parse_duration(text))
    except ValueError:
        pass
    try:
        return parse_delay(text, now)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


RunId: TypeAlias = Annotated[str, typer.Argument(metavar="RUN_ID", help="The run: run_...")]
Status: TypeAlias = Annotated[
    str | None, typer.Option(parser=_status, metavar="STATUS", help="Those that are QUEUED, DELAYED, ...")
]
Since: TypeAlias = Annotated[
    datetime | None,
    typer.Option(parser=_instant, metavar="WHEN", help="Those made since: 2h, or an instant."),
]
Until: TypeAlias = Annotated[
    datetime | None,
    typer.Option(parser=_instant, metavar="WHEN", help="Those made before: 2h, or an instant."),
]


@runs.command()
def get(
    run_id: RunId, env: Env = ENV, org: Org = ORG, timeout: Timeout = TIMEOUT_S, as_json: Json = False
) -> None:
    """Show one run, buffered or not, with all that is known of it."""
    where = _where(env, org, timeout)
    run = call(lambda mollifier: mollifier.retrieve(run_id, **where), as_json=as_json)
    _print_run(run, run.__struct_fields__, as_json)


@runs.command("list")
def list_runs(
    env: Env = ENV,
    org: Org = ORG,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 20,
    status: Status = None,
    task: Annotated[str | None, typer.Option(help="Those of this task.")] = None,
    tag: Annotated[str | None, typer.Option(help="Those with this tag.")] = None,
    since: Since = None,
    until: Until = None,
    timeout: Timeout = TIMEOUT_S,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one run a line.")] = False,
) -> None:
    """Show runs, the newest first."""
    asked = _where(env, org, timeout)
    asked |= {"status": status, "task": task, "tag": tag, "since": since, "until": until}

    shown: list[RunDetails] = []

    async def walk(mollifier: "Mollifier") -> int:
        count = 0
        async for run in mollifier.all_runs(limit=limit + 1, **asked):
            count += 1
            if count > limit:
                break
            if as_json:
                print_json(run)
            else:
                shown.append(run)
        return count

    count = call(walk, as_json=as_json)
    if not as_json:
        _print_table(shown)
    if count > limit:
        print("there are more; --limit shows more at once", file=sys.stderr if as_json else sys.stdout)


@runs.command()
def cancel(
    run_id: RunId,
    reason: Annotated[str | None, typer.Option(help="Why: kept with the run.")] = None,
    env: Env = ENV,
    org: Org = ORG,
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """End a run, so that it never starts. One that has ended stays as it is."""
    where = _where(env, org, timeout)
    run = call(lambda mollifier: mollifier.cancel(run_id, reason, **where), as_json=as_json)
    _print_run(run, ("friendly_id", "status", "cancelled_at", "cancel_reason"), as_json)


@runs.command()
def reschedule(
    run_id: RunId,
    delay: Annotated[str, typer.Argument(help="How long from now, e.g. 10m, or until which instant.")],
    env: Env = ENV,
    org: Org = ORG,
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Delay a delayed run until another time."""
    where = _where(env, org, timeout)
    run = call(lambda mollifier: mollifier.reschedule(run_id, delay, **where), as_json=as_json)
    _print_run(run, ("friendly_id", "status", "delay_until"), as_json)


@runs.command()
def tag(
    run_id: RunId,
    tags: Annotated[list[str], typer.Argument(metavar="TAG...", help="The tags.")],
    env: Env = ENV,
    org: Org = ORG,
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Add tags to a run."""
    where = _where(env, org, timeout)
    run = call(lambda mollifier: mollifier.add_tags(run_id, tags, **where), as_json=as_json)
    _print_run(run, ("friendly_id", "status", "tags"), as_json)


@runs.command()
def replay(
    run_id: RunId,
    payload: Annotated[str | None, typer.Option(help="Another payload, as JSON.")] = None,
    env: Env = ENV,
    org: Org = ORG,
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Trigger a run once more, as a new run."""
    other = parsed_payload(payload)
    where = _where(env, org, timeout)
    reply = call(lambda mollifier: mollifier.replay(run_id, **other, **where), as_json=as_json)
    print_reply(reply, as_json)


def _where(env: str, org: str, timeout_s: float) -> dict[str, Any]:
    """The arguments that every operation has."""
    return {"environment": {"id": env, "organization_id": org}, "timeout": timeout_s}


def _print_run(run: "RunDetails", fields: Sequence[str], as_json: bool) -> None:
    """Print some fields of a run, or all of it as JSON."""
    if as_json:
        print_json(run)
        return
    shown = {field: _text(getattr(run, field)) for field in fields}
    width = max(map(len, shown))
    for field, text in shown.items():
        if text:
            print(f"{field.replace('_', ' '):{width}}  {printable(text)}")


def _text(value: object) -> str:
    """A field for people; empty, if it has nothing to say."""
    from msgspec import Raw

    from schemas.run import NOTHING

    if isinstance(value, Raw):
        return "" if value == NOTHING else bytes(value).decode()
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _print_table(found: "Sequence[RunDetails]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found:
        print("no runs")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    has_long_ids = any(len(run.friendly_id) > _USUAL_LENGTH for run in found)
    table.add_column("run", overflow="fold", no_wrap=not has_long_ids)
    for name in ("age", "status", "buffered"):
        table.add_column(name, no_wrap=True)
    table.add_column("task", overflow="fold")
    table.add_column("tags", overflow="fold", style="dim")
    now = datetime.now(UTC)
    for run in found:
        age = ago((now - run.created_at) // timedelta(milliseconds=1))
        buffered = "yes" if run.is_buffered else "no"
        cells = (run.friendly_id, age, run.status, buffered, run.task, ", ".join(run.tags))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console(highlight=False).print(table)

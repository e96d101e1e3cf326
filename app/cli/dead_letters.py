"""`mollifier dead-letters`: what could not be handled, for an operator to look at, put back or drop."""

import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from app.cli.legible import ago, printable

if TYPE_CHECKING:
    from app.dead_letters import DeadLetters, Letter, Selection

_ID = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)
_LARGEST = 2**64 - 1
_DETAIL = 100


def _letter_id(text: str) -> str:
    match = _ID.fullmatch(text)
    if match is None or max(map(int, match.groups())) > _LARGEST:
        raise typer.BadParameter(f"{text!r} is not the id of a dead letter, such as 1767225600000-0")
    return "-".join(str(int(part)) for part in match.groups())


def _seconds(text: str) -> int:
    from app.durations import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Id: TypeAlias = Annotated[str, typer.Argument(parser=_letter_id, metavar="ID", help="As `list` shows it.")]
Ids: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(parser=_letter_id, metavar="[ID]...", help="These, as `list` shows them."),
]
Everything: TypeAlias = Annotated[bool, typer.Option("--all", help="All there are.")]
Reason: TypeAlias = Annotated[str | None, typer.Option(help="Those set aside for this: undecodable, ...")]
Source: TypeAlias = Annotated[str | None, typer.Option(help="Those of this stream: mollifier:triggers, ...")]
OlderThan: TypeAlias = Annotated[
    int | None, typer.Option(parser=_seconds, metavar="DURATION", help="Those set aside before: 2h30m, ...")
]
NewerThan: TypeAlias = Annotated[
    int | None, typer.Option(parser=_seconds, metavar="DURATION", help="Those set aside since: 10m, ...")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON: one object a line.")]

dead_letters = typer.Typer(
    help="What could not be handled: look at it, put it back, or drop it.", no_args_is_help=True
)


@dead_letters.command("list")
def list_letters(
    reason: Reason = None,
    source: Source = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 50,
    as_json: Json = False,
) -> None:
    """Show dead letters, the oldest first."""
    import asyncio

    from app.dead_letters import Selection

    asyncio.run(_list(Selection(reason, source, older_than, newer_than), limit, as_json))


@dead_letters.command()
def show(letter_id: Id, as_json: Json = False) -> None:
    """Show one dead letter with all that was set aside.

    Exit status 1 when there is none.
    """
    import asyncio

    letter = asyncio.run(_read(letter_id))
    if as_json:
        original = [{"name": _spelled(name), "value": _spelled(value)} for name, value in letter.original]
        _print_json(_head(letter) | {"original": original})
    else:
        _print_letter(letter)


@dead_letters.command()
def requeue(
    ids: Ids = None,
    everything: Everything = False,
    reason: Reason = None,
    source: Source = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
) -> None:
    """Put back what was set aside, as it came, and delete the dead letters.

    A request becomes a new one: its time and its deliveries begin again, and its run id is new unless it
    names one. A buffered run keeps its id. What cannot be put back stays, with exit status 1.
    """
    import asyncio

    from app.dead_letters import DeadLetters

    which = _which(ids, everything, reason, source, older_than, newer_than)
    raise typer.Exit(asyncio.run(_handle(which, DeadLetters.requeue, "requeued")))


@dead_letters.command()
def drop(
    ids: Ids = None,
    everything: Everything = False,
    reason: Reason = None,
    source: Source = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete dead letters for good. Asks first, unless they are named by id.

    Exit status 1 when one that was named is not there.
    """
    import asyncio

    from app.dead_letters import DeadLetters

    which = _which(ids, everything, reason, source, older_than, newer_than)
    asks = not (ids or yes)
    if asks and not sys.stdin.isatty():
        raise typer.BadParameter(
            "this deletes all that are selected; say that you mean it", param_hint="--yes"
        )
    raise typer.Exit(asyncio.run(_handle(which, DeadLetters.drop, "dropped", asks=asks)))


def _which(ids: list[str] | None, everything: bool, *asked: Any) -> "list[str] | Selection":
    """The ids that are given, each once, or else what is selected."""
    from app.dead_letters import Selection

    selection = Selection(*asked)
    if [bool(ids), everything, selection != Selection()].count(True) != 1:
        raise typer.BadParameter(
            "say which dead letters: either ids, or --all, or what they have in common"
            " (--reason, --source, --older-than, --newer-than)",
            param_hint="ID",
        )
    return list(dict.fromkeys(ids)) if ids else selection


@asynccontextmanager
async def _opened() -> AsyncIterator["DeadLetters"]:
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    from app.buffer import RedisBuffer
    from app.cli.complaints import reaching
    from app.dead_letters import DeadLetters
    from app.keys import Keys
    from app.redis_client import Scripts
    from app.redis_connection import connect
    from app.settings import Settings

    settings = Settings.load()
    with reaching("REDIS_URL", settings):
        redis = connect(settings.redis_url)
    try:
        redis.set_retry(Retry(NoBackoff(), 0))  # a request that is put back must not be sent twice unasked
        with reaching("REDIS_URL", settings):
            await redis.ping()
        keys, scripts = Keys(settings.namespace, settings.partitions), Scripts(redis)
        yield DeadLetters(scripts, keys, RedisBuffer(scripts, keys, settings))
    finally:
        await redis.aclose()


async def _list(selection: "Selection", limit: int, as_json: bool) -> None:
    shown: list[tuple[Letter, str]] = []
    count = 0
    async with _opened() as letters:
        span = await letters.span(selection)
        async for page in letters.pages(span):
            for letter in page[: max(0, limit - count)]:
                if as_json:
                    _print_json(_head(letter))
                else:
                    shown.append((letter, ago(span.now_ms - letter.ms)))
            count += len(page)
    if shown:
        _print_table(shown)
    elif not as_json:
        print("no dead letters")
    if count > limit:
        more = f"{count - limit:,} more; --limit shows more at once"
        print(more, file=sys.stderr if as_json else sys.stdout)


async def _read(letter_id: str) -> "Letter":
    from app.cli.complaints import Complaint
    from app.dead_letters import UNKNOWN

    async with _opened() as letters:
        (letter,) = await letters.read([letter_id])
    if letter is None:
        raise Complaint(f"{letter_id}: {UNKNOWN}")
    return letter


async def _handle(
    which: "Sequence[str] | Selection",
    act: Callable[["DeadLetters", Sequence[str]], Awaitable[list[str | None]]],
    done: str,
    *,
    asks: bool = False,
) -> int:
    """Do something with letters, piece by piece, and say with how many; the exit status."""
    from app.dead_letters import Selection

    handled = unhandled = 0
    async with _opened() as letters:
        lot = await letters.span(which) if isinstance(which, Selection) else which
        if asks:
            there = sum([len(ids) async for ids in letters.ids(lot)])
            typer.confirm(f"Drop {_letters(there)}?", abort=True, err=True)
        try:
            async for ids in letters.ids(lot):
                for one, trouble in zip(ids, await _known(act(letters, ids), ids, done), strict=True):
                    if trouble is None:
                        handled += 1
                    else:
                        unhandled += 1
                        print(f"mollifier: {one}: {printable(trouble)}", file=sys.stderr)
        finally:
            print(f"{done} {_letters(handled)}")
    return 1 if unhandled else 0


async def _known(acting: Awaitable[list[str | None]], ids: Sequence[str], done: str) -> list[str | None]:
    """What became of letters; a complaint that says for which nobody knows."""
    from app.cli.complaints import Complaint
    from app.errors import Unreachable

    try:
        return await acting
    except Unreachable as error:
        raise Complaint(f"{error} Which of these were {done} is not known: {' '.join(ids)}") from error


def _head(letter: "Letter") -> dict[str, Any]:
    head = letter._asdict()
    del head["original"]
    return head


def _print_json(value: dict[str, Any]) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def _print_table(shown: Sequence[tuple["Letter", str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("dead letter", "age"):
        table.add_column(name, no_wrap=True)
    table.add_column("source", overflow="fold")
    table.add_column("reason", no_wrap=True)
    table.add_column("detail", overflow="fold", style="dim")
    for letter, age in shown:
        cells = (letter.dead_letter_id, age, letter.source, letter.reason, _shortened(letter.detail or ""))
        table.add_row(*(Text(printable(cell or "?")) for cell in cells))
    Console(highlight=False).print(table)


def _print_letter(letter: "Letter") -> None:
    for field, said in _head(letter).items():
        print(f"{field.replace('_', ' '):14}  {'?' if said is None else printable(str(said))}")
    for name, value in letter.original:
        text = _text(value)
        kind = "bytes, escaped" if text is None else "text"
        print(f"\n{_legible(name)}  ({kind}; {len(value):,} bytes)")
        for line in (_legible(value) if text is None else text).split("\n"):
            print(f"  {printable(line)}")


def _spelled(value: bytes) -> dict[str, str]:
    """Bytes in JSON: as `text` when they are UTF-8, else in `base64`."""
    from base64 import b64encode

    text = _text(value)
    return {"base64": b64encode(value).decode()} if text is None else {"text": text}


def _text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _legible(value: bytes) -> str:
    """Bytes for people: UTF-8, or else each byte that is not ASCII as an escape."""
    text = _text(value)
    return printable(value.decode("ascii", "backslashreplace") if text is None else text)


def _shortened(text: str) -> str:
    return text if len(text) <= _DETAIL else f"{text[: _DETAIL - 1]}…"


def _letters(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"

"""A look at an installation as it is shown in a terminal, whatever its width and height."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.cli.legible import ago, printable
from schemas.status import Buffer, Consumer, Environment, Status, Stream

_HEAD_LINES = 9
"""Lines beside the rows of the two tables."""

_LEAST_ROWS = 3


def dashboard(status: Status, height: int | None = None) -> RenderableType:
    """All that was seen; with a height, as many rows of both tables as there is room for."""
    environments, consumers = len(status.environments), len(status.consumers)
    if height is not None:
        rows = max(2 * _LEAST_ROWS, height - _HEAD_LINES)
        consumers = min(consumers, max(_LEAST_ROWS, rows // 3, rows - environments))
        environments = min(environments, rows - consumers)
    return Group(
        *_head(status),
        "",
        _environments(status.environments[:environments]),
        "",
        _consumers(status.consumers[:consumers]),
    )


def _head(status: Status) -> Iterator[Text]:
    for server, why in (("Redis", status.redis), ("Postgres", status.postgres)):
        if why is not None:
            yield Text(f"{server}: {printable(why)}", "bold red")
    if status.buffer is not None:
        yield from _buffer(status.buffer)
    if status.streams:
        yield Text("requests  ", "bold").append(Text("; ".join(map(_stream, status.streams)), "not bold"))
    yield _set_aside(status)
    yield _switches(status)


def _buffer(buffer: Buffer) -> Iterator[Text]:
    what = (
        f"{buffer.depth:,} entries ({buffer.draining:,} draining) of {buffer.environments:,} environments,"
        f" the oldest for {_span(buffer.oldest_dwell_s)}; tripped: {buffer.tripped:,}"
    )
    if buffer.all_tripped_for_s is not None:
        what += f", and all for {_span(buffer.all_tripped_for_s)}"
    yield Text("buffer    ", "bold").append(Text(what, "not bold"))
    if buffer.drained_per_s is None or buffer.accepted_per_s is None:
        return
    if buffer.empty_in_s is None:
        when = Text("not getting emptier", "bold yellow")
    else:
        when = Text("empty" if not buffer.depth else f"empty in about {_span(buffer.empty_in_s)}", "not bold")
    pace = Text(f"{_rate(buffer.drained_per_s)} out, {_rate(buffer.accepted_per_s)} in: ", "not bold")
    yield Text("drain     ", "bold").append(pace).append(when)


def _stream(stream: Stream) -> str:
    name = printable(stream.stream.rpartition(":")[2])
    oldest = f", the oldest for {_span(stream.oldest_s)}" if stream.length else ""
    return f"{stream.length:,} {name} ({stream.pending:,} pending{oldest})"


def _set_aside(status: Status) -> Text:
    said = Text("set aside ", "bold")
    if status.dead_letters is None:
        return said.append("not known", "not bold dim")
    letters = status.dead_letters
    if not letters.count:
        return said.append("no dead letters", "not bold")
    newest = f", the newest {_span(letters.newest_s or 0)} ago: {printable(letters.newest_reason or '?')}"
    return said.append(f"{letters.count:,} dead letters{newest}", "bold yellow")


def _switches(status: Status) -> Text:
    said = Text("switches  ", "bold")
    switches = status.switches
    said.append(f"mollifier {switches.mode}", "not bold" if switches.mode == "on" else "bold yellow")
    if switches.drain_paused:
        said.append(", ").append("drain paused", "bold yellow")
    else:
        rate = f", at most {switches.drain_rate:,}/s" if switches.drain_rate else ""
        said.append(f", drain goes on{rate}", "not bold")
    decided = {
        "organizations enrolled or not": switches.enrolments,
        "weighted": switches.weights,
        "gates": switches.gates,
    }
    said.append("".join(f", {count:,} {what}" for what, count in decided.items() if count), "not bold")
    return said.append("" if switches.known else " (as set here; operators' not known)", "not bold dim")


def _environments(rows: Sequence[Environment]) -> RenderableType:
    if not rows:
        return Text("no environments in the buffer or counted by the gate", "dim")
    table = _table("environment", "organization")
    for name in ("rate", "tripped", "queued", "draining", "oldest"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in rows:
        held = "no" if not one.tripped else "until drained"
        if one.tripped_for_s is not None:
            held = f"for {_span(one.tripped_for_s)}"
        table.add_row(
            Text(printable(one.environment)),
            Text(printable(one.organization or "?")),
            _rate(one.rate_per_s),
            Text(held, "bold yellow" if one.tripped else "dim"),
            f"{one.queued:,}",
            f"{one.draining:,}",
            _span(one.oldest_dwell_s),
        )
    return table


def _consumers(rows: Sequence[Consumer]) -> RenderableType:
    if not rows:
        return Text("no processes", "dim")
    table = _table("process", "consumer")
    for name in ("state", "heartbeat", "pending"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in rows:
        beat = "?" if one.heartbeat_s is None else f"{_span(one.heartbeat_s)} ago"
        table.add_row(
            Text(printable(one.kind)),
            Text(printable(one.consumer)),
            Text("alive", "green") if one.alive else Text("dead", "bold red"),
            beat,
            f"{one.pending:,}",
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    return table


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}/s" if per_s >= 10 or per_s == 0 else f"{per_s:.1f}/s"


def _span(seconds: float) -> str:
    """A length of time: in tenths of a second while it is short."""
    return f"{seconds:.1f}s" if seconds < 10 else ago(int(seconds * 1000))

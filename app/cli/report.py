"""What `mollifier demo` tells: where the storm stands, what it came to, and whether every run is there."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import quantiles

import asyncpg
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.cli.storm import Tally

_FIGURES = """
WITH seconds AS (
    SELECT date_trunc('second', materialised_at), buffered_at IS NULL AS passed, count(*) AS rows
    FROM mollifier.runs GROUP BY 1, 2
)
SELECT
    (SELECT coalesce(max(rows), 0) FROM seconds WHERE passed) AS passed_peak,
    (SELECT coalesce(max(rows), 0) FROM seconds WHERE NOT passed) AS drained_peak,
    percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (
        ORDER BY extract(epoch FROM materialised_at - buffered_at)
    ) FILTER (WHERE buffered_at IS NOT NULL) AS dwells_s
FROM mollifier.runs
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the rows say: the busiest second of either path, and dwell p50 and p99 in seconds."""

    passed_peak: int
    drained_peak: int
    dwells_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the runs that were answered and the rows that are there are the same. Numbers of runs."""

    accepted: int
    missing: int
    unasked: int
    doubled: int

    @property
    def is_good(self) -> bool:
        return not (self.missing or self.unasked or self.doubled)


async def figures(connection: "asyncpg.Connection[asyncpg.Record]") -> Figures:
    """Read the figures."""
    record = await connection.fetchrow(_FIGURES)
    assert record is not None
    return Figures(record["passed_peak"], record["drained_peak"], record["dwells_s"] or (0.0, 0.0))


async def verdict(connection: "asyncpg.Connection[asyncpg.Record]", tally: Tally) -> Verdict:
    """Compare every id that was answered with every id there is."""
    records = await connection.fetch(
        "SELECT id FROM mollifier.runs UNION ALL SELECT id FROM mollifier.run_aliases"
    )
    return judge(tally.run_ids, tally.cached_run_ids, [record["id"] for record in records])


def judge(run_ids: Sequence[str], cached: Collection[str], rows: Sequence[str]) -> Verdict:
    """`run_ids` are those of new runs, `cached` those of runs that were there before."""
    answered, there = {*run_ids, *cached}, set(rows)
    return Verdict(
        accepted=len(set(run_ids)),
        missing=len(answered - there),
        unasked=len(there - answered),
        doubled=len(run_ids) - len(set(run_ids)) + len(rows) - len(there),
    )


def progress(tally: Tally, total: int, drained: int, drained_per_s: float) -> RenderableType:
    """Where the storm stands, for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_row("offered", _bar(tally.offered, total), f"{tally.offered:,} of {total:,}")
    table.add_row("passed through", _bar(tally.passed, total, "green"), f"{tally.passed:,}")
    table.add_row("mollified", _bar(tally.mollified, total, "yellow"), f"{tally.mollified:,}")
    buffered = max(0, tally.mollified - drained)
    table.add_row("  in the buffer", _bar(buffered, total, "red"), f"{buffered:,}")
    table.add_row("  drained", _bar(drained, total, "cyan"), f"{drained:,}  ({drained_per_s:,.0f} rows/s)")
    if tally.errors:
        table.add_row("errors", "", Text(_errors(tally), "bold red"))
    return table


def progress_line(tally: Tally, total: int, drained: int) -> str:
    """The same in a line, for a log."""
    return (
        f"offered {tally.offered:,} of {total:,} | passed through {tally.passed:,} |"
        f" mollified {tally.mollified:,} | in the buffer {max(0, tally.mollified - drained):,} |"
        f" drained {drained:,}"
    )


def report(tally: Tally, seen: Figures, checked: Verdict) -> RenderableType:
    """What it came to."""
    table = Table(show_header=False)
    table.add_column(style="dim")
    table.add_column()
    answered = max(1, tally.answered)
    table.add_row("offered", _rate(tally.offered, tally.all_offered - tally.started, tally.offered_in))
    table.add_row("absorbed", _rate(tally.answered, tally.last_reply - tally.started, tally.answered_in))
    table.add_row("latency, noisy environment", _spread(_percentiles(tally.noisy_latencies_s)))
    if tally.other_latencies_s:
        table.add_row("latency, all others", _spread(_percentiles(tally.other_latencies_s)))
    table.add_section()
    table.add_row("passed through", _share(tally.passed, answered))
    table.add_row("mollified", _share(tally.mollified, answered))
    if tally.cached:
        table.add_row("duplicate keys, one run each", _share(tally.cached, answered))
    table.add_section()
    table.add_row("rows, passed through", f"{seen.passed_peak:,} in the busiest second")
    table.add_row("rows, drained", f"{seen.drained_peak:,} in the busiest second")
    table.add_row("dwell in the buffer", _spread(seen.dwells_s))
    return Group("", table, "", *(Text(line, style) for line, style in conclusion(tally, checked)))


def conclusion(tally: Tally, checked: Verdict) -> list[tuple[str, str]]:
    """The last lines and their styles: that all is well, or what is not."""
    trouble = []
    if checked.missing:
        trouble.append(f"{checked.missing:,} accepted runs are MISSING in Postgres")
    if checked.unasked:
        trouble.append(f"{checked.unasked:,} rows in Postgres that NOBODY was answered for")
    if checked.doubled:
        trouble.append(f"{checked.doubled:,} runs are DOUBLED")
    if tally.errors:
        trouble.append(f"triggers without a run: {_errors(tally)}")
    if trouble:
        return [(line, "bold red") for line in trouble]
    return [(f"{checked.accepted:,} runs: every accepted run is in Postgres exactly once.", "bold green")]


def console() -> Console:
    """Where the demo prints; without colours or control characters when it is no terminal."""
    return Console(highlight=False)


def _bar(value: int, total: int, style: str = "blue", width: int = 30) -> Text:
    full = round(width * min(value, total) / max(1, total))
    return Text.assemble(("━" * full, style), ("━" * (width - full), "bright_black"))


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = quantiles(values, n=100)
    return cuts[49], cuts[98]


def _spread(values_s: Sequence[float]) -> str:
    return "p50 {:,.0f} ms   p99 {:,.0f} ms".format(*(1000 * value for value in values_s))


def _rate(count: int, seconds: float, by_second: Counter[int]) -> str:
    busiest = max(by_second.values(), default=0)
    return f"{count:,} in {seconds:.1f} s, {busiest:,} in the busiest second"


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)"


def _errors(tally: Tally) -> str:
    return ", ".join(f"{count:,} {code}" for code, count in tally.errors.most_common())

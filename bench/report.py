"""What was found, as text: a line for the screen, and the page `docs/benchmarks.md`."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill

from bench.findings import Bound, Figure, Outcome, Verdict

_WIDTH = 110

_INTRODUCTION = """\
# Benchmarks

What `{command}` found, and wrote here by itself. Repeats: {pairs}. It took {minutes:.0f} minutes.

Both sides of a comparison do the same work in the same run on the same servers, taken in turn (A B, B A, …).
The table below holds the medians of the ratios of those pairs, each with its smallest and largest; the
command ends with status 1 if one of them is missed. The absolute figures further down are context: they say
more about the machine than about the programs. "Processor time" is user and system time of the processes
that are compared, and on its own row that of the Redis server.

Servers are persistent as in production, for both sides alike: Valkey with its append-only file fsynced every
second, Postgres with its defaults (fsync and synchronous commit on). Processes are real ones, started as in
the Procfile; they, both servers and what sends the requests share the {cores} cores of one machine.

"""


def line(verdict: Verdict, comparison: str = "") -> str:
    """A verdict on one line, with the name of its comparison where that is not clear."""
    name = f"{comparison}: {verdict.bound.name}" if comparison else verdict.bound.name
    if not verdict.values:
        return f"NOT MEASURED  {name}: wanted {wanted(verdict.bound)}"
    word = "holds " if verdict.holds else "MISSED"
    return f"{word}  {name}: {found(verdict)}, wanted {wanted(verdict.bound)}"


def found(verdict: Verdict) -> str:
    """The median of what was found, with its range."""
    return f"{_number(verdict.median, verdict.bound.unit)} ({_range(verdict.values)})"


def wanted(bound: Bound) -> str:
    """What a bound asks for."""
    least = "" if bound.least is None else f"at least {_number(bound.least, bound.unit)}"
    most = "" if bound.most is None else f"at most {_number(bound.most, bound.unit)}"
    aim = "" if bound.aim is None else f", better {_number(bound.aim, bound.unit)}"
    return " and ".join(filter(None, (least, most))) + aim


def page(
    outcomes: Sequence[Outcome], command: str, pairs: int, cores: int, versions: Mapping[str, str]
) -> str:
    """The whole page, in Markdown."""
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    head = _INTRODUCTION.format(command=command, pairs=pairs, minutes=minutes, cores=cores)
    return head + "\n".join((*_summary(outcomes), "", *_versions(versions), *_details(outcomes)))


def _summary(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "| comparison | what | wanted | found | |"
    yield "|---|---|---|---|---|"
    for outcome in outcomes:
        for verdict in outcome.verdicts:
            result = "**not measured** |"
            if verdict.values:
                result = f"{found(verdict)} | {'holds' if verdict.holds else '**missed**'}"
            link = f"[{outcome.name}](#{_anchor(outcome.title)})"
            yield f"| {link} | {verdict.bound.name} | {wanted(verdict.bound)} | {result} |"


def _versions(versions: Mapping[str, str]) -> Iterator[str]:
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield fill(f"Versions: {text}.", _WIDTH, break_on_hyphens=False)
    yield ""


def _details(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        yield f"## {outcome.title}"
        yield ""
        yield fill(" ".join(outcome.how.split()), _WIDTH, break_on_hyphens=False)
        yield ""
        for note in outcome.notes:
            yield note
            yield ""
        if outcome.figures:
            yield "| figure | median | range |"
            yield "|---|---|---|"
            for figure in outcome.figures:
                yield f"| {figure.name} | {_absolute(figure.median, figure)} | {_span(figure)} |"
            yield ""


def _absolute(value: float, figure: Figure) -> str:
    digits = 0 if abs(value) >= 1000 else 1
    return f"{value:,.{digits}f} {figure.unit}".rstrip()


def _span(figure: Figure) -> str:
    return f"{_absolute(min(figure.values), figure)} to {_absolute(max(figure.values), figure)}"


def _number(value: float, unit: str) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    kept = (letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")
    return "".join(kept)

"""What `make bench` does with what it measures: pairs, bounds, how they are written. Nothing is measured."""

from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

import bench
from bench import __main__ as command
from bench.comparison import Comparison, Scale
from bench.findings import Bound, Figure, Measured, NotMeasured, Outcome, Reading, Rounds, Verdict, in_turn
from bench.load import percentile
from bench.report import line, page
from bench.stage import Stage
from bench.table import COMPARISONS

NO_STAGE = cast("Stage", None)

BOUNDS = {
    "mollify": [(3, None), (None, 0.25)],
    "passing": [(8, None), (8, None), (8, None), (0.6, None)],
    "drain": [(0.6, None), (1, None)],
    "latency": [(None, 4), (None, 50), (None, 250)],
    "hot-key": [(None, 1.5), (1 / 1.5, None)],
    "growth": [(0.85, 1.15), (0.85, 1.15), (None, 1.6)],
    "scaling": [(None, 1.15), (90, None)],
    "protection": [(None, 1), (None, 1.5)],
    "producer": [(5, None), (5, None), (2, None)],
    "telemetry": [(None, 0.02)],
}
"""What has to hold, as (least, most), by comparison."""


def outcome(*verdicts: Verdict, **changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "name": "race",
        "title": "A race, on foot",
        "how": "  Two\n   run.",
        "verdicts": verdicts,
        **changes,
    }
    return Outcome(**values)


FAST = Bound(name="ours to theirs", least=3, aim=5)
QUICK = Bound(name="replies within", unit="ms", most=50)


class TestTable:
    def test_every_comparison_is_in_it_with_its_bounds(self) -> None:
        found = {
            comparison.name: [(bound.least, bound.most) for bound in comparison.bounds]
            for comparison in COMPARISONS
        }
        assert found == BOUNDS

    def test_no_module_with_a_comparison_is_left_out(self) -> None:
        (folder,) = bench.__path__
        modules = [import_module(f"bench.{path.stem}") for path in Path(folder).glob("*.py")]
        assert {module.COMPARISON for module in modules if hasattr(module, "COMPARISON")} == set(COMPARISONS)

    def test_bounds_have_names_of_their_own(self) -> None:
        for comparison in COMPARISONS:
            names = [bound.name for bound in comparison.bounds]
            assert len(set(names)) == len(names), comparison.name


class TestPairs:
    async def test_sides_take_turns_and_every_other_round_is_backwards(self) -> None:
        order: list[str] = []

        def side(name: str, seconds: float) -> Callable[[], Awaitable[Reading]]:
            async def measured() -> Reading:
                order.append(name)
                return Reading(100, seconds, cpu_s=0.001 * len(order))

            return measured

        rounds = await in_turn({"a": side("a", 1), "b": side("b", 2)}, 3)
        assert order == ["a", "b", "b", "a", "a", "b"]
        assert rounds.ratios("rate", "a", "b") == (2, 2, 2)
        assert rounds.ratios("cpu_us", "a", "b") == (1 / 2, 4 / 3, 5 / 6)

    def test_ratios_are_those_of_the_pairs_not_of_the_medians(self) -> None:
        rounds = Rounds(
            {
                "a": tuple(Reading(count, 1) for count in (10, 40, 90)),
                "b": tuple(Reading(count, 1) for count in (10, 20, 10)),
            }
        )
        assert Verdict(FAST, rounds.ratios("rate", "a", "b")).median == 2

    def test_figures_leave_out_what_was_not_looked_at(self) -> None:
        rounds = Rounds({"a": (Reading(10, 2, cpu_s=0.5),)})
        assert rounds.figures() == (
            Figure("a, a second", "", (5,)),
            Figure("a, processor time of each", "µs", (50_000,)),
        )

    def test_percentiles(self) -> None:
        assert percentile(range(1, 101), 50) == 51
        assert percentile(range(1, 1001), 99) == 991
        assert percentile([7], 99) == 7


class TestVerdict:
    @pytest.mark.parametrize(
        ("bound", "values", "holds"),
        [
            (FAST, (3.0,), True),
            (FAST, (2.99,), False),
            (QUICK, (50.0,), True),
            (QUICK, (50.1,), False),
            (FAST, (1.0, 3.0, 9.0), True),
            (FAST, (9.0, 1.0, 2.0), False),
            (Bound(name="flat", least=0.85, most=1.15), (0.8,), False),
            (Bound(name="flat", least=0.85, most=1.15), (1.2,), False),
            (FAST, (), False),
        ],
    )
    def test_the_median_has_to_keep_the_bound(
        self, bound: Bound, values: tuple[float, ...], holds: bool
    ) -> None:
        assert Verdict(bound, values).holds is holds

    @pytest.mark.parametrize(
        ("bound", "values", "stands"),
        [
            (Bound(name="rate", least=3, guard=1.5), (1.5,), True),
            (Bound(name="rate", least=3, guard=1.5), (1.49,), False),
            (Bound(name="cost", most=0.25, guard=0.95), (0.95,), True),
            (Bound(name="cost", most=0.25, guard=0.95), (0.96,), False),
            (Bound(name="cost", most=0.25, guard=0.95), (0.2,), True),
            (FAST, (3.0,), True),
            (FAST, (2.99,), False),
            (Bound(name="rate", least=3, guard=1.5), (), False),
        ],
    )
    def test_what_was_reached_stands_until_it_is_lost(
        self, bound: Bound, values: tuple[float, ...], stands: bool
    ) -> None:
        assert Verdict(bound, values).stands is stands

    async def test_what_is_not_measured_does_not_hold(self) -> None:
        async def measure(stage: Stage, scale: Scale) -> Measured:
            raise NotMeasured("there is no node on PATH")

        found = await Comparison("race", "A race", "", (FAST, QUICK), measure).run(NO_STAGE, Scale(5))
        assert not any(verdict.holds for verdict in found.verdicts)
        assert found.notes == ("NOT MEASURED: there is no node on PATH.",)
        assert line(found.verdicts[0]).startswith("NOT MEASURED")

    async def test_a_comparison_has_to_give_values_for_every_bound(self) -> None:
        async def measure(stage: Stage, scale: Scale) -> Measured:
            return Measured({FAST.name: (4.0,)})

        with pytest.raises(KeyError, match=QUICK.name):
            await Comparison("race", "A race", "", (FAST, QUICK), measure).run(NO_STAGE, Scale(5))


class TestReport:
    def test_a_line_says_what_was_found_and_what_was_wanted(self) -> None:
        assert line(Verdict(FAST, (2.0, 1.0, 4.0))) == (
            "MISSED  ours to theirs: 2 times (1.00 to 4.00), wanted at least 3 times, better 5 times"
        )
        assert line(Verdict(QUICK, (20.5,))) == (
            "holds   replies within: 20.5 ms (20.50 to 20.50), wanted at most 50 ms"
        )

    def test_the_page(self) -> None:
        found = outcome(
            Verdict(FAST, (2.0, 1.0, 4.0)),
            Verdict(QUICK),
            figures=(Figure("ours, a second", "", (1234.5, 1000.0, 2000.0)),),
            notes=("It rained.",),
            seconds=90.0,
        )
        text = page([found], "python -m bench", 3, 2, {"Python": "3.11.2", "Valkey": "9.1.2"})
        lines = text.splitlines()
        link = "[race](#a-race-on-foot)"
        found_line = (
            f"| {link} | ours to theirs | at least 3 times, better 5 times | 2 times (1.00 to 4.00) |"
        )
        assert f"{found_line} **missed** |" in lines
        assert f"| {link} | replies within | at most 50 ms | **not measured** | |" in lines
        assert "Versions: Python 3.11.2, Valkey 9.1.2." in lines
        assert "## A race, on foot" in lines
        assert "Two run." in lines
        assert "It rained." in lines
        assert "| ours, a second | 1,234 | 1,000 to 2,000 |" in lines
        assert "`python -m bench` found" in text
        assert "Repeats: 3. It took 2 minutes." in text


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        """Runs the command, which finds the outcomes that are given to it."""

        def run(arguments: str, *found: Outcome) -> Any:
            async def measured(*_: object) -> tuple[list[Outcome], dict[str, str]]:
                return list(found), {}

            monkeypatch.setattr(command, "_run", measured)
            return CliRunner().invoke(command.application, arguments)

        return run

    def test_it_ends_well_when_all_holds(self, run: Callable[..., Any]) -> None:
        result = run("", outcome(Verdict(FAST, (4.0,))))
        assert (result.exit_code, result.stderr) == (0, "")

    def test_a_missed_bound_is_named_and_fails(self, run: Callable[..., Any]) -> None:
        result = run("", outcome(Verdict(FAST, (4.0,))), outcome(Verdict(QUICK, (99.0,)), Verdict(FAST)))
        assert result.exit_code == 1
        assert result.stderr.splitlines() == [
            "MISSED  race: replies within: 99 ms (99.00 to 99.00), wanted at most 50 ms",
            "NOT MEASURED  race: ours to theirs: wanted at least 3 times, better 5 times",
        ]

    def test_a_guard_fails_only_for_what_is_lost(self, run: Callable[..., Any]) -> None:
        bound = Bound(name="rate", least=3, guard=1.5)
        assert run("--guard", outcome(Verdict(bound, (2.0,)))).exit_code == 0
        assert run("", outcome(Verdict(bound, (2.0,)))).exit_code == 1
        lost = run("--guard", outcome(Verdict(bound, (1.0,))))
        assert (lost.exit_code, lost.stderr[:7]) == (1, "MISSED ")
        assert run("--guard", outcome(Verdict(bound))).exit_code == 1, "not measured"

    def test_it_writes_the_page(self, run: Callable[..., Any], tmp_path: Path) -> None:
        run(f"--write {tmp_path / 'page.md'}", outcome(Verdict(FAST, (4.0,))))
        assert (tmp_path / "page.md").read_text().startswith("# Benchmarks\n")

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ("--only mollify,races", "races is none of"),
            ("--only drain --write {}", "no --only"),
            ("--share 0.5 --write {}", "no --share"),
        ],
    )
    def test_a_wrong_argument_is_named(
        self, run: Callable[..., Any], tmp_path: Path, arguments: str, complaint: str
    ) -> None:
        result = run(arguments.format(tmp_path / "page.md"))
        assert result.exit_code == 2
        assert complaint in " ".join(result.stderr.replace("│", "").split())

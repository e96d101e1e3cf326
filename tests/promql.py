"""As much of Prometheus as our alerts need: the series of promtool's test files, and rules over them.

Rates are not extrapolated; nothing here depends on more than their sign.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import promql_parser as promql

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Series = dict[Labels, list[tuple[float, float]]]
"""Samples by labels (`__name__` among them): seconds since the beginning, and value."""

LOOK_BACK_S = 300

_SERIES = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})?")
_VALUES = re.compile(r"(?P<start>-?[\w.]+?)(?:(?P<step>[+-][\d.]+))?(?:x(?P<more>\d+))?")
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": lambda left, right: left > right,
    "<": lambda left, right: left < right,
    "==": lambda left, right: left == right,
}


def seconds(duration: str) -> float:
    """`1m30s` -> 90."""
    return promql.parse_duration(duration).total_seconds()


def selectors(expression: str) -> Iterator[tuple[promql.VectorSelector, frozenset[str]]]:
    """The selectors of an expression, and the labels that it is summed up by."""
    found: list[promql.VectorSelector] = []
    labels: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)

    promql.walk(promql.parse(expression), visit)
    for one in found:
        yield one, frozenset(labels)


def read_series(given: list[dict[str, Any]], interval_s: float) -> Series:
    """`input_series` of a test."""
    series: Series = {}
    for one in given:
        match = _SERIES.fullmatch(one["series"])
        assert match, one
        labels = dict(re.findall(r'(\w+)="(.*?)"', match["labels"] or ""), __name__=match["name"])
        values = [value for part in str(one["values"]).split() for value in _expand(part)]
        series[frozenset(labels.items())] = [
            (place * interval_s, value) for place, value in enumerate(values)
        ]
    return series


def _expand(part: str) -> list[float]:
    match = _VALUES.fullmatch(part)
    assert match, part
    start, step = float(match["start"]), float(match["step"] or 0)
    return [start + place * step for place in range(int(match["more"] or 0) + 1)]


def firing(rule: Mapping[str, Any], series: Series, at_s: float, every_s: float) -> list[dict[str, str]]:
    """The labels of the alerts of a rule that fire `at_s`, where rules are evaluated every so often."""
    expression, held_s = promql.parse(rule["expr"]), seconds(rule.get("for", "0s"))
    since: dict[Labels, float] = {}
    now = 0.0
    while now <= at_s:
        active = evaluate(expression, series, now)
        since = {labels: since.get(labels, now) for labels in active}
        last, now = now, now + every_s
    return [
        {**rule["labels"], **{name: value for name, value in labels if name != "__name__"}}
        for labels, began in since.items()
        if last - began >= held_s
    ]


def evaluate(node: Any, series: Series, now: float) -> Vector:
    """The instant vector of an expression."""
    if isinstance(node, promql.ParenExpr):
        return evaluate(node.expr, series, now)
    if isinstance(node, promql.VectorSelector):
        return {
            labels: samples[-1][1]
            for labels, samples in _select(node, series, now - LOOK_BACK_S, now).items()
        }
    if isinstance(node, promql.AggregateExpr):
        return _aggregate(node, evaluate(node.expr, series, now))
    if isinstance(node, promql.Call):
        return _call(node, series, now)
    if isinstance(node, promql.BinaryExpr):
        return _binary(node, series, now)
    raise NotImplementedError(type(node).__name__)


def _select(node: promql.VectorSelector, series: Series, after: float, until: float) -> Series:
    wanted = [(one.name, str(one.op), one.value) for one in node.matchers.matchers]
    found: Series = {}
    for labels, samples in series.items():
        values = dict(labels)
        inside = [sample for sample in samples if after < sample[0] <= until]
        if inside and values["__name__"] == node.name and all(_matches(values, *one) for one in wanted):
            found[labels] = inside
    return found


def _matches(values: Mapping[str, str], name: str, operator: str, value: str) -> bool:
    is_equal = values.get(name, "") == value
    is_like = re.fullmatch(value, values.get(name, "")) is not None
    return {
        "MatchOp.Equal": is_equal,
        "MatchOp.NotEqual": not is_equal,
        "MatchOp.Re": is_like,
        "MatchOp.NotRe": not is_like,
    }[operator]


def _aggregate(node: promql.AggregateExpr, vector: Vector) -> Vector:
    by = () if node.modifier is None else tuple(node.modifier.labels)
    groups: defaultdict[Labels, list[float]] = defaultdict(list)
    for labels, value in vector.items():
        groups[frozenset(one for one in labels if one[0] in by)].append(value)
    combine: Callable[[list[float]], float] = _max if str(node.op) == "max" else sum
    assert str(node.op) in ("max", "sum"), node.op
    return {labels: combine(values) for labels, values in groups.items()}


def _max(values: list[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _call(node: promql.Call, series: Series, now: float) -> Vector:
    (argument,) = node.args
    if node.func.name == "absent":
        return {} if evaluate(argument, series, now) else {frozenset(): 1.0}
    range_s = argument.range.total_seconds()
    divisor = {"increase": 1.0, "rate": range_s}[node.func.name]
    return {
        frozenset(one for one in labels if one[0] != "__name__"): _increase(samples) / divisor
        for labels, samples in _select(argument.vector_selector, series, now - range_s, now).items()
        if len(samples) > 1
    }


def _increase(samples: list[tuple[float, float]]) -> float:
    """What a counter has gained; one that falls began anew."""
    values = [value for _, value in samples]
    return sum(new - old if new >= old else new for old, new in pairwise(values))


def _binary(node: promql.BinaryExpr, series: Series, now: float) -> Vector:
    left, operator = evaluate(node.lhs, series, now), str(node.op)
    if operator in _COMPARE:
        assert isinstance(node.rhs, promql.NumberLiteral)
        bound = node.rhs.val
        return {labels: value for labels, value in left.items() if _COMPARE[operator](value, bound)}
    right = evaluate(node.rhs, series, now)
    if operator == "unless":
        return {labels: value for labels, value in left.items() if labels not in right}
    raise NotImplementedError(operator)

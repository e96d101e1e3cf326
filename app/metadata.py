"""Changing metadata by operations: on keys of the object, or on paths into it such as `$.a.b[0]`."""

import re
from collections.abc import Sequence
from copy import deepcopy
from decimal import Decimal
from itertools import pairwise
from math import isfinite
from typing import Any

from app.errors import InvalidRequest
from schemas.operations import AnyMetadataOperation, Append, DeleteKey, Increment, Remove, SetKey, Update

Metadata = dict[str, Any]
Step = str | int

_PATH = re.compile(r"\$(?:\.[^.\[\]]+|\[\d{1,6}\])+")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d{1,6})\]")


def apply(metadata: Metadata, operations: Sequence[AnyMetadataOperation]) -> Metadata:
    """The metadata after some operations, in order. The given object is changed in place or replaced.

    Raises:
        InvalidRequest: a path is malformed, or leads through something that holds nothing; names the field.
    """
    for number, operation in enumerate(operations):
        if isinstance(operation, Update):
            metadata = deepcopy(operation.value)
            continue
        try:
            _apply(metadata, parse_path(operation.key), operation)
        except ValueError as error:
            raise InvalidRequest(f"operations[{number}].key: {error}") from None
    return metadata


def parse_path(key: str) -> list[Step]:
    """`$.a.b[0]` -> ["a", "b", 0]; what does not begin with `$.` is a key as it stands.

    Raises:
        ValueError: it begins like a path and is none.
    """
    if not key.startswith("$."):
        return [key]
    if _PATH.fullmatch(key) is None:
        raise ValueError(f"{key!r} is not a path like $.a.b[0]")
    return [name or int(index) for name, index in _STEP.findall(key)]


def _apply(metadata: Metadata, path: list[Step], operation: AnyMetadataOperation) -> None:
    *way, last = path
    if isinstance(operation, DeleteKey | Remove):
        holder = _find(metadata, way)
        if holder is None or not _has(holder, last):
            return
        if isinstance(operation, DeleteKey):
            del holder[last]
        elif isinstance(holder[last], list):
            holder[last] = [one for one in holder[last] if not _equal(one, operation.value)]
        return
    holder = _make(metadata, path)
    there: Any = holder[last] if _has(holder, last) else None
    if isinstance(operation, SetKey):
        value = deepcopy(operation.value)
    elif isinstance(operation, Append):
        before = there if isinstance(there, list) else [] if there is None else [there]
        value = [*before, deepcopy(operation.value)]
    else:
        assert isinstance(operation, Increment)
        value = _sum(there if _is_number(there) else 0, operation.value)
    if isinstance(last, int):
        holder.extend([None] * (last + 1 - len(holder)))
    holder[last] = value


def _find(holder: Any, way: Sequence[Step]) -> Any:
    """What lies at the end of a way, if it holds something; else None."""
    for step in way:
        if not _has(holder, step):
            return None
        holder = holder[step]
    return holder if isinstance(holder, dict | list) else None


def _make(holder: Any, path: Sequence[Step]) -> Any:
    """What holds the last step of a path. What is missing on the way is made.

    Raises:
        ValueError: something else is in the way.
    """
    for step, following in pairwise(path):
        empty: Any = [] if isinstance(following, int) else {}
        if not _fits(holder, step):
            raise ValueError(f"there is nothing at {step!r}")
        if not _has(holder, step) or holder[step] is None:
            if isinstance(step, int):
                holder.extend([None] * (step + 1 - len(holder)))
            holder[step] = empty
        holder = holder[step]
    if not _fits(holder, path[-1]):
        raise ValueError(f"there is nothing at {path[-1]!r}")
    return holder


def _fits(holder: Any, step: Step) -> bool:
    if isinstance(step, int):
        return isinstance(holder, list) and step <= len(holder) + 100
    return isinstance(holder, dict)


def _has(holder: Any, step: Step) -> bool:
    if isinstance(step, int):
        return isinstance(holder, list) and step < len(holder)
    return isinstance(holder, dict) and step in holder


def _equal(one: Any, other: Any) -> bool:
    """JSON's equality: true is not 1, however deep."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _sum(one: Any, other: int | float) -> Any:
    """The sum of two numbers, of which the first may be a Decimal.

    Raises:
        ValueError: it is larger than other programs can read.
    """
    if isinstance(one, Decimal):
        total: Any = one + Decimal(repr(other))
    else:
        total = one + other
    if not isfinite(total):
        raise ValueError("the sum is too large")
    return total


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)

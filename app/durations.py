"""Durations and instants as producers write them, into datetimes."""

import re
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from schemas.requests import DURATION, LONGEST_S

_UNITS = {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(DURATION, re.ASCII)

Seconds = TypeVar("Seconds", int, float)


def parse_duration(text: str) -> int:
    """Seconds of a duration such as `30s`, `5m`, `2h30m`, `3d` or `1w`; units in falling order, each once.

    Raises:
        ValueError: it is not a duration, or is longer than ten years.
    """
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ValueError(f"{text!r} is not a duration like 30s, 5m, 2h30m, 3d or 1w")
    seconds = sum(
        int(count) * unit for count, unit in zip(match.groups(), _UNITS.values(), strict=True) if count
    )
    return _bounded(seconds)


def parse_delay(text: str, since: datetime) -> datetime:
    """The instant a delay ends: a duration from `since`, or an ISO 8601 instant with its offset.

    Raises:
        ValueError: it is neither, or lies more than ten years after `since`.
    """
    if _DURATION.fullmatch(text):
        return since + timedelta(seconds=parse_duration(text))
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a duration like 30s, 5m, 2h30m, 3d or 1w nor an ISO 8601 instant"
        ) from None
    if instant.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; write 2026-01-01T00:00:00Z")
    try:
        instant = instant.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{text!r} is out of range") from None
    _bounded((instant - since).total_seconds())
    return instant


def parse_ttl(value: str | int) -> int:
    """Seconds of a time to live: a duration, or seconds as a number.

    Raises:
        ValueError: not a duration, not above zero, or longer than ten years.
    """
    seconds = value if isinstance(value, int) else parse_duration(value)
    if seconds <= 0:
        raise ValueError("must be more than 0 seconds")
    return _bounded(seconds)


def _bounded(seconds: Seconds) -> Seconds:
    if seconds > LONGEST_S:
        raise ValueError("is more than ten years ahead")
    return seconds

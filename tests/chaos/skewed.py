"""A process whose wall clock can jump: `python -m tests.chaos.skewed workers.triggers`, then SIGUSR1.

Each SIGUSR1 switches between the true time and one that is CHAOS_CLOCK_JUMP_S off. A jump leaves monotonic
clocks alone: only `time.time` changes, and what the modules under test have imported as `datetime`.
"""

import importlib
import os
import signal
import sys
import time
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

_true_time = time.time
_offset_s = 0.0


class _Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)


class SkewedDatetime(metaclass=_Meta):
    """`datetime`, but for what it calls now. Everything it makes is a plain `datetime`."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        return datetime(*arguments, **keywords)

    @staticmethod
    def now(zone: tzinfo | None = None) -> datetime:
        return datetime.now(zone) + timedelta(seconds=_offset_s)

    @staticmethod
    def utcnow() -> datetime:
        return datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=_offset_s)

    fromisoformat = staticmethod(datetime.fromisoformat)
    fromtimestamp = staticmethod(datetime.fromtimestamp)
    combine = staticmethod(datetime.combine)
    strptime = staticmethod(datetime.strptime)
    min, max = datetime.min, datetime.max


def _jump(*_: object) -> None:
    global _offset_s
    _offset_s = 0.0 if _offset_s else float(os.environ["CHAOS_CLOCK_JUMP_S"])


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    for name, one in list(sys.modules.items()):
        if name.partition(".")[0] in ("app", "workers") and vars(one).get("datetime") is datetime:
            vars(one)["datetime"] = SkewedDatetime
    time.time = lambda: _true_time() + _offset_s
    signal.signal(signal.SIGUSR1, _jump)
    line = sys.argv[1].rpartition(".")[2]
    module.run(getattr(module, line.capitalize()))


if __name__ == "__main__":
    main()

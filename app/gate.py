"""The rate gate's counters in Redis: one script call per partition, all in one round trip."""

from collections.abc import Mapping
from sys import maxsize

from redis.exceptions import ResponseError

from app.errors import GateUnavailable, Unreachable
from app.grouping import by_partition
from app.keys import Keys
from app.ports import Admission
from app.redis_client import Call, Scripts
from app.settings import Settings
from app.switches import Rate


class RedisGate:
    """Implements `ports.RateGate` with `lua/gate.lua`. `now_ms` replaces the server's clock in tests."""

    def __init__(self, scripts: Scripts, keys: Keys, settings: Settings) -> None:
        self._scripts = scripts
        self._keys = keys
        self._settings = settings
        self._head = (int(settings.gate_window == "sliding"), int(settings.hold_until_drained))

    async def admit(
        self, requests: Mapping[str, int], now_ms: int | None = None, *, rates: Mapping[str, Rate] = {}
    ) -> Admission:
        """See `ports.RateGate.admit`."""
        settings = self._settings
        rate = Rate(settings.trip_window_ms, settings.trip_threshold, settings.hold_ms)
        groups = by_partition(self._keys, requests)
        head = ("" if now_ms is None else now_ms, *self._head)
        calls = []
        for environments in groups.values():
            keys: list[str] = []
            arguments: list[str | bytes | int] = list(head)
            for environment in environments:
                names = self._keys.environment(environment)
                keys += (names.gate, names.drain)
                arguments += (requests[environment], *rates.get(environment, rate))
            calls.append(Call("gate", keys, arguments))
        if settings.global_trip_threshold:
            fleet = (
                sum(requests.values()),
                settings.trip_window_ms,
                settings.global_trip_threshold,
                settings.hold_ms,
            )
            calls.append(Call("gate", [self._keys.fleet_gate] * 2, [*head, *fleet]))
        answers = await self._ask(calls)
        fleet_passes = answers.pop()[0] if settings.global_trip_threshold else maxsize
        passes: dict[str, int] = {}
        for environments, answer in zip(groups.values(), answers, strict=True):
            passes.update(zip(environments, answer[::2], strict=True))
        return Admission(passes, fleet_passes)

    async def _ask(self, calls: list[Call]) -> list[list[int]]:
        try:
            answers = await self._scripts.run(calls)
        except Unreachable as error:
            raise GateUnavailable(str(error)) from error
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise GateUnavailable(str(answer)) from answer
        return answers

"""What operators decide while the fleet runs, over what the environment variables say. DESIGN section 6.

`Switches` is one consistent value, which a batch takes once; a `Switchboard` has the newest that is known.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

from app.settings import Settings

Mode = Literal["on", "off", "shadow"]

_SHOWN = 10


class Rate(NamedTuple):
    """How the gate of an environment trips: over `threshold` requests in `window_ms`, for `hold_ms`."""

    window_ms: int
    threshold: int
    hold_ms: int


class Override(NamedTuple):
    """What operators have decided on a rate; None: nothing."""

    window_ms: int | None = None
    threshold: int | None = None
    hold_ms: int | None = None


class OperatorSettings(msgspec.Struct, frozen=True):
    """What operators have decided, as Postgres has it; what is None or missing they have not.

    `revision` grows with each change. `environments` and `organizations` are about the gate; `weights` are of
    organizations whose share of the drain is not 1; `drain_rate` is in rows a second, 0: no limit.
    """

    revision: int = 0
    switch: Mode | None = None
    drain_paused: bool = False
    drain_rate: int | None = None
    enrolment: dict[str, bool] = {}
    weights: dict[str, int] = {}
    environments: dict[str, Override] = {}
    organizations: dict[str, Override] = {}


_NOTHING = OperatorSettings()


@dataclass(frozen=True, slots=True)
class Switches:
    """What holds now: `decided` by operators, or else as the environment variables say."""

    enabled: bool
    shadow_mode: bool
    default_enrolled: bool
    rate: Rate
    drain_rate: int
    decided: OperatorSettings

    @classmethod
    def of(cls, settings: Settings, decided: OperatorSettings = _NOTHING) -> "Switches":
        """Settings, with what operators have decided over them."""
        mode, drain_rate = decided.switch, decided.drain_rate
        return cls(
            enabled=settings.enabled if mode is None else mode != "off",
            shadow_mode=settings.shadow_mode if mode is None else mode == "shadow",
            default_enrolled=settings.default_enrolled,
            rate=Rate(settings.trip_window_ms, settings.trip_threshold, settings.hold_ms),
            drain_rate=settings.drain_max_rate if drain_rate is None else drain_rate,
            decided=decided,
        )

    def is_enrolled(self, organization_id: str, flag: bool | None) -> bool:
        """Whether an organization takes part: as operators decided, else its own flag, else the default."""
        decided = self.decided.enrolment.get(organization_id)
        if decided is not None:
            return decided
        return self.default_enrolled if flag is None else flag

    def rates(self, tenants: Iterable[tuple[str, str]]) -> Mapping[str, Rate]:
        """Of some (environment id, organization id), the rates that are not `rate`, by environment.

        Each part of a rate is the environment's, else the organization's, else that of the settings.
        """
        environments, organizations = self.decided.environments, self.decided.organizations
        rates: dict[str, Rate] = {}
        if not environments and not organizations:
            return rates
        for environment, organization in tenants:
            own, shared = environments.get(environment), organizations.get(organization)
            if (own is not None or shared is not None) and environment not in rates:
                layers = (own or Override(), shared or Override(), self.rate)
                rates[environment] = Rate(*(_first(parts) for parts in zip(*layers, strict=True)))
        return rates


class Switchboard:
    """The newest switches that a process knows of. `current` is replaced as a whole, never changed.

    Until it `is_known` what operators have decided, they are those of the environment variables.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.current = Switches.of(settings)
        self.is_known = False

    def decide(self, decided: OperatorSettings) -> dict[str, Any]:
        """Go by what operators have decided from now on; what is new of it (see `changes`)."""
        before, self.current = self.current.decided, Switches.of(self._settings, decided)
        self.is_known = True
        return changes(before, decided)


def changes(before: OperatorSettings, after: OperatorSettings) -> dict[str, Any]:
    """The new value of each field that differs; of one that has many, the first ten. For the log."""
    changed: dict[str, Any] = {}
    for field in OperatorSettings.__struct_fields__:
        was, now = getattr(before, field), getattr(after, field)
        if was != now:
            changed[field] = _changed_of(was, now) if isinstance(now, dict) else now
    return changed


def _changed_of(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    values = {name: now.get(name) for name in names[:_SHOWN]}
    return {name: one._asdict() if isinstance(one, Override) else one for name, one in values.items()}


def _first(parts: Iterable[int | None]) -> int:
    return next(part for part in parts if part is not None)

"""Step 6: the gate's policy, from a batch to one decision per request. DESIGN section 6.

What the counters say is the rate gate's business (`gate.py`); who is asked at all, and what an
answer means, is decided here, in memory.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from app.batch import Batch, Decision, Item, Key, Outcome
from app.errors import GateUnavailable
from app.ports import RateGate
from app.settings import Settings
from app.store_health import StoreHealth
from app.switches import Switches
from app.telemetry import Telemetry
from schemas.requests import TriggerRequest

_OVER = ("per_env_rate", "global_rate")
"""Reasons for which a request does not pass."""


class Decide:
    """Gives every open item its decision. Never fails: a gate that cannot be asked lets pass."""

    def __init__(self, gate: RateGate, health: StoreHealth, settings: Settings, telemetry: Telemetry) -> None:
        self._gate = gate
        self._health = health
        self._divert = settings.divert_on_store_failure
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        asked = []
        for item in batch.open():
            assert item.request is not None
            item.decision = self._without_asking(item.request, batch.switches)
            if item.decision is None:
                asked.append(item)
        if asked:
            await self._ask(asked, batch.switches)

    def _without_asking(self, request: TriggerRequest, switches: Switches) -> Decision | None:
        if not switches.enabled:
            return Decision(Outcome.PASS_THROUGH, "disabled")
        enrolled = is_enrolled(request, switches)
        bypass = bypass_reason(request)
        if bypass is not None:
            return Decision(Outcome.PASS_THROUGH, bypass, enrolled)
        if not enrolled and not switches.shadow_mode:
            return Decision(Outcome.PASS_THROUGH, "not_enrolled")
        if enrolled and not switches.shadow_mode and self._divert:
            trouble = self._health.trouble()
            if trouble is not None:
                return Decision(Outcome.MOLLIFY, trouble, enrolled)
        return None

    async def _ask(self, items: Sequence[Item], switches: Switches) -> None:
        tenants = [_tenant(item) for item in items]
        environments = [environment for environment, _ in tenants]
        try:
            admission = await self._gate.admit(Counter(environments), rates=switches.rates(tenants))
        except GateUnavailable as error:
            self._telemetry.gate_failed(error)
            for item in items:
                item.decision = _decision(item, switches, "gate_unavailable")
            return
        left, fleet_left = dict(admission.by_environment), admission.fleet
        for item, environment in zip(items, environments, strict=True):
            if left[environment] <= 0:
                reason = "per_env_rate"
            elif fleet_left <= 0:
                reason = "global_rate"
            else:
                reason = "within_rate"
            item.decision = _decision(item, switches, reason)
            left[environment] -= 1
            fleet_left -= 1


def _decision(item: Item, switches: Switches, reason: str) -> Decision:
    assert item.request is not None
    return _decided(is_enrolled(item.request, switches), switches.shadow_mode, reason)


@cache
def _decided(enrolled: bool, shadow_mode: bool, reason: str) -> Decision:
    may_divert = enrolled and not shadow_mode
    if reason not in _OVER:
        return Decision(Outcome.PASS_THROUGH, reason, enrolled, may_divert)
    return Decision(Outcome.MOLLIFY if may_divert else Outcome.SHADOW, reason, enrolled)


def may_be_mollified(item: Item, switches: Switches) -> bool:
    """Whether the gate could ever mollify a request: only then does its key have to be claimed."""
    assert item.request is not None
    return (
        switches.enabled
        and not switches.shadow_mode
        and bypass_reason(item.request) is None
        and is_enrolled(item.request, switches)
    )


def claimed_key(item: Item, switches: Switches) -> Key | None:
    """The idempotency key that an item claims; None if it claims nothing."""
    key = item.key
    return key if key is not None and may_be_mollified(item, switches) else None


def is_enrolled(request: TriggerRequest, switches: Switches) -> bool:
    """Whether a request's organization takes part: see `Switches.is_enrolled`."""
    environment = request.environment
    return switches.is_enrolled(environment.organization_id, environment.feature_flags.mollifier_enabled)


def bypass_reason(request: TriggerRequest) -> str | None:
    """Why a request never reaches the gate (G6), or None if it may."""
    options = request.options
    if options.debounce is not None:
        return "bypass_debounce"
    if options.one_time_use_token is not None:
        return "bypass_one_time_use_token"
    if options.parent_run_id is not None and options.resume_parent_on_completion:
        return "bypass_resume_parent"
    return None


def _tenant(item: Item) -> tuple[str, str]:
    """The ids of an item's environment and organization."""
    assert item.request is not None
    return item.request.environment.id, item.request.environment.organization_id

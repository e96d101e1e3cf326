"""Step 6: the gate's policy, from a batch to one decision per request. DESIGN section 6.

What the counters say is the rate gate's business (`gate.py`); who is asked at all, and what an
answer means, is decided here, in memory.
"""

from collections import Counter
from collections.abc import Sequence

from app.batch import Batch, Decision, Item, Outcome
from app.errors import GateUnavailable
from app.ports import RateGate
from app.settings import Settings
from app.store_health import StoreHealth
from app.telemetry import Telemetry
from schemas.requests import TriggerRequest


class Decide:
    """Gives every open item its decision. Never fails: a gate that cannot be asked lets pass."""

    def __init__(self, gate: RateGate, health: StoreHealth, settings: Settings, telemetry: Telemetry) -> None:
        self._gate = gate
        self._health = health
        self._settings = settings
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        asked = []
        for item in batch.open():
            assert item.request is not None
            item.decision = self._without_asking(item.request)
            if item.decision is None:
                asked.append(item)
        if asked:
            await self._ask(asked)

    def _without_asking(self, request: TriggerRequest) -> Decision | None:
        settings = self._settings
        if not settings.enabled:
            return Decision(Outcome.PASS_THROUGH, "disabled")
        enrolled = is_enrolled(request, settings)
        bypass = bypass_reason(request)
        if bypass is not None:
            return Decision(Outcome.PASS_THROUGH, bypass, enrolled)
        if not enrolled and not settings.shadow_mode:
            return Decision(Outcome.PASS_THROUGH, "not_enrolled")
        if enrolled and not settings.shadow_mode and settings.divert_on_store_failure:
            trouble = self._health.trouble()
            if trouble is not None:
                return Decision(Outcome.MOLLIFY, trouble, enrolled)
        return None

    async def _ask(self, items: Sequence[Item]) -> None:
        environments = [_environment_id(item) for item in items]
        try:
            admission = await self._gate.admit(Counter(environments))
        except GateUnavailable as error:
            self._telemetry.gate_failed(error)
            for item in items:
                item.decision = self._decision(item, "gate_unavailable", is_over=False)
            return
        left, fleet_left = dict(admission.by_environment), admission.fleet
        for item, environment in zip(items, environments, strict=True):
            if left[environment] <= 0:
                item.decision = self._decision(item, "per_env_rate", is_over=True)
            elif fleet_left <= 0:
                item.decision = self._decision(item, "global_rate", is_over=True)
            else:
                item.decision = self._decision(item, "within_rate", is_over=False)
            left[environment] -= 1
            fleet_left -= 1

    def _decision(self, item: Item, reason: str, *, is_over: bool) -> Decision:
        assert item.request is not None
        enrolled = is_enrolled(item.request, self._settings)
        may_divert = enrolled and not self._settings.shadow_mode
        if not is_over:
            return Decision(Outcome.PASS_THROUGH, reason, enrolled, may_divert)
        return Decision(Outcome.MOLLIFY if may_divert else Outcome.SHADOW, reason, enrolled)


def may_be_mollified(item: Item, settings: Settings) -> bool:
    """Whether the gate could ever mollify a request: only then does its key have to be claimed."""
    assert item.request is not None
    return (
        settings.enabled
        and not settings.shadow_mode
        and bypass_reason(item.request) is None
        and is_enrolled(item.request, settings)
    )


def is_enrolled(request: TriggerRequest, settings: Settings) -> bool:
    """Whether a request's organization takes part: its own flag, else the default."""
    flag = request.environment.feature_flags.mollifier_enabled
    return settings.default_enrolled if flag is None else flag


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


def _environment_id(item: Item) -> str:
    assert item.request is not None
    return item.request.environment.id

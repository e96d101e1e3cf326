"""Step 8: claims end with what became of their requests, published or released; followers are answered."""

from collections.abc import Callable, Sequence

from app.batch import Answer, Batch, Item
from app.errors import RequestError, Unreachable
from app.ports import Claims, Settlement
from app.telemetry import Telemetry


class Settle:
    """Ends the claims that a batch holds, in one round trip."""

    def __init__(self, claims: Claims, wait: Callable[[Sequence[Item]], None], telemetry: Telemetry) -> None:
        self._claims = claims
        self._wait = wait
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        settlements = [settlement for item in batch.items if (settlement := _settlement(item)) is not None]
        if settlements:
            try:
                lost = await self._claims.settle(settlements, batch.now)
                self._telemetry.claims_lost(lost)
            except Unreachable as error:
                self._telemetry.unreachable("claims", error)
        for item in batch.items:
            if item.followers:
                self._answer_followers(item)

    def _answer_followers(self, leader: Item) -> None:
        """Followers share their leader's fate; if it failed for a reason of its own, one of them leads."""
        outcome = leader.outcome
        if isinstance(outcome, Answer):
            for follower in leader.followers:
                follower.outcome = outcome._replace(is_cached=True)
        elif isinstance(outcome, RequestError) and outcome.retryable:
            for follower in leader.followers:
                follower.outcome = outcome
        else:
            self._wait(leader.followers)


def _settlement(item: Item) -> Settlement | None:
    """How the claim of an item ends; None when it has none, acceptance published it, or nobody knows."""
    claim, outcome, run = item.claim, item.outcome, item.run
    if claim is None or claim.state != "claimed" or claim.expected is None or run is None or outcome is None:
        return None
    if isinstance(outcome, RequestError):
        return Settlement(run, claim.expected, "")
    if outcome.is_mollified:
        return None
    return Settlement(run, claim.expected, outcome.run_id)

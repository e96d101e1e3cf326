"""Step 8: claims end with what became of their requests, published or released; followers are answered."""

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from app.batch import Answer, Batch, Item
from app.decide import may_be_mollified
from app.errors import ClaimLost, RequestError, StoreUnavailable, Unreachable
from app.ports import Claims, Settlement
from app.switches import Switches
from app.telemetry import Telemetry


class Settle:
    """Ends the claims that a batch holds, in one round trip."""

    def __init__(
        self,
        claims: Claims,
        wait: Callable[[Sequence[Item]], None],
        telemetry: Telemetry,
    ) -> None:
        self._claims = claims
        self._wait = wait
        self._telemetry = telemetry

    async def __call__(self, batch: Batch) -> None:
        for item in batch.items:
            if isinstance(item.outcome, ClaimLost):
                self._claim_again(item)
            elif isinstance(item.outcome, RequestError):
                item.outcome = _as_far_as_known(item, item.outcome)
        held = [settlement for item in batch.items if (settlement := _settlement(item)) is not None]
        left = [
            settlement
            for item in batch.items
            if item.is_redelivered and (settlement := _left_behind(item, batch.switches)) is not None
        ]
        if held or left:
            try:
                ended = await self._claims.settle([*held, *left], batch.now)
                self._telemetry.claims_lost(len(held) - sum(ended[: len(held)]))
            except Unreachable as error:
                self._telemetry.unreachable("claims", error)
        for item in batch.items:
            if item.followers:
                self._answer_followers(item)

    def _claim_again(self, item: Item) -> None:
        """Somebody else may have the key by now: the request finds out as one that waits."""
        followers, item.followers = item.followers, []
        item.outcome = None
        self._wait([item, *followers])

    def _answer_followers(self, leader: Item) -> None:
        """Followers share their leader's fate; if it failed for a reason of its own, one of them leads."""
        outcome = leader.outcome
        if isinstance(outcome, Answer):
            cached = replace(outcome, is_cached=True)
            for follower in leader.followers:
                follower.outcome = cached
        elif isinstance(outcome, RequestError) and outcome.retryable:
            for follower in leader.followers:
                follower.outcome = _as_far_as_known(follower, outcome)
        else:
            self._wait(leader.followers)


def _as_far_as_known(item: Item, error: RequestError) -> RequestError:
    """That nothing was done is more than anybody knows of a request that may have a run."""
    return StoreUnavailable() if item.unsure and error.retryable else error


def _left_behind(item: Item, switches: Switches) -> Settlement | None:
    """How the claim ends that an earlier attempt may have left, where this one had no need of its own."""
    run, outcome = item.run, item.outcome
    if item.claim is not None or run is None or run.idempotency_key is None or outcome is None:
        return None
    if not may_be_mollified(item, switches):
        return None
    winner_id = "" if isinstance(outcome, RequestError) else outcome.run_id
    return Settlement(run, f"pending:{run.id}:", winner_id)


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

"""Claims on a real server: every transition of DESIGN section 7. G4."""

import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest
from redis.asyncio import Redis

from app.batch import Answer, Claim
from app.buffer import RedisBuffer
from app.claims import RedisClaims
from app.errors import ClaimLost
from app.keys import Keys
from app.ports import Settlement
from app.redis_client import Scripts
from app.settings import Settings
from app.turns import RedisTurns
from schemas.snapshot import Snapshot
from tests.builders import NOW, run

KEYS = Keys("mollifier", 16)
DAY = timedelta(days=1)


def keyed(key: str = "order-42", environment: str = "env_1", **changes: object) -> Snapshot:
    values: dict[str, object] = {"idempotency_key_expires_at": NOW + DAY, "buffered_at": NOW, **changes}
    return run(environment, idempotency_key=key, **values)


@pytest.fixture
def claims(client: Redis) -> RedisClaims:
    return RedisClaims(Scripts(client), KEYS, Settings.model_validate({}))


async def claim(claims: RedisClaims, *runs: Snapshot) -> list[Claim]:
    return list(await claims.claim(runs, NOW))


def token(claim: Claim) -> str:
    assert claim.state == "claimed"
    assert claim.expected is not None
    return claim.expected


async def test_the_first_claims_and_the_others_wait(claims: RedisClaims) -> None:
    first, second = keyed(), keyed()
    results = await claim(
        claims, first, second, keyed("other"), keyed(environment="env_2"), keyed(task="other")
    )
    assert [result.state for result in results] == ["claimed", "pending", "claimed", "claimed", "claimed"]
    assert results[1].expected is None, "a token is never shown to others"


async def test_g4_a_winner_that_is_a_row_is_for_postgres_to_tell(
    claims: RedisClaims, make_buffer: Callable[..., RedisBuffer], make_turns: Callable[..., RedisTurns]
) -> None:
    winner, second, third = keyed(), keyed(), keyed()
    await make_buffer().accept([winner], await claim(claims, winner))
    turns = make_turns()
    await turns.settle(await turns.take(1), [winner])
    (held,) = await claim(claims, second)
    await claims.settle([Settlement(second, token(held), winner.id)], NOW)
    assert await claim(claims, third) == [Claim("taken", expected=winner.id)], "it may have failed by now"
    assert await claims.find_winners([third]) == [None]


async def test_a_buffered_winner_is_found_without_claiming(
    claims: RedisClaims, make_buffer: Callable[..., RedisBuffer], client: Redis
) -> None:
    winner, pending, passed_through, free = keyed(), keyed("pending"), keyed("passed"), keyed("free")
    await make_buffer().accept([winner], await claim(claims, winner))
    await claim(claims, pending)
    (claimed,) = await claim(claims, passed_through)
    await claims.settle([Settlement(passed_through, token(claimed), passed_through.id)], NOW)
    before = sorted(await client.keys())
    asked = [keyed(), keyed("pending"), keyed("passed"), free, keyed(environment="env_2")]
    assert await claims.find_winners(asked) == [winner, None, None, None, None]
    assert sorted(await client.keys()) == before


async def test_racing_claims_have_one_winner(claims: RedisClaims) -> None:
    results = await asyncio.gather(*(claim(claims, keyed()) for _ in range(50)))
    assert sorted(one.state for (one,) in results) == ["claimed"] + ["pending"] * 49


async def test_a_redelivered_request_takes_over_its_own_claim(claims: RedisClaims) -> None:
    mine = keyed()
    (first,) = await claim(claims, mine)
    (second,) = await claim(claims, mine)
    assert second.state == "claimed"
    assert first.expected != second.expected
    assert await claims.settle([Settlement(mine, token(first), "")], NOW) == [False], (
        "the earlier attempt frees nothing"
    )
    (other,) = await claim(claims, keyed())
    assert other.state == "pending"


async def test_a_run_id_that_is_a_prefix_of_another_takes_over_nothing(claims: RedisClaims) -> None:
    await claim(claims, keyed(id="abcdef"))
    (result,) = await claim(claims, keyed(id="abc"))
    assert result.state == "pending"


async def test_a_released_key_is_free_and_a_published_one_is_taken(claims: RedisClaims) -> None:
    first, second, third = keyed(), keyed(), keyed()
    (mine,) = await claim(claims, first)
    assert await claims.settle([Settlement(first, token(mine), "")], NOW) == [True]
    (mine,) = await claim(claims, second)
    assert await claims.settle([Settlement(second, token(mine), second.id)], NOW) == [True]
    assert await claim(claims, third) == [Claim("taken", expected=second.id, winner=None)]


async def test_an_expired_predecessor_can_neither_publish_nor_release(
    client: Redis, claims: RedisClaims
) -> None:
    old, new = keyed(), keyed()
    (expired,) = await claim(claims, old)
    await client.delete(KEYS.claim(old))
    (current,) = await claim(claims, new)
    assert await claims.settle([Settlement(old, token(expired), old.id)], NOW) == [False]
    assert await claims.settle([Settlement(old, token(expired), "")], NOW) == [False]
    assert await client.get(KEYS.claim(new)) == token(current).encode()


@pytest.mark.parametrize(("left_s", "life_s"), [(1, 5), (12, 12), (86_400, 30)])
async def test_a_claim_lives_as_long_as_its_key_within_bounds(
    client: Redis, claims: RedisClaims, left_s: int, life_s: int
) -> None:
    one = keyed(idempotency_key_expires_at=NOW + timedelta(seconds=left_s))
    await claim(claims, one)
    assert (life_s - 1) * 1000 < await client.pttl(KEYS.claim(one)) <= life_s * 1000


async def test_acceptance_publishes_the_claim_until_the_key_expires(
    client: Redis, claims: RedisClaims, make_buffer: Callable[..., RedisBuffer]
) -> None:
    winner, loser = keyed(), keyed()
    buffer = make_buffer()
    (answer,) = await buffer.accept([winner], await claim(claims, winner))
    assert answer == Answer(winner.id, winner.span_id, None, is_mollified=True)
    assert await claim(claims, loser) == [Claim("taken", expected=winner.id, winner=winner)]
    assert await client.pttl(KEYS.claim(winner)) > 86_000_000
    (late,) = await buffer.accept([loser], [None])
    assert late == Answer(winner.id, winner.span_id, None, is_mollified=True, is_cached=True)
    assert await buffer.recall([loser], []) == [None], "the loser was not buffered"


async def test_a_claim_that_was_lost_accepts_nothing(
    client: Redis, claims: RedisClaims, make_buffer: Callable[..., RedisBuffer]
) -> None:
    old, new = keyed(), keyed()
    expired = await claim(claims, old)
    await client.delete(KEYS.claim(old))
    await claim(claims, new)
    (outcome,) = await make_buffer().accept([old], expired)
    assert isinstance(outcome, ClaimLost)
    assert await make_buffer().recall([old], []) == [None]


async def test_a_run_whose_claim_ran_out_unnoticed_is_not_accepted(
    client: Redis, claims: RedisClaims, make_buffer: Callable[..., RedisBuffer]
) -> None:
    mine = keyed()
    held = await claim(claims, mine)
    await client.delete(KEYS.claim(mine))
    assert [type(outcome) for outcome in await make_buffer().accept([mine], held)] == [ClaimLost]
    assert token((await claim(claims, mine))[0])


async def test_every_attempt_of_a_run_can_be_ended_by_its_id(claims: RedisClaims, client: Redis) -> None:
    mine, other = keyed(), keyed("other")
    await claim(claims, mine, other)
    own = [Settlement(one, f"pending:{mine.id}:", mine.id) for one in (mine, other)]
    assert await claims.settle(own, NOW) == [True, False]
    assert await client.get(KEYS.claim(mine)) == mine.id.encode()


async def test_a_materialised_run_gives_its_claim_to_postgres(
    client: Redis,
    claims: RedisClaims,
    make_buffer: Callable[..., RedisBuffer],
    make_turns: Callable[..., RedisTurns],
) -> None:
    mine = keyed()
    buffer, turns = make_buffer(), make_turns(ack_grace_ttl_s=0)
    await buffer.accept([mine], await claim(claims, mine))
    await turns.settle(await turns.take(9), [mine])
    await turns.schedule.flush()
    while await turns.forget():
        pass
    assert await client.keys("*") == []


@pytest.mark.parametrize("text", ["a:b", "a b", "é\U0001f40d", "k" * 2048, "*", "{1}", "\x01"])
async def test_keys_of_any_characters_never_collide(claims: RedisClaims, text: str) -> None:
    runs = [keyed(text), keyed("k", environment=text), keyed("k", task=text), keyed("k")]
    assert [one.state for one in await claim(claims, *runs)] == ["claimed"] * 4
    assert [one.state for one in await claim(claims, keyed(text))] == ["pending"]

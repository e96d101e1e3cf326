"""The rate gate on a real server. DESIGN section 6. Against a plain model of it: `test_model_gate.py`."""

import pytest
from redis.asyncio import Redis

from app.errors import GateUnavailable
from app.gate import RedisGate
from app.keys import Keys
from app.redis_client import Scripts
from app.redis_connection import connect
from app.settings import Settings
from app.switches import Rate

WINDOW, THRESHOLD, HOLD = 100, 5, 250
START = 1_800_000_000_000


def gate_settings(**changes: object) -> Settings:
    values: dict[str, object] = {
        "trip_window_ms": WINDOW,
        "trip_threshold": THRESHOLD,
        "hold_ms": HOLD,
        "partitions": 3,
        **changes,
    }
    return Settings.model_validate(values)


def make_gate(redis: Redis, config: Settings) -> RedisGate:
    return RedisGate(Scripts(redis), Keys(config.namespace, config.partitions), config)


async def test_the_threshold_passes_and_the_next_request_trips(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings())
    assert (await gate.admit({"env": THRESHOLD}, START)).by_environment == {"env": THRESHOLD}
    assert (await gate.admit({"env": 1}, START)).by_environment == {"env": 0}


async def test_the_hold_ends_after_the_last_overage(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings())
    await gate.admit({"env": THRESHOLD + 1}, START)
    assert (await gate.admit({"env": 1}, START + HOLD - 1)).by_environment == {"env": 0}
    assert (await gate.admit({"env": 1}, START + HOLD)).by_environment == {"env": 1}


async def test_overage_during_the_hold_renews_it(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings())
    await gate.admit({"env": THRESHOLD + 1}, START)
    later = START + HOLD - 10
    await gate.admit({"env": THRESHOLD + 1}, later)
    assert (await gate.admit({"env": 1}, later + HOLD - 1)).by_environment == {"env": 0}
    assert (await gate.admit({"env": 1}, later + HOLD)).by_environment == {"env": 1}


async def test_a_sliding_window_lets_no_double_burst_through_a_boundary(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings())
    boundary = (START // WINDOW + 1) * WINDOW
    before = await gate.admit({"env": THRESHOLD}, boundary - 1)
    after = await gate.admit({"env": THRESHOLD}, boundary)
    assert before.by_environment["env"] + after.by_environment["env"] == THRESHOLD


async def test_fixed_windows_let_a_double_burst_through_a_boundary(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings(gate_window="fixed"))
    boundary = (START // WINDOW + 1) * WINDOW
    before = await gate.admit({"env": THRESHOLD}, boundary - 1)
    after = await gate.admit({"env": THRESHOLD}, boundary)
    assert before.by_environment["env"] + after.by_environment["env"] == 2 * THRESHOLD


async def test_holding_until_drained_looks_at_queued_entries(redis: Redis) -> None:
    config = gate_settings(hold_until_drained=True)
    gate = make_gate(redis, config)
    drain = Keys(config.namespace, config.partitions).environment("env").drain
    await redis.hset(drain, "queued", "1")
    assert (await gate.admit({"env": 1, "other": 1}, START)).by_environment == {"env": 0, "other": 1}
    await redis.hset(drain, "queued", "0")
    assert (await gate.admit({"env": 1}, START)).by_environment == {"env": 1}


async def test_rates_that_operators_set_are_those_of_their_environments(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings())
    rates = {"env": Rate(WINDOW, 2, HOLD)}
    admission = await gate.admit({"env": THRESHOLD, "other": THRESHOLD}, START, rates=rates)
    assert admission.by_environment == {"env": 2, "other": THRESHOLD}
    assert (await gate.admit({"env": 1}, START + 1, rates=rates)).by_environment == {"env": 0}


async def admitted(redis: Redis, windows: tuple[int, int], threshold: int) -> list[int]:
    """Of 3 requests every 10 ms, how many pass: by the first window, by both in turn, and by the second."""
    gate, passed = make_gate(redis, gate_settings()), []
    for number in range(90):
        window = windows[number % 2 if 30 <= number < 60 else number // 45]
        rates = {"env": Rate(window, threshold, 1)}
        admission = await gate.admit({"env": 3}, START + 8 + 10 * number, rates=rates)
        passed.append(admission.by_environment["env"])
    return passed


@pytest.mark.parametrize("windows", [(WINDOW, 600_000), (600_000, WINDOW), (WINDOW, 7), (7, WINDOW)])
async def test_what_is_within_the_rate_passes_however_long_the_window_was(
    redis: Redis, windows: tuple[int, int]
) -> None:
    """Also while two workers go by different ones."""
    assert set(await admitted(redis, windows, threshold=1_000)) == {3}


async def test_the_length_of_the_window_can_be_changed_under_load(redis: Redis) -> None:
    grown = await admitted(redis, (WINDOW, 600_000), threshold=60)
    assert (set(grown[:30]), set(grown[-10:])) == ({3}, {0})
    await redis.flushall()
    shrunk = await admitted(redis, (600_000, WINDOW), threshold=60)
    assert (set(shrunk[21:30]), set(shrunk[-10:])) == ({0}, {3})


async def test_a_hold_lasts_no_longer_than_the_one_that_is_set_now(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings())
    long, short = {"env": Rate(WINDOW, THRESHOLD, 600_000)}, {"env": Rate(WINDOW, THRESHOLD, HOLD)}
    await gate.admit({"env": THRESHOLD + 1}, START, rates=long)
    later = START + 100_000
    assert (await gate.admit({"env": 1}, later, rates=long)).by_environment == {"env": 0}
    assert (await gate.admit({"env": 1}, later, rates=short)).by_environment == {"env": 0}
    assert (await gate.admit({"env": 1}, later + HOLD, rates=short)).by_environment == {"env": 1}


async def test_state_is_forgotten_by_itself(redis: Redis) -> None:
    config = gate_settings()
    await make_gate(redis, config).admit({"env": 1})
    key = Keys(config.namespace, config.partitions).environment("env").gate
    assert 0 < await redis.pttl(key) <= 2 * WINDOW + HOLD


async def test_the_server_clock_is_used_when_none_is_given(redis: Redis) -> None:
    gate = make_gate(redis, gate_settings(trip_window_ms=60_000, hold_ms=60_000))
    assert (await gate.admit({"env": THRESHOLD})).by_environment == {"env": THRESHOLD}
    assert (await gate.admit({"env": 1})).by_environment == {"env": 0}


async def test_a_gate_that_cannot_be_asked_says_so(redis: Redis) -> None:
    config = gate_settings()
    key = Keys(config.namespace, config.partitions).environment("env").gate
    await redis.hset(key, "wrong", "type")
    with pytest.raises(GateUnavailable):
        await make_gate(redis, config).admit({"env": 1})
    nowhere = connect("redis://127.0.0.1:1/0")
    with pytest.raises(GateUnavailable):
        await make_gate(nowhere, config).admit({"env": 1})
    await nowhere.aclose()

"""How many rows are committed at once: within bounds, fewer while Postgres is slow, more when it is quick."""

from hypothesis import given
from hypothesis import strategies as st

from app.batch_size import BatchSize

TARGET_S = 0.25

latencies = st.floats(min_value=0, max_value=1e6, allow_nan=False)


@given(st.integers(1, 3000), st.lists(latencies, max_size=100))
def test_it_is_always_between_one_and_most(most: int, observed: list[float]) -> None:
    size = BatchSize(most, TARGET_S)
    assert size.current == most
    for latency in observed:
        size.observe(latency)
        assert 1 <= size.current <= most


@given(st.integers(1, 3000), st.lists(latencies, max_size=50), latencies)
def test_a_slow_commit_shrinks_it_and_a_quick_one_grows_it(
    most: int, before: list[float], latency: float
) -> None:
    size = BatchSize(most, TARGET_S)
    for one in before:
        size.observe(one)
    was = size.current
    size.observe(latency)
    if latency > TARGET_S:
        assert size.current < was or was == 1
        assert size.current >= was // 2, "one slow commit costs no more than half"
    else:
        assert size.current > was or was == most
        assert size.current <= was * 1.1 + 1


@given(st.integers(1, 3000), st.lists(latencies, max_size=100))
def test_every_change_is_told_once(most: int, observed: list[float]) -> None:
    told: list[int] = []
    size = BatchSize(most, TARGET_S, told.append)
    seen = [most]
    for latency in observed:
        size.observe(latency)
        if size.current != seen[-1]:
            seen.append(size.current)
    assert told == seen[1:]


@given(st.integers(100, 3000), st.floats(min_value=0.0005, max_value=0.02))
def test_it_settles_where_a_commit_takes_the_target(most: int, row_s: float) -> None:
    """Commits whose time is in proportion to their rows: near the target, after a few dozen of them."""
    size = BatchSize(most, TARGET_S)
    for _ in range(40):
        size.observe(size.current * row_s)
    fits = min(most, TARGET_S / row_s)
    for _ in range(40):
        size.observe(size.current * row_s)
        assert 0.7 * fits - 1 <= size.current <= 1.1 * fits + 1


def test_it_recovers_from_the_smallest() -> None:
    size = BatchSize(3000, TARGET_S)
    for _ in range(20):
        size.observe(60)
    assert size.current == 1
    for _ in range(75):
        size.observe(0.001)
    assert size.current == 3000

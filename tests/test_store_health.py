"""When Postgres counts as failing or under pressure, and how it is found out that it is well again."""

from app.settings import Settings
from app.store_health import StoreHealth


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock) -> StoreHealth:
    return StoreHealth(Settings.model_validate({"store_pressure_latency_ms": 100}), clock)


def test_quick_writes_are_no_trouble() -> None:
    health = make(Clock())
    for _ in range(50):
        health.wrote(0.09)
        assert health.trouble() is None


def test_one_slow_write_among_quick_ones_is_no_trouble() -> None:
    health = make(Clock())
    health.wrote(0.4)
    assert health.trouble() is None


def test_slow_writes_are_pressure_until_probes_are_quick_again() -> None:
    clock = Clock()
    health = make(clock)
    for _ in range(10):
        health.wrote(0.5)
    probes = 0
    for _ in range(60):
        if health.trouble() is None:
            probes += 1
            health.wrote(0.01)
        else:
            assert health.trouble() == "store_pressure"
            clock.now += 0.25
    assert probes >= 2
    assert health.latency_s < 0.1


def test_a_failure_is_trouble_and_one_write_a_second_finds_out() -> None:
    clock = Clock()
    health = make(clock)
    health.failed()
    assert [health.trouble() for _ in range(3)] == ["store_unavailable"] * 3
    clock.now += 1.0
    assert [health.trouble() for _ in range(3)] == [None, "store_unavailable", "store_unavailable"]
    health.wrote(0.01)
    assert health.trouble() is None

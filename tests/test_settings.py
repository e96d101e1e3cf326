"""Settings are checked once; a mistake names its variable; passwords are not shown."""

import pytest

from app.errors import ConfigurationError
from app.settings import Settings


def test_defaults_need_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "DATABASE_URL", "PORT", "HOST"):
        monkeypatch.delenv(name, raising=False)
    settings = Settings.load()
    assert settings.trip_threshold == 100
    assert settings.enabled


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MOLLIFIER_TRIP_THRESHOLD", "0"),
        ("MOLLIFIER_TRIP_WINDOW_MS", "fast"),
        ("MOLLIFIER_GATE_WINDOW", "round"),
        ("MOLLIFIER_ENABLED", "perhaps"),
        ("MOLLIFIER_NAMESPACE", "a b"),
        ("MOLLIFIER_REPLY_CHANNELS", "("),
        ("MOLLIFIER_LOG_LEVEL", "loud"),
        ("PORT", "70000"),
        ("REDIS_URL", "nowhere"),
        ("REDIS_URL", "http://127.0.0.1:6379"),
        ("DATABASE_URL", "mysql://127.0.0.1/db"),
        ("OTEL_TRACES_EXPORTER", "jaeger"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
    ],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("MOLLIFIER_HOLD_MS", "-1")
    with pytest.raises(ConfigurationError) as caught:
        Settings.load()
    lines = str(caught.value).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == sorted([variable, "MOLLIFIER_HOLD_MS"])


def test_passwords_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "rediss://user:s3cret@redis.internal:6380/0")
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:s3cret@db.internal/app")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://user:s3cret@collector.internal")
    shown = Settings.load().masked()
    assert shown["REDIS_URL"] == "rediss://user:***@redis.internal:6380/0"
    assert "s3cret" not in str(shown)


@pytest.mark.parametrize(
    ("variables", "are_wanted"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_TRACES_EXPORTER": ""}, False),
    ],
)
def test_traces_are_wanted_once_an_exporter_is_configured(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], are_wanted: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Settings.load().are_traces_wanted == are_wanted


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        Settings.load().port = 1

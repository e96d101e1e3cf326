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


@pytest.mark.parametrize(
    ("variable", "url", "shown"),
    [
        (
            "REDIS_URL",
            "rediss://user:s3cret@redis.internal:6380/0",
            "rediss://user:***@redis.internal:6380/0",
        ),
        ("REDIS_URL", "redis://:s3cret@redis", "redis://:***@redis"),
        ("REDIS_URL", "redis://s3cret@redis", "redis://***@redis"),
        ("REDIS_URL", "redis://u:%733cret%40s3cret@redis/1", "redis://u:***@redis/1"),
        ("REDIS_URL", "redis://u:s3cret@s3cret:s3cret@redis/1", "redis://u:***@redis/1"),
        ("REDIS_URL", "redis://redis/1?password=s3cret&db=2", "redis://redis/1?password=***&db=2"),
        ("REDIS_URL", "rediss://redis?ssl_password=s3cret", "rediss://redis?ssl_password=***"),
        ("DATABASE_URL", "postgresql://app:s3cret@db.internal/app", "postgresql://app:***@db.internal/app"),
        ("DATABASE_URL", "postgresql://app@db/app", "postgresql://app@db/app"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://u:s3cret@collector", "https://u:***@collector"),
        (
            "DATABASE_URL",
            "postgresql://a:s3cret@h1:5432,[::1]:5433/app",
            "postgresql://a:***@h1:5432,[::1]:5433/app",
        ),
        (
            "DATABASE_URL",
            "postgres:///app?host=db&user=a&PASSWORD=s3cret&sslpassword=s3cret",
            "postgres:///app?host=db&user=a&PASSWORD=***&sslpassword=***",
        ),
    ],
)
def test_passwords_are_masked(monkeypatch: pytest.MonkeyPatch, variable: str, url: str, shown: str) -> None:
    monkeypatch.setenv(variable, url)
    settings = Settings.load()
    assert settings.masked()[variable] == shown
    assert "s3cret" not in repr(settings) + str(settings)


@pytest.mark.parametrize("variable", ["REDIS_URL", "DATABASE_URL"])
@pytest.mark.parametrize(
    "credentials",
    [
        "u:s3cret/s3cret@h",
        "u:s3cret#x@h",
        "u:s3cret?x@h",
        "u:1234?s3cret@h",
        "u:1234#s3cret@h",
        "u:1234/s3cret@h",
        "u:[s3cret@h",
        "u:s3cret℀@h",
        ":s3cret",
        "u:p@h:s3cret",
    ],
)
def test_a_password_that_makes_its_url_unreadable_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, variable: str, credentials: str
) -> None:
    scheme = "redis" if variable == "REDIS_URL" else "postgresql"
    monkeypatch.setenv(variable, f"{scheme}://{credentials}/0")
    with pytest.raises(ConfigurationError, match=rf"^{variable}: ") as caught:
        Settings.load()
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


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

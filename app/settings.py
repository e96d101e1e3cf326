"""All settings: read once from the environment, checked, frozen, passed down. DESIGN section 10.

A bad value raises `ConfigurationError` with one line per variable, each by its full name.
"""

import re
from functools import cached_property
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import ConfigurationError
from app.masking import without_secrets

PREFIX = "MOLLIFIER_"

_HOST = re.compile(r"(?:\[[^\[\]]+\]|[^:\[\]]*)(?::\d{1,5})?")
_SCHEMES = {
    "redis_url": ("redis", "rediss"),
    "database_url": ("postgresql", "postgres"),
    "otel_exporter_otlp_endpoint": ("http", "https"),
    "otel_exporter_otlp_traces_endpoint": ("http", "https"),
}

_HAVE_PASSWORDS = ("_URL", "_ENDPOINT")

Positive = Annotated[int, Field(ge=1, le=2_147_483_647)]
Natural = Annotated[int, Field(ge=0, le=2_147_483_647)]


class Settings(BaseSettings):
    """One value for the life of the process. Times are in the unit that the name ends with."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", case_sensitive=False)

    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        validation_alias="REDIS_URL",
        description="Redis or Valkey.",
        repr=False,
    )
    database_url: str = Field(
        default="postgresql://postgres@127.0.0.1:5432/postgres",
        validation_alias="DATABASE_URL",
        description="Postgres.",
        repr=False,
    )
    host: str = Field(
        default="127.0.0.1",
        validation_alias="HOST",
        description="Address of the HTTP side (health, metrics).",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=0, validation_alias="PORT", description="Its port; 0: any free one, which is logged."
    )

    enabled: bool = Field(default=True, description="The master switch; off: everything passes through.")
    shadow_mode: bool = Field(default=False, description="Decide and record, but pass through.")
    default_enrolled: bool = Field(
        default=True, description="Whether an organization that nobody has decided on is enrolled."
    )
    trip_window_ms: Positive = Field(default=200, description="Length of the gate's rate window.")
    trip_threshold: Positive = Field(
        default=100,
        description="Triggers of one environment per window that pass; the next one trips the gate.",
    )
    hold_ms: Positive = Field(
        default=500, description="How long the gate stays tripped after the last overage."
    )
    hold_until_drained: bool = Field(
        default=False, description="Stay tripped while the environment has queued entries."
    )
    gate_window: Literal["sliding", "fixed"] = Field(
        default="sliding", description="`sliding` (two weighted buckets) or `fixed`."
    )
    global_trip_threshold: Natural = Field(
        default=0, description="The same over all environments together; 0: off."
    )
    divert_on_store_failure: bool = Field(
        default=True, description="Buffer what may be buffered while Postgres fails or is slow."
    )
    store_pressure_latency_ms: Positive = Field(
        default=500, description="Average time of a write over which Postgres counts as under pressure."
    )
    store_timeout_ms: Positive = Field(
        default=5000, description="Longest wait for a connection or a statement of Postgres."
    )
    claim_ttl_s: Positive = Field(default=30, description="Longest life of a pending claim.")
    claim_min_ttl_s: Positive = Field(default=5, description="Shortest life of a pending claim.")
    claim_wait_ms: Natural = Field(default=5000, description="How long a request waits for another's claim.")
    claim_poll_ms: Positive = Field(default=25, description="Time between two looks at awaited claims.")
    mutate_wait_ms: Natural = Field(
        default=2000, description="How long a change waits for a run that is being materialised."
    )
    trigger_batch_size: Annotated[int, Field(ge=1, le=3000)] = Field(
        default=500, description="Most requests read at once by a trigger worker."
    )
    trigger_inflight_batches: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Batches that a trigger worker handles at the same time."
    )
    heartbeat_ttl_ms: Annotated[int, Field(ge=300, le=3_600_000)] = Field(
        default=5000, description="Silence after which a process counts as dead."
    )
    reclaim_idle_ms: Positive = Field(
        default=60000, description="Idle time after which an entry is taken over in any case."
    )
    max_deliveries: Positive = Field(
        default=5, description="Deliveries of one request after which it becomes a dead letter."
    )
    drain_batch_size: Annotated[int, Field(ge=1, le=3000)] = Field(
        default=500, description="Most rows in one write of a drainer."
    )
    drain_max_attempts: Positive = Field(
        default=3, description="Tries for a row that Postgres refuses before it becomes SYSTEM_FAILURE."
    )
    drain_max_rate: Natural = Field(
        default=0, description="Rows a second of all drainers together; 0: no limit."
    )
    drain_target_latency_ms: Positive = Field(
        default=250, description="Commit time around which a drainer sizes its batches."
    )
    ack_grace_ttl_s: Natural = Field(
        default=30, description="How long an entry stays readable after it was materialised."
    )
    stale_threshold_ms: Positive = Field(
        default=300000, description="Dwell over which an entry is reported as stale."
    )
    stale_sweep_interval_s: Positive = Field(
        default=30, description="Time between two passes of the sweeper."
    )
    shutdown_timeout_s: Positive = Field(
        default=30, description="Time a process has after SIGTERM to finish what it holds."
    )
    max_payload_bytes: Positive = Field(default=524288, description="Longest payload, in bytes as received.")
    max_metadata_bytes: Positive = Field(
        default=262144, description="Longest metadata, in bytes as received."
    )
    max_tags: Natural = Field(default=10, description="Most tags of one run.")
    max_buffered_per_env: Natural = Field(
        default=0, description="Most entries one environment may have queued; 0: no limit."
    )
    partitions: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=16, description="Hash slots the buffer is spread over; the same in every process, for ever."
    )
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = Field(
        default="mollifier", description="First part of every key, stream and channel."
    )
    reply_channels: str = Field(
        default="",
        description="Regular expression that a whole `reply_to` must match; empty: see docs/wire.md.",
    )
    buffer_wait_replicas: Natural = Field(
        default=0, description="Replicas that must have a snapshot before its reply is sent (WAIT)."
    )
    buffer_wait_aof: Annotated[int, Field(ge=0, le=1)] = Field(
        default=0, description="1: the local append-only file must have it on disk too (WAITAOF)."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe event that is logged."
    )
    log_format: Literal["json", "console"] = Field(default="json", description="`json` or `console`.")
    otel_traces_exporter: Literal["", "otlp", "none"] = Field(
        default="",
        validation_alias="OTEL_TRACES_EXPORTER",
        description="`otlp` has spans exported, `none` has not; empty: if there is an endpoint for them.",
    )
    otel_exporter_otlp_endpoint: str = Field(
        repr=False,
        default="",
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="Where an OpenTelemetry collector takes OTLP over HTTP.",
    )
    otel_exporter_otlp_traces_endpoint: str = Field(
        repr=False,
        default="",
        validation_alias="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        description="The same for spans alone, with the path.",
    )

    @field_validator("reply_channels")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value

    @field_validator(*_SCHEMES)
    @classmethod
    def _is_url(cls, value: str, info: ValidationInfo) -> str:
        schemes = _SCHEMES[str(info.field_name)]
        if value and not value.lower().startswith(tuple(f"{one}://" for one in schemes)):
            raise ValueError(f"is not a URL that begins with {' or '.join(f'{one}://' for one in schemes)}")
        if not _is_readable(value):
            raise ValueError("cannot be read; write / ? # @ % in a password as %2F %3F %23 %40 %25")
        return value

    @field_validator("log_level", "log_format", "gate_window", "otel_traces_exporter", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @cached_property
    def reply_channel_pattern(self) -> re.Pattern[str]:
        """What a whole `reply_to` must match: wire.md, "Reply"."""
        default = rf"{re.escape(self.namespace)}:reply:.{{1,200}}|[A-Za-z0-9]{{22}}"
        return re.compile(self.reply_channels or default, re.DOTALL)

    @property
    def are_traces_wanted(self) -> bool:
        """Whether an exporter of spans is configured."""
        endpoint = self.otel_exporter_otlp_endpoint or self.otel_exporter_otlp_traces_endpoint
        return self.otel_traces_exporter == "otlp" or (self.otel_traces_exporter == "" and bool(endpoint))

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable of a field, e.g. `trip_window_ms` -> `MOLLIFIER_TRIP_WINDOW_MS`."""
        alias = cls.model_fields[field].validation_alias
        return alias if isinstance(alias, str) else PREFIX + field.upper()

    @classmethod
    def load(cls) -> "Settings":
        """Read the environment.

        Raises:
            ConfigurationError: a value is wrong; one line for each, naming the variable.
        """
        try:
            return cls()
        except ValidationError as error:
            raise ConfigurationError("\n".join(_complaint(cls, one) for one in error.errors())) from None

    def masked(self) -> dict[str, str]:
        """Every variable with its effective value, for people to read; passwords are left out."""
        shown = {self.variable(name): str(getattr(self, name)) for name in type(self).model_fields}
        return {
            name: without_secrets(value) if name.endswith(_HAVE_PASSWORDS) else value
            for name, value in shown.items()
        }


def _complaint(settings: type[Settings], error: Any) -> str:
    field = str(error["loc"][0])
    name = settings.variable(field) if field in settings.model_fields else field
    message = error["msg"].removeprefix("Value error, ")
    value = "" if name.endswith(_HAVE_PASSWORDS) else f" (it is {error['input']!r})"
    return f"{name}: {message}{value}"


def _is_readable(url: str) -> bool:
    """Whether drivers find the host where it is; else they repeat in their errors what they take for it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    hosts = parts.netloc.rpartition("@")[2].split(",")
    beyond = parts.path + parts.query.partition("=")[0] + parts.fragment
    return "@" not in beyond and all(map(_HOST.fullmatch, hosts))

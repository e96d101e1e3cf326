"""What must hold between settings that are each right alone. Nothing is asked: no server is needed."""

from collections.abc import Callable
from typing import NamedTuple

from app.doctor.examination import Check, Patient, Verdict
from app.settings import Settings
from schemas.diagnosis import Level

_READ_MS = 2000
"""How long a worker that stops waits for its last read."""

_ALONE = 3
"""From this delivery on a request is handled alone (`app/streams.py`)."""


class Rule(NamedTuple):
    """What is to hold, and what follows when it does not; `values` are the settings that are shown."""

    name: str
    asks: str
    remedy: str
    values: tuple[str, ...]
    level: Level
    holds: Callable[[Settings], bool]


def batch_ms(settings: Settings) -> int:
    """The longest that a batch may take: a connection and a statement, and the wait for a key or a run."""
    return 2 * settings.store_timeout_ms + max(settings.claim_wait_ms, settings.mutate_wait_ms)


RULES = (
    Rule(
        "settings.shutdown",
        "`MOLLIFIER_SHUTDOWN_TIMEOUT_S` is enough for a last read (2 s) and the longest batch: twice"
        " `MOLLIFIER_STORE_TIMEOUT_MS`, and the longer of `MOLLIFIER_CLAIM_WAIT_MS` and"
        " `MOLLIFIER_MUTATE_WAIT_MS`",
        "Raise MOLLIFIER_SHUTDOWN_TIMEOUT_S, and the time that what stops the processes gives them.",
        ("shutdown_timeout_s", "store_timeout_ms", "claim_wait_ms", "mutate_wait_ms"),
        "warning",
        lambda settings: settings.shutdown_timeout_s * 1000 >= _READ_MS + batch_ms(settings),
    ),
    Rule(
        "settings.heartbeat",
        "`MOLLIFIER_HEARTBEAT_TTL_MS` is shorter than `MOLLIFIER_RECLAIM_IDLE_MS`",
        "Raise MOLLIFIER_RECLAIM_IDLE_MS: what the living hold must not be taken from them first.",
        ("heartbeat_ttl_ms", "reclaim_idle_ms"),
        "failure",
        lambda settings: settings.heartbeat_ttl_ms < settings.reclaim_idle_ms,
    ),
    Rule(
        "settings.reclaim",
        "`MOLLIFIER_RECLAIM_IDLE_MS` is longer than the longest batch",
        "Raise MOLLIFIER_RECLAIM_IDLE_MS, or lower MOLLIFIER_STORE_TIMEOUT_MS.",
        ("reclaim_idle_ms", "store_timeout_ms", "claim_wait_ms", "mutate_wait_ms"),
        "warning",
        lambda settings: settings.reclaim_idle_ms > batch_ms(settings),
    ),
    Rule(
        "settings.claims",
        "`MOLLIFIER_CLAIM_MIN_TTL_S` is at most `MOLLIFIER_CLAIM_TTL_S`",
        "Lower MOLLIFIER_CLAIM_MIN_TTL_S.",
        ("claim_min_ttl_s", "claim_ttl_s"),
        "failure",
        lambda settings: settings.claim_min_ttl_s <= settings.claim_ttl_s,
    ),
    Rule(
        "settings.claim_life",
        "`MOLLIFIER_CLAIM_TTL_S` outlasts a write: twice `MOLLIFIER_STORE_TIMEOUT_MS`",
        "Raise MOLLIFIER_CLAIM_TTL_S, or lower MOLLIFIER_STORE_TIMEOUT_MS.",
        ("claim_ttl_s", "store_timeout_ms"),
        "warning",
        lambda settings: settings.claim_ttl_s * 1000 > 2 * settings.store_timeout_ms,
    ),
    Rule(
        "settings.claim_wait",
        "`MOLLIFIER_CLAIM_WAIT_MS` is 0, or leaves time for a look every `MOLLIFIER_CLAIM_POLL_MS`",
        "Lower MOLLIFIER_CLAIM_POLL_MS.",
        ("claim_wait_ms", "claim_poll_ms"),
        "warning",
        lambda settings: settings.claim_wait_ms == 0 or settings.claim_poll_ms < settings.claim_wait_ms,
    ),
    Rule(
        "settings.deliveries",
        "`MOLLIFIER_MAX_DELIVERIES` is 3 or more: what a batch may have died of is tried alone first",
        "Raise MOLLIFIER_MAX_DELIVERIES.",
        ("max_deliveries",),
        "warning",
        lambda settings: settings.max_deliveries >= _ALONE,
    ),
    Rule(
        "settings.pressure",
        "`MOLLIFIER_STORE_PRESSURE_LATENCY_MS` is shorter than `MOLLIFIER_STORE_TIMEOUT_MS`",
        "Lower MOLLIFIER_STORE_PRESSURE_LATENCY_MS: a write that takes so long is cut off before it counts.",
        ("store_pressure_latency_ms", "store_timeout_ms"),
        "warning",
        lambda settings: settings.store_pressure_latency_ms < settings.store_timeout_ms,
    ),
    Rule(
        "settings.drain_latency",
        "`MOLLIFIER_DRAIN_TARGET_LATENCY_MS` is shorter than `MOLLIFIER_STORE_TIMEOUT_MS`",
        "Lower MOLLIFIER_DRAIN_TARGET_LATENCY_MS: batches would grow until they are cut off.",
        ("drain_target_latency_ms", "store_timeout_ms"),
        "warning",
        lambda settings: settings.drain_target_latency_ms < settings.store_timeout_ms,
    ),
    Rule(
        "settings.global_threshold",
        "`MOLLIFIER_GLOBAL_TRIP_THRESHOLD` is 0, or more than `MOLLIFIER_TRIP_THRESHOLD`",
        "Raise MOLLIFIER_GLOBAL_TRIP_THRESHOLD: one environment within its rate trips the gate for all.",
        ("global_trip_threshold", "trip_threshold"),
        "warning",
        lambda settings: not 0 < settings.global_trip_threshold <= settings.trip_threshold,
    ),
)


def _check(rule: Rule) -> Check:
    async def look(patient: Patient) -> Verdict:
        settings = patient.settings
        seen = ", ".join(f"{Settings.variable(name)}={getattr(settings, name)}" for name in rule.values)
        return Verdict("ok" if rule.holds(settings) else rule.level, seen)

    return Check(rule.name, [], rule.asks, rule.remedy, look)


CHECKS = tuple(_check(rule) for rule in RULES)

"""All comparisons, in the order of the report."""

from bench import (
    drain,
    growth,
    hot_key,
    latency,
    mollify,
    passing,
    producer,
    protection,
    scaling,
    telemetry,
)

COMPARISONS = (
    mollify.COMPARISON,
    passing.COMPARISON,
    drain.COMPARISON,
    latency.COMPARISON,
    hot_key.COMPARISON,
    growth.COMPARISON,
    scaling.COMPARISON,
    protection.COMPARISON,
    producer.COMPARISON,
    telemetry.COMPARISON,
)

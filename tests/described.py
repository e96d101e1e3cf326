"""The metrics there are, as documentation, alerts and dashboards may speak of them."""

from typing import NamedTuple

from prometheus_client.metrics import MetricWrapperBase

from app.metrics import Distribution, Metrics


class DescribedMetric(NamedTuple):
    """A metric by the name that it is shown and asked for by; a histogram without its suffixes."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def all_metrics() -> list[DescribedMetric]:
    """Every metric of a process."""
    described = []
    for one in vars(Metrics()).values():
        if isinstance(one, MetricWrapperBase):
            name = one._name + ("_total" if one._type == "counter" else "")
            described.append(
                DescribedMetric(name, str(one._type), tuple(one._labelnames), one._documentation)
            )
        elif isinstance(one, Distribution):
            described.append(DescribedMetric(one.name, "histogram", (), one.text))
    return described

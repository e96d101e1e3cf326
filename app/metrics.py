"""Every metric of a process, by name, with its labels and those of their values that are known beforehand.

Labels are bounded. An organization is one only when it is enrolled, and only the first hundred that a process
sees have their own; environments and runs never are one.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, product
from math import inf, nan
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

ORGANIZATIONS = 100
"""So many organizations have a label of their own; all others are OTHER."""

OTHER = "other"

DEAD_LETTERS = ("undecodable", "reply_channel", "unanswerable", "deliveries", "refused")
DELIVERIES = ("first", "again")
DRAINED = ("inserted", "present", "alias", "system_failure", "refused", "dead")
PUT_BACK = ("store_unavailable", "timed_out", "unreachable", "failed")
RECOVERED = ("holder_gone", "lost_on_the_way", "idle")
STREAMS = ("triggers", "operations")
TELEMETRY = ("log", "traces")

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_SIZES = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2000, 3000)


class Distribution(Collector):
    """A histogram without labels that takes the values of a whole batch at once.

    For what every request has: `Histogram.observe` costs it a microsecond, and this a twentieth of that.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self.name = name
        self.text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe_all(self, values: Iterable[float]) -> None:
        """Count values. One below 0, which two clocks can give, counts as 0."""
        ordered = sorted(values)
        start = 0
        for index, bound in enumerate(self._bounds):
            end = bisect_right(ordered, bound, start)
            self._counts[index] += end - start
            start = end
        self._counts[-1] += len(ordered) - start
        self._sum += sum(ordered[bisect_right(ordered, 0) :])

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self.name, self.text)

    def collect(self) -> Iterator[Metric]:
        bounds = map(floatToGoString, (*self._bounds, inf))
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self.name, self.text, buckets=buckets, sum_value=self._sum)


class Timed:
    """Tells how many seconds its block took. A request that comes alone has eleven of these."""

    __slots__ = ("_started", "_tell")

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._tell(perf_counter() - self._started)


class Metrics:
    """The metrics of one process, in a registry of their own, so that tests can have many."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._organizations: set[str] = set()

        def counter(name: str, text: str, **labels: Sequence[str]) -> Counter:
            """Values that are known start at 0, so that their first rise is one to whoever looks at rates."""
            one = Counter(f"mollifier_{name}", text, tuple(labels), registry=registry)
            for values in product(*labels.values()) if labels else ():
                one.labels(*values)
            return one

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"mollifier_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, bounds: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"mollifier_{name}", text, labels, buckets=bounds, registry=registry)

        def distribution(name: str, text: str, bounds: Sequence[float]) -> Distribution:
            return Distribution(f"mollifier_{name}", text, bounds, registry)

        # Requests
        self.requests = counter(
            "requests",
            "Requests that were read, by stream, and whether they had been handed out before.",
            stream=STREAMS,
            delivery=DELIVERIES,
        )
        self.decisions = counter(
            "decisions",
            "Gate decisions, by what became of the request and why.",
            outcome=(),
            reason=(),
            enrolled=(),
            organization=(),
        )
        self.gate_failures = counter("gate_failures", "Evaluations of the gate that failed, and so let pass.")
        self.claims = counter("claims", "Claims of idempotency keys, by what became of them.", state=())
        self.claim_wait = distribution(
            "claim_wait_seconds", "From a request's first wait for its key to its reply.", _FAST
        )
        self.replies = counter(
            "replies", "Requests that were finished, by code (`run` for a run).", code=("run",)
        )
        self.reply_latency = distribution(
            "reply_seconds", "From a request's arrival in the stream to its reply.", _FAST
        )
        self.stages = histogram("stage_seconds", "Time of one step on one batch.", _FAST, "stage")
        self.batch_sizes = histogram("batch_size", "Requests or rows handled together.", _SIZES, "stage")
        self.dead_letters = counter("dead_letters", "Requests and entries set aside.", reason=DEAD_LETTERS)
        self.recovered = counter(
            "recovered", "Entries taken over, by what had become of their holder.", why=RECOVERED
        )

        # The drain
        self.drained = counter("drained", "Buffered runs that were materialised, by result.", result=DRAINED)
        self.put_back = counter("put_back", "Entries put back into the buffer, by why.", why=PUT_BACK)
        self.dwell = distribution("dwell_seconds", "From acceptance into the buffer to the row.", _SLOW)
        self.commits = histogram(
            "drain_commit_seconds", "Time that Postgres takes to commit one batch of the drain.", _FAST
        )
        self.drain_batch_size = gauge(
            "drain_batch_size", "Rows that the drain commits at once; it follows the time of commits."
        )

        # What all processes share, as the one sweeper that works has seen it
        self.depth = gauge("buffer_depth", "Entries in the buffer, queued or draining.")
        self.oldest_dwell = gauge(
            "buffer_oldest_dwell_seconds", "How long the oldest entry has been in the buffer."
        )
        self.draining = gauge("buffer_draining", "Entries that drainers are writing.")
        self.stale = gauge(
            "buffer_stale", "Entries in the buffer whose dwell is over MOLLIFIER_STALE_THRESHOLD_MS."
        )
        self.dead_letters_held = gauge("dead_letters_held", "Dead letters that nobody has dealt with yet.")
        self.consumers = gauge("consumers", "Consumers of a request stream that are alive.", "stream")
        self.waiting = gauge("requests_waiting", "Requests that no consumer has read yet.", "stream")
        self.pending = gauge("requests_pending", "Requests that consumers are working on.", "stream")

        # The process
        self.sweeping = gauge("sweeper_active", "1 while this sweeper is the one that works, else 0.")
        self.passes = counter("sweeper_passes", "Passes of the sweeper, by result.", result=())
        self.swept = counter("swept", "What the sweeper put in order, by kind.", what=())
        self.unreachable = counter(
            "unreachable", "Times that a server did not answer, by what was asked.", what=()
        )
        self.switch = gauge("switch", "1 while a switch is on in this process, else 0.", "switch")
        self.ready = gauge("ready", "1 while the process has what it needs to work, else 0.")
        self.telemetry_failures = counter(
            "telemetry_failures", "Log lines and spans that could not be delivered.", what=TELEMETRY
        )
        self.forget_shared()

    def organization(self, organization_id: str) -> str:
        """The label of an organization, by its id."""
        known = self._organizations
        if organization_id not in known:
            if len(known) >= ORGANIZATIONS:
                return OTHER
            known.add(organization_id)
        return organization_id

    def forget_shared(self) -> None:
        """What all processes share is not known (any more)."""
        for one in (self.depth, self.oldest_dwell, self.draining, self.stale, self.dead_letters_held):
            one.set(nan)
        for of_stream in (self.consumers, self.waiting, self.pending):
            for stream in STREAMS:
                of_stream.labels(stream).set(nan)

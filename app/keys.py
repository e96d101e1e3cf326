"""Every Redis key, stream and channel, spelled once.

`ns` is the setting NAMESPACE, `{p}` the partition of an environment, the hash tag that keeps all
keys which one script touches in one slot of a Redis Cluster.

    key                     type     written by                 holds
    ns:triggers             stream   producers                  trigger requests
    ns:operations           stream   producers                  reads and changes
    ns:dead-letters         stream   workers, drainers          what could not be handled, and why
    ns:heartbeat:<consumer> string   every process that holds   "1" for HEARTBEAT_TTL_MS
    ns:processes            sorted   every process that holds   `<kind> <consumer>` -> when it was last alive
    ns:sweeper              string   sweeper (lease)            the consumer whose sweeper works
    ns:wake                 channel  buffer (accept)            an environment has become ready
    ns:reply:...            channel  workers                    one reply per request
    ns:gate                 string   gate                       the fleet's rate (GLOBAL_TRIP_THRESHOLD)
    ns:{p}:gate:<env>       string   gate                       `<start> <count> <previous> <tripped until>`
    ns:{p}:entries:<env>    stream   buffer, turns              the buffer: fields run_id, snapshot
    ns:{p}:index:<env>      hash     buffer, turns              run id -> entry id
    ns:{p}:drain:<env>      hash     buffer, turns              queued, done, uncertain, holder, hold, taken
    ns:{p}:overlays:<env>   hash     buffer                     run id -> changes since it was accepted
    ns:{p}:claim:<digest>   string   claims, buffer             `pending:<token>`, or the winner's run id
    ns:{p}:ready            sorted   buffer, turns              environments with entries, by the oldest
    ns:{p}:arrivals         sorted   buffer, turns              environments that became ready, for the turns
    ns:{p}:totals           hash     buffer, turns              queued: entries of all environments
    ns:{p}:grace            sorted   turns                      `<entry id> <env>` -> when to forget it
    ns:{p}:chosen           hash     buffer                     caller-chosen id -> its tenant, till a row

    ns:{turns}              prefix   turns                      whose turn it is, over all partitions:
      :organizations        sorted   turns (schedule)           organizations with entries, by virtual time
      :choosable            sorted   turns (schedule)           those of them that have something not held
      :idle                 sorted   turns (schedule)           those without entries that are ahead of time
      :environments:<org>   sorted   turns (schedule)           its environments; +inf while held
      :states               hash     turns (schedule)           environment -> what is known of it
      :clocks               hash     turns (schedule)           organization (or '' for all) -> virtual time
      :weights              hash     turns                      organization -> weight, where it is not 1
      :resting              sorted   turns (schedule)           environments that failed -> when to try again
      :apart                list     turns (schedule)           those whose rest is over: each is tried alone
      :held:<consumer>      hash     turns (schedule)           environment -> entries that it was handed
      :takers               set      turns (schedule)           drainers that hold something
      :bucket               hash     turns (schedule)           tokens of DRAIN_MAX_RATE
      :drained              string   turns (schedule)           entries that became rows; till all are

In `chosen` the partition is that of the run id.
"""

from functools import lru_cache
from hashlib import blake2b
from typing import Protocol
from zlib import crc32

from msgspec import Struct

_LONG = 128
"""A name of more characters is not remembered."""


class EnvironmentKeys(Struct, frozen=True, gc=False):
    """The keys of one environment; all share the hash tag of `partition`."""

    partition: int
    gate: str
    entries: str
    index: str
    drain: str
    overlays: str


class Keyed(Protocol):
    """What an idempotency key belongs to."""

    @property
    def organization_id(self) -> str: ...
    @property
    def environment_id(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def idempotency_key(self) -> str | None: ...


def tenant(organization_id: str, environment_id: str) -> str:
    """A tenant as one text; no id contains a NUL."""
    return f"{organization_id}\0{environment_id}"


class Keys:
    """The names of one namespace, spread over a number of partitions."""

    def __init__(self, namespace: str, partitions: int) -> None:
        self.namespace = namespace
        self.partitions = partitions
        self.triggers = f"{namespace}:triggers"
        self.operations = f"{namespace}:operations"
        self.dead_letters = f"{namespace}:dead-letters"
        self.group = namespace
        self.wake = f"{namespace}:wake"
        self.sweeper = f"{namespace}:sweeper"
        self.processes = f"{namespace}:processes"
        self.fleet_gate = f"{namespace}:gate"
        self.turns = f"{namespace}:{{turns}}"
        self.claims = f"{namespace}:{{*}}:claim:*"
        """What all claims match; no character that a namespace may have means anything in a pattern."""
        self._remembered = lru_cache(maxsize=16_384)(self._environment)
        self._remembered_claim = lru_cache(maxsize=4_096)(self._claim)

    def partition(self, text: str) -> int:
        """The partition of an environment id (or, for `chosen`, of a run id)."""
        return crc32(text.encode()) % self.partitions

    def environment(self, environment_id: str) -> EnvironmentKeys:
        """The keys of an environment. Those with long names are not remembered: anybody can make up many."""
        return (self._environment if len(environment_id) > _LONG else self._remembered)(environment_id)

    def _environment(self, environment_id: str) -> EnvironmentKeys:
        partition = self.partition(environment_id)
        tag = f"{self.namespace}:{{{partition}}}"
        return EnvironmentKeys(
            partition,
            f"{tag}:gate:{environment_id}",
            f"{tag}:entries:{environment_id}",
            f"{tag}:index:{environment_id}",
            f"{tag}:drain:{environment_id}",
            f"{tag}:overlays:{environment_id}",
        )

    def claim(self, run: "Keyed") -> str:
        """The claim of a run's idempotency key; a digest, so that no two keys of any characters collide."""
        organization, environment, task = run.organization_id, run.environment_id, run.task
        key = run.idempotency_key or ""
        is_long = len(organization) + len(environment) + len(task) + len(key) > 4 * _LONG
        return (self._claim if is_long else self._remembered_claim)(organization, environment, task, key)

    def _claim(self, organization_id: str, environment_id: str, task: str, key: str) -> str:
        parts = f"{organization_id}\0{environment_id}\0{task}\0{key}".encode()
        partition = self.environment(environment_id).partition
        return f"{self.namespace}:{{{partition}}}:claim:{blake2b(parts, digest_size=16).hexdigest()}"

    def ready(self, partition: int) -> str:
        return f"{self.namespace}:{{{partition}}}:ready"

    def arrivals(self, partition: int) -> str:
        return f"{self.namespace}:{{{partition}}}:arrivals"

    def totals(self, partition: int) -> str:
        return f"{self.namespace}:{{{partition}}}:totals"

    def grace(self, partition: int) -> str:
        return f"{self.namespace}:{{{partition}}}:grace"

    def chosen(self, partition: int) -> str:
        return f"{self.namespace}:{{{partition}}}:chosen"

    def heartbeat(self, consumer: str) -> str:
        return f"{self.namespace}:heartbeat:{consumer}"

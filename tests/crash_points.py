"""Every step at which a process can be killed, by name: whose method it is. Only tests know of them.

`CRASH_AT` says at which one a process of `tests/crashing.py` ends: `before write 1`, or `after`, with the
number of the call.
"""

import os
import signal
from itertools import count
from typing import Any, NamedTuple, Self

from app.buffer import RedisBuffer
from app.buffered_runs import RedisBufferedRuns
from app.census import RedisCensus
from app.claims import RedisClaims
from app.decide import Decide
from app.decode import Decode
from app.deduplicate import Deduplicate
from app.drain import Drain
from app.fence import Fence
from app.gate import RedisGate
from app.lease import Lease
from app.leftovers import PostgresRows, RedisLeftovers
from app.operate import Operate
from app.pipeline import Pipeline
from app.recall import Recall
from app.relate import Relate
from app.replies import RedisDesk
from app.respond import Respond
from app.schedule import Schedule
from app.settle import Settle
from app.store import PostgresStore
from app.stored_runs import PostgresStoredRuns
from app.streams import RequestStream
from app.sweep import Sweep
from app.turns import RedisTurns
from app.validate import Validate
from app.waiting import WaitingRoom
from app.write import Write

CRASH_AT = "CRASH_AT"

Step = tuple[type, str]

POINTS: dict[str, Step] = {
    # the way of a trigger, step by step
    "decode": (Decode, "__call__"),
    "validate": (Validate, "__call__"),
    "recall": (Recall, "__call__"),
    "relate": (Relate, "__call__"),
    "deduplicate": (Deduplicate, "__call__"),
    "decide": (Decide, "__call__"),
    "fence": (Fence, "__call__"),
    "write": (Write, "__call__"),
    "settle": (Settle, "__call__"),
    "respond": (Respond, "__call__"),
    "try-keys": (WaitingRoom, "tick"),
    "take-on": (WaitingRoom, "_take_on"),
    "resume": (Pipeline, "resume"),
    # what these steps ask of the world
    "recall-from-buffer": (RedisBuffer, "recall"),
    "recall-from-store": (PostgresStore, "recall"),
    "find-buffered-parents": (RedisBuffer, "find_parents"),
    "find-stored-parents": (PostgresStore, "find_parents"),
    "find-winners": (RedisClaims, "find_winners"),
    "let-parents-wait": (PostgresStore, "let_parents_wait"),
    "claim": (RedisClaims, "claim"),
    "look-up-keys": (PostgresStore, "look_up_keys"),
    "admit": (RedisGate, "admit"),
    "insert": (PostgresStore, "insert"),
    "accept": (RedisBuffer, "accept"),
    "settle-claims": (RedisClaims, "settle"),
    "set-aside": (RedisDesk, "set_aside"),
    "release": (RedisBuffer, "release"),
    "reply": (RedisDesk, "respond"),
    # the way of an operation; it has decode, fence and respond too
    "perform": (Operate, "_perform"),
    "find-row": (PostgresStoredRuns, "find"),
    "change-row": (PostgresStoredRuns, "change"),
    "list-rows": (PostgresStoredRuns, "newest"),
    "reset-stored-key": (PostgresStoredRuns, "reset_key"),
    "find-entry": (RedisBufferedRuns, "find"),
    "change-entry": (RedisBufferedRuns, "change"),
    "list-entries": (RedisBufferedRuns, "newest"),
    "find-key-holder": (RedisClaims, "holder"),
    "end-claim": (RedisClaims, "end"),
    "trigger": (RequestStream, "trigger"),
    # the way of a buffered run
    "take": (RedisTurns, "take"),
    "take-entries": (RedisTurns, "_take"),
    "materialise": (PostgresStore, "materialise"),
    "write-rows": (Drain, "_write"),
    "write-failures": (Drain, "_write_failures"),
    "bury": (Drain, "_bury"),
    "bury-letters": (RedisDesk, "bury"),
    "settle-entries": (RedisTurns, "settle"),
    "put-back": (RedisTurns, "put_back"),
    "put-back-entries": (Drain, "_put_back"),
    "forget": (RedisTurns, "forget"),
    # whose turn it is
    "next-turn": (Schedule, "next"),
    "recollect": (Schedule, "_recollect"),
    "look-for-arrivals": (Schedule, "_arrivals"),
    "report": (Schedule, "_call"),
    "strike-off": (Schedule, "_strike_off"),
    "flush": (Schedule, "flush"),
    "set-weights": (Schedule, "set_weights"),
    "return-of-the-dead": (Schedule, "_return_of_the_dead"),
    "without-heartbeat": (Schedule, "without_heartbeat"),
    # recovery of requests
    "ensure-group": (RequestStream, "ensure_group"),
    "recover": (RequestStream, "recover"),
    "find-abandoned": (RequestStream, "_abandoned"),
    "find-silent": (RequestStream, "_silent"),
    "find-pending": (RequestStream, "_pending"),
    "take-over-pending": (RequestStream, "_take_over"),
    "leave-group": (RequestStream, "leave"),
    # the sweeper
    "hold-lease": (Lease, "hold"),
    "pass-lease-on": (Lease, "_pass_on"),
    "look-at-holder": (Lease, "_is_alive"),
    "let-lease-go": (Lease, "let_go"),
    "sweep-count": (Sweep, "_count"),
    "sweep-count-streams": (Sweep, "_count_streams"),
    "sweep-announce-lost": (Sweep, "_announce_lost"),
    "sweep-drop-consumers": (Sweep, "_drop_consumers"),
    "sweep-retire": (Sweep, "_retire"),
    "count": (RedisCensus, "count"),
    "count-streams": (RedisCensus, "count_streams"),
    "announce-lost": (RedisCensus, "announce_lost"),
    "drop-consumers": (RedisLeftovers, "drop_consumers"),
    "find-kept": (RedisLeftovers, "find"),
    "find-tenants": (PostgresRows, "tenants_of"),
    "find-not-buffered": (RedisLeftovers, "not_buffered"),
    "retire": (RedisLeftovers, "retire"),
}


class Crash(NamedTuple):
    """A process ends there: before or after the nth call of a step."""

    when: str
    point: str
    call: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From what `str` gives."""
        when, point, call = text.split()
        return cls(when, point, int(call))

    def __str__(self) -> str:
        return f"{self.when} {self.point} {self.call}"

    @property
    def last_words(self) -> str:
        """What the process writes as it ends there, and nowhere else."""
        return f"crashed {self}"


def arm(crash: Crash) -> None:
    """Have this process killed at a point."""
    owner, name = POINTS[crash.point]
    method = getattr(owner, name)
    calls = count(1)

    async def mortal(self: Any, *arguments: Any, **options: Any) -> Any:
        is_last = next(calls) == crash.call
        if is_last and crash.when == "before":
            _end(crash)
        result = await method(self, *arguments, **options)
        if is_last:
            _end(crash)
        return result

    setattr(owner, name, mortal)


def _end(crash: Crash) -> None:
    os.write(1, f"{crash.last_words}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)

"""The processes of the fleet, as their heartbeats tell: which there are, and when each was last alive."""

from typing import Any, NamedTuple

from app.keys import Keys
from app.redis_client import Call
from app.redis_connection import CONNECTIONS

KINDS = ("triggers", "operations", "drainer", "sweeper")
"""One for each line of the Procfile."""

REMEMBER_MS = 3_600_000
"""For how long a process that died is remembered; one that ends in order is forgotten at once."""

CONNECTIONS_OF_A_PROCESS = CONNECTIONS + 2
"""Most connections to Redis of one process: its pool, what reads its stream, and what wakes it."""

_MOST = 1000


class Member(NamedTuple):
    """A process, and for how many ms its heart has been silent."""

    kind: str
    consumer: str
    silent_ms: int

    def is_alive(self, ttl_ms: int) -> bool:
        """Whether its heartbeat can still be there; `ttl_ms` is HEARTBEAT_TTL_MS."""
        return self.silent_ms < ttl_ms


def enlist(keys: Keys, kind: str, consumer: str) -> Call:
    """What notes that a process is alive."""
    return Call("enlist", [keys.processes], [f"{kind} {consumer}", REMEMBER_MS])


def strike_off(keys: Keys, kind: str, consumer: str) -> Call:
    """What forgets a process that ends in order."""
    return Call("ZREM", None, [keys.processes, f"{kind} {consumer}"])


def roll_call(keys: Keys) -> Call:
    """What reads the list, at most a thousand of it: `members` makes sense of the answer."""
    return Call("ZREVRANGE", None, [keys.processes, 0, _MOST - 1, "WITHSCORES"])


def members(answer: Any, now_ms: int) -> list[Member]:
    """The processes in the answer to `roll_call`, the living first; `now_ms` is by the server's clock."""
    found = []
    for name, last in zip(answer[::2], answer[1::2], strict=True):
        kind, _, consumer = name.decode().partition(" ")
        found.append(Member(kind, consumer, max(0, now_ms - int(float(last)))))
    return found


def server_ms(time: Any) -> int:
    """The answer to TIME in ms since 1970."""
    return int(time[0]) * 1000 + int(time[1]) // 1000

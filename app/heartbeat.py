"""Being alive, for others to see: while the key is there, nobody takes over what its owner holds."""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from app.errors import Unreachable
from app.fleet import enlist, strike_off
from app.keys import Keys
from app.redis_client import Call, Scripts
from app.telemetry import Telemetry

_BEATS_PER_TTL = 4


def consumer_name() -> str:
    """A name that no other process has or ever had."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


class Heartbeat:
    """Renews the key of one consumer until it is stopped."""

    def __init__(
        self,
        scripts: Scripts,
        keys: Keys,
        consumer: str,
        ttl_ms: int,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scripts = scripts
        self._keys = keys
        self._consumer = consumer
        self._ttl_ms = ttl_ms
        self._telemetry = telemetry
        self._clock = clock
        self._renewed = clock()
        self._is_seen = False
        self._life = 0
        self._stopping = asyncio.Event()

    def life(self) -> int:
        """Which of its lives the process is in: another begins when others may have taken it for dead."""
        if self._is_seen and self._clock() - self._renewed >= self._ttl_ms / 1000:
            self._is_seen = False
            self._life += 1
        return self._life

    async def renew(self) -> None:
        """See to it that others see this life, and at least half of it is left for what is about to be done.

        Raises:
            Unreachable: Redis cannot be reached, or refuses.
        """
        if not self._is_seen or self._clock() - self._renewed >= self._ttl_ms / 2000:
            await self.beat()

    async def beat(self) -> None:
        """Renew the key once.

        Raises:
            Unreachable: Redis cannot be reached, or refuses.
        """
        self.life()
        sent = self._clock()
        beat = Call("beat", [self._keys.heartbeat(self._consumer)], [self._ttl_ms])
        await self._scripts.demand([beat, enlist(self._keys, self._telemetry.process, self._consumer)])
        self._renewed, self._is_seen = sent, True

    async def run(self) -> None:
        """Renew the key until `stop`; a Redis that is away is tried again at the next beat."""
        while not self._stopping.is_set():
            try:
                await self.beat()
            except Exception as error:
                self._telemetry.trouble("heartbeat.failed", error=str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._ttl_ms / 1000 / _BEATS_PER_TTL):
                    await self._stopping.wait()

    def stop(self) -> None:
        """Let `run` end."""
        self._stopping.set()

    async def remove(self) -> None:
        """Remove the key once `run` has ended: what is still held may be taken over at once."""
        try:
            await self._scripts.run(
                [
                    Call("DEL", None, [self._keys.heartbeat(self._consumer)]),
                    strike_off(self._keys, self._telemetry.process, self._consumer),
                ]
            )
        except Unreachable as error:
            self._telemetry.trouble("heartbeat.failed", error=str(error))

"""How soon after a fault the front door is well again: small bursts of requests, until one is answered with a
run and one that was buffered is a row."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import asyncpg

from tests.chaos.journal import Attempt, Journal
from tests.chaos.posts import PlainPost
from tests.chaos.tenants import Tenant

_BURST = 8
_EVERY_S = 0.15
_GIVE_UP_S = 30.0


class Recovery(NamedTuple):
    """Seconds after the healing of a fault; None: not within half a minute."""

    kind: str
    answered_s: float | None
    drained_s: float | None


@dataclass(slots=True)
class Probe:
    """Sends bursts, each into an environment of its own: some pass, the rest is mollified."""

    post: PlainPost
    journal: Journal
    database_url: str
    tenant: Tenant
    numbers: "count[int]"

    async def after(self, kind: str, healed_at: float) -> Recovery:
        """Watch the recovery from a fault that was healed just now."""
        answered_s = drained_s = None
        bursts: set[asyncio.Task[tuple[float | None, float | None]]] = set()
        deadline = time.time() + _GIVE_UP_S
        while (answered_s is None or drained_s is None) and time.time() < deadline:
            bursts.add(asyncio.create_task(self._burst(deadline)))
            done, bursts = await asyncio.wait(bursts, timeout=_EVERY_S)
            for burst in done:
                answered, drained = burst.result()
                answered_s = answered_s or (answered and answered - healed_at)
                drained_s = drained_s or (drained and drained - healed_at)
        for burst in bursts:
            burst.cancel()
        await asyncio.gather(*bursts, return_exceptions=True)
        return Recovery(kind, answered_s, drained_s)

    async def _burst(self, deadline: float) -> tuple[float | None, float | None]:
        """When the first of a burst was answered with a run, and when the first buffered one was a row."""
        number = next(self.numbers)
        answered: list[float] = []
        drained: list[float] = []

        async def ask(position: int) -> None:
            run_id = await self._ask(f"probe-{number}x{position}", number, answered)
            while run_id is not None and not drained and time.time() < deadline:
                if await self._is_row(run_id):
                    drained.append(time.time())
                    return
                await asyncio.sleep(0.1)

        await asyncio.gather(*(ask(position) for position in range(_BURST)))
        return min(answered, default=None), min(drained, default=None)

    async def _ask(self, request: str, number: int, answered: list[float]) -> str | None:
        """The id of the run, if it was buffered."""
        environment = f"{self.tenant.id}_{number}"
        body = {
            "task": "probe",
            "environment": {**self.tenant.as_sent(enrolled=True), "id": environment},
            "payload": {"request": request, "secret": self.tenant.secret},
            "options": {"run_id": f"run_{request}", "tags": []},
        }
        attempt = Attempt(
            name=f"{request}.0",
            request=request,
            kind="probe",
            stream="triggers",
            environment=environment,
            organization=self.tenant.organization_id,
            body=body,
            reply_to=f"mollifier:reply:probe:{request}.0",
            is_repeated=False,
            sending_at=time.time(),
        )
        await self.post.send(attempt)
        reply = await self.post.reply(attempt.name, 5)
        if reply is None or reply["type"] != "run":
            return None
        answered.append(time.time())
        return str(reply["run"]["id"]) if reply["is_mollified"] else None

    async def _is_row(self, run_id: str) -> bool:
        with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection = await asyncpg.connect(self.database_url, timeout=2)
            try:
                query = "SELECT EXISTS (SELECT FROM mollifier.runs WHERE id = $1)"
                return bool(await connection.fetchval(query, run_id, timeout=2))
            finally:
                await connection.close(timeout=1)
        return False

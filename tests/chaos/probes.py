"""How soon after a fault the front door is well again: a burst of requests now and then, all the time."""

import asyncio
import time
from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import asyncpg

from tests.chaos.evidence import Happened
from tests.chaos.journal import Attempt, Journal
from tests.chaos.posts import PlainPost
from tests.chaos.tenants import Tenant

_BURST = 6
_EVERY_S = 0.4
_AT_ONCE = 5
_GIVE_UP_S = 15.0


@dataclass(slots=True)
class Pulse:
    """When a probe was answered with a run, and when one that was buffered had become a row; in seconds."""

    answered: list[float] = field(default_factory=list)
    drained: list[float] = field(default_factory=list)


class Probe:
    """Sends bursts, each into an environment of its own: some pass, the rest is mollified."""

    def __init__(self, redis_url: str, database_url: str, journal: Journal) -> None:
        secret = f"secret{'0' * 12}"
        self._tenant = Tenant(f"env_{secret}", "org_probe", secret, 0.0, flips=False)
        self._post = PlainPost(redis_url, "probe", journal)
        self._database_url = database_url
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._bursts: set[asyncio.Task[None]] = set()
        self.pulse = Pulse()

    async def run(self) -> None:
        """Go on until cancelled."""
        number = 0
        while True:
            number += 1
            await self._room.acquire()
            burst = asyncio.create_task(self._burst(number))
            self._bursts.add(burst)
            burst.add_done_callback(self._bursts.discard)
            await asyncio.sleep(_EVERY_S)

    async def close(self) -> None:
        """Let the last ones come to their end."""
        if self._bursts:
            await asyncio.wait(self._bursts, timeout=_GIVE_UP_S)
        await self._post.close()

    async def _burst(self, number: int) -> None:
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                asked = [self._ask(f"probe-{number}x{position}", number) for position in range(_BURST)]
                buffered = [run_id for run_id in await asyncio.gather(*asked) if run_id is not None]
                if buffered:
                    await self._drained(buffered)
        except TimeoutError:
            pass
        finally:
            self._room.release()

    async def _ask(self, request: str, number: int) -> str | None:
        """The id of the run, if it was buffered."""
        environment = f"{self._tenant.id}_{number}"
        attempt = Attempt(
            name=f"{request}.0",
            request=request,
            kind="probe",
            stream="triggers",
            environment=environment,
            organization=self._tenant.organization_id,
            body={
                "task": "probe",
                "environment": {**self._tenant.as_sent(enrolled=True), "id": environment},
                "payload": {"request": request, "secret": self._tenant.secret},
                "options": {"run_id": f"run_{request}", "tags": []},
            },
            reply_to=f"mollifier:reply:probe:{request}.0",
            is_repeated=False,
            sending_at=time.time(),
        )
        await self._post.send(attempt)
        reply = await self._post.reply(attempt.name, _GIVE_UP_S)
        if reply is None or reply["type"] != "run":
            return None
        self.pulse.answered.append(time.time())
        return str(reply["run"]["id"]) if reply["is_mollified"] else None

    async def _drained(self, run_ids: list[str]) -> None:
        """Look until one of them is a row."""
        query = "SELECT EXISTS (SELECT FROM mollifier.runs WHERE id = ANY ($1::text[]))"
        while True:
            with suppress(Exception):  # Postgres is away, in one of many ways
                connection = await asyncpg.connect(self._database_url, timeout=2)
                try:
                    if await connection.fetchval(query, run_ids, timeout=2):
                        self.pulse.drained.append(time.time())
                        return
                finally:
                    connection.terminate()
            await asyncio.sleep(0.1)


def recovery(times: Sequence[float], fault: Happened, faults: Sequence[Happened]) -> float | None:
    """Seconds from the healing of a fault to the first of some times (in order); None where another fault
    was there in between, so that nobody knows whose recovery it was."""
    position = bisect(times, fault.healed_at)
    if position == len(times):
        return None
    at = times[position]
    is_alone = all(
        other is fault or other.over_at < fault.healed_at or other.injected_at > at for other in faults
    )
    return at - fault.healed_at if is_alone else None

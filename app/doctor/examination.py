"""How a check is made: what it is given, what it says, and what becomes of it while a server is away."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, ResponseError

from app.errors import MollifierError, StoreUnavailable, Unreachable
from app.fleet import Member, members, roll_call, server_ms
from app.keys import Keys
from app.postgres import acquire, statement
from app.reason import root_reason
from app.redis_client import Call, Scripts
from app.settings import Settings
from schemas.diagnosis import Finding, Level

REDIS, POSTGRES = "Redis", "Postgres"
LIMIT_S = 3.0
"""Longest time of one check."""

READ_IT = "Let the user do that, or look it up with one who may."
BRING_BACK = "Bring {server} back first, then ask again."


class Verdict(NamedTuple):
    """What a check says."""

    level: Level
    seen: str


class Unreadable(MollifierError):
    """A server answered, and did not tell what was asked."""


class Info(dict[str, Any]):
    """The fields of INFO. What a server does not tell cannot be read."""

    def __missing__(self, name: str) -> Any:
        raise Unreadable(f"INFO: it does not tell {name}")


@dataclass(slots=True)
class Patient:
    """An installation as it is examined. `away` has the servers that did not answer, with the reason."""

    settings: Settings
    keys: Keys
    redis: Redis
    pool: "asyncpg.Pool[asyncpg.Record]"
    clock: Callable[[], float] = time.time
    away: dict[str, str] = field(default_factory=dict)
    _info: Info | None = None
    _facts: asyncpg.Record | None = None

    async def ask(self, name: str, *arguments: str | int) -> Any:
        """What Redis answers to a command, or the `ResponseError` that it refuses it with.

        Raises:
            Unreachable: it did not answer.
        """
        (answer,) = await Scripts(self.redis).run([Call(name, None, arguments)])
        return answer

    async def told(self, name: str, *arguments: str | int) -> Any:
        """The same, when a refusal is no answer.

        Raises:
            Unreachable: it did not answer.
            Unreadable: it refused.
        """
        answer = await self.ask(name, *arguments)
        if isinstance(answer, ResponseError):
            kind = "NOPERM " if isinstance(answer, NoPermissionError) else ""
            raise Unreadable(f"{' '.join((name, *map(str, arguments[:1])))}: {kind}{answer}")
        return answer

    async def info(self) -> Info:
        """The answer to INFO, asked for once."""
        if self._info is None:
            self._info = Info(await self.told("INFO"))
        return self._info

    async def config(self, name: str) -> str:
        """One setting of Redis; '' if it has none of that name."""
        answer: dict[str | bytes, str | bytes] = await self.told("CONFIG GET", name)
        told = {_text(one): _text(value) for one, value in answer.items()}
        return told.get(name, "")

    async def processes(self) -> list[Member]:
        """The processes that live."""
        time, listed = await Scripts(self.redis).demand([Call("TIME", None, []), roll_call(self.keys)])
        found = members(listed, server_ms(time))
        return [one for one in found if one.is_alive(self.settings.heartbeat_ttl_ms)]

    async def fetch(self, name: str) -> list[asyncpg.Record]:
        """The records of a statement of `app/sql`.

        Raises:
            StoreUnavailable: Postgres did not answer.
            Unreadable: it refused.
        """
        records: list[asyncpg.Record] = await self.query(lambda connection: connection.fetch(statement(name)))
        return records

    async def query(self, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        """What comes of a connection; raises as `fetch` does."""
        try:
            async with acquire(self.pool, LIMIT_S) as connection:
                return await ask(connection)
        except StoreUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, asyncpg.PostgresError) and (cause.sqlstate or "")[:2] == "42":
                raise Unreadable(root_reason(cause)) from error
            raise

    async def facts(self) -> asyncpg.Record:
        """What Postgres says about itself (`app/sql/examine.sql`), asked for once."""
        if self._facts is None:
            (self._facts,) = await self.fetch("examine")
        return self._facts


class Check(NamedTuple):
    """One line of the table of checks. `asks` is what it looks at, `remedy` what helps when that is wrong."""

    name: str
    needs: Sequence[str]
    asks: str
    remedy: str
    look: Callable[[Patient], Awaitable[Verdict]]


async def examine(checks: Sequence[Check], patient: Patient) -> list[Finding]:
    """Make checks one after the other; each says for itself what stood in its way, and none raises."""
    return [await _examine(check, patient) for check in checks]


async def _examine(check: Check, patient: Patient) -> Finding:
    for server in check.needs:
        if server in patient.away:
            seen = f"not known: {server}: {patient.away[server]}"
            return _finding(check, Verdict("warning", seen), BRING_BACK.format(server=server))
    try:
        async with asyncio.timeout(LIMIT_S):
            return _finding(check, await check.look(patient), check.remedy)
    except Unreadable as error:
        return _finding(check, Verdict("warning", f"could not be read: {error}"), READ_IT)
    except (Unreachable, StoreUnavailable, TimeoutError) as error:
        server = POSTGRES if isinstance(error, StoreUnavailable) else (*check.needs, "")[0]
        patient.away[server] = root_reason(error)
        return _finding(check, Verdict("failure", f"{server}: {patient.away[server]}"), check.remedy)
    except Exception as error:
        seen = f"the check itself failed: {type(error).__name__}: {error}"
        return _finding(check, Verdict("warning", seen), "Tell the makers of Mollifier; go on by hand.")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _finding(check: Check, verdict: Verdict, remedy: str) -> Finding:
    return Finding(
        check=check.name,
        level=verdict.level,
        seen=verdict.seen,
        remedy=None if verdict.level == "ok" else remedy,
    )

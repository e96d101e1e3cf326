"""What operators change: one transaction each, which notes who did it and wakes every process."""

from datetime import datetime
from typing import Any, Literal, NamedTuple

import asyncpg
import orjson

from app.operator_settings import load
from app.postgres import statement
from app.switches import OperatorSettings, Override

Setting = Literal["switch", "drain.paused", "drain.rate"]
Scope = Literal["environment", "organization"]


class Change(NamedTuple):
    """One change. `who` is a login and a host (None: not made by the command); `before` and `after` are JSON.

    `is_new`: it was made just now, in the transaction that tells of it.
    """

    at: datetime
    who: str | None
    database_user: str
    what: str
    before: Any
    after: Any
    is_new: bool


class OperatorChanges:
    """The settings of operators on one connection. Changes are `who`'s; each returns the last of its kind."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", who: str) -> None:
        self._connection = connection
        self._who = who

    async def read(self) -> OperatorSettings:
        """What is decided now."""
        return await load(self._connection)

    async def audit(self, most: int, what: str | None = None) -> list[Change]:
        """The last changes, of one thing or of all, the newest first."""
        records = await self._connection.fetch(statement("look_up_audit"), what, most)
        return [
            Change(at, who, user, what, _parsed(before), _parsed(after), is_new)
            for at, who, user, what, before, after, is_new in records
        ]

    async def last(self, what: str) -> Change | None:
        """The last change of one thing."""
        return next(iter(await self.audit(1, what)), None)

    async def set(self, name: Setting, value: object) -> Change | None:
        """Decide something for the whole fleet; None: leave it to the environment variables."""
        if value is None:
            return await self._change(name, "reset_setting", name)
        return await self._change(name, "set_setting", name, orjson.dumps(value).decode())

    async def enrol(self, organization: str, enrolled: bool) -> Change | None:
        """Decide whether an organization takes part."""
        return await self._change(of_organization(organization), "set_enrolment", organization, enrolled)

    async def weigh(self, organization: str, weight: int) -> Change | None:
        """Decide on an organization's weight in the drain."""
        return await self._change(of_organization(organization), "set_weight", organization, weight)

    async def reset_organization(self, organization: str) -> Change | None:
        """Take back what was decided on an organization's enrolment and weight."""
        return await self._change(of_organization(organization), "reset_organization", organization)

    async def set_gate(self, scope: Scope, name: str, rate: Override) -> Change | None:
        """Decide on the gate of an environment or organization; what is None stays as it was."""
        return await self._change(of_gate(scope, name), "set_gate", scope, name, *rate)

    async def reset_gate(self, scope: Scope, name: str) -> Change | None:
        """Take back what was decided on the gate of an environment or organization."""
        return await self._change(of_gate(scope, name), "reset_gate", scope, name)

    async def _change(self, what: str, sql: str, *arguments: object) -> Change | None:
        async with self._connection.transaction():
            await self._connection.execute(statement("name_operator"), self._who)
            await self._connection.execute(statement(sql), *arguments)
            return await self.last(what)


def of_organization(organization: str) -> str:
    """What the audit calls an organization's enrolment and weight."""
    return f"organization {organization}"


def of_gate(scope: Scope, name: str) -> str:
    """What the audit calls the gate of an environment or organization."""
    return f"gate {scope} {name}"


def _parsed(text: str | None) -> Any:
    return None if text is None else orjson.loads(text)

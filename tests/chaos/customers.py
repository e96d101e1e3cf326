"""What customers ask for: a seeded mix of triggers with all options, and of operations on the runs they made.

Every trigger's payload names its request (`request`) and its environment's secret. Keys, debounce keys and
tokens are made of the time, so that customers in different processes contend for them.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from tests.builders import bound_id
from tests.chaos.tenants import Tenant

Body = dict[str, Any]

_TASKS = ("send-email", "resize-image")
_REMEMBERED = 200
_SLOT_S = 5


@dataclass(frozen=True, slots=True)
class Wish:
    """One request. `is_repeated`: sending it again, when there was no reply, cannot do it twice."""

    request: str
    kind: str
    stream: Literal["triggers", "operations"]
    tenant: Tenant
    body: Body | str
    is_repeated: bool
    reply: Literal["wanted", "none", "forbidden"] = "wanted"


@dataclass(frozen=True, slots=True)
class Run:
    """A run that a reply named."""

    id: str
    tenant: Tenant
    has_parent: bool
    is_delayed: bool


class Customer:
    """Thinks of requests, one at a time, and remembers the runs that came of them."""

    def __init__(self, name: str, tenants: Sequence[Tenant], seed: str) -> None:
        self._name = name
        self._tenants = tenants
        self._random = random.Random(seed)
        self._number = 0
        self._runs: deque[Run] = deque(maxlen=_REMEMBERED)

    def wish(self, now: float) -> Wish:
        """The next request. `now` is in seconds since 1970."""
        self._number += 1
        request = f"{self._name}-{self._number}"
        table = _TRIGGERS if not self._runs or self._random.random() < 0.8 else _OPERATIONS
        make = self._random.choices(list(table), list(table.values()))[0]
        return make(self, request, now)

    def learn(self, wish: Wish, reply: dict[str, Any]) -> None:
        """Take note of a reply: its run can be changed from now on."""
        if reply.get("type") != "run" or wish.stream != "triggers" or not isinstance(wish.body, dict):
            return
        options = wish.body.get("options", {})
        self._runs.append(
            Run(
                reply["run"]["friendly_id"],
                wish.tenant,
                "parent_run_id" in options and not reply["is_cached"],
                "debounce" not in options and reply["status"] == "DELAYED",
            )
        )

    # What follows are the kinds of triggers.

    def _plain(self, request: str, now: float) -> Wish:
        return self._trigger(request, "plain", now)

    def _chosen(self, request: str, now: float) -> Wish:
        return self._trigger(request, "chosen", now, run_id=f"run_{request}")

    def _keyed(self, request: str, now: float) -> Wish:
        key = f"long {int(now) // _SLOT_S} {self._random.randrange(6)}"
        options: Body = {"idempotency_key": key}
        if self._random.random() < 0.5:
            options["idempotency_key_ttl"] = "24h"
        if self._random.random() < 0.4:
            options["run_id"] = f"run_{request}"
        return self._trigger(request, "keyed", now, **options)

    def _shortly_keyed(self, request: str, now: float) -> Wish:
        key, ttl = f"short {self._random.randrange(4)}", f"{self._random.randint(3, 8)}s"
        options: Body = {"idempotency_key": key, "idempotency_key_ttl": ttl}
        if self._random.random() < 0.4:
            options["run_id"] = f"run_{request}"
        return self._trigger(request, "short", now, **options)

    def _expiring(self, request: str, now: float) -> Wish:
        """A run that may expire in the buffer, and whose key is free then."""
        key = f"expiring {int(now) // _SLOT_S} {self._random.randrange(2)}"
        return self._trigger(
            request, "expiring", now, idempotency_key=key, ttl=f"{self._random.randint(1, 3)}s"
        )

    def _debounced(self, request: str, now: float) -> Wish:
        debounce: Body = {
            "key": f"debounce {int(now) // (4 * _SLOT_S)} {self._random.randrange(3)}",
            "delay": f"{self._random.randint(600, 900)}s",
            "mode": self._random.choice(["trailing", "trailing", "leading"]),
        }
        if self._random.random() < 0.3:
            debounce["max_delay"] = "20m"
        return self._trigger(request, "debounced", now, debounce=debounce, run_id=f"run_{request}")

    def _token(self, request: str, now: float) -> Wish:
        tenant = self._tenant()
        token = f"token {tenant.secret} {int(now) // _SLOT_S} {self._random.randrange(3)}"
        options = {"one_time_use_token": token, "run_id": f"run_{request}"}
        return self._trigger(request, "token", now, tenant, **options)

    def _child(self, request: str, now: float) -> Wish:
        if not self._runs:
            return self._plain(request, now)
        parent = self._random.choice(self._runs)
        options: Body = {"parent_run_id": parent.id, "run_id": f"run_{request}"}
        options["resume_parent_on_completion"] = self._random.random() < 0.4
        return self._trigger(request, "child", now, parent.tenant, **options)

    def _delayed(self, request: str, now: float) -> Wish:
        delay = self._random.choice(["20m", "1h", "2h30m", _instant(now + 7200)])
        return self._trigger(request, "delayed", now, delay=delay, run_id=f"run_{request}")

    def _full(self, request: str, now: float) -> Wish:
        choose = self._random.choice
        options: Body = {
            "run_id": f"run_{request}",
            "idempotency_key": f"full {request}",
            "idempotency_key_options": {"key": request, "scope": choose(["run", "attempt", "global"])},
            "ttl": choose(["1h", 7200]),
            "queue": choose(["emails", "images"]),
            "concurrency_key": f"user {self._random.randrange(9)}",
            "worker_queue": "main",
            "machine": "small-1x",
            "priority": self._random.randrange(-5, 5),
            "max_attempts": 3,
            "max_duration": 300,
            "lock_to_version": "20260101.1",
            "test": self._random.random() < 0.5,
            "batch": {"id": f"batch_{request}", "index": self._random.randrange(9)},
        }
        return self._trigger(request, "full", now, **options)

    def _late(self, request: str, now: float) -> Wish:
        wish = self._trigger(request, "late", now, run_id=f"run_{request}")
        assert isinstance(wish.body, dict)
        wish.body["deadline"] = _instant(now + self._random.choice([-1.0, 0.2, 2.0]))
        return wish

    def _wrong(self, request: str, now: float) -> Wish:
        """What must be refused: nothing may come of it."""
        wrong: Sequence[Body] = (
            {"delay": "in a while"},
            {"nope": 1},
            {"tags": [str(number) for number in range(60)]},
            {"run_id": "run_m" + "0" * 31},
            {"parent_run_id": "run_nobody"},
            {"queue": "a\0b"},
        )
        wish = self._trigger(request, "wrong", now, **self._random.choice(wrong))
        if self._random.random() < 0.2:
            body = f'{{"request": "{request}", this is not JSON'
            return Wish(request, "garbage", "triggers", wish.tenant, body, is_repeated=False)
        return wish

    def _foreign(self, request: str, now: float) -> Wish:
        """A child of a run of another tenant: there is no such parent here."""
        if not self._runs:
            return self._plain(request, now)
        run = self._random.choice(self._runs)
        tenant = self._random.choice([one for one in self._tenants if one.id != run.tenant.id])
        return self._trigger(request, "foreign", now, tenant, parent_run_id=run.id)

    def _silent(self, request: str, now: float) -> Wish:
        wish = self._trigger(request, "silent", now)
        return Wish(request, "silent", "triggers", wish.tenant, wish.body, is_repeated=False, reply="none")

    def _forbidden(self, request: str, now: float) -> Wish:
        wish = self._trigger(request, "forbidden", now)
        return Wish(
            request, "forbidden", "triggers", wish.tenant, wish.body, is_repeated=False, reply="forbidden"
        )

    # What follows are the operations.

    def _retrieve(self, request: str, now: float) -> Wish:
        return self._operation(request, "retrieve", "run.retrieve", is_repeated=True)

    def _retrieve_foreign(self, request: str, now: float) -> Wish:
        run = self._random.choice(self._runs)
        tenant = self._random.choice([one for one in self._tenants if one.id != run.tenant.id])
        kind = self._random.choice(["run.retrieve", "run.cancel"])
        body = {"type": kind, "environment": _tenancy(tenant), "run_id": run.id}
        return Wish(request, "foreign operation", "operations", tenant, body, is_repeated=True)

    def _cancel(self, request: str, now: float) -> Wish:
        return self._operation(request, "cancel", "run.cancel", is_repeated=True, reason=request)

    def _add_tag(self, request: str, now: float) -> Wish:
        return self._operation(request, "tag", "run.add_tags", is_repeated=True, tags=[request])

    def _set(self, request: str, now: float) -> Wish:
        change = {"type": "set", "key": request, "value": 1}
        return self._operation(request, "set", "run.update_metadata", is_repeated=True, operations=[change])

    def _append(self, request: str, now: float) -> Wish:
        change = {"type": "append", "key": "list", "value": request}
        return self._operation(
            request, "append", "run.update_metadata", is_repeated=False, operations=[change]
        )

    def _increment(self, request: str, now: float) -> Wish:
        change = {"type": "increment", "key": "count", "value": 1}
        return self._operation(
            request, "increment", "run.update_metadata", is_repeated=False, operations=[change]
        )

    def _increment_parent(self, request: str, now: float) -> Wish:
        children = [run for run in self._runs if run.has_parent]
        if not children:
            return self._increment(request, now)
        change = {"type": "increment", "key": "children", "value": 1}
        return self._operation(
            request,
            "parent",
            "run.update_metadata",
            self._random.choice(children),
            is_repeated=False,
            operations=[],
            parent_operations=[change],
        )

    def _reschedule(self, request: str, now: float) -> Wish:
        delayed = [run for run in self._runs if run.is_delayed]
        if not delayed:
            return self._retrieve(request, now)
        return self._operation(
            request,
            "reschedule",
            "run.reschedule",
            self._random.choice(delayed),
            is_repeated=True,
            delay=_instant(now + self._random.uniform(20_000, 90_000)),
        )

    def _replay(self, request: str, now: float) -> Wish:
        tenant = self._random.choice(self._runs).tenant
        payload = {"request": request, "secret": tenant.secret}
        run = self._random.choice([run for run in self._runs if run.tenant is tenant])
        return self._operation(request, "replay", "run.replay", run, is_repeated=False, payload=payload)

    def _list(self, request: str, now: float) -> Wish:
        tenant = self._tenant()
        body = {"type": "run.list", "environment": _tenancy(tenant), "limit": self._random.randint(1, 30)}
        return Wish(request, "list", "operations", tenant, body, is_repeated=True)

    def _reset(self, request: str, now: float) -> Wish:
        tenant = self._tenant()
        key = f"long {int(now) // _SLOT_S} {self._random.randrange(6)}"
        body = {
            "type": "idempotency_key.reset",
            "environment": _tenancy(tenant),
            "task": self._random.choice(_TASKS),
            "idempotency_key": key,
        }
        return Wish(request, "reset", "operations", tenant, body, is_repeated=False)

    def _trigger(
        self, request: str, kind: str, now: float, tenant: Tenant | None = None, **options: Any
    ) -> Wish:
        tenant = tenant or self._tenant()
        options.setdefault("tags", [f"of {tenant.secret}"])
        if options.get("run_id") == f"run_{request}" and self._random.random() < 0.6:
            number = int("".join(filter(str.isdigit, request)))
            options["run_id"] = f"run_{bound_id(tenant.organization_id, tenant.id, number)}"
        if self._random.random() < 0.5:
            options["metadata"] = {"secret": tenant.secret, "list": [], "count": 0}
        body = {
            "task": self._random.choice(_TASKS),
            "environment": tenant.as_sent(self._is_enrolled(tenant, now)),
            "payload": {"request": request, "secret": tenant.secret},
            "options": options,
        }
        is_repeated = "run_id" in options or "idempotency_key" in options
        return Wish(request, kind, "triggers", tenant, body, is_repeated)

    def _operation(
        self,
        request: str,
        kind: str,
        operation: str,
        run: Run | None = None,
        *,
        is_repeated: bool,
        **fields: Any,
    ) -> Wish:
        run = run or self._random.choice(self._runs)
        body = {"type": operation, "environment": _tenancy(run.tenant), "run_id": run.id, **fields}
        return Wish(request, kind, "operations", run.tenant, body, is_repeated)

    def _tenant(self) -> Tenant:
        return self._random.choices(self._tenants, [tenant.share for tenant in self._tenants])[0]

    def _is_enrolled(self, tenant: Tenant, now: float) -> bool | None:
        if not tenant.flips:
            return None
        return int(now / 3) % 2 == 0


Make = Callable[[Customer, str, float], Wish]

_TRIGGERS: dict[Make, float] = {
    Customer._plain: 22,
    Customer._chosen: 14,
    Customer._keyed: 20,
    Customer._shortly_keyed: 6,
    Customer._expiring: 3,
    Customer._debounced: 7,
    Customer._token: 4,
    Customer._child: 7,
    Customer._delayed: 5,
    Customer._full: 5,
    Customer._late: 2,
    Customer._wrong: 2,
    Customer._foreign: 1,
    Customer._silent: 1,
    Customer._forbidden: 0.5,
}

_OPERATIONS: dict[Make, float] = {
    Customer._retrieve: 5,
    Customer._retrieve_foreign: 2,
    Customer._cancel: 3,
    Customer._add_tag: 4,
    Customer._set: 4,
    Customer._append: 2,
    Customer._increment: 4,
    Customer._increment_parent: 2,
    Customer._reschedule: 2,
    Customer._replay: 1,
    Customer._list: 2,
    Customer._reset: 1,
}


def _tenancy(tenant: Tenant) -> dict[str, str]:
    return {"id": tenant.id, "organization_id": tenant.organization_id}


def _instant(at: float) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at)).isoformat()

"""Bodies that are as they should be: good requests, and what hostile ones are made from."""

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from tests.builders import EVERY_OPTION
from tests.fuzz.entries import Body, Tenant

MAX_PAYLOAD, MAX_METADATA, MAX_TAGS = 20_000, 10_000, 10
MAX_BODY = MAX_PAYLOAD + MAX_METADATA + 131_072

TASKS = ("send-email", "resize", "naïve task ✓")


def trigger(rng: random.Random, tenant: Tenant, number: int) -> Body:
    """A trigger with everything that goes together; it is not enrolled, so that it is a row at once."""
    return {
        "task": rng.choice(TASKS),
        "environment": tenant.environment(
            project_id=f"proj_{tenant.name}",
            type=rng.choice(["DEVELOPMENT", "STAGING", "PREVIEW", "PRODUCTION"]),
            feature_flags={"mollifier_enabled": False, "other": [1, {"x": None}]},
        ),
        "payload": {"of": tenant.secret, "list": [1, 2.5, "ü", None]},
        "payload_type": "application/json",
        "options": {
            **deepcopy(EVERY_OPTION),
            "run_id": f"run_{tenant.name}-{number}",
            "idempotency_key": f"{tenant.name} {number}",
            "priority": 3,
            "test": False,
            "tags": [tenant.secret, "é"],
            "metadata": {"of": tenant.secret, "count": 0, "list": []},
            "resume_parent_on_completion": False,
        },
        "trace_context": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        "deadline": "2100-01-01T00:00:00Z",
    }


def operation(rng: random.Random, tenant: Tenant, number: int) -> Body:
    """An operation of some type."""
    kind = rng.choice(list(OPERATIONS))
    return {"type": kind, "environment": tenant.environment(), **OPERATIONS[kind](rng, tenant, number)}


def _update(rng: random.Random, tenant: Tenant, number: int) -> Body:
    changes = [
        {"type": "set", "key": "a", "value": {"b": [1, "x"]}},
        {"type": "set", "key": "$.deep.er[0]", "value": number},
        {"type": "append", "key": "list", "value": number % 7},
        {"type": "remove", "key": "list", "value": number % 5},
        {"type": "increment", "key": "count", "value": 1},
        {"type": "delete", "key": "a"},
        {"type": "update", "value": {"of": tenant.secret}},
    ]
    return {"run_id": tenant.run_id("work"), "operations": rng.sample(changes, 3)}


OPERATIONS: dict[str, Callable[[random.Random, Tenant, int], Body]] = {
    "run.retrieve": lambda rng, tenant, number: {"run_id": tenant.run_id("work")},
    "run.cancel": lambda rng, tenant, number: {"run_id": f"run_{tenant.name}-{number}", "reason": "why not"},
    "run.reschedule": lambda rng, tenant, number: {"run_id": tenant.run_id("work"), "delay": "3h"},
    "run.add_tags": lambda rng, tenant, number: {"run_id": tenant.run_id("work"), "tags": ["vip"]},
    "run.update_metadata": _update,
    "run.replay": lambda rng, tenant, number: {"run_id": tenant.run_id("work"), "payload": {"n": number}},
    "run.list": lambda rng, tenant, number: {
        "limit": 3,
        "status": "DELAYED",
        "task": TASKS[0],
        "tag": "vip",
        "since": "2026-01-01T00:00:00Z",
        "until": "2036-01-01T00:00:00Z",
    },
    "idempotency_key.reset": lambda rng, tenant, number: {
        "task": TASKS[0],
        "idempotency_key": f"no {number}",
    },
}

ON_A_RUN = [kind for kind in OPERATIONS if kind not in ("run.list", "idempotency_key.reset")]

VALID = {"triggers": trigger, "operations": operation}


def first_run(tenant: Tenant, which: str) -> Body:
    """The trigger of a run that a tenant has from the beginning: delayed, so that all can be done to it."""
    options: dict[str, Any] = {"run_id": tenant.run_id(which), "delay": "5h", "tags": [tenant.secret]}
    options["metadata"] = {"of": tenant.secret, "count": 0, "list": [], "small": 1e-300}
    if which == "kept":
        options["idempotency_key"] = tenant.key
    return {
        "task": TASKS[0],
        "environment": tenant.environment(project_id=f"proj_{tenant.name}"),
        "payload": {"of": tenant.secret},
        "options": options,
    }

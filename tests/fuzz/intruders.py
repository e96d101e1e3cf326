"""Requests for what is another tenant's, and of tenants that nobody knows."""

from tests.fuzz.bodies import ON_A_RUN, TASKS
from tests.fuzz.entries import VICTIMS, Draft, Tenant
from tests.fuzz.material import Material, anything, exactly, on


def foreign(of: Material) -> Draft:
    """What exists elsewhere does not exist: half of the address is the victim's own."""
    victim, mine = of.rng.choice(VICTIMS), of.tenant
    which = of.rng.choice(["kept", "work"])
    mixed = of.rng.choice(
        [
            mine.environment(),
            {"id": victim.environment_id, "organization_id": mine.organization_id},
            {"id": mine.environment_id, "organization_id": victim.organization_id},
        ]
    )
    if of.stream == "operations":
        kind = of.rng.choice([*ON_A_RUN, "run.list", "idempotency_key.reset"])
        body = {**on(of, kind), "environment": mixed}
        if kind == "run.list":
            return exactly({"type": kind, "environment": mixed}, "run_list")
        if kind == "idempotency_key.reset":
            replies = ("run_not_found", "idempotency_key_reset")  # of a run that was made here, see below
            return exactly({**body, "idempotency_key": victim.key}, *replies)
        return exactly({**body, "run_id": victim.run_id(which)}, "run_not_found")
    body = of.body()
    body["environment"] = {**body["environment"], **mixed}
    body["environment"]["feature_flags"] = {"mollifier_enabled": of.rng.random() < 0.5}
    what = of.rng.randrange(3)
    if what == 0:
        body["task"], body["options"]["idempotency_key"] = TASKS[0], victim.key
        return anything(body)
    if what == 1:
        body["options"] |= {"parent_run_id": victim.run_id(which)}
        body["options"]["resume_parent_on_completion"] = of.rng.random() < 0.5
        return exactly(body, "parent_run_not_found")
    body["options"] |= {"run_id": victim.run_id(which)}
    return exactly(body, "run_id_conflict")


def stranger(of: Material) -> Draft:
    """Nobody ever heard of this tenant, nor will again; what is kept of it is kept for nothing."""
    stranger = Tenant(f"{of.number}{'n' * of.rng.choice([1, 1_900, 1_950, 2_000])}")
    if of.stream == "operations":
        kind = of.rng.choice([*ON_A_RUN, "idempotency_key.reset", "run.list"])
        body = {**on(of, kind), "environment": stranger.environment()}
        return exactly(body, "run_list" if kind == "run.list" else "run_not_found")
    body = of.body()
    body["environment"] |= stranger.environment()
    body["options"]["parent_run_id"] = "run_nobody"
    return exactly(body, "parent_run_not_found")

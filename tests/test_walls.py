"""Two tenants in one house: neither can tell that the other is there. G7.

Random operations of both are performed beside one another, and then again by each in a world of its own.
Every reply has to be the same, to the letter. And every operation on what is elsewhere has to take the very
way, question by question, of one on what is nowhere: so nothing can be told from the time that it takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.drain import Drain
from app.keys import EnvironmentKeys
from app.operations.scene import Listing, StoredKeys
from app.ports import Taken
from app.redis_client import Call
from app.runs import BufferedRun, BufferedRuns, Runs, StoredRun, StoredRuns, Tenancy
from app.settings import Settings
from app.store import PostgresStore
from app.turns import RedisTurns
from tests import builders
from tests.adapters import Operator, Pool
from tests.test_runs import statements

START = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
NOW = START + timedelta(minutes=30)
TOMORROW = START + timedelta(hours=24)
NOT_COMPARED = ("materialised_at", "updated_at")
"""Which Postgres writes by its own clock."""

RELATIONS = {
    "the same environment, another organization": ("env_1", "org_2"),
    "another environment, the same organization": ("env_2", "org_1"),
    "nothing in common": ("env_2", "org_2"),
}


class Tenant(NamedTuple):
    name: str
    environment: str
    organization: str


class Step(NamedTuple):
    """`who`: 0 or 1; of the steps of the drain nobody."""

    what: str
    who: int
    details: dict[str, Any]


def runs_named(name: str) -> st.SearchStrategy[str]:
    return st.integers(0, 3).map(lambda number: f"{name}{number}")


targets = st.one_of(runs_named("own"), runs_named("other"), st.sampled_from(["nowhere", "own0-x"]))
metadata_steps = st.lists(
    st.sampled_from(
        [
            {"type": "increment", "key": "n", "value": 1},
            {"type": "append", "key": "$.l.x", "value": "y"},
            {"type": "set", "key": "$.n.m", "value": 1},
            {"type": "update", "value": {}},
        ]
    ),
    max_size=2,
)


@st.composite
def operations(draw: st.DrawFn) -> Step:
    kind = draw(
        st.sampled_from(
            [
                *("run.retrieve", "run.cancel", "run.reschedule", "run.add_tags", "run.update_metadata"),
                *("run.replay", "run.list", "idempotency_key.reset"),
            ]
        )
    )
    fields: dict[str, Any] = {"type": kind}
    if kind == "run.list":
        optional = {
            "limit": st.integers(1, 3),
            "status": st.sampled_from(["QUEUED", "CANCELED"]),
            "tag": st.just("a"),
            "cursor": st.just("the last one"),
        }
        fields |= draw(st.fixed_dictionaries({}, optional=optional))
    elif kind == "idempotency_key.reset":
        fields |= {"task": "send-email", "idempotency_key": f"key{draw(st.integers(0, 4))}"}
    else:
        fields["run_id"] = draw(targets)
    if kind == "run.cancel":
        fields["reason"] = draw(st.sampled_from(["one", "two"]))
    if kind == "run.reschedule":
        fields["delay"] = draw(st.sampled_from(["1h", "3h"]))
    if kind == "run.add_tags":
        fields["tags"] = draw(st.lists(st.sampled_from("abcd"), max_size=3))
    if kind == "run.update_metadata":
        names = ("operations", "parent_operations", "root_operations")
        fields |= draw(st.fixed_dictionaries({}, optional=dict.fromkeys(names, metadata_steps)))
    return Step("operate", draw(st.integers(0, 1)), fields)


new_runs = st.builds(
    Step,
    st.sampled_from(["accept", "accept", "insert"]),
    st.integers(0, 1),
    st.fixed_dictionaries(
        {"number": st.integers(0, 3), "is_delayed": st.booleans(), "is_keyed": st.booleans()},
        optional={"parent": targets},
    ),
)
drain_steps = st.builds(Step, st.sampled_from(["take", "put back", "settle"]), st.just(-1), st.just({}))
scripts = st.lists(
    st.one_of(new_runs, operations(), operations(), operations(), drain_steps), min_size=10, max_size=30
)


@dataclass
class World:
    """Some tenants on real stores, and a drainer that stops wherever the script says."""

    operator: Operator
    store: PostgresStore
    turns: RedisTurns
    drain: Drain
    known: set[str] = field(default_factory=set)
    taken: Sequence[Taken] = ()
    cursors: dict[str, str] = field(default_factory=dict)

    async def play(self, script: Sequence[Step], tenants: Sequence[Tenant]) -> dict[str, list[Any]]:
        """Perform the steps of the tenants that live here; their replies."""
        replies: dict[str, list[Any]] = {tenant.name: [] for tenant in tenants}
        for number, step in enumerate(script):
            if step.who < 0:
                await self._move(step.what)
                continue
            for tenant in tenants:
                if tenant.name != "ab"[step.who]:
                    continue
                if step.what == "operate":
                    replies[tenant.name].append(await self._operate(number, step.details, tenant))
                else:
                    await self._create(number, step, tenant)
        await self._move("settle")
        return replies

    async def _move(self, what: str) -> None:
        """The drainer's next step; whatever it held it has let go of before."""
        if self.taken and what == "settle":
            await self.drain.handle(self.taken)
        elif self.taken:
            await self.turns.put_back(self.taken, apart=False)
        self.taken = ()
        self.turns.schedule.stir()
        if what == "take":
            # The first time as many are taken as were announced, the second time all that are there.
            await self.turns.put_back(await self.turns.take(500), apart=False)
            self.taken = await self.turns.take(500)
        while what == "settle" and await self.drain.turn():
            self.turns.schedule.stir()

    async def _create(self, number: int, step: Step, tenant: Tenant) -> None:
        details = step.details
        run_id = f"{tenant.name}{details['number']}"
        if run_id in self.known:
            return
        self.known.add(run_id)
        parent = _named(details["parent"], tenant) if "parent" in details else None
        run = builders.run(
            tenant.environment,
            id=run_id,
            organization_id=tenant.organization,
            created_at=START + timedelta(seconds=number),
            delay_until=TOMORROW if details["is_delayed"] else None,
            idempotency_key=f"key{details['number']}" if details["is_keyed"] else None,
            idempotency_key_expires_at=TOMORROW if details["is_keyed"] else None,
            parent_run_id=parent,
            root_run_id=parent,
        )
        if step.what == "insert":
            await self.store.insert([run], NOW)
        else:
            await self.operator.buffer.accept([replace(run, buffered_at=run.created_at)], [None])

    async def _operate(self, number: int, details: dict[str, Any], tenant: Tenant) -> Any:
        fields = dict(details)
        if "run_id" in fields:
            fields["run_id"] = f"run_{_named(fields['run_id'], tenant)}"
        if "cursor" in fields:
            fields["cursor"] = self.cursors.get(tenant.name) or "MDph"
        kind = fields.pop("type")
        entry = self.operator.entry(kind, tenant.environment, tenant.organization, **fields)
        entry = replace(entry, id=f"{int(NOW.timestamp() * 1000)}-{number}")
        triggered = len(self.operator.triggered)
        await self.operator.handle([entry])
        reply = self.operator.replies.get(entry.id)
        if reply is None:
            return self.operator.triggered[triggered:]
        self.cursors |= {tenant.name: reply["next_cursor"]} if reply.get("next_cursor") else {}
        for shown in (reply.get("run"), *reply.get("runs", ())):
            for name in NOT_COMPARED if shown else ():
                del shown[name]
        return reply


def _named(target: str, tenant: Tenant) -> str:
    """The id of a run of one of the tenants, as one of them would name it."""
    return target.replace("own", tenant.name).replace("other", "b" if tenant.name == "a" else "a")


FIRST = [
    Step(what, who, {"number": number, "is_delayed": who == number, "is_keyed": True})
    for number, what in enumerate(("accept", "insert"))
    for who in (0, 1)
]
"""Each has a buffered run and a row before anything else happens."""


@pytest.mark.parametrize("relation", RELATIONS)
@given(script=scripts)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
async def test_g7_each_tenant_lives_as_if_alone(
    client: Redis,
    pool: Pool,
    store: PostgresStore,
    make_turns: Callable[..., RedisTurns],
    make_drain: Callable[..., Drain],
    relation: str,
    script: list[Step],
) -> None:
    both = [Tenant("a", "env_1", "org_1"), Tenant("b", *RELATIONS[relation])]
    config = Settings.model_validate({"mutate_wait_ms": 0, "max_tags": 3})
    outcomes = []
    for tenants in (both, both[:1], both[1:]):
        await client.flushall()
        await pool.execute("DELETE FROM mollifier.runs")
        turns = make_turns()
        operator = Operator(client, pool, config, clock=lambda: NOW)
        world = World(operator, store, turns, make_drain(turns))
        outcomes.append(await world.play([*FIRST, *script], tenants))
    together, *alone = outcomes
    assert together == alone[0] | alone[1]


ON_A_RUN: dict[str, dict[str, Any]] = {
    "run.retrieve": {},
    "run.cancel": {"reason": "mine"},
    "run.reschedule": {"delay": "3h"},
    "run.add_tags": {"tags": ["mine"]},
    "run.update_metadata": {
        name: [{"type": "set", "key": "mine", "value": 1}]
        for name in ("operations", "parent_operations", "root_operations")
    },
    "run.replay": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "run.list": {},
    "idempotency_key.reset": {"task": "send-email", "idempotency_key": "key"},
}


class Asked(NamedTuple):
    """What an operation came to: its reply, what was asked of the stores for it, and what was logged."""

    reply: Any
    statements: list[tuple[str, tuple[Any, ...]]]
    calls: list[Call]
    logged: Any


async def ask(operator: Operator, kind: str, tenant: Tenant, run_id: str, number: int) -> Asked:
    """Perform one operation, and look over its shoulder."""
    fields = ON_A_RUN[kind] | {"run_id": f"run_{run_id}"} if kind in ON_A_RUN else OTHERS[kind]
    entry = operator.entry(kind, tenant.environment, tenant.organization, **fields)
    entry = replace(entry, id=f"{int(NOW.timestamp() * 1000)}-{number}")
    calls: list[Call] = []
    run = operator.scripts.run

    async def noting(given: Sequence[Call]) -> list[Any]:
        calls.extend(given)
        return await run(given)

    with pytest.MonkeyPatch.context() as patch, statements() as given, capture_logs() as logged:
        patch.setattr(operator.scripts, "run", noting)
        await operator.handle([entry])
    return Asked(operator.replies.get(entry.id), given, calls, logged)


class TestG7TheSameWay:
    """Operations on the run of another, wherever it is, beside the same ones in an empty house."""

    @pytest.fixture
    def operator(self, client: Redis, pool: Pool) -> Operator:
        return Operator(client, pool, Settings.model_validate({"mutate_wait_ms": 5000}), clock=lambda: NOW)

    @pytest.mark.parametrize("relation", RELATIONS)
    @pytest.mark.parametrize("place", ["stored", "buffered", "draining", "materialised", "aliased"])
    async def test_what_is_elsewhere_is_nowhere(
        self,
        client: Redis,
        pool: Pool,
        store: PostgresStore,
        make_turns: Callable[..., RedisTurns],
        make_drain: Callable[..., Drain],
        operator: Operator,
        place: str,
        relation: str,
    ) -> None:
        """Also while it is drained, which a change of its owner would have to wait for."""
        other = Tenant("b", *RELATIONS[relation])
        kinds = [*ON_A_RUN, *OTHERS]
        nowhere = [await ask(operator, kind, other, "a0", number) for number, kind in enumerate(kinds)]
        run = builders.run(
            "env_1",
            id="a0",
            created_at=START,
            delay_until=TOMORROW,
            idempotency_key="key",
            idempotency_key_expires_at=TOMORROW,
        )
        if place in ("stored", "aliased"):
            await store.insert([run if place == "stored" else replace(run, id="winner")], NOW)
        else:
            await operator.buffer.accept([replace(run, buffered_at=START)], [None])
        if place == "aliased":
            await pool.execute("INSERT INTO mollifier.run_aliases VALUES ('a0', 'winner', 'env_1')")
        turns = make_turns()
        turns.schedule.stir()
        taken = await turns.take(500) if place in ("draining", "materialised") else ()
        if place == "materialised":
            await make_drain(turns).handle(taken)
        assert (len(taken) > 0) == (place in ("draining", "materialised"))
        owner = Tenancy("org_1", "env_1")
        before = await operator.runs.find(owner, "a0", NOW)
        elsewhere = [await ask(operator, kind, other, "a0", number) for number, kind in enumerate(kinds)]
        if relation == "the same environment, another organization":
            # The entries of an environment are one stream, which a list reads before it looks whose they are.
            number = kinds.index("run.list")
            nowhere[number] = nowhere[number]._replace(calls=elsewhere[number].calls)
        assert elsewhere == nowhere
        assert [one.logged for one in elsewhere] == [[]] * len(kinds)
        assert operator.triggered == []
        assert await operator.runs.find(owner, "a0", NOW) == before

    @pytest.mark.parametrize("place", ["stored", "buffered"])
    async def test_every_question_names_its_tenant(
        self, pool: Pool, store: PostgresStore, operator: Operator, place: str
    ) -> None:
        """In Postgres as a condition, without which it finds nothing; in Redis in the names of all keys."""
        tenant = Tenant("a", "env_1", "org_1")
        for number, kind in enumerate([*ON_A_RUN, *OTHERS]):
            run = builders.run(
                "env_1",
                id=f"a{number}",
                created_at=START,
                delay_until=TOMORROW,
                idempotency_key="key" if kind in OTHERS else None,
                idempotency_key_expires_at=TOMORROW if kind in OTHERS else None,
            )
            if place == "stored":
                await store.insert([run], NOW)
            else:
                await operator.buffer.accept([replace(run, buffered_at=START)], [None])
            asked = await ask(operator, kind, tenant, run.id, number)
            assert asked.reply is None or asked.reply["type"] != "error"
            for query, arguments in asked.statements:
                assert {"org_1", "env_1"} <= {one for one in arguments if isinstance(one, str)}, query
                for own in ("org_1", "env_1"):
                    for missing in (None, "", "%"):
                        asking = [missing if one == own else one for one in arguments]
                        assert await pool.fetch(query, *asking) == []
            keys = operator.buffered._keys
            own_keys = {*names_of(keys.environment("env_1")), keys.claim(replace(run, idempotency_key="key"))}
            for call in asked.calls:
                named = call.arguments[:1] if call.keys is None else call.keys
                assert {str(one) for one in named} <= own_keys, call

    def test_none_can_be_asked_without_one(self) -> None:
        """Every way to a run takes whose it is, or a run that was found that way."""
        for asks in (Runs, StoredRuns, BufferedRuns, Listing, StoredKeys):
            for name, method in vars(asks).items():
                if not name.startswith("_"):
                    first = next(iter(get_type_hints(method).values()))
                    assert first in (Tenancy, StoredRun, BufferedRun), f"{asks.__name__}.{name}"
        for incomplete in ({}, {"environment_id": "env_1"}, {"organization_id": "org_1"}):
            with pytest.raises(TypeError):
                Tenancy(**incomplete)


def names_of(keys: EnvironmentKeys) -> set[str]:
    """The names of an environment's keys."""
    return {keys.entries, keys.index, keys.drain, keys.overlays}

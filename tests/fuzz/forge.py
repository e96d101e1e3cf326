"""Makes what is sent, one entry after the other."""

import random

from tests.fuzz.bodies import TASKS, first_run, trigger
from tests.fuzz.entries import ATTACKERS, VICTIMS, Draft, Entry, Fields, Tenant, encode, faststream, plain
from tests.fuzz.envelopes import ENVELOPES, NOBODY, UNANSWERABLE, Address, entry, large_rubbish
from tests.fuzz.extremes import oversize
from tests.fuzz.kinds import BODIES
from tests.fuzz.material import INVALID, Material

CORRELATIONS = ("1", "", "é\u202e", 'with\nlines\0and "quotes" \\', "c" * 1_024, "null", "{}", None)


class Forge:
    """Makes entries, one after the other: the same ones for a seed."""

    def __init__(self, seed: int, good_share: float = 0.1) -> None:
        self.rng = random.Random(f"fuzz {seed}")
        self.channels = f"mollifier:reply:fuzz{seed}:"
        self._good_share = good_share
        self._number = 0

    def first(self) -> list[Entry]:
        """The requests for the runs that are there from the beginning."""
        tenants = (*VICTIMS, *ATTACKERS)
        bodies = [(tenant, first_run(tenant, which)) for tenant in tenants for which in ("kept", "work")]
        return [self._good("triggers", tenant, encode(body), "run") for tenant, body in bodies]

    def good(self, stream: str) -> Entry:
        """A request of a victim that must succeed."""
        tenant, rng = self.rng.choice(VICTIMS), self.rng
        if stream == "triggers":
            body = trigger(rng, tenant, self._number + 1)
            body["environment"]["feature_flags"]["mollifier_enabled"] = rng.random() < 0.3
            return self._good(stream, tenant, encode(body), "run")
        kind = rng.choice(["run.retrieve", "run.list", "run.update_metadata"])
        fields: dict[str, object] = {"run_id": tenant.run_id("work")}
        if kind == "run.retrieve":
            fields["run_id"] = tenant.run_id("kept")
        elif kind == "run.list":
            fields = {"limit": 5, "task": TASKS[0]}
        else:
            fields["operations"] = [{"type": "increment", "key": "count", "value": 1}]
        body = {"type": kind, "environment": tenant.environment(), **fields}
        answer = "run_list" if kind == "run.list" else "run_details"
        return self._good(stream, tenant, encode(body), answer)

    def batch(self, hostile: int) -> list[Entry]:
        """So many hostile entries, and good ones among them."""
        entries = []
        for _ in range(hostile):
            if self.rng.random() < self._good_share:
                entries.append(self.good(self._stream()))
            entries.append(self.hostile())
        return entries

    def _stream(self) -> str:
        return "triggers" if self.rng.random() < 0.6 else "operations"

    def hostile(self) -> Entry:
        """The next hostile entry."""
        stream = self._stream()
        if self.rng.random() < 0.2:
            make = self.rng.choices(list(ENVELOPES), list(ENVELOPES.values()))[0]
            return make(self.material(stream), self.address())
        kinds = [kind for kind, (_, streams) in BODIES.items() if stream in streams]
        make_body = self.rng.choices(kinds, [BODIES[kind][0] for kind in kinds])[0]
        of = self.material(stream)
        return self.wrapped(make_body.__name__, of, make_body(of))

    def largest(self, stream: str) -> Entry:
        """One of the largest that there are."""
        if self.rng.random() < 0.5:
            return large_rubbish(self.material(stream), self.address())
        of = self.material(stream)
        return self.wrapped("oversize", of, oversize(of))

    def material(self, stream: str) -> Material:
        self._number += 1
        return Material(self.rng, stream, self.rng.choice(ATTACKERS), self._number)

    def address(self) -> Address:
        return Address(f"{self.channels}{self._number}", self.rng.choice(CORRELATIONS) or None)

    def wrapped(self, kind: str, of: Material, draft: Draft) -> Entry:
        """A draft in either envelope, with an address or without one where nobody is to be told."""
        address = self.address()
        headers = address.headers
        is_told = self.rng.random() < 0.9 or not draft.replies <= INVALID
        if not is_told:
            headers[b"reply_to"] = self.rng.choice([b"", None])
        if self.rng.random() < 0.5:
            fields: Fields = ((b"__data__", faststream(draft.body, headers)),)
        else:
            fields = plain(draft.body, headers[b"reply_to"], headers[b"correlation_id"])
        if is_told:
            return entry(kind, of, fields, address, draft.replies, draft.letters, draft.names)
        letters = UNANSWERABLE if draft.letters == {""} else draft.letters - {""}
        letters |= UNANSWERABLE if "" in draft.letters else NOBODY
        return entry(kind, of, fields, None, NOBODY, letters)

    def _good(self, stream: str, tenant: Tenant, body: bytes, answer: str) -> Entry:
        self._number += 1
        address = Address(f"{self.channels}{self._number}", str(self._number))
        if self.rng.random() < 0.5:
            fields: Fields = ((b"__data__", faststream(body, address.headers)),)
        else:
            fields = plain(body, *address.headers.values())
        of = Material(self.rng, stream, tenant, self._number)
        made = entry("good", of, fields, address, frozenset({answer}), frozenset({""}))
        made.is_good = True
        return made

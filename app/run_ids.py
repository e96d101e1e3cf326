"""Run ids: derived from a stream entry, or chosen by the caller. Guarantee G3.

A derived id is `m` and 31 hexadecimal digits: 12 of the entry's milliseconds, 5 of its sequence,
14 of a digest over namespace, entry id and environment. So it sorts by time, is the same at every
redelivery, and differs between deployments that share a database. That form is reserved: a caller
may repeat such an id but not invent one.

A bound id is a caller's choice that carries its tenant: `b` and 44 hexadecimal digits, 12 of its
milliseconds, 16 at random, and 16 of a digest over organization, environment and those 28. No other tenant
can use it, so nobody has to be asked whether one does. Every other id has to be reserved.
"""

import re
import secrets
import time
from hashlib import blake2b

from schemas.requests import RUN_ID

PREFIX = "run_"

_DERIVED = re.compile(r"m[0-9a-f]{31}")
_BOUND = re.compile(r"b([0-9a-f]{28})([0-9a-f]{16})")
_CHOSEN = re.compile(RUN_ID)
_LARGEST_SEQUENCE = 0xFFFFF


def derive(namespace: str, entry_id: str, environment_id: str) -> str:
    """The id (without `run_`) of the run that the stream entry `<ms>-<seq>` asks for."""
    ms, _, sequence = entry_id.partition("-")
    digest = blake2b(f"{namespace}\0{entry_id}\0{environment_id}".encode(), digest_size=7).hexdigest()
    return f"m{int(ms) & 0xFFFFFFFFFFFF:012x}{min(int(sequence), _LARGEST_SEQUENCE):05x}{digest}"


def is_derived(run_id: str) -> bool:
    """Whether an id has the reserved form."""
    return _DERIVED.fullmatch(run_id) is not None


def bind(organization_id: str, environment_id: str) -> str:
    """A new bound id (without `run_`) for a run of a tenant."""
    head = f"{time.time_ns() // 1_000_000 & 0xFFFFFFFFFFFF:012x}{secrets.token_hex(8)}"
    return f"b{head}{_binding(head, organization_id, environment_id)}"


def is_bound(run_id: str) -> bool:
    """Whether an id has the form of bound ones; whose it is was told when it was first read."""
    return _BOUND.fullmatch(run_id) is not None


def is_foreign(run_id: str, organization_id: str, environment_id: str) -> bool:
    """Whether an id is bound, but not to this tenant."""
    bound = _BOUND.fullmatch(run_id)
    return bound is not None and _binding(bound[1], organization_id, environment_id) != bound[2]


def needs_reservation(run_id: str) -> bool:
    """Whether an id has to be reserved until it is a row: nothing about it tells whose it is."""
    return not (is_derived(run_id) or is_bound(run_id))


def _binding(head: str, organization_id: str, environment_id: str) -> str:
    parts = f"{organization_id}\0{environment_id}\0{head}".encode(errors="surrogatepass")
    return blake2b(parts, digest_size=8, person=b"bound").hexdigest()


def parse_friendly(friendly_id: str) -> str:
    """`run_abc` -> `abc`.

    Raises:
        ValueError: not `run_` and 1 to 128 letters, digits, `_` or `-`.
    """
    match = _CHOSEN.fullmatch(friendly_id)
    if match is None:
        raise ValueError("must be run_ and then 1 to 128 letters, digits, _ or -")
    return match.group(1)


def friendly(run_id: str) -> str:
    """What customers see of an id."""
    return PREFIX + run_id


def span_id(run_id: str) -> str:
    """The W3C span id (16 hexadecimal digits) of a run, the same at every redelivery."""
    return blake2b(run_id.encode(), digest_size=8, person=b"span").hexdigest()


def buffered_span_id(run_id: str) -> str:
    """The W3C span id of the time that a run was buffered."""
    return blake2b(run_id.encode(), digest_size=8, person=b"buffered").hexdigest()


def trace_id(run_id: str) -> str:
    """The W3C trace id (32 hexadecimal digits) of a run whose producer sent no `traceparent`."""
    return blake2b(run_id.encode(), digest_size=16, person=b"trace").hexdigest()

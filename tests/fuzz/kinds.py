"""The table of hostile bodies."""

from collections.abc import Callable, Sequence

from tests.fuzz import extremes, garbled, intruders, misfits
from tests.fuzz.entries import Draft
from tests.fuzz.material import Material

Make = Callable[[Material], Draft]

BOTH, TRIGGERS, OPERATIONS = ("triggers", "operations"), ("triggers",), ("operations",)

BODIES: dict[Make, tuple[float, Sequence[str]]] = {
    garbled.random_bytes: (6, BOTH),
    garbled.cut_off: (6, BOTH),
    garbled.flipped: (9, BOTH),
    garbled.spliced: (4, BOTH),
    garbled.followed_by_more: (2, BOTH),
    garbled.bad_utf8: (4, BOTH),
    garbled.raw_nul: (3, BOTH),
    garbled.lone_surrogate: (3, BOTH),
    garbled.no_object: (2, BOTH),
    garbled.not_quite_json: (2, TRIGGERS),
    misfits.wrong_type: (9, BOTH),
    misfits.missing_field: (3, BOTH),
    misfits.unknown_field: (5, BOTH),
    misfits.escaped_nul: (4, BOTH),
    misfits.nul_in_metadata: (2, BOTH),
    misfits.duplicate_keys: (4, BOTH),
    misfits.repeated_keys: (2, BOTH),
    misfits.of_the_other_stream: (2, BOTH),
    misfits.unknown_operation: (2, OPERATIONS),
    extremes.huge_number: (3, BOTH),
    extremes.number_in_metadata: (2, BOTH),
    extremes.deep: (4, BOTH),
    extremes.deep_path: (1, OPERATIONS),
    extremes.oversize: (2, BOTH),
    extremes.long_text: (3, BOTH),
    extremes.wrong_time: (3, BOTH),
    extremes.edge_of_time: (2, BOTH),
    extremes.forged_cursor: (2, OPERATIONS),
    extremes.wrong_id: (3, BOTH),
    intruders.foreign: (6, BOTH),
    intruders.stranger: (20, BOTH),
}
"""Each kind of body with its weight, and the streams that it is for."""

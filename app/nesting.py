"""How deep JSON is nested, told before it is read: who reads it later has a limit, too, and may not tell."""

import re
from itertools import accumulate

MOST_LEVELS = 128
"""Of arrays and objects in a body, itself included."""

MOST_LEVELS_OF_METADATA = MOST_LEVELS - 2
"""What remains of these inside `options` of a trigger: so what a run has can always be replayed."""

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_IRRELEVANT = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def is_deeper(json: bytes, levels: int) -> bool:
    """Whether arrays and objects lie in one another more than so many levels deep.

    Of what is not JSON, the part before the mistake counts as if it were; so no parser gets deeper.
    """
    if json.count(b"[") + json.count(b"{") <= levels:
        return False
    if b"\\" in json:
        json = _ESCAPE.sub(b"", json)
    outside_strings = json.translate(None, _IRRELEVANT).split(b'"')[::2]
    depths = accumulate(map(_STEPS.__getitem__, b"".join(outside_strings)))
    return max(depths, default=0) > levels

"""What producers and clocks say, made fit for a terminal."""

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def printable(text: str) -> str:
    """Text that does nothing to a terminal, whatever a producer wrote: the unprintable is escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def ago(ms: int) -> str:
    """How long ago, in its largest unit."""
    seconds = max(0, ms // 1000)
    unit, length = next((one for one in _UNITS.items() if seconds >= one[1]), ("s", 1))
    return f"{seconds // length}{unit}"

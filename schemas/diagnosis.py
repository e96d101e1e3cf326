"""What `mollifier doctor --json` prints. Fields may be added; none changes its meaning."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Level = Literal["ok", "warning", "failure"]


class Finding(Struct, kw_only=True, frozen=True):
    """What one check came to."""

    check: Annotated[str, Meta(description="The check, as the table of checks names it.")]
    level: Annotated[Level, Meta(description="`ok`, `warning` or `failure`.")]
    seen: Annotated[str, Meta(description="What was seen.")]
    remedy: Annotated[str | None, Meta(description="What to do about it; null when it is ok.")]


class Diagnosis(Struct, kw_only=True, frozen=True):
    """What all of them came to."""

    level: Annotated[Level, Meta(description="The worst of all findings.")]
    findings: Annotated[list[Finding], Meta(description="One for each check, in the order of the table.")]

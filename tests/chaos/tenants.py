"""Who triggers: environments, each with a secret that must never be seen in another's replies."""

import re
from dataclasses import dataclass
from hashlib import blake2b

SECRET = re.compile(r"secret[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """An environment. `share` is its part of the traffic."""

    id: str
    organization_id: str
    secret: str
    share: float
    flips: bool

    def as_sent(self, enrolled: bool | None) -> dict[str, object]:
        """As the body of a trigger names it."""
        flags = {} if enrolled is None else {"feature_flags": {"mollifier_enabled": enrolled, "other": 1}}
        return {
            "id": self.id,
            "organization_id": self.organization_id,
            "project_id": f"proj_{self.secret}",
            **flags,
        }


def tenants(seed: int, count: int = 10) -> list[Tenant]:
    """Environments of a few organizations: one with most of the traffic, some that flip their enrolment."""
    made = []
    for number in range(count):
        secret = "secret" + blake2b(f"{seed}:{number}".encode(), digest_size=6).hexdigest()
        share = 8.0 if number == 0 else 1.0
        made.append(Tenant(f"env_{secret}", f"org_{seed}_{number // 2}", secret, share, number % 3 == 2))
    return made


def secrets_in(text: str) -> set[str]:
    """All secrets that a text gives away."""
    return set(SECRET.findall(text))

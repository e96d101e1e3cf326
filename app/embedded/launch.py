"""Starting a program that does not outlive this process, on Linux however this process ends."""

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO

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

"""Ports for embedded servers."""

import random
import socket

from app.embedded.errors import EmbeddedServerError

# Below every system's range of outgoing ports: a client that keeps reconnecting to a dead server on such a
# port may be given that same port as its own end, talk to itself, and keep the server from coming back.
PORTS = range(10_000, 16_000)

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

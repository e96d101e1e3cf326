"""A real Valkey and a real Postgres from PyPI wheels: `mollifier dev`, `mollifier demo` and the tests.

A server listens on 127.0.0.1 only and lives as long as the process that started it, however that process
ends. `kill` and `pause` are there to rehearse outages. Not meant for production: no password, no TLS.
"""

from app.embedded.errors import EmbeddedServerError
from app.embedded.launch import spawn
from app.embedded.ports import free_port, port_is_free
from app.embedded.postgres import Postgres
from app.embedded.valkey import Valkey

__all__ = ["EmbeddedServerError", "Postgres", "Valkey", "free_port", "port_is_free", "spawn"]

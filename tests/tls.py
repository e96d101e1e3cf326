"""TLS in front of a real server: neither wheel is built with it, so what ends it stands before them.

Certificates are made for the test and signed by an authority that nobody else knows.
"""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import trustme

_ASKS_FOR_TLS = bytes.fromhex("0000000804d2162f")
"""How a client of Postgres begins, which is answered by one letter: docs "Message Formats", SSLRequest."""


class Authority:
    """One that signs certificates, with files as clients want them: its own, and a client's with its key."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._authority = trustme.CA()
        self.file = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(self.file)
        client = self._authority.issue_cert("producer@example.org")
        self.certificate, self.key = folder / "client.pem", folder / "client.key"
        client.private_key_pem.write_to_path(self.key)
        for part in client.cert_chain_pems:
            part.write_to_path(self.certificate, append=True)

    def context(self, host: str, *, asks_for_certificate: bool = False) -> ssl.SSLContext:
        """What a server shows that goes by the name or address `host`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(host).configure_cert(context)
        if asks_for_certificate:
            self._authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@contextmanager
def behind_tls(port: int, context: ssl.SSLContext, *, is_postgres: bool = False) -> Iterator[int]:
    """A port of 127.0.0.1 that passes on to another, over TLS only. It runs in a thread of its own."""
    started: Future[tuple[int, asyncio.AbstractEventLoop]] = Future()
    stopping = asyncio.Event()

    async def serve(reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            if is_postgres:
                if await reading.readexactly(len(_ASKS_FOR_TLS)) != _ASKS_FOR_TLS:
                    writing.close()
                    return
                writing.write(b"S")
                await writing.drain()
                await writing.start_tls(context)
            inside = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_pass_on(reading, inside[1]), _pass_on(inside[0], writing))

    async def run() -> None:
        ours = None if is_postgres else context
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=ours)
        started.set_result((server.sockets[0].getsockname()[1], asyncio.get_running_loop()))
        await stopping.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    listening, loop = started.result(10)
    try:
        yield listening
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)


async def _pass_on(reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reading.read(65_536):
            writing.write(data)
            await writing.drain()
    writing.close()

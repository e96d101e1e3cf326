"""What lies between a process and a server: a TCP proxy that can cut, delay, and leave hanging."""

import asyncio
from contextlib import suppress

from app.embedded import free_port

DISTANCE_S = 0.004
"""How far away servers are in calm times: so a batch is under way for a while, and faults hit it there."""

_AT_ONCE = 65_536


class Link:
    """One address that leads to a server. `delay_s` holds each piece of data back, in both directions."""

    def __init__(self, name: str, target_port: int) -> None:
        self.name = name
        self.port = free_port()
        self.delay_s = DISTANCE_S
        self._target_port = target_port
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def close(self) -> None:
        """Cut what there is, and accept no more."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> int:
        """Break all connections; how many there were."""
        writers = list(self._writers)
        for writer in writers:
            writer.transport.abort()
        return len(writers)

    def hang(self) -> None:
        """Let nothing through any more: connections stay, and new ones are accepted."""
        self._flows.clear()

    def flow(self) -> None:
        """Undo `hang`; what was held back goes on its way."""
        self._flows.set()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        back: asyncio.StreamWriter | None = None
        try:
            await self._flows.wait()
            answers, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(back)
            pumps = [
                asyncio.create_task(self._pump(reader, back)),
                asyncio.create_task(self._pump(answers, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the server is away, and the client sees its connection closed
        finally:
            for one in (writer, back):
                if one is not None:
                    self._writers.discard(one)
                    with suppress(OSError, RuntimeError):
                        one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_AT_ONCE):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flows.wait()
            writer.write(data)
            await writer.drain()

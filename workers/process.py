"""What every process has: an HTTP side for health and metrics, loops, and an orderly end (G13)."""

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
import uvicorn
import uvloop
from faststream.asgi import AsgiFastStream, AsgiResponse, get
from faststream.redis import RedisBroker
from prometheus_client import make_asgi_app

from app.doctor import ESSENTIAL, refusal
from app.errors import ConfigurationError, StoreUnavailable, Unreachable
from app.logs import configure_logging, flush_logs
from app.settings import Settings
from app.telemetry import Telemetry
from app.wiring import World, open_telemetry

Loop = Callable[[], Awaitable[None]]

_CONNECTIONS_CLOSE_S = 2
_RESTART_S = 1.0
_WATCH_EVERY_S = 2.0
_EXAMINE_EVERY_S = 1.0
_LOOK_AT_SWITCHES_EVERY_S = 1.0
"""A change of a switch is known everywhere within two seconds also where nobody hears of it."""

_JSON = {"content-type": "application/json"}


class Process:
    """One process' loops around its world. Subclasses say what they run and how they finish."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stopping = asyncio.Event()
        self.refusal: str | None = None
        """Why the process must not run; set once that is known, to make it end."""
        self._tasks: list[asyncio.Task[None]] = []

    def broker(self) -> RedisBroker:
        """The FastStream broker whose subscribers feed this process."""
        raise NotImplementedError

    def loops(self) -> Sequence[Loop]:
        """What runs beside the heartbeat; each ends soon after `stopping` is set."""
        raise NotImplementedError

    async def finish(self) -> None:
        """Finish what is held, once the loops have ended."""

    async def start(self) -> None:
        """Start the heartbeat and the loops, once it is known what operators have decided.

        If Postgres is away, or does not answer in time, the environment variables hold until it does.
        """
        self._heart = asyncio.create_task(self.world.heartbeat.run())
        self.world.telemetry.switched(self.world.switches())
        await self._look_at_switches()
        self._follower = asyncio.create_task(self._keep_going(self._follow_operators))
        loops = (self._examine, self._watch_servers, *self.loops())
        self._tasks = [asyncio.create_task(self._keep_going(loop)) for loop in loops]

    async def _watch_servers(self) -> None:
        """Keep the gauge of readiness true, and say when it changes."""
        was: dict[str, str] | None = None
        while not self.stopping.is_set():
            missing = await self.world.health.missing()
            self.world.telemetry.ready(not missing)
            self.world.telemetry.summarise()
            if was is None or bool(missing) != bool(was):
                self.world.telemetry.event("readiness", ready=not missing, missing=missing)
            was = missing
            await self.pause(_WATCH_EVERY_S)

    async def _follow_operators(self) -> None:
        within_s = 30 + 2 * self.world.settings.store_timeout_ms / 1000
        while True:
            self.world.health.progress("switches", within_s)
            await self.world.operators.wait(_LOOK_AT_SWITCHES_EVERY_S)
            await self._look_at_switches()

    async def _look_at_switches(self) -> None:
        """Go by what operators have decided; while Postgres is away, by what was known last."""
        board = self.world.switchboard
        try:
            decided = await self.world.operators.read(
                board.current.decided.revision if board.is_known else None
            )
        except StoreUnavailable as error:
            self.world.telemetry.trouble("switches.unknown", error=repr(error.__cause__))
            return
        if decided is not None:
            changed = board.decide(decided)
            self.world.telemetry.switched(board.current)
            if changed:
                self.world.telemetry.event("switches.changed", **changed)

    async def _examine(self) -> None:
        """Say what each server is configured wrong in, once it answers."""
        for server in ESSENTIAL:
            while (found := await self.world.examine(server)) is None and not self.stopping.is_set():
                await self.pause(_EXAMINE_EVERY_S)
            for one in found or ():
                self.world.telemetry.diagnosed(one)
                self.refusal = self.refusal or refusal(one)
        await self.stopping.wait()

    async def _keep_going(self, loop: Loop) -> None:
        """Run a loop until the process stops, whatever happens in it."""
        while not self.stopping.is_set():
            try:
                await loop()
            except Exception as error:
                self.world.telemetry.failed("loop.failed", error, loop=getattr(loop, "__name__", ""))
                await self.pause(_RESTART_S)

    async def stop(self) -> None:
        """End the loops and finish what is held, within SHUTDOWN_TIMEOUT_S; others pick up what is left."""
        self.stopping.set()
        self._follower.cancel()
        try:
            async with asyncio.timeout(self.world.settings.shutdown_timeout_s):
                await asyncio.gather(*self._tasks)
                await self.finish()
        except TimeoutError:
            self.world.telemetry.trouble("shutdown.timed_out")
        except Unreachable as error:
            self.world.telemetry.unreachable("shutdown", error)
        self.world.heartbeat.stop()
        await self._heart
        await self.world.heartbeat.remove()

    async def close(self) -> None:
        """Close connections; after the broker has stopped."""
        await self.world.close()
        self.world.telemetry.close()
        self.world.telemetry.event("stopped", consumer=self.world.consumer)

    async def pause(self, seconds: float) -> None:
        """Sleep, but no longer than until the process is told to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            pass


def application(process: Process) -> AsgiFastStream:
    """The ASGI application around a process: `/health/live`, `/health/ready`, `/metrics`."""
    world = process.world
    name = type(process).__name__.lower()

    @get
    async def live(scope: Any) -> AsgiResponse:
        stuck = world.health.stuck()
        body = {"status": "stuck" if stuck else "ok", "process": name, "stuck_s": stuck}
        return AsgiResponse(orjson.dumps(body), 503 if stuck else 200, _JSON)

    @get
    async def ready(scope: Any) -> AsgiResponse:
        missing = await world.health.missing()
        world.telemetry.ready(not missing)
        body = {"status": "unavailable" if missing else "ok", "process": name, "missing": missing}
        return AsgiResponse(orjson.dumps(body), 503 if missing else 200, _JSON)

    return AsgiFastStream(
        process.broker(),
        logger=None,
        asgi_routes=[
            ("/health/live", live),
            ("/health/ready", ready),
            ("/metrics", make_asgi_app(registry=world.telemetry.registry)),
        ],
        on_startup=[process.start],
        on_shutdown=[process.stop],
        after_shutdown=[process.close],
    )


def run(make: Callable[[World], Process]) -> None:
    """Run a process until SIGTERM or SIGINT, then exit with status 0; the command of a Procfile line.

    Exit status 1, with a line that says why, when a setting is wrong, or a server is such that what the
    process takes would never be answered.
    """
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: sys.exit(0))
    try:
        _run(Settings.load(), make)
    except ConfigurationError as error:
        sys.exit(f"mollifier: the configuration is wrong.\n{error}")
    finally:
        flush_logs()


def _run(settings: Settings, make: Callable[[World], Process]) -> None:
    configure_logging(settings)
    telemetry = open_telemetry(settings, make.__name__.lower())
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            sys.exit(f"mollifier: HOST={settings.host} PORT={settings.port}: {error.strerror}")
        if (refused := uvloop.run(_serve(settings, telemetry, make, listener))) is not None:
            sys.exit(f"mollifier: {refused}")


async def _serve(
    settings: Settings, telemetry: Telemetry, make: Callable[[World], Process], listener: socket.socket
) -> str | None:
    """Serve until told to stop; what the process was refused for, if it was."""
    world = await World.open(settings, telemetry)
    process = make(world)
    config = uvicorn.Config(
        application(process),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_CONNECTIONS_CLOSE_S,
    )
    host, port = listener.getsockname()[:2]
    gc.collect()
    gc.freeze()  # what is there by now stays: to look through it again and again took a tenth of all time
    world.telemetry.event("started", consumer=world.consumer, http=f"http://{host}:{port}")
    await _Server(config, process).serve(sockets=[listener])
    return process.refusal


class _Server(uvicorn.Server):
    """Ends, in order, also when its process must not run."""

    def __init__(self, config: uvicorn.Config, process: Process) -> None:
        super().__init__(config)
        self._process = process

    async def on_tick(self, counter: int) -> bool:
        return self._process.refusal is not None or await super().on_tick(counter)

"""The only module that names every adapter: what a process is made of, and how it comes and goes."""

import time
from dataclasses import dataclass

import asyncpg
from redis.asyncio import Redis

from app import doctor
from app.buffer import RedisBuffer
from app.buffered_runs import RedisBufferedRuns
from app.census import RedisCensus
from app.claims import RedisClaims
from app.drain import Drain
from app.errors import ConfigurationError
from app.gate import RedisGate
from app.health import Health
from app.heartbeat import Heartbeat, consumer_name
from app.keys import Keys
from app.lease import Lease
from app.leftovers import PostgresRows, RedisLeftovers
from app.operate import Operate
from app.operations import TABLE
from app.operations.scene import Scene
from app.operator_settings import OperatorNews
from app.pipeline import Pipeline
from app.postgres import create_pool
from app.redis_client import Scripts
from app.redis_connection import connect
from app.replies import RedisDesk
from app.runs import Runs
from app.settings import Settings
from app.store import PostgresStore
from app.store_health import StoreHealth
from app.stored_runs import PostgresStoredRuns
from app.streams import RequestStream
from app.sweep import Sweep
from app.switches import Switchboard, Switches
from app.telemetry import Telemetry
from app.turns import RedisTurns
from app.wake import Wake
from schemas.diagnosis import Finding


def open_telemetry(settings: Settings, process: str) -> Telemetry:
    """What a process tells the world. OpenTelemetry is imported only if an exporter is configured.

    Raises:
        ConfigurationError: one is, and OpenTelemetry is not installed.
    """
    telemetry = Telemetry(process)
    if settings.are_traces_wanted:
        try:
            from app.traces import OtelSpans
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT: spans are wanted, but {error.name} "
                "is not installed: pip install 'mollifier[traces]'"
            ) from error
        telemetry.spans = OtelSpans(process, telemetry.traces_failed)
    return telemetry


@dataclass(frozen=True, slots=True)
class World:
    """What every process has: its name, its connections, and how it is doing."""

    settings: Settings
    consumer: str
    keys: Keys
    redis: Redis
    scripts: Scripts
    pool: "asyncpg.Pool[asyncpg.Record]"
    store: PostgresStore
    buffer: RedisBuffer
    heartbeat: Heartbeat
    health: Health
    switchboard: Switchboard
    operators: OperatorNews
    telemetry: Telemetry

    @classmethod
    async def open(cls, settings: Settings, telemetry: Telemetry) -> "World":
        """Connect to nothing yet: a process starts, and says that it is not ready, while servers are away."""
        keys = Keys(settings.namespace, settings.partitions)
        redis = connect(settings.redis_url)
        scripts = Scripts(redis)
        pool = await create_pool(settings.database_url, settings.store_timeout_ms / 1000)
        store = PostgresStore(pool, settings)
        consumer = consumer_name()
        return cls(
            settings=settings,
            consumer=consumer,
            keys=keys,
            redis=redis,
            scripts=scripts,
            pool=pool,
            store=store,
            buffer=RedisBuffer(scripts, keys, settings),
            heartbeat=Heartbeat(scripts, keys, consumer, settings.heartbeat_ttl_ms, telemetry),
            health=Health({"redis": redis.ping, "postgres": store.ping}),
            switchboard=Switchboard(settings),
            operators=OperatorNews(settings),
            telemetry=telemetry,
        )

    async def examine(self, server: str) -> list[Finding] | None:
        """What is essential and wrong with a server of `doctor.ESSENTIAL`; None while it does not answer."""
        return await doctor.look_at_start(server, self.settings, self.keys, self.redis, self.pool)

    async def close(self) -> None:
        """Let everything go. Statements under way have been waited for by then."""
        await self.redis.aclose()
        self.operators.close()
        self.pool.terminate()

    def switches(self) -> Switches:
        """The switches that this process goes by now."""
        return self.switchboard.current

    def request_stream(self, stream: str) -> RequestStream:
        """A request stream, as this process' consumer sees it."""
        return RequestStream(self.redis, self.keys, stream, self.consumer, self.settings.reclaim_idle_ms)

    def operate(self) -> Operate:
        """The way of an operation, on real servers."""
        stored = PostgresStoredRuns(self.pool, self.settings)
        buffered = RedisBufferedRuns(self.scripts, self.keys)
        scene = Scene(
            runs=Runs(stored, buffered, self.settings.mutate_wait_ms / 1000),
            stored=stored,
            buffered=buffered,
            claims=RedisClaims(self.scripts, self.keys, self.settings),
            keys=stored,
            front_door=self.request_stream(self.keys.triggers),
            settings=self.settings,
        )
        return Operate(
            table=TABLE,
            scene=scene,
            reservations=self.buffer,
            desk=RedisDesk(self.scripts, self.keys, self.keys.operations),
            settings=self.settings,
            telemetry=self.telemetry,
            heart=self.heartbeat,
        )

    def pipeline(self) -> Pipeline:
        """The way of a trigger, on real servers."""
        return Pipeline(
            gate=RedisGate(self.scripts, self.keys, self.settings),
            buffer=self.buffer,
            reservations=self.buffer,
            claims=RedisClaims(self.scripts, self.keys, self.settings),
            store=self.store,
            desk=RedisDesk(self.scripts, self.keys, self.keys.triggers),
            health=StoreHealth(self.settings, time.monotonic),
            settings=self.settings,
            telemetry=self.telemetry,
            heart=self.heartbeat,
            switches=self.switches,
        )

    def turns(self) -> RedisTurns:
        """The drainers' turns, as this process' consumer takes them."""
        return RedisTurns(self.scripts, self.keys, self.settings, self.consumer)

    def wake(self) -> Wake:
        """What wakes an idle drainer."""
        return Wake(self.redis, self.keys)

    def drain(self, turns: RedisTurns) -> Drain:
        """The way of a buffered run, on real servers."""
        return Drain(
            turns=turns,
            materialiser=self.store,
            graveyard=RedisDesk(self.scripts, self.keys, self.keys.triggers),
            reservations=self.buffer,
            settings=self.settings,
            telemetry=self.telemetry,
        )

    def lease(self) -> Lease:
        """The sweepers' lease, as this process sees it."""
        return Lease(self.scripts, self.keys, self.keys.sweeper, self.consumer)

    def sweep(self) -> Sweep:
        """The passes of the sweeper, on real servers."""
        return Sweep(
            census=RedisCensus(self.scripts, self.keys, self.settings),
            leftovers=RedisLeftovers(self.scripts, self.keys, self.settings),
            rows=PostgresRows(self.pool, self.settings),
            settings=self.settings,
            telemetry=self.telemetry,
        )

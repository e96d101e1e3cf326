"""The servers that both sides of every comparison share, and the processes that are measured on them."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from redis.asyncio import Redis

from app.embedded import Postgres, Valkey
from app.migrate import migrate
from app.redis_connection import connect
from bench.process import Process, cpu_s, until

VALKEY_OPTIONS = {"appendonly": "yes", "appendfsync": "everysec", "auto-aof-rewrite-percentage": "0"}
"""As in production. The file is rewritten between measurements instead of during some of them."""

POSTGRES_OPTIONS = {"fsync": "on", "synchronous_commit": "on"}
"""Its defaults, spelled out."""

_TABLES = "mollifier.runs, mollifier.run_aliases, mollifier.waitpoints"


@dataclass(frozen=True, slots=True)
class Stage:
    """One Valkey and one Postgres for a whole run of the bench."""

    valkey: Valkey
    postgres: Postgres
    redis: Redis
    sql: "asyncpg.Connection[asyncpg.Record]"
    folder: Path

    async def clear(self) -> None:
        """Leave nothing of what was measured before: in memory, in tables, or as work put off until later."""
        await self.redis.execute_command("FLUSHALL", "SYNC")  # type: ignore[no-untyped-call]
        await self.redis.bgrewriteaof()
        await self.sql.execute(f"TRUNCATE {_TABLES}")
        await self.sql.execute("CHECKPOINT")
        await until(self._is_rewritten, "the append-only file to be rewritten")

    @asynccontextmanager
    async def processes(self, *modules: str, **settings: object) -> AsyncIterator[list[Process]]:
        """One process for each module, ready. `settings` are those of the program, in lower case."""
        variables = {f"MOLLIFIER_{name.upper()}": str(value) for name, value in settings.items()}
        variables |= {"REDIS_URL": self.valkey.url, "DATABASE_URL": self.postgres.url}
        variables |= {"MOLLIFIER_LOG_LEVEL": "warning"}
        started: list[Process] = []
        try:
            started += [Process(module, self.folder, variables) for module in modules]
            for process in started:
                await process.ready()
            yield started
        except BaseException as error:
            for process in started:
                error.add_note(process.last_words)
            raise
        finally:
            for process in started:
                process.end()

    @property
    def redis_cpu_s(self) -> float:
        """Processor time that the Redis server has used so far."""
        assert self.valkey.pid is not None
        return cpu_s(self.valkey.pid)

    async def _is_rewritten(self) -> bool:
        state = await self.redis.info("persistence")
        return not state["aof_rewrite_in_progress"] and not state["aof_rewrite_scheduled"]


@asynccontextmanager
async def opened() -> AsyncIterator[Stage]:
    """A stage in a folder of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mollifier-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (
            Valkey(folder / "valkey", options=VALKEY_OPTIONS) as valkey,
            Postgres(folder / "postgres", options=POSTGRES_OPTIONS) as postgres,
        ):
            await migrate(postgres.url)
            redis = connect(valkey.url)
            sql = await asyncpg.connect(postgres.url)
            try:
                yield Stage(valkey, postgres, redis, sql, folder)
            finally:
                await sql.close()
                await redis.aclose()

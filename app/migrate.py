"""Bringing a database to the current schema: numbered files, each run once, in order."""

from importlib.resources import files

import asyncpg

from app.postgres import connect

_LOCK = 0x6D6F6C6C69666965
_CONNECT_S = 10.0


async def migrate(url: str) -> list[str]:
    """Apply what is missing, all in one transaction; the names of the files that were applied.

    Safe to run from many processes at once: they take turns, and all but the first find nothing to do.
    """
    connection = await connect(url, _CONNECT_S)
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            await connection.execute("CREATE SCHEMA IF NOT EXISTS mollifier")
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS mollifier.migrations"
                " (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            applied = {row["name"] for row in await connection.fetch("SELECT name FROM mollifier.migrations")}
            missing = [name for name in migrations() if name not in applied]
            for name in missing:
                await connection.execute(_text(name))
                await connection.execute("INSERT INTO mollifier.migrations (name) VALUES ($1)", name)
            return missing
    finally:
        await connection.close()


async def missing_migrations(connection: "asyncpg.Connection[asyncpg.Record]") -> list[str]:
    """The files that a database still lacks."""
    if await connection.fetchval("SELECT to_regclass('mollifier.migrations')") is None:
        return migrations()
    applied = {row["name"] for row in await connection.fetch("SELECT name FROM mollifier.migrations")}
    return [name for name in migrations() if name not in applied]


async def unknown_migrations(connection: "asyncpg.Connection[asyncpg.Record]") -> list[str]:
    """The files that were applied to a database and that this program, being older, does not have."""
    if await connection.fetchval("SELECT to_regclass('mollifier.migrations')") is None:
        return []
    applied = await connection.fetch("SELECT name FROM mollifier.migrations ORDER BY name")
    return [row["name"] for row in applied if row["name"] not in migrations()]


def migrations() -> list[str]:
    """The names of all files, in order."""
    folder = files("app").joinpath("sql", "migrations")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))


def _text(name: str) -> str:
    return files("app").joinpath("sql", "migrations", name).read_text(encoding="utf-8")

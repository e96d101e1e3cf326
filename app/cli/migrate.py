"""`mollifier migrate`: what the servers must have before the processes start."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.settings import Settings


def migrate() -> None:
    """Bring Postgres to the current schema and create the consumer groups in Redis. Safe to repeat."""
    import asyncio

    from app.settings import Settings

    for line in asyncio.run(prepare(Settings.load())) or ["nothing to do"]:
        print(line)


async def prepare(settings: "Settings") -> list[str]:
    """Apply what is missing in both servers; a line for each thing that was done.

    Raises:
        Complaint: a server cannot be reached or refuses.
    """
    import app.migrate
    from app.cli.complaints import reaching

    with reaching("DATABASE_URL", settings):
        applied = await app.migrate.migrate(settings.database_url)
    with reaching("REDIS_URL", settings):
        created = await _create_groups(settings)
    return [*(f"applied {name}" for name in applied), *(f"created the group of {name}" for name in created)]


async def _create_groups(settings: "Settings") -> list[str]:
    """Create each group at the beginning of its stream: nothing that waits there is passed over."""
    from redis.exceptions import ResponseError

    from app.keys import Keys
    from app.redis_connection import connect

    keys = Keys(settings.namespace, settings.partitions)
    created = []
    redis = connect(settings.redis_url)
    try:
        for stream in (keys.triggers, keys.operations):
            try:
                await redis.xgroup_create(stream, keys.group, id="0", mkstream=True)
                created.append(stream)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
    finally:
        await redis.aclose()
    return created

"""`mollifier drain`: what operators decide about the drain of the whole fleet."""

import typer

drain = typer.Typer(help="Pause and resume the drain of the whole fleet.", no_args_is_help=True)


@drain.command()
def pause() -> None:
    """Let every drainer finish its batches and stand still, until `resume`. Triggers go on."""
    _decide(paused=True)


@drain.command()
def resume() -> None:
    """Let every drainer go on."""
    _decide(paused=False)


def _decide(*, paused: bool) -> None:
    import asyncio

    asyncio.run(_store(paused=paused))
    print(f"the drain {'stands still' if paused else 'goes on'} within two seconds")


async def _store(*, paused: bool) -> None:
    from app.cli.complaints import reaching
    from app.operator_settings import DRAIN_PAUSED, decide
    from app.postgres import connect
    from app.settings import Settings

    settings = Settings.load()
    with reaching("DATABASE_URL", settings):
        connection = await connect(settings.database_url, settings.store_timeout_ms / 1000)
        try:
            await decide(connection, DRAIN_PAUSED, paused)
        finally:
            await connection.close()

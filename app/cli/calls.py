"""One call of the client from the command line: the options that all have, and what an error says."""

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

if TYPE_CHECKING:
    from app.client import Mollifier
    from app.errors import RequestError
    from schemas.replies import RunReply

Result = TypeVar("Result")

Env: TypeAlias = Annotated[str, typer.Option(help="The environment's id.")]
Org: TypeAlias = Annotated[str, typer.Option(help="The organization's id.")]
Payload: TypeAlias = Annotated[str | None, typer.Option(help="The run's payload, as JSON.")]
Timeout: TypeAlias = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the reply.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the reply as JSON.")]

ENV, ORG, TIMEOUT_S = "env_demo", "org_demo", 10.0


def call(ask: Callable[["Mollifier"], Awaitable[Result]], *, as_json: bool) -> Result:
    """What a call on the Redis of REDIS_URL comes to. An error reply is printed, and the exit status 1.

    Raises:
        Complaint: Redis cannot be reached.
        NoReply: none came in time.
    """
    import asyncio

    from app.errors import RequestError

    try:
        return asyncio.run(_call(ask))
    except RequestError as error:
        _print_error(error, as_json)
        raise typer.Exit(1) from None


async def _call(ask: Callable[["Mollifier"], Awaitable[Result]]) -> Result:
    from app.cli.complaints import reaching
    from app.client import Mollifier
    from app.redis_connection import connect
    from app.settings import Settings

    settings = Settings.load()
    with reaching("REDIS_URL", settings):
        redis = connect(settings.redis_url)
        try:
            await redis.ping()
        finally:
            await redis.aclose()
    async with Mollifier(settings.redis_url, settings.namespace) as mollifier:
        return await ask(mollifier)


def parsed_payload(text: str | None) -> dict[str, Any]:
    """The argument `payload` of a call, as ready JSON; none, if none is given."""
    import orjson

    if text is None:
        return {}
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--payload") from None
    return {"payload": text.encode()}


def print_json(value: object) -> None:
    """Print a value in a line."""
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def print_reply(reply: "RunReply", as_json: bool) -> None:
    """Print what a trigger came to."""
    if as_json:
        print_json(reply)
        return
    print(f"{reply.run.friendly_id}  {reply.status}")
    if reply.is_cached:
        print("An earlier run answers this idempotency key.")
    elif reply.is_mollified:
        print("Mollified: it waits in the buffer and will be in Postgres in a moment.")
    else:
        print("Passed through: it is in Postgres.")


def _print_error(error: "RequestError", as_json: bool) -> None:
    if as_json:
        detail = {"code": error.code, "message": error.message, "status": error.status}
        print_json({"type": "error", "error": detail | {"retryable": error.retryable}})
    else:
        print(f"{error.code}: {error.message}", file=sys.stderr)

"""`mollifier trigger`: one request, and its reply."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from app.errors import RequestError
    from schemas.replies import RunReply


def trigger(
    task: Annotated[str, typer.Argument(help="The task to run, e.g. send-email.")],
    env: Annotated[str, typer.Option(help="The environment's id.")] = "env_demo",
    org: Annotated[str, typer.Option(help="The organization's id.")] = "org_demo",
    project: Annotated[str, typer.Option("--project", "--proj", help="The project's id.")] = "proj_demo",
    payload: Annotated[str | None, typer.Option(help="The run's payload, as JSON.")] = None,
    key: Annotated[str | None, typer.Option(help="An idempotency key: at most one live run has it.")] = None,
    delay: Annotated[str | None, typer.Option(help="Start after this, e.g. 10m, or at an instant.")] = None,
    ttl: Annotated[str | None, typer.Option(help="Let the run expire unless started within it.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be repeated.")] = None,
    run_id: Annotated[str | None, typer.Option(help="A run id of your own: run_...")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the reply.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reply as JSON.")] = False,
) -> None:
    """Trigger one run on the Redis of REDIS_URL and print the reply.

    Exit status 1 when the reply is an error, or none came.
    """
    import asyncio

    from app.errors import RequestError

    body = _json(payload)
    options: dict[str, Any] = {
        "idempotency_key": key,
        "delay": delay,
        "ttl": ttl,
        "tags": tag or None,
        "run_id": run_id,
    }
    environment = {"id": env, "organization_id": org, "project_id": project}
    if body is not None:
        options["payload"] = body
    try:
        reply = asyncio.run(_send(task, environment, timeout, options))
    except RequestError as error:
        _print_error(error, as_json)
        raise typer.Exit(1) from None
    _print_reply(reply, as_json)


async def _send(
    task: str, environment: dict[str, str], timeout_s: float, options: dict[str, Any]
) -> "RunReply":
    from app.cli.complaints import reaching
    from app.client import Mollifier
    from app.redis_client import connect
    from app.settings import Settings

    settings = Settings.load()
    with reaching("REDIS_URL", settings):
        redis = connect(settings.redis_url)
        try:
            await redis.ping()
        finally:
            await redis.aclose()
    async with Mollifier(settings.redis_url, settings.namespace) as mollifier:
        return await mollifier.trigger(task, environment=environment, timeout=timeout_s, **options)


def _json(text: str | None) -> bytes | None:
    import orjson

    if text is None:
        return None
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--payload") from None
    return text.encode()


def _print_reply(reply: "RunReply", as_json: bool) -> None:
    import msgspec

    if as_json:
        sys.stdout.write(msgspec.json.encode(reply).decode() + "\n")
        return
    print(f"{reply.run.friendly_id}  {reply.status}")
    if reply.is_cached:
        print("An earlier run answers this idempotency key.")
    elif reply.is_mollified:
        print("Mollified: it waits in the buffer and will be in Postgres in a moment.")
    else:
        print("Passed through: it is in Postgres.")


def _print_error(error: "RequestError", as_json: bool) -> None:
    import orjson

    if as_json:
        detail = {"code": error.code, "message": error.message, "status": error.status}
        detail |= {"retryable": error.retryable}
        sys.stdout.write(orjson.dumps({"type": "error", "error": detail}).decode() + "\n")
    else:
        print(f"{error.code}: {error.message}", file=sys.stderr)

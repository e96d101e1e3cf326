"""`mollifier trigger`: one request, and its reply."""

from typing import Annotated

import typer

from app.cli.calls import (
    ENV,
    ORG,
    TIMEOUT_S,
    Env,
    Json,
    Org,
    Payload,
    Timeout,
    call,
    parsed_payload,
    print_reply,
)


def trigger(
    task: Annotated[str, typer.Argument(help="The task to run, e.g. send-email.")],
    env: Env = ENV,
    org: Org = ORG,
    project: Annotated[str, typer.Option("--project", "--proj", help="The project's id.")] = "proj_demo",
    payload: Payload = None,
    key: Annotated[str | None, typer.Option(help="An idempotency key: at most one live run has it.")] = None,
    delay: Annotated[str | None, typer.Option(help="Start after this, e.g. 10m, or at an instant.")] = None,
    ttl: Annotated[str | None, typer.Option(help="Let the run expire unless started within it.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be repeated.")] = None,
    run_id: Annotated[str | None, typer.Option(help="A run id of your own: run_...")] = None,
    timeout: Timeout = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Trigger one run on the Redis of REDIS_URL and print the reply.

    Exit status 1 when the reply is an error, or none came.
    """
    options = parsed_payload(payload) | {
        "idempotency_key": key,
        "delay": delay,
        "ttl": ttl,
        "tags": tag or None,
        "run_id": run_id,
    }
    environment = {"id": env, "organization_id": org, "project_id": project}
    reply = call(
        lambda mollifier: mollifier.trigger(task, environment=environment, timeout=timeout, **options),
        as_json=as_json,
    )
    print_reply(reply, as_json)

"""The producer's side in Python: triggers, and operations on runs. Other languages: docs/wire.md.

Any number of calls share one connection for replies and one that appends requests in batches. With retries
on, a trigger has a run id, the caller's or one chosen here, which all its tries share: a lost reply never
makes a second run.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Self, TypedDict, Unpack

import msgspec
from msgspec import UNSET

from app.bodies import AnyTenant, free_form, new_run_id, operation, request
from app.calls import Calls, Delivery, NoReply
from app.keys import Keys
from app.postbox import Postbox
from schemas import operations as requests
from schemas.replies import KeyResetReply, RunDetailsReply, RunListReply, RunReply
from schemas.requests import Environment, TraceContext
from schemas.run import RunDetails

__all__ = ["Delivery", "Mollifier", "NoReply", "new_run_id", "request"]

TIMEOUT_S = 10.0

_PAGE = 40
"""As many of the largest runs stay below 32 MB, at which Redis may drop the connection for replies."""

_encode = msgspec.json.Encoder().encode

MetadataChange = requests.AnyMetadataOperation | Mapping[str, Any]
"""A struct, or the same as a mapping: `{"type": "increment", "key": "count", "value": 1}`."""


class Conditions(TypedDict, total=False):
    """Which runs to list: all that are given hold. `created_at` is from `since` on, before `until`."""

    status: requests.Status | None
    task: str | None
    tag: str | None
    since: datetime | None
    until: datetime | None


class Mollifier:
    """Triggers runs, reads and changes them: `async with Mollifier(redis_url) as mollifier: ...`

    Replies come to the event loop that entered it. It connects in the background, and again whenever
    Redis was away, so entering never fails; calls wait for the connection.

    All calls have a `timeout` in seconds, None for ever, and raise

        RequestError: the reply is an error, of the class with its code. A retryable one means that nothing
            was done, and is raised only when there is no time left for another try. (An InternalError does
            not mean it; what could then be done twice is not tried again.)
        InvalidRequest: one of these. Operations raise it before anything is sent, if a field is wrong.
        NoReply: nothing came in time. The request may have been handled, or may still be; so it may when
            the call is cancelled.

    When a reply may have been missed, the request is sent again if handling it twice does what handling it
    once does: triggers, `retrieve`, `list_runs`, `cancel`, `add_tags`, `reset_key`. The others (`reschedule`,
    `update_metadata`, `replay`) end with NoReply. With `retry=False` nothing is ever sent again.

    Operations see nothing outside their `environment`, of which they need `id` and `organization_id`.
    """

    def __init__(self, redis_url: str, namespace: str = "mollifier", *, retry: bool = True) -> None:
        self._postbox = Postbox(redis_url, namespace)
        self._retry = retry
        keys = Keys(namespace, partitions=1)  # of these only the names of streams are used
        self._triggers = Calls(self._postbox, keys.triggers, "a trigger worker", retry=retry)
        self._operations = Calls(self._postbox, keys.operations, "an operations worker", retry=retry)

    async def __aenter__(self) -> Self:
        self._postbox.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._postbox.close()

    async def trigger(
        self,
        task: str,
        payload: object = UNSET,
        *,
        environment: Environment | Mapping[str, Any],
        trace_context: TraceContext | Mapping[str, Any] | None = None,
        deadline: datetime | None = None,
        payload_type: str = "application/json",
        timeout: float | None = TIMEOUT_S,
        **options: Any,
    ) -> RunReply:
        """Trigger one run. `payload` and `options` are those of `request`."""
        body = request(
            task,
            payload,
            environment=environment,
            trace_context=trace_context,
            deadline=deadline,
            payload_type=payload_type,
            **options,
        )
        if self._retry:
            body["options"].setdefault("run_id", new_run_id(environment))
        is_named = "run_id" in body["options"]
        return await self._triggers.call(_encode(body), RunReply, repeatable=is_named, timeout=timeout)

    def trigger_many(
        self, requests: Iterable[Mapping[str, Any]], timeout: float = TIMEOUT_S
    ) -> AsyncGenerator[Delivery, None]:
        """Send requests (see `request`) in one go; yields what became of each as the replies come.

        Nothing is sent again: an error is yielded in place of the reply. Requests that are to be tried again
        by the caller need a `run_id` of their own.
        """
        return self._triggers.many((_encode(body) for body in requests), timeout)

    async def retrieve(
        self, run_id: str, *, environment: AnyTenant, timeout: float | None = TIMEOUT_S
    ) -> RunDetails:
        """A run as it is, buffered or not. Free-form fields are JSON, which is null where there is none:
        `msgspec.json.decode(run.payload)`.
        """
        body = operation(requests.Retrieve, environment, run_id=run_id)
        return await self._about_a_run(body, timeout, repeatable=True)

    async def cancel(
        self,
        run_id: str,
        reason: str | None = None,
        *,
        environment: AnyTenant,
        timeout: float | None = TIMEOUT_S,
    ) -> RunDetails:
        """End a run, buffered or not. One that has ended is answered as it is, and the first reason stays."""
        body = operation(requests.Cancel, environment, run_id=run_id, reason=reason)
        return await self._about_a_run(body, timeout, repeatable=True)

    async def reschedule(
        self,
        run_id: str,
        delay: str | datetime,
        *,
        environment: AnyTenant,
        timeout: float | None = TIMEOUT_S,
    ) -> RunDetails:
        """Delay a delayed run until an instant, or for a duration (`10m`) that counts from now."""
        body = operation(requests.Reschedule, environment, run_id=run_id, delay=delay)
        return await self._about_a_run(body, timeout, repeatable=False)

    async def add_tags(
        self,
        run_id: str,
        tags: Sequence[str],
        *,
        environment: AnyTenant,
        timeout: float | None = TIMEOUT_S,
    ) -> RunDetails:
        """Add tags behind those that the run has; each stays once."""
        body = operation(requests.AddTags, environment, run_id=run_id, tags=tags)
        return await self._about_a_run(body, timeout, repeatable=True)

    async def update_metadata(
        self,
        run_id: str,
        metadata: Mapping[str, Any] | bytes | None = None,
        *,
        operations: Sequence[MetadataChange] | None = None,
        parent_operations: Sequence[MetadataChange] | None = None,
        root_operations: Sequence[MetadataChange] | None = None,
        environment: AnyTenant,
        timeout: float | None = TIMEOUT_S,
    ) -> RunDetails:
        """Replace a run's metadata, or change its own, its parent's and its root's: docs/wire.md."""
        body = operation(
            requests.UpdateMetadata,
            environment,
            run_id=run_id,
            metadata=None if metadata is None else free_form("metadata", metadata),
            operations=operations,
            parent_operations=parent_operations,
            root_operations=root_operations,
        )
        return await self._about_a_run(body, timeout, repeatable=False)

    async def replay(
        self,
        run_id: str,
        payload: object = UNSET,
        *,
        environment: AnyTenant,
        timeout: float | None = TIMEOUT_S,
    ) -> RunReply:
        """Trigger a run once more, as a new run, with its own payload or another."""
        body = operation(requests.Replay, environment, run_id=run_id, payload=free_form("payload", payload))
        return await self._operations.call(body, RunReply, repeatable=False, timeout=timeout)

    async def list_runs(
        self,
        *,
        environment: AnyTenant,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = TIMEOUT_S,
        **conditions: Unpack[Conditions],
    ) -> RunListReply:
        """One page of runs, the newest first: `limit` (1 to 100; 20 by default) of them from `cursor` on, the
        `next_cursor` of the page before.
        """
        body = operation(requests.List, environment, limit=limit, cursor=cursor, **conditions)
        return await self._operations.call(body, RunListReply, repeatable=True, timeout=timeout)

    async def all_runs(
        self,
        *,
        environment: AnyTenant,
        limit: int | None = None,
        timeout: float | None = TIMEOUT_S,
        **conditions: Unpack[Conditions],
    ) -> AsyncGenerator[RunDetails, None]:
        """All runs, or the first `limit`, the newest first, page by page; `timeout` is a page's."""
        cursor = None
        left = limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(_PAGE, left)
            page = await self.list_runs(
                environment=environment, limit=size, cursor=cursor, timeout=timeout, **conditions
            )
            for run in page.runs:
                yield run
            cursor = page.next_cursor
            if cursor is None:
                return
            left = None if left is None else left - len(page.runs)

    async def reset_key(
        self, task: str, idempotency_key: str, *, environment: AnyTenant, timeout: float | None = TIMEOUT_S
    ) -> KeyResetReply:
        """Take a key off the run that has it, so that the next trigger makes a new one.

        RunNotFound is raised when none has it, be it that a first try whose reply was lost has taken it off.
        A second try takes it off the run of a trigger that came in between, too.
        """
        body = operation(requests.ResetKey, environment, task=task, idempotency_key=idempotency_key)
        return await self._operations.call(body, KeyResetReply, repeatable=True, timeout=timeout)

    async def _about_a_run(self, body: bytes, timeout: float | None, *, repeatable: bool) -> RunDetails:
        reply = await self._operations.call(body, RunDetailsReply, repeatable=repeatable, timeout=timeout)
        return reply.run

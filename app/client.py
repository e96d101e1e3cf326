"""The producer's side in Python: append a trigger request, wait for its reply.

Any number of calls share one connection for replies and one that appends requests in batches. A request
is appended at least once. With retries on, every request has a run id, the caller's or one chosen here,
and all its tries share it: a lost reply never makes a second run. Other languages: docs/wire.md.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, Self

import msgspec
from msgspec import UNSET, Raw, UnsetType

from app import run_ids
from app.backoff import Backoff
from app.errors import MollifierError, RequestError
from app.postbox import Postbox
from schemas.replies import RunReply
from schemas.requests import Environment, Options, TraceContext

_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.05, 2.0

_encode = msgspec.json.Encoder().encode


class NoReply(MollifierError, TimeoutError):
    """The time was up before a reply came; the request may still become a run."""


class Delivery(NamedTuple):
    """What became of one request of `trigger_many`. Either `reply` or `error` is there, never both."""

    position: int
    reply: RunReply | None
    error: RequestError | NoReply | None
    latency_s: float


class Mollifier:
    """Triggers runs. `async with Mollifier(redis_url) as mollifier: await mollifier.trigger(...)`.

    Replies come to the event loop that entered it. It connects in the background, and again whenever
    Redis was away, so entering never fails; calls wait for the connection.
    """

    def __init__(self, redis_url: str, namespace: str = "mollifier", *, retry: bool = True) -> None:
        self._postbox = Postbox(redis_url, namespace)
        self._retry = retry

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
        timeout: float | None = 10.0,  # noqa: ASYNC109
        **options: Any,
    ) -> RunReply:
        """Trigger one run. `payload` and `options` are those of `request`; `timeout` is in seconds.

        Raises:
            RequestError: the reply is an error, of the class with its code. A retryable one is raised only
                when there is no time left for another try.
            NoReply: nothing came in time.
        """
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
            body["options"].setdefault("run_id", new_run_id())
        encoded = _encode(body)
        try:
            async with asyncio.timeout(timeout) as limit:
                return await self._try(encoded, limit.when(), repeatable="run_id" in body["options"])
        except TimeoutError:
            raise self._no_reply(timeout) from None

    async def trigger_many(
        self,
        requests: Iterable[Mapping[str, Any]],
        timeout: float = 10.0,  # noqa: ASYNC109
    ) -> AsyncIterator[Delivery]:
        """Send requests (see `request`) in one go; yields what became of each as the replies come.

        Nothing is sent again: an error is yielded in place of the reply. Requests that are to be tried again
        by the caller need a `run_id` of their own.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        replied: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
        waiting: dict[int, tuple[int, asyncio.Future[RunReply]]] = {}
        try:
            for position, body in enumerate(requests):
                number, future = self._postbox.post(_encode(body), repeatable=False)
                waiting[number] = (position, future)
                future.add_done_callback(partial(_note, replied, number))
            while waiting:
                try:
                    async with asyncio.timeout_at(started + timeout):
                        number, at = await replied.get()
                except TimeoutError:
                    break
                position, future = waiting.pop(number)
                self._postbox.forget(number)
                yield _delivery(position, future, at - started)
            for position, _ in waiting.values():
                yield Delivery(position, None, self._no_reply(timeout), clock() - started)
        finally:
            for number in waiting:
                self._postbox.forget(number)

    async def _try(self, body: bytes, until: float | None, *, repeatable: bool) -> RunReply:
        """Send a request until it has a reply that stands, or another try would come too late."""
        clock = asyncio.get_running_loop().time
        backoff = Backoff(_FIRST_RETRY_S, _LONGEST_RETRY_S)
        while True:
            number, future = self._postbox.post(body, repeatable=self._retry and repeatable)
            try:
                return await future
            except RequestError as error:
                delay_s = backoff.delay_s()
                if not (self._retry and error.retryable) or (
                    until is not None and clock() + delay_s >= until
                ):
                    raise
            finally:
                self._postbox.forget(number)
            await asyncio.sleep(delay_s)

    def _no_reply(self, timeout: float | None) -> NoReply:
        why = self._postbox.trouble or "is a trigger worker running on this Redis and namespace?"
        return NoReply(f"no reply within {timeout:g} s: {why}")


def request(
    task: str,
    payload: object = UNSET,
    *,
    environment: Environment | Mapping[str, Any],
    trace_context: TraceContext | Mapping[str, Any] | None = None,
    deadline: datetime | None = None,
    payload_type: str = "application/json",
    **options: Any,
) -> dict[str, Any]:
    """The body of a trigger request.

    `payload` is anything that JSON can hold, or ready JSON as `bytes` or `msgspec.Raw`, which must be
    valid. `options` are the fields of `schemas.requests.Options`; what is None counts as left out.

    Raises:
        TypeError: there is no option of that name.
    """
    unknown = sorted(options.keys() - set(Options.__struct_fields__))
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}")
    body: dict[str, Any] = {"task": task, "environment": environment, "payload_type": payload_type}
    if not isinstance(payload, UnsetType):
        body["payload"] = Raw(payload) if isinstance(payload, bytes) else payload
    body["options"] = {name: value for name, value in options.items() if value is not None}
    if trace_context is not None:
        body["trace_context"] = trace_context
    if deadline is not None:
        body["deadline"] = deadline
    return body


def new_run_id() -> str:
    """A run id of a producer's own choice: it sorts by time, and has not the reserved form of `run_ids`."""
    return f"{run_ids.PREFIX}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def _delivery(position: int, future: asyncio.Future[RunReply], latency_s: float) -> Delivery:
    error = future.exception()
    if error is None:
        return Delivery(position, future.result(), None, latency_s)
    if not isinstance(error, RequestError):
        raise error
    return Delivery(position, None, error, latency_s)


def _note(replied: asyncio.Queue[tuple[int, float]], number: int, future: asyncio.Future[RunReply]) -> None:
    replied.put_nowait((number, future.get_loop().time()))

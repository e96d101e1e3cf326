"""From a client's requests to their replies: one with all its tries, or many in one go."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any, NamedTuple

from app.backoff import Backoff
from app.errors import InternalError, MollifierError, RequestError
from app.postbox import Postbox, Posted
from app.read_reply import Success
from schemas.replies import RunReply

_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.05, 2.0


class NoReply(MollifierError, TimeoutError):
    """The time was up before a reply came. What was asked for may have been done, or may still be."""


class Delivery(NamedTuple):
    """What became of one trigger of many. Either `reply` or `error` is there, never both."""

    position: int
    reply: RunReply | None
    error: RequestError | NoReply | None
    latency_s: float


class Calls:
    """Calls on one request stream. `worker` is who should answer, for when nobody does."""

    def __init__(self, postbox: Postbox, stream: str, worker: str, *, retry: bool) -> None:
        self._postbox = postbox
        self._stream = stream
        self._worker = worker
        self._retry = retry

    async def call(
        self,
        body: bytes,
        expected: type[Success],
        *,
        repeatable: bool,
        timeout: float | None,
    ) -> Success:
        """Send a request, again and again if that can help, and return its reply; `timeout` is in seconds.

        After a retryable error it is sent again, waiting longer each time. A reply that may have been missed
        is asked for again only if the request is `repeatable`: handled twice, it does what it does once.

        Raises:
            RequestError: the reply is an error, of the class with its code. A retryable one is raised only
                when there is no time left for another try.
            NoReply: nothing came in time.
        """
        clock = asyncio.get_running_loop().time
        until = None if timeout is None else clock() + timeout
        backoff = Backoff(_FIRST_RETRY_S, _LONGEST_RETRY_S)
        while True:
            may_repeat = self._retry and repeatable
            posted = self._postbox.post(self._stream, body, expected, repeatable=may_repeat)
            try:
                async with asyncio.timeout_at(until):
                    return await posted.reply
            except RequestError as error:
                delay_s = backoff.delay_s()
                is_too_late = until is not None and clock() + delay_s >= until
                if is_too_late or not self._may_try_again(error, repeatable=repeatable):
                    raise
            except TimeoutError:
                raise self._no_reply(posted, timeout) from None
            finally:
                self._postbox.forget(posted)
            await asyncio.sleep(delay_s)

    async def many(self, bodies: Iterable[bytes], timeout: float) -> AsyncGenerator[Delivery, None]:
        """Send triggers in one go, each once; yields what became of each as the replies come."""
        clock = asyncio.get_running_loop().time
        started = clock()
        replied: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
        waiting: dict[int, Posted[RunReply]] = {}
        try:
            for position, body in enumerate(bodies):
                waiting[position] = self._postbox.post(self._stream, body, RunReply, repeatable=False)
                waiting[position].reply.add_done_callback(partial(_note, replied, position))
            while waiting:
                try:
                    async with asyncio.timeout_at(started + timeout):
                        position, at = await replied.get()
                except TimeoutError:
                    break
                posted = waiting.pop(position)
                self._postbox.forget(posted)
                yield _delivery(position, posted.reply, at - started)
            for position, posted in waiting.items():
                yield Delivery(position, None, self._no_reply(posted, timeout), clock() - started)
        finally:
            for posted in waiting.values():
                self._postbox.forget(posted)

    def _no_reply(self, posted: Posted[Any], timeout: float | None) -> NoReply:
        why = self._postbox.trouble(posted) or f"is {self._worker} running on this Redis and namespace?"
        return NoReply(f"no reply within {timeout:g} s: {why}")

    def _may_try_again(self, error: RequestError, *, repeatable: bool) -> bool:
        """Whether that can help, and does no harm: before an internal error a change may have been made."""
        return self._retry and error.retryable and (repeatable or not isinstance(error, InternalError))


def _delivery(position: int, reply: "asyncio.Future[RunReply]", latency_s: float) -> Delivery:
    error = reply.exception()
    if error is None:
        return Delivery(position, reply.result(), None, latency_s)
    if not isinstance(error, RequestError):
        raise error
    return Delivery(position, None, error, latency_s)


def _note(
    replied: asyncio.Queue[tuple[int, float]], position: int, reply: "asyncio.Future[RunReply]"
) -> None:
    replied.put_nowait((position, reply.get_loop().time()))

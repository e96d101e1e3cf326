"""One producer: `python -m tests.chaos.producers --name p1 --redis-url ... --journal ... --rate 50 --seed 7`.

It triggers and operates at a steady pace. What may be repeated is repeated until there is an answer that
stands. SIGTERM: think of nothing new, but see what is under way to its end; exit status 0.
"""

import argparse
import asyncio
import random
import signal
import time
from pathlib import Path

import uvloop

from tests.chaos.customers import Customer, Wish
from tests.chaos.journal import Attempt, Journal
from tests.chaos.posts import FastStreamPost, PlainPost, Post
from tests.chaos.tenants import tenants

_REPLY_S = 4.0
_LATE_REPLY_S = 20.0
_LAST_WORDS_S = 60.0
_MOST_UNDER_WAY = 300


class Producer:
    """Sends a customer's wishes, and repeats them as the wire's page advises."""

    def __init__(self, name: str, post: Post, customer: Customer, rate: float, seed: str) -> None:
        self._name = name
        self._post = post
        self._customer = customer
        self._rate = rate
        self._random = random.Random(f"{seed} pace")
        self._under_way: set[asyncio.Task[None]] = set()
        self._until = float("inf")

    async def run(self, stopping: asyncio.Event) -> None:
        """Go on until told to stop, then finish."""
        while not stopping.is_set():
            await asyncio.sleep(self._random.expovariate(self._rate))
            if len(self._under_way) < _MOST_UNDER_WAY:
                task = asyncio.create_task(self._fulfil(self._customer.wish(time.time())))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
        self._until = time.time() + _LAST_WORDS_S
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def _fulfil(self, wish: Wish) -> None:
        """Send until there is an answer that stands; what must not be sent twice, only after an error."""
        for number in range(1000):
            attempt = Attempt(
                name=f"{wish.request}.{number}",
                request=wish.request,
                kind=wish.kind,
                stream=wish.stream,
                environment=wish.tenant.id,
                organization=wish.tenant.organization_id,
                body=wish.body,
                reply_to=self._reply_to(wish, f"{wish.request}.{number}"),
                is_repeated=wish.is_repeated,
                sending_at=time.time(),
            )
            await self._post.send(attempt)
            if wish.reply != "wanted" and not self._post.makes_up_channels:
                return
            reply = await self._post.reply(attempt.name, _REPLY_S if wish.is_repeated else _LATE_REPLY_S)
            if reply is not None:
                self._customer.learn(wish, reply)
                if reply["type"] != "error" or not reply["error"]["retryable"]:
                    return
            elif not wish.is_repeated:
                return
            if time.time() > self._until:
                return
            await asyncio.sleep(self._random.uniform(0.1, 0.4) * min(2**number, 8))

    def _reply_to(self, wish: Wish, attempt: str) -> str | None:
        if wish.reply == "none" or self._post.makes_up_channels:
            return None
        return (
            f"somewhere:else:{attempt}"
            if wish.reply == "forbidden"
            else f"mollifier:reply:{self._name}:{attempt}"
        )


async def _main(arguments: argparse.Namespace) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    journal = Journal(arguments.journal)
    make = FastStreamPost if arguments.faststream else PlainPost
    post = make(arguments.redis_url, arguments.name, journal)
    seed = f"{arguments.seed} {arguments.name}"
    customer = Customer(arguments.name, tenants(arguments.seed), seed)
    await Producer(arguments.name, post, customer, arguments.rate, seed).run(stopping)
    await post.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--faststream", action="store_true")
    uvloop.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()

"""What wakes an idle drainer."""

import asyncio

from redis.asyncio import Redis

from app.keys import Keys
from app.redis_connection import LOST


class Wake:
    """Wakes a drainer when an environment becomes ready. A lost message only costs the wait's timeout."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._pubsub = redis.pubsub()
        self._channel = keys.wake

    async def wait(self, timeout_s: float) -> bool:
        """Return when something may have become ready, at the latest after `timeout_s`: whether it may."""
        try:
            if not self._pubsub.subscribed:
                await self._pubsub.subscribe(self._channel)
                return True
            message = await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
        except LOST:
            await asyncio.sleep(timeout_s)
            return True
        return message is not None

    async def close(self) -> None:
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]

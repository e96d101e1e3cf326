"""The least that a worker can do: a FastStream process that publishes what it reads. `latency` runs it."""

import os
from typing import Any

import uvicorn
from faststream.asgi import AsgiFastStream, make_ping_asgi
from faststream.message import StreamMessage
from faststream.redis import RedisBroker, StreamSub
from redis.asyncio import Redis

STREAM, GROUP = "bench:echo", "bench"


def main() -> None:
    broker = RedisBroker(os.environ["REDIS_URL"], apply_types=False)
    redis = Redis.from_url(os.environ["REDIS_URL"])

    async def parse(message: Any) -> StreamMessage[Any]:
        return StreamMessage(raw_message=message, body=b"")

    async def decode(message: StreamMessage[Any]) -> Any:
        return message.raw_message["data"]

    subscription = StreamSub(STREAM, group=GROUP, consumer="echo", polling_interval=1000)

    @broker.subscriber(stream=subscription, parser=parse, decoder=decode, no_reply=True)
    async def echo(fields: dict[bytes, bytes]) -> None:
        await redis.publish(fields[b"reply_to"].decode(), fields[b"body"])

    ready = ("/health/ready", make_ping_asgi(broker, timeout=5))
    application = AsgiFastStream(broker, logger=None, asgi_routes=[ready])
    uvicorn.run(
        application, host="127.0.0.1", port=int(os.environ["PORT"]), loop="uvloop", log_level="warning"
    )


if __name__ == "__main__":
    main()

"""The trigger worker: takes trigger requests through the pipeline."""

from collections.abc import Collection, Sequence

from app.wiring import World
from workers.consumer import Consumer
from workers.process import Loop, run


class Triggers(Consumer):
    """Consumes the trigger stream. What waits for an idempotency key is held beside its batch."""

    def __init__(self, world: World) -> None:
        pipeline = world.pipeline()
        super().__init__(world, world.keys.triggers, pipeline.handle, "triggers")
        self._waiting_room = pipeline.waiting_room

    def loops(self) -> Sequence[Loop]:
        return (*super().loops(), self._wait_for_keys)

    def held(self) -> Collection[str]:
        return self._intake.held | self._waiting_room.held

    async def _wait_for_keys(self) -> None:
        await self._waiting_room.run(self.stopping)


if __name__ == "__main__":
    run(Triggers)

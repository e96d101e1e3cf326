"""The operations worker: reads of runs and changes to them. A storm of triggers does not delay it."""

from app.wiring import World
from workers.consumer import Consumer
from workers.process import run


class Operations(Consumer):
    """Consumes the operations stream."""

    def __init__(self, world: World) -> None:
        super().__init__(world, world.keys.operations, world.operate().handle, "operations")


if __name__ == "__main__":
    run(Operations)

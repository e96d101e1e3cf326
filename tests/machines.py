"""Machines of Hypothesis on real servers: what those of `test_model*.py` share.

They play the same examples in every run, so whoever changes other code is not stopped by what chance finds.
A longer search, of other examples, is for people:

    MODEL_EXAMPLES=20000 MODEL_SEED=7 nice .venv/bin/pytest tests/test_model_gate.py
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import pytest
import uvloop
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

_EXAMPLES, _SEED = (os.environ.get(f"MODEL_{name}") for name in ("EXAMPLES", "SEED"))

_OVER_MS = 10
"""What has less than this to live is over, rather than counted by the model's time."""

patient = pytest.mark.timeout(0 if _EXAMPLES else 600)
"""For a search: a failure takes its time to become the shortest one."""


class Machine(RuleBasedStateMachine):
    """A machine whose rules are called, and whose code under test is awaited."""

    loop: ClassVar[asyncio.AbstractEventLoop]

    def wait_for(self, work: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(work)


M = TypeVar("M", bound=Machine)
Site = Callable[[], AbstractAsyncContextManager[dict[str, Any]]]
"""Opens the connections of the processes and the model's own, by the attributes that they become. They serve
all examples."""


async def search(machine: type[Machine], site: Site, *, examples: int, steps: int) -> None:
    """Let Hypothesis play: so many examples, of so many steps at most."""
    game = settings(
        max_examples=int(_EXAMPLES or examples),
        stateful_step_count=steps,
        derandomize=_SEED is None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )

    def play(one: type[Machine]) -> None:
        run_state_machine_as_test(one if _SEED is None else seed(int(_SEED))(one), settings=game)

    await asyncio.to_thread(_on_site, machine, site, play)


async def tell(story: Callable[[M], None], machine: type[M], site: Site) -> None:
    """Play one example, and its end."""

    def play(one: Callable[[], M]) -> None:
        model = one()
        try:
            story(model)
        finally:
            model.teardown()

    await asyncio.to_thread(_on_site, machine, site, play)


def _on_site(machine: type[Machine], site: Site, play: Callable[[Any], None]) -> None:
    """Hypothesis wants to call, not to be awaited: the machine has a loop and a thread of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        opened = site()
        attributes = runner.run(opened.__aenter__())
        try:
            play(type("Machine", (machine,), {"loop": runner.get_loop(), **attributes}))
        finally:
            runner.run(opened.__aexit__(None, None, None))


class Endings:
    """Keys that end by the model's time: the server's clock is stopped for them. Times are in ms.

    `grain_ms` divides the life that any of them is given, and is far longer than it takes to look.
    """

    def __init__(self, redis: Any, pattern: str, grain_ms: int) -> None:
        self._redis = redis
        self._pattern = pattern
        self._grain_ms = grain_ms
        self.at: dict[str, int] = {}
        self.values: dict[str, str] = {}

    async def look(self, now_ms: int) -> None:
        """Read them, and give those that are new or were given another life an end by the model's time."""
        names = [name.decode() for name in await self._redis.keys(self._pattern)]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.get(name).pttl(name).persist(name)
            found = await pipeline.execute() if names else []
        at, values = {}, {}
        for name, value, left_ms in zip(names, found[::3], found[1::3], strict=True):
            if value is None or 0 <= left_ms < _OVER_MS:
                await self._redis.delete(name)
                continue
            values[name] = value.decode()
            if left_ms == -1:
                assert self.values.get(name) == values[name], f"{name} has no end"
                at[name] = self.at[name]
            else:
                at[name] = now_ms - left_ms // -self._grain_ms * self._grain_ms
        self.at, self.values = at, values

    async def end(self, now_ms: int) -> None:
        """Let those end whose time has come."""
        for name in [name for name, at in self.at.items() if at <= now_ms]:
            await self._redis.delete(name)
            del self.at[name], self.values[name]


class Fault(NamedTuple):
    """What happens at a script or statement: its server is `lost`, the process comes to a `halt`, or the
    command arrives `twice`. `done`: after it was done, of which nobody is told."""

    point: str
    kind: Literal["lost", "halt", "twice"]
    done: bool


def faults(*points: str) -> st.SearchStrategy[Fault | None]:
    kinds: list[Literal["lost", "halt", "twice"]] = ["halt", "lost", "twice", "halt"]
    return st.none() | st.builds(Fault, st.sampled_from(points), st.sampled_from(kinds), st.booleans())


class Job:
    """What a process has under way, until it ends or comes to a halt."""

    def __init__(self, process: int, fault: Fault | None) -> None:
        self.process = process
        self.fault = fault
        self.struck: Fault | None = None
        self.halted: asyncio.Event | None = None
        self.task: asyncio.Task[Any] | None = None
        self._active = 0
        self._moved = asyncio.Event()

    def start(self, loop: asyncio.AbstractEventLoop, work: Any) -> None:
        context = copy_context()
        context.run(JOB.set, self)
        self.task = loop.create_task(work, context=context)
        self.task.add_done_callback(lambda _: self._moved.set())

    async def meet(self, points: set[str], call: Callable[[], Awaitable[Any]], lost: type[Exception]) -> Any:
        """Make a call, unless the fault wants it otherwise."""
        fault = self.fault if self.fault and self.fault.point in points else None
        if fault is not None:
            self.fault, self.struck = None, fault
            if not fault.done:
                await self._strike(fault, lost)
        self._active += 1
        try:
            result = await call()
            if fault is not None and fault.kind == "twice":
                result = await call()
        finally:
            self._active -= 1
            self._moved.set()
        if fault is not None and fault.done:
            await self._strike(fault, lost)
        return result

    async def _strike(self, fault: Fault, lost: type[Exception]) -> None:
        if fault.kind == "lost":
            raise lost("says the model")
        if fault.kind == "halt":
            self.halted = asyncio.Event()
            self._moved.set()
            await self.halted.wait()
            self.halted = None

    def go_on(self, fault: Fault | None) -> None:
        """End the halt."""
        assert self.halted is not None
        self.fault = fault
        self.halted.set()

    async def until_still(self) -> None:
        """Return when it has ended, or stands still at its halt."""
        assert self.task is not None
        idle = 0
        while not self.task.done() and idle < 20:
            if self.halted is not None and not self._active:
                idle += 1
                await asyncio.sleep(0)
            else:
                idle = 0
                self._moved.clear()
                await self._moved.wait()

    async def die(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])


JOB: ContextVar[Job] = ContextVar("job")


def breakable(adapter: object, method: str, points: Callable[..., set[str]], lost: type[Exception]) -> None:
    """Let the fault of the job at hand strike in a method of an adapter."""
    real = getattr(adapter, method)

    async def call(*arguments: Any) -> Any:
        return await JOB.get().meet(points(*arguments), partial(real, *arguments), lost)

    setattr(adapter, method, call)

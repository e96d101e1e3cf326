"""The mollify path beside the reference's own library."""

import asyncio
import json
import shutil
from pathlib import Path

import msgspec
import orjson

from bench.comparison import Comparison, Scale
from bench.findings import Bound, Measured, NotMeasured, Reading, in_turn
from bench.stage import Stage
from bench.triggers import ENVIRONMENTS, MOLLIFIES, ORGANIZATIONS, PAYLOAD, triggers, work_off

TRIGGERS = 40_000
WARM_UP = 4_000
CONCURRENCY = 100

_NODE = Path(__file__).parent / "node"
_FASTER = Bound(name="triggers a second, ours to theirs", least=3, aim=5, guard=1.5)
_CHEAPER = Bound(name="processor time of a trigger, ours to theirs", most=0.25, guard=0.95)


class Theirs(msgspec.Struct):
    """What `node/mollify.mjs` prints."""

    triggers: int
    seconds: float
    cpu_s: float
    node: str
    library: str


async def measure(stage: Stage, scale: Scale) -> Measured:
    count = scale.of(TRIGGERS)
    reference = _Reference(count)

    async def ours() -> Reading:
        await stage.clear()
        async with stage.processes("workers.triggers", **MOLLIFIES) as workers:
            await work_off(stage, workers, triggers(WARM_UP, keys="warm-up"))
            reading = await work_off(stage, workers, triggers(count, keys="counted"))
            mollified = await workers[0].metric("mollifier_decisions_total", outcome="mollify")
            assert mollified >= WARM_UP - ENVIRONMENTS + count, f"only {mollified} were mollified"
            return reading

    async def theirs() -> Reading:
        await stage.clear()
        before = stage.redis_cpu_s
        found = await reference.run(stage.valkey.url)
        used = (stage.redis_cpu_s - before) * count / (count + WARM_UP)
        return Reading(found.triggers, found.seconds, found.cpu_s, used)

    rounds = await in_turn({"ours": ours, "theirs": theirs}, scale.pairs)
    return Measured(
        {
            _FASTER.name: rounds.ratios("rate", "ours", "theirs"),
            _CHEAPER.name: rounds.ratios("cpu_us", "ours", "theirs"),
        },
        rounds.figures(),
        (reference.versions,),
    )


class _Reference:
    """The reference's library in a Node process of its own, warmed up before it is timed."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.versions = ""
        node = shutil.which("node")
        if node is None:
            raise NotMeasured("there is no node on PATH")
        if not (_NODE / "node_modules").is_dir():
            raise NotMeasured(f"its library is not installed: npm ci --prefix {_NODE.name}")
        self._program = node

    async def run(self, url: str) -> Theirs:
        wanted = {
            "url": url,
            "triggers": self._count,
            "warmUp": WARM_UP,
            "concurrency": CONCURRENCY,
            "environments": ENVIRONMENTS,
            "organizations": ORGANIZATIONS,
            "payload": orjson.dumps(PAYLOAD).decode(),
        }
        process = await asyncio.create_subprocess_exec(
            self._program, "mollify.mjs", json.dumps(wanted), cwd=_NODE, stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"mollify.mjs ended with {process.returncode}")
        found = msgspec.json.decode(printed, type=Theirs)
        self.versions = f"Theirs is @trigger.dev/redis-worker {found.library} on Node {found.node}."
        return found


COMPARISON = Comparison(
    name="mollify",
    title="The mollify path and the reference's own library",
    how=f"""
        A trigger with an idempotency key and a payload of 400 bytes, in {ENVIRONMENTS} environments.
        Theirs: `MollifierBuffer` of `@trigger.dev/redis-worker`, claim, evaluateTrip, accept and
        publishClaim in the order of its service, {CONCURRENCY} at once, with ioredis' automatic
        pipelining, which is faster. Ours: one trigger worker on a stream that was filled before, which
        also reads the stream, validates, replies and acknowledges. One process each, warmed up.
    """,
    bounds=(_FASTER, _CHEAPER),
    measure=measure,
)

"""From the command line: `python -m tests.fuzz.run --seed 1 --count 100000`.

Exit status 1 on any violation.
"""

import argparse
import shutil
import sys
from pathlib import Path

import uvloop

from app.embedded import Postgres, Valkey
from app.migrate import migrate
from tests.fuzz.fuzz import Fuzz, Outcome, mib
from tests.fuzz.verdict import report
from tests.processes import Workers


async def run(folder: Path, seed: int, count: int) -> Outcome:
    """On servers of its own, which are gone when it returns; the processes' logs stay in the folder."""
    workers = Workers(folder)
    redis = Valkey(folder / "redis", options={"appendfsync": "no"})
    postgres = Postgres(folder / "postgres", options={"fsync": "off"})
    with redis, postgres:
        await migrate(postgres.url)
        try:
            return await Fuzz(redis.url, postgres.url, workers, seed, count).run()
        finally:
            workers.end()


def figures(outcome: Outcome, count: int) -> str:
    """What there was, for people."""
    waited = outcome.latencies
    lines = [f"{count:,} hostile requests in {outcome.seconds:.0f} s, {len(waited):,} good ones answered"]
    points = ((50, "median"), (99, "p99"), (100, "slowest"))
    lines += [
        f"  {name}: {waited[min(len(waited) - 1, len(waited) * at // 100)] * 1000:.0f} ms"
        for at, name in points
    ]
    lines += [
        f"{line}: {mib(warm)} after the warm-up, {mib(end)} at the end"
        for line, (warm, end) in outcome.sizes.items()
    ]
    return "\n".join([*lines, *(f"  {what}: {times:,}" for what, times in outcome.tally.items())])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(f"/tmp/mollifier-fuzz-{arguments.seed}")).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome = uvloop.run(run(folder, arguments.seed, arguments.count))
    print(figures(outcome, arguments.count))
    print(report(outcome.violations))
    print(f"seed {arguments.seed}, the logs are in {folder}")
    sys.exit(bool(outcome.violations))


if __name__ == "__main__":
    main()

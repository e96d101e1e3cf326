"""A storm from the command line: `python -m tests.chaos.run --seed 1 --seconds 600`.

Exit status 1 on any violation. What there is to look at afterwards is in the folder.
"""

import argparse
import sys
from pathlib import Path

import uvloop

from tests.chaos.checker import check, report
from tests.chaos.faults import KINDS
from tests.chaos.figures import figures
from tests.chaos.storm import Options, Storm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", help="part of the names of the faults to inject; several with commas")
    parser.add_argument("--calm", action="store_true", help="no faults")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(f"/tmp/mollifier-storm-{arguments.seed}")
    wanted = (arguments.only or "").split(",")
    kinds = [kind for kind in KINDS if any(part in kind.name for part in wanted)]
    options = Options(
        arguments.seed, arguments.seconds, folder.resolve(), arguments.rate, kinds, faults=not arguments.calm
    )
    outcome = uvloop.run(Storm(options).run())
    violations = check(outcome.story)
    print(figures(outcome, violations))
    print(report(violations))
    print(f"seed {arguments.seed}, {outcome.seconds:.0f} s, everything in {folder}")
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()

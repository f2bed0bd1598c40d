"""Kills, bad bytes and a soak, one after the other, each for its share of the minutes.

    python -m stress --minutes 20                          # `make stress MINUTES=20`: all parts, going on where the results stop
    python -m stress --parts kills --minutes 60 --seed 7   # one part, other cases
    python -m stress --parts bytes --case 4711             # one case again, to see its fault

Every part writes a line and adds its run to results/PART.json. Exit status 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stress import bad_bytes, kills, soak
from stress.part import Outcome, next_case, record

RESULTS = Path(__file__).resolve().parent / "results"
# Part -> what runs it until a `time.monotonic`, from the case of that number on; at least one case, `most` at most.
PARTS: dict[str, Callable[[float, int, int, int | None], Outcome]] = {"kills": kills.run, "bytes": bad_bytes.run, "soak": soak.run}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=20, help="of all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone, of one part; nothing is recorded")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    if args.case is not None and len(args.parts) != 1:
        parser.error("--case: expected one of --parts")
    faults = 0
    for name in args.parts:
        file, began = args.results / f"{name}.json", time.monotonic()
        first = next_case(file, args.seed) if args.case is None else args.case
        until = began + 60 * args.minutes / len(args.parts)
        outcome = PARTS[name](until, args.seed, first, None if args.case is None else 1)
        seconds = time.monotonic() - began
        if args.case is None:
            record(file, outcome, args.seed, seconds)
        for fault in outcome.faults:
            print(f"{name}, case {fault['case']} of seed {args.seed}: {fault}", flush=True)
        print(f"{name}: {outcome.cases:,} cases in {seconds / 60:.1f} minutes, {len(outcome.faults)} faults", flush=True)
        faults += len(outcome.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

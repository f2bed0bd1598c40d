"""The studies of docs/evidence.md from scratch: does recursion pay, where, and how much?

    python -m recipes.evidence state_tracking                 # half an hour on 2 cores; --size gpu on one large GPU
    python -m recipes.evidence state_tracking --rows "naive loop" "Muon"     # rerun these rows
    python -m recipes.evidence tables                         # the tables of docs/ from all results

A study pretrains its donor, trains and evaluates every row that is not in results/STUDY-SIZE.json yet, and saves each as it ends.
Run it from the root of the checkout, with the project installed (`make demo` does that), or all of them by `make evidence`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from recipes.evidence import compact, hops, length, prose, scan, state_tracking, tables
from recipes.evidence.study import RESULTS, Size, Study, run
from recursify.errors import UserError
from recursify.utils.device import choose_device

STUDIES: dict[str, tuple[Callable[[Size], Study], dict[str, Size]]] = {
    "compact": (compact.study, compact.SIZES),
    "hops": (hops.study, hops.SIZES),
    "length": (length.study, length.SIZES),
    "prose": (prose.study, prose.SIZES),
    "scan": (scan.study, scan.SIZES),
    "state_tracking": (state_tracking.study, state_tracking.SIZES),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "tables"])
    parser.add_argument("--size", choices=["cpu", "gpu", "test"], default="cpu")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only these rows, anew")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder where donors are made, once")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="rows at once on a CPU, one core each")
    parser.add_argument("--device", help="cpu or cuda; the best there is where not given")
    args = parser.parse_args(argv)
    if args.study == "tables":
        tables.write()
        return
    make, sizes = STUDIES[args.study]
    names = [row.name for row in make(sizes[args.size]).rows]
    if unknown := set(args.rows) - set(names):
        parser.error(f"--rows: expected some of {names}, got {sorted(unknown)}")
    processes = args.processes if choose_device(args.device).type == "cpu" else 1
    try:
        run(make, args.size, sizes[args.size], args.rows, args.output, args.work, args.device, processes)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

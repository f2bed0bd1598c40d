"""Runs benchmarks on a CPU, saves their results, and writes them into docs/performance.md. On a GPU: python -m benchmarks.gpu

    python -m benchmarks                          all that are quick enough; `make bench`
    python -m benchmarks decoding loss            some of them; the others' results stay
    python -m benchmarks --quick                  toy sizes: a smoke test, measures nothing
    python -m benchmarks --list                   what there is
    python -m benchmarks --render                 only regenerates the page from results/*.json

Exit status 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from .case import Bench, Case, missed, registry
from .page import RESULTS, tables_of, write


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which; see --list")
    parser.add_argument("--quick", action="store_true", help="toy sizes on the CPU; bounds are not judged")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--render", action="store_true", help="print what was measured into docs/performance.md again, and stop")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON; the page is printed from the usual one only")
    args = parser.parse_args(argv)
    known = registry()
    for name in args.cases:
        if name not in known.cases:
            why = known.missing.get(name, "")
            parser.error(f"{name}: no such case{f' here ({why})' if why else ''}; there are {', '.join(known.cases)}")
        if not args.quick and "cpu" not in known.cases[name].sizes:
            parser.error(f"{name}: is measured on a GPU only: python -m benchmarks.gpu {name}")
    return args


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that are named; else all that belong to the suite of a CPU."""
    cases = registry().cases
    if args.cases:
        return [cases[name] for name in args.cases]
    return [one for one in cases.values() if "cpu" in one.sizes and not one.asked]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for one in registry().cases.values():
            print(f"{one.name:<12} {one.title}{' (only when named)' if one.asked else ''}")
        return 0
    if args.render:
        write()
        return 0
    bench = Bench("quick" if args.quick else "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{bench.size}.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    all_hold = True
    for one in chosen(args):
        print(f"{time.strftime('%H:%M:%S')} {one.name}: {one.title}", file=sys.stderr, flush=True)
        results[one.name] = one.measure(bench)
        print(tables_of(one.name, results), flush=True)
        all_hold &= not missed(results[one.name])
        file.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.output == RESULTS and not args.quick:
        write()
    return 0 if all_hold or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs benchmarks, keeps their results, and prints them into docs/performance.md.

    python -m benchmarks                          all that are quick enough, on the CPU; `make bench`
    python -m benchmarks --device cuda            on the GPU; `make bench-gpu`. Needs torch, transformers, accelerate and this folder
    python -m benchmarks decoding loss            some of them; the others' results stay
    python -m benchmarks --quick                  toy sizes: shows that they run, measures nothing
    python -m benchmarks --list                   what there is
    python -m benchmarks --render                 only prints results/*.json into the page again

Exit status 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .case import Bench, Case, registry
from .page import RESULTS, tables_of, write
from .record import load, provenance


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which; see --list")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="toy sizes on the CPU; bounds are not judged")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--render", action="store_true", help="print what was measured into docs/performance.md again, and stop")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON; the page is printed from the usual one only")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not (torch.cuda.is_available() or args.list or args.render):
        parser.error("--device cuda: torch finds no GPU here")
    known = registry()
    for name in args.cases:
        if name not in known.cases:
            why = known.missing.get(name, "")
            parser.error(f"{name}: no such case{f' here ({why})' if why else ''}; there are {', '.join(known.cases)}")
        if args.device not in known.cases[name].sizes:
            parser.error(f"{name}: runs on {' and '.join(known.cases[name].sizes)} only, got --device {args.device}")
    return args


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that are named; else all that belong to the suite of this device."""
    cases = registry().cases
    if args.cases:
        return [cases[name] for name in args.cases]
    return [one for one in cases.values() if args.device in one.sizes and not one.asked]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for one in registry().cases.values():
            print(f"{one.name:<12} {one.title}{' (only when named)' if one.asked else ''}")
        return 0
    if args.render:
        write()
        return 0
    bench = Bench("quick" if args.quick else args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{bench.size}.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missed = False
    for one in chosen(args):
        print(f"{time.strftime('%H:%M:%S')} {one.name}: {one.title}", file=sys.stderr, flush=True)
        results[one.name] = run(one, bench)
        print(tables_of(one.name, results), flush=True)
        missed |= any(check["must"] and not check["holds"] for check in results[one.name]["checks"])
        file.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.output == RESULTS and not args.quick:
        write()
    return 1 if missed and not args.quick else 0


def run(one: Case, bench: Bench) -> dict[str, Any]:
    """The result of a case, with where, when and how long it was measured."""
    machine, start = provenance(bench.device), time.perf_counter()
    found = one.measure(bench)
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    after = {"load_after": load(), "seconds": round(time.perf_counter() - start, 1)}
    return {"title": one.title, "about": one.about, "machine": machine | after, **found}


if __name__ == "__main__":
    sys.exit(main())

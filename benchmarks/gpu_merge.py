"""Merges the results of benchmarks.gpu into the committed ones and regenerates the pages; `make gpu-merge RESULTS=folder`.

    python -m benchmarks.gpu_merge runs/gpu

Cases go to benchmarks/results/cuda.json, rows of the evidence to recipes/evidence/results. Incomplete or failed results and
those of a rehearsal are listed and not merged. Exit status 1 if there is nothing to merge.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from recipes.evidence.study import RESULTS as EVIDENCE
from recursify.utils.atomic import write_text

from .case import registry
from .gpu_evidence import PREFIX
from .job_queue import read_result
from .page import RESULTS, write

CASES = "cuda.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder that benchmarks.gpu wrote its results to")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"results: expected a folder, got {args.results}")
    merged = merge(args.results)
    if not merged:
        print(f"{args.results}: no result is whole", file=sys.stderr)
        return 1
    render(evidence=any(name.startswith(PREFIX) for name in merged))
    print(f"merged: {len(merged)}")
    return 0


def merge(folder: Path, cases: Path = RESULTS, evidence: Path = EVIDENCE) -> list[str]:
    """The names of the jobs whose results were merged; prints why others were not."""
    merged, known = [], registry().cases
    for file in sorted(folder.glob("*.json")):
        found = read_result(file)
        if found is None or isinstance(found, str):
            print(f"left out: {found or file}")
        elif (found["status"], found["size"]) != ("ok", "cuda"):
            print(f"left out: {found['job']}: {found['status']}, {'a rehearsal' if found['size'] == 'quick' else found['size']}")
        elif found["job"] in known:
            put_case(found["job"], found["data"], cases / CASES)
            merged.append(found["job"])
        elif found["job"].startswith(PREFIX) and "run" in found["data"]:
            put_row(found["data"], evidence)
            merged.append(found["job"])
        else:
            print(f"left out: {found['job']}: has no table of its own")
    return merged


def put_case(name: str, data: dict[str, Any], file: Path) -> None:
    """In the place of an earlier result of the same case; in the order of the page."""
    found = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}) | {name: data}
    order = [one for one in registry().cases if one in found]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({one: found[one] for one in order}, indent=1, allow_nan=False) + "\n")


def put_row(data: dict[str, Any], folder: Path) -> None:
    """A run of a study, in the place of an earlier one of the same row and seed."""
    from recipes.evidence.__main__ import STUDIES
    from recipes.evidence.study import add

    make, sizes = STUDIES[data["study"]]
    file = folder / f"{data['study']}-{data['size']}.json"
    here = {name: value for name, value in data.items() if name != "run"} | {"runs": []}
    add(data["run"], here, file, make(sizes[data["size"]]))


def render(evidence: bool) -> None:
    """Regenerate the pages."""
    write()
    if evidence:
        from recipes.evidence import tables

        tables.write()


if __name__ == "__main__":
    sys.exit(main())

"""What the parts have in common: cases by number, what came of them, and the file that counts them.

A part draws case N of a seed from these two numbers alone, so a fault is repeated by its case, and a later run of the same seed goes on
where the last one stopped.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, provenance
from recursify.utils.atomic import write_text


@dataclass
class Outcome:
    """What came of some cases.

    Args:
        first: Number of the first case.
        cases: How many there were.
        counts: What they were and how they ended -> how many.
        faults: One for each case that ended as it must not: `case`, `what` was tried, what was `expected` and `found`.
        notes: Figures of the part as a whole, such as the growth of memory.
    """

    first: int = 0
    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def next(self) -> int:
        """Number of the next case."""
        return self.first + self.cases

    def add(self, kind: str, fault: dict[str, Any] | None = None) -> None:
        """Count a case."""
        if fault is not None:
            self.faults.append({"case": self.next, **fault})
        self.cases += 1
        self.counts[f"{kind}: fault" if fault else kind] += 1


def draw(seed: int, case: int) -> random.Random:
    """What chooses everything in a case."""
    return random.Random(f"{seed} {case}")


def earlier(file: Path) -> list[dict[str, Any]]:
    """The runs in a file of results."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []


def next_case(file: Path, seed: int) -> int:
    """Where the last run of this seed stopped."""
    return max((run["first"] + run["cases"] for run in earlier(file) if run["seed"] == seed), default=0)


def record(file: Path, outcome: Outcome, seed: int, seconds: float) -> None:
    """Add a run to a file of results, with machine, versions and commit."""
    run = {
        "seed": seed, "first": outcome.first, "cases": outcome.cases, "minutes": round(seconds / 60, 2),
        "counts": dict(sorted(outcome.counts.items())), "faults": outcome.faults, "notes": outcome.notes,
        "machine": provenance(torch.device("cpu")),
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, without_places(json.dumps({"runs": [*earlier(file), run]}, indent=1)) + "\n")


def without_places(text: str) -> str:
    """A text without the folders of this machine."""
    places = {str(ROOT): "CHECKOUT", sys.prefix: "ENVIRONMENT", sys.base_prefix: "PYTHON", tempfile.gettempdir(): "TMP"}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def left(until: float) -> bool:
    """Whether there is time for another case; `until` is a `time.monotonic`."""
    return time.monotonic() < until

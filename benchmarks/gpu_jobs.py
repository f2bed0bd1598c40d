"""The jobs of a machine with a GPU, the most valuable first: the cases of the registry, a published donor, the rows of recipes/evidence."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from . import engine_throughput, gpu_evidence, real_donor
from .case import Bench, missed, registry
from .job_queue import Job, Keep, Place
from .named_checks import failed
from .page import RESULTS

# Case -> seconds on one large GPU, which are guesses until a result says how long it took; seconds at toy size on two cores, measured.
FIRST = {
    "works": (60, 15),
    "works_training": (100, 40),
    "ceilings": (10, 5),
    "training": (90, 30),
    "training_sizes": (80, 5),
    "training_adapter": (80, 8),
    "decoding": (80, 5),
    "decoding_static": (120, 8),
    "decoding_static_text": (120, 4),
    "speculation_and_early_exit": (90, 8),
}
LAST = {
    "loss": (40, 12),
    "training_growth": (40, 4),
    "supervision": (15, 1),
    "conversion": (120, 7),
    "training_large": (120, 4),
    "training_ways": (120, 8),
    "decoding_static_batches": (240, 7),
    "decoding_static_long": (240, 7),
    "profile": (30, 7),
    "prototype": (90, 4),
}


def jobs(size: str) -> list[Job]:
    """All at a size of a place, in order."""
    donor = Job("published donor", real_donor.measure, 60, 2, real_donor.obstacle, verdict)
    engines = Job("engines", engine_throughput.measure, 420, 1, engine_throughput.obstacle, verdict)
    return [*map(of_case, FIRST), donor, *gpu_evidence.evidence(size), *map(of_case, LAST), engines]


def of_case(name: str) -> Job:
    """A case of the registry as a job."""
    estimate, rehearsal = (FIRST | LAST)[name]
    return Job(name, partial(_measure, name), estimate, rehearsal, partial(_obstacle, name), verdict)


def _measure(name: str, place: Place, keep: Keep) -> dict[str, Any]:
    return registry().cases[name].measure(Bench(place.size), keep)


def _obstacle(name: str, place: Place) -> str | None:
    known = registry()
    return None if name in known.cases else f"its module cannot be imported: {known.missing.get(name, 'there is no such case')}"


def verdict(found: dict[str, Any], place: Place) -> str:
    """Checks that failed; and bounds that were missed, of which a rehearsal, at toy size, says nothing."""
    wrong = [name for one in found["tables"] for name in failed(one["rows"])]
    wrong += missed(found) if place.size == "cuda" else []
    return f"{len(wrong)} failed or missed: {'; '.join(wrong)}" if wrong else ""


def committed_seconds(job: Job, size: str, results: Path = RESULTS) -> float | None:
    """How long a case took when the result was measured that is in the repository."""
    file = results / f"{size}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return float(found[job.name]["machine"]["seconds"]) if job.name in found else None

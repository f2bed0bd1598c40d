"""Where and with what a measurement was taken, for the JSON that it is kept in."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import accelerate
import psutil
import torch
import transformers

import recursify
from recursify.utils.machine import machine

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit. `load` is the number of processes that wanted to run, of all users, in the last minute."""
    pinned = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": machine(),
        "pinned_to": pinned,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load": load(),
        "versions": {
            "Python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "recursify": recursify.__version__,
        },
        **commit(),
    }


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, least and most of some ratios, and how many they are."""
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "pairs": len(values)}


def earlier(file: Path, parts: set[str]) -> dict[str, Any]:
    """What was measured before of the parts that are not measured now, with the time and commit of each."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    whole = {part: {"date": found["machine"]["date"], "commit": found["machine"]["commit"]} for part in parts}
    measured = {part: found.get("measured", whole)[part] for part in parts if part in found}
    return {part: found[part] for part in measured} | {"measured": measured}


def load() -> float:
    return round(os.getloadavg()[0], 2)


def commit() -> dict[str, Any]:
    """`commit`, and whether the tree differed from it (`changed`); None outside a repository."""
    try:
        # a case writes its results before the next one looks
        changed = _git("status", "--porcelain", "--", "recursify", "benchmarks", ":!benchmarks/results")
        return {"commit": _git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


def _git(*args: str) -> str:
    return subprocess.run(["git", "--no-optional-locks", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

"""Hardware and software versions, for measurements."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


def machine() -> str:
    """Processor, cores and threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def versions() -> tuple[tuple[str, str], ...]:
    """Name and version of the software that determines a measurement."""
    from .. import __version__

    own = ("recursify", __version__), ("Python", platform.python_version())
    return (*own, ("torch", str(torch.__version__)), ("transformers", transformers.__version__))

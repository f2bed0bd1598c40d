"""A published donor from a folder: whether conversion is exact with its weights, in its sizes."""

from __future__ import annotations

from typing import Any

from .case import Bench, Table
from .job_queue import Keep, Place
from .models import SHIPPED
from .named_checks import outcomes
from .works import conversion_of


def obstacle(place: Place) -> str | None:
    if place.donor is None and place.size == "cuda":
        return "needs a pretrained donor: --donor FOLDER"
    if place.donor is not None and not (place.donor / "config.json").is_file():
        return f"--donor: expected a folder with config.json and safetensors, got {place.donor}"
    return None


def measure(place: Place, keep: Keep) -> dict[str, Any]:
    """`tables` and `checks`; a rehearsal without a donor takes the one that ships."""
    folder, bench = str(place.donor or SHIPPED), Bench(place.size)
    found = list(outcomes("A published donor", conversion_of(folder), bench))
    tables = [{"title": one.title, "rows": one.rows, "note": one.note} for one in found if isinstance(one, Table)]
    return {"donor": folder, "tables": tables, "checks": []}

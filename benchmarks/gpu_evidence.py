"""The rows of recipes/evidence as jobs of the queue: first a study's donor, then a job for each row and seed, the cheapest first.

The donors of these studies are pretrained first or bundled; none is downloaded. The time of a row is estimated from the
layer applications of its steps, until it was measured.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.evidence import scan
from recipes.evidence.__main__ import STUDIES
from recipes.evidence.real_donor import layers_of
from recipes.evidence.study import Row, Size, Study, about, donor_folder, is_made, make_donor, one

from .job_queue import Job, Keep, Place

SIZES = {"cuda": "gpu", "quick": "test"}  # of a place, by the names that the studies have for them
ORDER = ("state_tracking", "hops", "length", "compact", "prose", "scan")
PREFIX = "evidence: "
# Guesses: seconds of a layer application in training, of the rest of a step, of loading and measuring a row.
APPLICATION, STEP, ROW = 1.2e-3, 6e-3, 20.0
# Seconds of a row at toy size on two cores.
TOY = {"state_tracking": 1.0, "hops": 4.0, "length": 2.0, "compact": 3.0, "prose": 3.0, "scan": 2.0}
PRETRAINED = ("hops", "compact")  # whose donor is a real one
BACK_TOO = 3  # times the work of a forward pass


def evidence(size: str) -> list[Job]:
    """All donors and rows at a size of a place."""
    found = []
    for name in ORDER:
        make, sizes = STUDIES[name]
        at = sizes[SIZES[size]]
        study = make(at)
        layers = layers_of(at) if name in PRETRAINED else at.donor.get("layers", 8)
        pretraining = at.donor_steps * (STEP + APPLICATION * layers)
        donor = f"{PREFIX}{name}, the donor"
        found.append(Job(donor, partial(_donor, name), 10 + pretraining, TOY[name], partial(_obstacle, name)))
        rows = [(row, seed) for row in study.rows for seed in range(min(row.seeds, at.seeds))]
        rows.sort(key=lambda each: (each[1], _seconds(each[0], study, at, layers)))
        for row, seed in rows:
            work, obstacle = partial(_row, name, row.name, seed), partial(_obstacle, name, needs_donor=True)
            found.append(
                Job(f"{PREFIX}{name}, {row.name}, seed {seed}", work, _seconds(row, study, at, layers), TOY[name], obstacle, after=donor)
            )
    return found


def _seconds(row: Row, study: Study, size: Size, layers: int) -> float:
    """A guess."""
    if row.budget == "none":
        return ROW
    if row.budget == "flops":
        main = next(each for each in study.rows if each.name == study.main)
        return ROW + _applications(main, layers) / layers * size.steps * (STEP + APPLICATION * layers)
    return ROW + size.steps * (STEP + APPLICATION * _applications(row, layers))


def _applications(row: Row, layers: int) -> float:
    """Of layers in a pass, at the trained depth."""
    if row.shape is None:
        return layers
    looped = row.shape["L_layers"]
    rest = layers - looped if row.shape.get("keep_donor") else 0
    return rest + looped * row.shape["H_cycles"] * (row.shape["L_cycles"] + 1)


def _obstacle(name: str, place: Place, needs_donor: bool = False) -> str | None:
    if name in ("prose", *PRETRAINED) and importlib.util.find_spec("datasets") is None:
        return "needs the datasets library, which is not installed here"
    if name in PRETRAINED and place.size == "cuda" and "RECURSIFY_DONOR" not in os.environ:
        return "needs a pretrained donor; RECURSIFY_DONOR names its folder (`python -m recipes.donors smollm2 FOLDER` makes one)"
    if name == "scan" and place.size == "cuda" and not _scan_is_here():
        return "needs the files of SCAN's length split, which RECURSIFY_SCAN names the folder of"
    if needs_donor and not is_made(_folder(name, place)):
        return "the study's donor has not been made"
    return None


def _scan_is_here() -> bool:
    folder = Path(os.environ.get("RECURSIFY_SCAN", "."))
    return any(all((folder / file).exists() for file in names) for names in scan.NAMES)


def _find_scan(name: str, place: Place) -> None:
    """In a rehearsal, lines that only look like SCAN's."""
    if name == "scan" and place.size == "quick" and not _scan_is_here():
        folder = place.results / "evidence" / "scan-lines"
        if not folder.exists():
            _stand_in(folder)
        os.environ["RECURSIFY_SCAN"] = str(folder)


def _stand_in(folder: Path) -> None:
    """A few lines in the form of SCAN's files, of every length that is asked for, where a rehearsal has not got the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, variants in zip(scan.NAMES[0], (range(12), range(12, 24)), strict=True):
        lines = [f"IN: jump {n} times {variant} OUT: {' '.join(['I_JUMP'] * n)}" for n in range(1, 49) for variant in variants]
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _study(name: str, place: Place) -> tuple[Any, Size]:
    make, sizes = STUDIES[name]
    return make, sizes[SIZES[place.size]]


def _folder(name: str, place: Place) -> Path:
    make, size = _study(name, place)
    return donor_folder(make(size), SIZES[place.size], place.results / "evidence")


def _donor(name: str, place: Place, keep: Keep) -> dict[str, Any]:
    """Makes it, and says how."""
    make, size = _study(name, place)
    folder = _folder(name, place)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _find_scan(name, place)
    make_donor(make(size), folder)
    return about(make(size), SIZES[place.size], size, folder, _device(place))


def _row(name: str, row: str, seed: int, place: Place, keep: Keep) -> dict[str, Any]:
    """One row with one seed, trained and measured: `run`, beside what all rows of its study have in common."""
    make, size = _study(name, place)
    number = next(i for i, each in enumerate(make(size).rows) if each.name == row)
    folder, device = _folder(name, place), _device(place)
    _find_scan(name, place)
    entry = one(make, size, number, seed, folder, str(device))
    return about(make(size), SIZES[place.size], size, folder, device) | {"run": entry}


def _device(place: Place) -> torch.device:
    return torch.device("cuda" if place.size == "cuda" else "cpu")

"""The real pretrained donor of some studies: that of `recipes.donors`, or the folder that RECURSIFY_DONOR names; made up for tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from recipes.evidence.study import Size, small_model
from recursify.errors import UserError

LAYERS = 30  # of the one of recipes.donors


def layers_of(size: Size) -> int:
    """Of the donor that `put_donor` will put there, which the shapes of rows depend on."""
    if "layers" in size.donor:
        return int(size.donor["layers"])
    given = os.environ.get("RECURSIFY_DONOR")
    return LAYERS if given is None else int(json.loads(_config(given).read_text(encoding="utf-8"))["num_hidden_layers"])


def _config(given: str) -> Path:
    file = Path(given, "config.json")
    if not file.is_file():
        raise UserError(f"RECURSIFY_DONOR: expected a folder with config.json, got {given}")
    return file


def put_donor(folder: Path, size: Size) -> dict[str, Any]:
    """Make the folder of the donor, with links to the files of one that is there, and say which it is. A size with `hidden_size` has one
    without training.

    Raises:
        UserError: RECURSIFY_DONOR names no model.
    """
    if size.donor.get("hidden_size"):
        return _made_up(folder, size)
    given = os.environ.get("RECURSIFY_DONOR")
    if given is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in _config(given).parent.resolve().iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        return {"name": Path(given).resolve().name}
    from recipes.donors import SOURCES, make

    make(SOURCES["smollm2"], folder)
    return {"name": SOURCES["smollm2"].name}


def _made_up(folder: Path, size: Size) -> dict[str, Any]:
    from recursify.checkpoints.tokenizer import load_tokenizer
    from recursify.demo.prose import donor_folder

    tokenizer = load_tokenizer(str(donor_folder()))
    model = small_model(size.donor, len(tokenizer))
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"name": "random"}

"""An adapter on disk: the parameters of the recursion, beside the name and the hash of the donor that they belong to.

    adapter_config.json         format, base_model_name_or_path, revision, donor_sha256, and the shape of the loop, for reading
    adapter_model.safetensors   gains, initial states, halting head and low-rank updates, in float32
    config.json                 the recursive model's own, with plan and training summary
    tokenizer, generation_config.json, README.md

A `.pt` file of an adapter holds the same parameters as `model_state_dict`. Both take the donor's weights from its own files, which nothing
writes to, and check that these are the ones that the adapter was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import UserError, first_line
from ..utils.files import read_json, sha256
from .donor import Donor, open_donor, recorded_donor

CONFIG, WEIGHTS, FORMAT = "adapter_config.json", "adapter_model.safetensors", "recursify-adapter/1"
HASH = "donor_sha256"  # in the conversion record
PREFIX = "model.recursion."
_SHAPE = ("prelude_layers", "L_layers", "coda_layers", "H_cycles", "L_cycles", "lora_rank", "lora_alpha", "lora_targets", "lora_pairs")
_BLOB = re.compile(r"[0-9a-f]{64}")


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter of ours; PEFT's have a file of the same name."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("format") == FORMAT


def own_state(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of the recursion, in float32 on the CPU."""
    return {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.state_dict().items() if name.startswith(PREFIX)}


def donor_hash(donor: Donor) -> str:
    """SHA-256 over the names and SHA-256s of the files with the donor's weights."""
    digest = hashlib.sha256()
    for name, path in sorted(donor.weight_files().items()):
        digest.update(f"{name} {_file_hash(Path(path))}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    """The SHA-256 of a file; of one in the hub's cache, which names large files by it, without reading it."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and _BLOB.fullmatch(real.name) else sha256(path)


def donor_tensors(record: Mapping[str, Any], wanted: set[str], where: str, donor: str | None = None) -> dict[str, torch.Tensor]:
    """The donor's tensors among those that an adapter's model has, as views of its files.

    Args:
        record: The conversion record of the adapter.
        wanted: Names of all tensors of the model.
        where: The adapter, for messages.
        donor: Folder or hub id of the donor, if not that of the record.

    Raises:
        UserError: The donor is not there, or its weights are not those that the adapter was trained on.
    """
    name, revision = (donor, None) if donor is not None else donor_place(record, where)
    found = open_donor(name, revision=revision)
    if donor_hash(found) != record.get(HASH):
        raise UserError(
            f"{where}: is an adapter of other weights than those of {name}: their hashes differ; name the donor that it was trained on "
            "with --donor"
        )
    return {tensor: found.read(tensor) for tensor in found.tensor_names if tensor in wanted}


def donor_place(record: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """Name and revision of the donor of an adapter.

    Raises:
        UserError: The record names none, or a folder that is not there.
    """
    name, revision, missing = recorded_donor(record)
    if missing:
        raise UserError(f"{where}: its donor was the folder {name}, which is not there; name another place with --donor")
    if name is None:
        raise UserError(f"{where}: does not say which donor it belongs to; name it with --donor")
    return name, revision


def write(folder: Path, state: dict[str, torch.Tensor], config: Any, record: Mapping[str, Any]) -> None:
    """Write the two files of an adapter into a folder."""
    (folder / WEIGHTS).write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"}))
    name, revision, _ = recorded_donor(record)
    fields = {
        "format": FORMAT,
        "base_model_name_or_path": name,
        "revision": revision,
        HASH: record.get(HASH),
        **{name: getattr(config, name) for name in _SHAPE},
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of an adapter folder.

    Raises:
        UserError: The file is missing, truncated or corrupt.
    """
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: {WEIGHTS} is missing, truncated or corrupt ({first_line(error)}); copy it again") from error

"""Open a model by name: recursive or plain; a file, a folder or a hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..network.configuration_recursive_llm import CONFIGS
from . import checkpoint
from .donor import donor_tokenizer, open_donor
from .repository import check_revision, read_config


def is_recursive_checkpoint(name: str, *, revision: str | None = None, token: str | None = None) -> bool:
    """Whether a path or hub id names a recursive model. Always True for a file and for a name that ends in `.pt`. Reads config.json only.

    Raises:
        UserError: Neither a path nor a hub id, no config.json, or a revision of a path.
    """
    if os.path.isfile(name) or checkpoint.is_file_form(name):
        check_revision(name, revision)
        return True
    return read_config(name, revision=revision, token=token).get("model_type") in CONFIGS


def load_model(
    name: str | Path,
    tokenizer_path: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    donor: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A recursive checkpoint or a plain transformers model, with its tokenizer; on the CPU, in the stored dtype.

    Args:
        name: A path or hub id.
        tokenizer_path: Folder or hub id of another tokenizer, in its main revision.
        revision, token: Of the hub, as `from_pretrained` takes them.
        donor: Folder or hub id of the donor of an adapter; where None, the one that the adapter names.

    Raises:
        UserError: Neither of the two, no tokenizer, a revision of a path, or a model without a trained head.
    """
    name, hub = str(name), {"revision": revision, "token": token}
    if is_recursive_checkpoint(name, **hub):
        found = checkpoint.load(name, tokenizer_path=tokenizer_path, donor=donor, **hub)
        checkpoint.require_head(found, name)
        return found.model, checkpoint.require_tokenizer(found, name)
    plain = open_donor(name, **hub)
    return plain.load(), donor_tokenizer(plain, tokenizer_path)

"""The one way to open a model by name: recursive or plain, a file, a folder or a hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..network.configuration_recursive_llm import CONFIGS
from . import checkpoint
from .donor import open_donor
from .repository import read_config
from .tokenizer import load_tokenizer


def is_recursive_checkpoint(name: str) -> bool:
    """Whether a path or hub id is a recursive model's; a file, or what ends in `.pt`, can be nothing else. Reads config.json alone.

    Raises:
        UserError: Neither a path nor a hub id, or no config.json there.
    """
    if os.path.isfile(name) or checkpoint.is_file_form(name):
        return True
    return read_config(name).get("model_type") in CONFIGS


def load_model(name: str | Path, tokenizer_path: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A recursive checkpoint or a plain model of transformers, by path or hub id, with its tokenizer; on the CPU, in the stored type.

    Raises:
        UserError: Neither, no tokenizer, or a model whose head was not trained with the rest.
    """
    name = str(name)
    if is_recursive_checkpoint(name):
        found = checkpoint.load(name, tokenizer_path=tokenizer_path)
        checkpoint.require_head(found, name)
        return found.model, checkpoint.need_tokenizer(found, name)
    return open_donor(name).load(), load_tokenizer(tokenizer_path or name)

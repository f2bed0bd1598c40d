"""Flags that name a model. The settings of every command that opens a model inherit them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..utils.options import Options

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MAX_SHARD_SIZE = "5GB"  # of a file of weights


@dataclass(kw_only=True)
class TokenizerSource(Options):
    """Model and tokenizer: where the tokenizer is."""

    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer. Default: the tokenizer of the model."""


@dataclass(kw_only=True)
class Revision(Options):
    """Model and tokenizer: which revision of a hub repository."""

    revision: str | None = None
    """Branch, tag or commit of a model that is named by its hub id. Default: the main branch."""


@dataclass(kw_only=True)
class DonorPlace(Options):
    """Model and tokenizer: the donor of an adapter."""

    donor: str | None = None
    """Folder or hub id of the donor of an adapter. Default: the one that its adapter_config.json names."""


@dataclass(kw_only=True)
class ModelSource(Revision, DonorPlace):
    """Model and tokenizer: which model, recursive or plain."""

    checkpoint: str
    """A recursive checkpoint (a .pt file with its _tokenizer folder, a folder, or a hub id), or a plain model (folder or hub id)."""


@dataclass(kw_only=True)
class RecursiveSource(Revision):
    """Model and tokenizer: which recursive model."""

    checkpoint: str
    """A recursive checkpoint: a .pt file with its _tokenizer folder, a folder in Hugging Face layout, or a hub id."""

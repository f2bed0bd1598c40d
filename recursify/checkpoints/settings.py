"""Flags that name a model; the settings of every command that opens one inherit them."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.options import Options


@dataclass(kw_only=True)
class TokenizerSource(Options):
    """Model and tokenizer: where the tokenizer is."""

    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer. Default: the one that the model came with."""


@dataclass(kw_only=True)
class ModelSource(Options):
    """Model and tokenizer: which model, recursive or plain."""

    checkpoint: str
    """A recursive checkpoint (a .pt file with its _tokenizer folder, a folder, or a hub id), or a plain model (folder or hub id)."""


@dataclass(kw_only=True)
class RecursiveSource(Options):
    """Model and tokenizer: which recursive model."""

    checkpoint: str
    """What convert or train wrote: a .pt file with its _tokenizer folder, or a folder in Hugging Face layout, here or on the hub."""

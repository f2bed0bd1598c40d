"""Flags of an export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import tyro

from ..checkpoints.settings import HUB_ID, MAX_SHARD_SIZE, RecursiveSource, TokenizerSource
from ..errors import UserError
from ..evaluation.settings import TextMeasurement

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)")


@dataclass(kw_only=True)
class ExportSettings(TextMeasurement, TokenizerSource, RecursiveSource):
    """Write a folder for the Hugging Face hub, or the layers as a plain model, and upload it."""

    out: tyro.conf.Positional[str] = ""
    """Where to write: a new folder, or one that holds a recursive model, which is replaced. Also as --output_dir OUT."""
    donor: bool = False
    """Write prelude, loop and coda, as they are trained, as a plain model of the donor's architecture: the recursive model at 0 cycles."""
    adapter_only: bool = False
    """Write an adapter alone, some megabytes, which names its donor by hub id; without this, the donor's weights are written, too."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights. Default: that of the checkpoint."""
    max_shard_size: str = MAX_SHARD_SIZE
    """Largest size of a weights file, such as 500MB; larger weights are sharded."""

    check: str | None = None
    """Write nothing: ask the running server at this address, such as http://127.0.0.1:8000, for the log-probabilities of the prompt in
    recursify_export.json of the folder --checkpoint, and say how far they are from it; at --cycles, or at any depth."""

    license: str | None = None
    """License for the model card, by its identifier on the hub, such as apache-2.0."""
    base_model: str | None = None
    """Hub id of the base model, for the model card. Default: the donor that the model was converted from, if it was a hub id."""
    evaluation: tuple[str, ...] = ()
    """Files with the output of `recursify evaluate --json`, of this model and of baselines on the same text, for the model card."""
    dataset_name: str | None = None  # type: ignore[assignment]
    """Measure the loss on this text, for the model card: wikitext or another hub dataset, a local file, or a folder, read as
    `recursify evaluate` reads it; the flags of "Text and depths" and "Data" say how. Default: nothing is measured."""
    push: str | None = None
    """Upload the folder to this repository on the hub, such as you/model; created if it does not exist."""
    private: bool = False
    """Create the repository as a private one."""
    commit_message: str = "Upload by recursify export"
    """Commit message of the upload."""

    def validate(self) -> None:
        """Check what needs neither model nor disk.

        Raises:
            UserError: A value of another form, or mutually exclusive ones.
        """
        if self.check is not None and self.out:
            raise UserError(f"--check: compares a server with the folder --checkpoint and writes nothing; leave {self.out} out")
        if self.check is None and not self.out:
            raise UserError("OUT: expected the name of the folder to write; give one, such as recursify export OUT --checkpoint model.pt")
        _expect("--license", _LICENSE, self.license, "an identifier of the hub's such as apache-2.0, mit or other")
        _expect("--base_model", HUB_ID, self.base_model, "a hub id such as Qwen/Qwen2-0.5B")
        _expect("--max_shard_size", _SIZE, self.max_shard_size, "a size such as 500MB or 5GB")
        if self.evaluation and self.dataset_name is not None:
            raise UserError("--evaluation: was measured before, --dataset_name measures now; give one of them")
        if self.adapter_only and (self.donor or self.dtype is not None):
            other = "--donor" if self.donor else f"--dtype {self.dtype}"
            raise UserError(f"--adapter_only: writes no weights of the donor, which {other} is about; give one of them")
        if self.private and self.push is None:
            raise UserError("--private: says how to upload, but nothing is uploaded; name a repository with --push")


def _expect(flag: str, pattern: re.Pattern[str], value: str | None, wanted: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise UserError(f"{flag}: expected {wanted}, got {value!r}")

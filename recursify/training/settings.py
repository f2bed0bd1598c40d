"""The flags of training. One field is one flag; the text under it is its help, and stands here once for all scripts that have it.

    TrainSettings        train_qwen_recursive.py     what RunSettings has, and where the model is
    EmbeddingSettings    train_qwen_trm.py           what DonorSettings has, and what embedding-space training adds
    HybridSettings       train_qwen_trm_hybrid.py    what DonorSettings has, and what hybrid training adds

Floor 3.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..conversion import LoopSettings
from ..device import check_seed, choose_device
from ..errors import UserError
from ..objective import SCHEDULES

GAIN_LR_RATIO = 10.0

# What decides which tokens a step sees. A resumed run must agree with the interrupted one in all of it.
DATA_FIELDS = ("dataset_name", "dataset_config_name", "text_column", "seq_len", "batch_size", "grad_accum_steps", "seed")


@dataclass(kw_only=True)
class RunSettings:
    """What every training run has, whatever it trains and wherever the model comes from."""

    approach: ClassVar[str]  # its row of `approaches.APPROACHES`
    resume_fields: ClassVar[tuple[str, ...]] = DATA_FIELDS  # in which a resumed run must agree with the interrupted one

    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer. Default: the one that the model came with."""

    dataset_name: str = "wikitext"
    """Hub data set (wikitext means Salesforce/wikitext), or a local .txt, .jsonl, .json, .csv or .parquet file, or a folder of them."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set; wikitext-2-raw-v1 for wikitext when none is named."""
    text_column: str = "text"
    """Column that holds the text."""
    seq_len: int = 128
    """Tokens per training sequence. Documents are joined, with an end-of-text token after each, and cut to this length."""

    batch_size: int = 4
    """Sequences per forward pass."""
    grad_accum_steps: int = 1
    """Forward passes per optimizer step: the effective batch is batch_size * grad_accum_steps sequences."""
    eval_batch_size: int | None = None
    """Sequences per forward pass of the validation. Default: batch_size."""
    num_epochs: int = 3
    """Passes over the training text."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; overrides num_epochs, going over the text as often as it takes."""

    lr: float = 1e-5
    """Learning rate of all but what gain_lr is for, reached after the warm-up; from there it falls linearly to 0 over the run."""
    gain_lr: float | None = None
    """Learning rate of what the donor has not got: gains, H_init, L_init, q_head; these have no weight decay. Default: 10 * lr."""
    warmup_steps: int = 100
    """Optimizer steps in which the learning rate rises; a tenth of the run if this is more than half of it."""
    weight_decay: float = 0.01
    """AdamW's weight decay of the matrices; norms, biases and the recursion's own parameters have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    enable_deep_supervision: bool = False
    """Score every cycle, not only the last, so that each of them learns to predict."""
    deep_supervision_weight: float = 0.5
    """Weight of the cycles before the last, which has weight 1; the schedule shapes it."""
    deep_supervision_schedule: Literal["linear_decay", "constant", "exponential_decay", "early_decay"] = "linear_decay"
    """How it runs over the cycles before the last: linear_decay and exponential_decay give the early ones less, early_decay the late."""

    generate_every: int = 500
    """Print a sample every so many optimizer steps; 0 never."""
    generation_prompt: str = "The quick brown fox"
    """What the samples continue."""
    save_every: int = 1000
    """Write checkpoint_step_N.pt, from which --resume can go on, every so many optimizer steps; 0 never."""
    log_every: int = 10
    """Write the training loss to metrics.jsonl every so many optimizer steps."""
    output_dir: str = "."
    """Folder for checkpoints and metrics.jsonl; made if it is missing."""
    resume: bool = False
    """Go on from the newest whole checkpoint_step_N.pt in output_dir, as if the run had never stopped."""

    seed: int = 42
    """Seed of the order of the sequences and of everything else that is random."""
    device: str | None = None
    """cpu, cuda or mps. Default: cuda where there is one, else mps, else cpu."""
    bf16: bool | None = None
    """Compute in bfloat16 (the weights that are trained stay float32). Default: where the GPU has it."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a third more time."""

    def validate(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            UserError: A value out of range.
        """
        for name in ("batch_size", "grad_accum_steps", "num_epochs", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_batch_size", "max_steps"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "deep_supervision_weight", "generate_every", "save_every"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "gain_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name}: expected a number above 0, got {value}")
        if self.seq_len < 2:
            raise UserError(f"--seq_len: expected at least 2 tokens, so that one can be predicted from another, got {self.seq_len}")
        if self.deep_supervision_schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise UserError(f"--deep_supervision_schedule: expected one of {known}, got {self.deep_supervision_schedule!r}")
        if self.generate_every and not self.generation_prompt.strip():
            raise UserError("--generation_prompt: expected some text to continue, got none; --generate_every 0 prints no samples")
        check_seed(self.seed)
        choose_device(self.device)
        _check_folder(self.folder)

    def validate_model(self, config: Any) -> None:
        """Check what depends on the model.

        Args:
            config: The model's configuration; a plain donor's has no cycles, and is trained as it is.

        Raises:
            UserError: No cycle to train, or sequences longer than the model has positions.
        """
        if getattr(config, "H_cycles", 1) == 0:
            raise UserError(
                f"{self.source}: cannot train at 0 cycles: with H_cycles 0 the recursion is never run and learns nothing; "
                "convert with --H_cycles 1 or more"
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and self.seq_len > positions:
            raise UserError(f"--seq_len: expected at most {positions}, the positions that the model has, got {self.seq_len}")

    @property
    def source(self) -> str:
        """Where the model comes from."""
        raise NotImplementedError

    @property
    def gain_learning_rate(self) -> float:
        return GAIN_LR_RATIO * self.lr if self.gain_lr is None else self.gain_lr

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


@dataclass(kw_only=True)
class _FromCheckpoint:
    checkpoint: str
    """The model that convert wrote: a .pt file with its _tokenizer folder beside it, or a folder in Hugging Face layout."""


# Help lists the fields of the last base first: where the model comes from, then the run.
@dataclass(kw_only=True)
class TrainSettings(RunSettings, _FromCheckpoint):
    """Fine-tune a recursive model on text."""

    approach = "full"

    @property
    def source(self) -> str:
        return self.checkpoint


@dataclass(kw_only=True)
class _FromDonor:
    model_name: str = "Qwen/Qwen2-0.5B"
    """The donor: a hub id, or a folder with config.json and safetensors."""


@dataclass(kw_only=True)
class DonorSettings(RunSettings, LoopSettings, _FromDonor):
    """What the approaches have that start at a donor, whose embeddings they freeze, and train the loop alone."""

    resume_fields: ClassVar[tuple[str, ...]] = (*DATA_FIELDS, "model_name", "L_layers", "H_cycles", "L_cycles")

    @property
    def source(self) -> str:
        return self.model_name

    @property
    def starts_fresh(self) -> bool:
        """Whether the looped layers start at random and not as the donor's."""
        raise NotImplementedError

    def validate(self) -> None:
        super().validate()
        for name, least in (("L_layers", 1), ("H_cycles", 1), ("L_cycles", 0)):
            _at_least(name, getattr(self, name), least)


@dataclass(kw_only=True)
class EmbeddingSettings(DonorSettings):
    """Train a recursive block in a donor's embedding space: it predicts the embedding of the next token. No head, so it writes no text."""

    approach = "embedding"
    resume_fields: ClassVar[tuple[str, ...]] = (*DonorSettings.resume_fields, "donor_loop")

    donor_loop: bool = False
    """Start the looped layers as layers of the donor. Default: at random, for which a --lr of some 3e-4 suits better than 1e-5."""

    @property
    def starts_fresh(self) -> bool:
        return not self.donor_loop


@dataclass(kw_only=True)
class HybridSettings(DonorSettings):
    """Train the recursive layers alone, between a donor's frozen embeddings and its frozen head; the model writes text."""

    approach = "hybrid"
    resume_fields: ClassVar[tuple[str, ...]] = (*DonorSettings.resume_fields, "fresh_loop", "tune_lm_head")

    fresh_loop: bool = False
    """Start the looped layers at random, for which a --lr of some 3e-4 suits better than 1e-5. Default: as layers of the donor."""
    tune_lm_head: bool = False
    """Train the final norm and the head, too. A head that is tied to the embeddings becomes a matrix of its own first; they stay frozen."""

    @property
    def starts_fresh(self) -> bool:
        return self.fresh_loop


def _check_folder(folder: Path) -> None:
    """Whether a run could write into a folder that may not be there yet."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"--output_dir: expected a folder, got {there}, which is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"--output_dir: {folder} cannot be written: {there} is not writable; choose another")


def _at_least(name: str, value: float, least: int) -> None:
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"--{name}: expected at least {least}, got {value}")

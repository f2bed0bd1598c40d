"""The flags of training. One field is one flag; the text under it is its help.

Floor 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..device import choose_device
from ..errors import UserError
from ..objective import SCHEDULES

GAIN_LR_RATIO = 10.0

# What decides which tokens a step sees: a resumed run must agree with the interrupted one in all of it.
DATA_FIELDS = ("dataset_name", "dataset_config_name", "text_column", "seq_len", "batch_size", "grad_accum_steps", "seed")


@dataclass(kw_only=True)
class TrainSettings:
    """Fine-tune a recursive model on text."""

    checkpoint: str
    """The model that convert wrote: a .pt file with its _tokenizer folder beside it, or a folder in Hugging Face layout."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer. Default: the one saved with the checkpoint."""

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
    """Learning rate of the donor's weights, reached after the warm-up; from there it falls linearly to 0 over the run."""
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
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "deep_supervision_weight", "generate_every", "save_every", "seed"):
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
        choose_device(self.device)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output_dir: expected a folder, got {self.output_dir}, which is a file")

    def validate_model(self, config: Any) -> None:
        """Check what depends on the model.

        Args:
            config: The model's configuration; a plain donor's has no cycles, and is trained as it is.

        Raises:
            UserError: No cycle to train, or sequences longer than the model has positions.
        """
        if getattr(config, "H_cycles", 1) == 0:
            raise UserError(
                f"{self.checkpoint}: cannot train at 0 cycles: with H_cycles 0 the recursion is never run and learns nothing; "
                "convert with --H_cycles 1 or more"
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and self.seq_len > positions:
            raise UserError(f"--seq_len: expected at most {positions}, the positions that the model has, got {self.seq_len}")

    @property
    def gain_learning_rate(self) -> float:
        return GAIN_LR_RATIO * self.lr if self.gain_lr is None else self.gain_lr

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def _at_least(name: str, value: float, least: int) -> None:
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"--{name}: expected at least {least}, got {value}")

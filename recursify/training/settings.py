"""The flags of training. One field is one flag; the text under it is its help, and stands here once for all scripts that have it.

FitSettings          `fit`, RecursiveTrainer     what RunSettings has: the model is in memory
TrainSettings        train_qwen_recursive.py     the same, and where the model is
EmbeddingSettings    train_qwen_trm.py           what DonorSettings has, and what embedding-space training adds
HybridSettings       train_qwen_trm_hybrid.py    what DonorSettings has, and what hybrid training adds
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ..checkpoints.settings import RecursiveSource, Revision, TokenizerSource
from ..conversion.settings import LoopSettings
from ..data.question_sets import is_questions
from ..data.settings import DataSettings, parse_mix
from ..errors import UserError
from ..network.configuration_recursive_llm import GAIN_MAX
from ..utils.device import check_seed, choose_device
from ..utils.options import DeviceOptions

GAIN_LR_RATIO = 10.0

NOT_NEGATIVE = (
    "warmup_steps", "weight_decay", "max_grad_norm", "deep_supervision_weight", "distill_weight", "self_distill_weight", "monotone_weight",
    "halting_weight", "generate_every", "save_every", "keep_last", "early_stopping_patience",
)  # fmt: skip

# What decides which tokens a step sees. A resumed run must agree with the interrupted one in all of it.
DATA_FIELDS = (
    "dataset_name", "dataset_config_name", "text_column", "mix", "streaming", "separate_documents", "seq_len", "batch_size",
    "grad_accum_steps", "seed",
)  # fmt: skip
# What changes the trained state itself or what it is made of; another value would read it wrongly.
STATE_FIELDS = ("optimizer", "ema_decay")


@dataclass(kw_only=True)
class RunSettings(DataSettings, DeviceOptions, TokenizerSource):
    """Training: what every run has, whatever it trains and wherever the model comes from."""

    approach: ClassVar[str]  # its row of `approaches.APPROACHES`
    resume_fields: ClassVar[tuple[str, ...]] = (*DATA_FIELDS, *STATE_FIELDS)  # in which a resumed run must agree with the interrupted one

    seq_len: int = 128
    """Tokens per training sequence. Documents are joined, with an end-of-text token after each, and cut to this length."""
    separate_documents: bool = False
    """Let no token see into another document of its sequence: attention stays inside, positions restart. Questions are always apart."""

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
    max_tokens: int | None = None
    """Stop after so many training tokens, as max_steps: the steps are rounded up."""
    eval_every: int | None = None
    """Validate every so many optimizer steps, too, and not only at the end of each epoch and of the run."""
    early_stopping_patience: int = 0
    """Stop when the validation loss has not fallen for so many validations in a row; 0 never."""

    cycle_choices: tuple[int, ...] = ()
    """Cycle counts to train at: each optimizer step draws one. Default: the H_cycles of the model, always."""
    cycle_weights: tuple[float, ...] = ()
    """How often each of cycle_choices is drawn, relative to the others. Default: equally often."""
    depth_curriculum: float = 0.0
    """Share of the run in which cycle_choices open up one after another, the shallow ones first; 0 has all of them from the start."""
    backprop: Literal["full", "cycle", "last"] = "full"
    """How far back gradients go: through all cycles; through each cycle alone, at the memory of one; or through the last alone (TRM)."""
    start_gain: float | None = None
    """Gain that the loop starts from. Default: as it is; where all are 0, the largest of 0.45 to 0.05 that costs at most 0.02 nats."""

    lr: float = 1e-5
    """Learning rate of all but what gain_lr is for, reached after the warm-up; from there lr_schedule brings it to 0 over the run."""
    gain_lr: float | None = None
    """Learning rate of what the donor has not got: gains, H_init, L_init, q_head; these have no weight decay. Default: 10 * lr."""
    lr_schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """How the learning rate falls after the warm-up: linear or cosine, over the whole run; wsd, not until its last part (decay_share)."""
    decay_share: float = 0.2
    """Share of the run in which the learning rate falls under wsd; the other schedules take all that follows the warm-up."""
    warmup_steps: int = 100
    """Optimizer steps in which the learning rate rises; a tenth of the run if this is more than half of it."""
    optimizer: Literal["adamw", "muon", "adamw_8bit"] = "adamw"
    """muon is for the matrices of the layers, with AdamW for the rest; adamw_8bit takes a quarter of the memory for states (torchao)."""
    weight_decay: float = 0.01
    """Weight decay of the matrices; norms, biases and the recursion's own parameters have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    ema_decay: float = 0.0
    """Validate, sample and save a moving average of the weights with this decay, such as 0.999, in place of the weights; 0 has none."""

    enable_deep_supervision: bool = False
    """Score every cycle, not only the last, so that each of them learns to predict."""
    deep_supervision_weight: float = 0.5
    """Weight of the cycles before the last, which has weight 1; the schedule shapes it."""
    deep_supervision_schedule: Literal["linear_decay", "constant", "exponential_decay", "early_decay"] = "linear_decay"
    """How it runs over the cycles before the last: linear_decay and exponential_decay give the early ones less, early_decay the late."""

    distill_weight: float = 0.0
    """Weight of staying near the donor: the divergence (forward KL) from its predictions, at every scored cycle."""
    distill_temperature: float = 1.0
    """Temperature of the two distillation terms: above 1, what is unlikely counts for more."""
    teacher: str | None = None
    """Teacher of --distill_weight: a folder, a hub id, or id@revision. Default: the donor that the checkpoint was converted from."""
    self_distill_weight: float = 0.0
    """Weight of the divergence of each earlier cycle from the last one. Needs enable_deep_supervision."""
    monotone_weight: float = 0.0
    """Weight of what each cycle makes worse than the one before it, token by token. Needs enable_deep_supervision."""
    halting_weight: float = 0.0
    """Weight of training q_head to say where later cycles do not help; it changes nothing else. Needs enable_deep_supervision."""

    generate_every: int = 500
    """Print a sample every so many optimizer steps; 0 never."""
    generation_prompt: str = "The quick brown fox"
    """What the samples continue."""
    save_every: int = 1000
    """Write checkpoint_step_N.pt, from which --resume can go on, every so many optimizer steps; 0 never."""
    keep_last: int = 0
    """Keep so many of the newest checkpoint_step_N.pt and delete older ones; 0 keeps all."""
    log_every: int = 10
    """Write the training loss to metrics.jsonl every so many optimizer steps."""
    report_to: tuple[str, ...] = ()
    """Also send what metrics.jsonl gets to these trackers, such as tensorboard, wandb, mlflow or trackio: any that transformers knows."""
    output_dir: str = "."
    """Folder for checkpoints and metrics.jsonl; made if it is missing."""
    resume: bool = False
    """Go on from the newest whole checkpoint_step_N.pt in output_dir, as if the run had never stopped."""

    seed: int = 42
    """Seed of the order of the sequences and of everything else that is random."""
    bf16: bool | None = None
    """Compute in bfloat16 (the weights that are trained stay float32). Default: where the GPU has it."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the layers with torch.compile: once for all their applications, whatever the depth."""
    fsdp: bool = False
    """Under torchrun: spread weights, gradients and optimizer states over the processes (FSDP2) where each has all of them else (DDP)."""
    deepspeed: str | None = None
    """Under torchrun: a DeepSpeed configuration (JSON) with ZeRO stage 0 to 2, for adamw; its runs cannot be resumed. Needs deepspeed."""
    dry_run: bool = False
    """Say what the run would cost in steps, tokens, FLOPs and memory, and stop."""

    def validate(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            UserError: A value out of range.
        """
        for name in ("batch_size", "grad_accum_steps", "num_epochs", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_batch_size", "max_steps", "max_tokens", "eval_every"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in NOT_NEGATIVE:
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "gain_lr", "distill_temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name}: expected a number above 0, got {value}")
        for name in ("depth_curriculum", "decay_share", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name}: expected at least 0 and less than 1, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise UserError(f"--seq_len: expected at least 2 tokens, so that one can be predicted from another, got {self.seq_len}")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise UserError(f"--{name}: expected one of {', '.join(get_args(hint))}, got {getattr(self, name)!r}")
        self._validate_depth()
        self._validate_terms()
        if self.max_steps and self.max_tokens:
            raise UserError("--max_tokens: expected it or --max_steps, got both: each says where the run ends; give one")
        parse_mix(self.mix)
        if self.streaming and not (self.max_steps or self.max_tokens):
            raise UserError("--streaming: the end of a stream is not known; say where the run ends with --max_steps or --max_tokens")
        if self.streaming and self.has_questions:
            raise UserError("--streaming: question sets are small and not streamed; leave it out")
        if self.generate_every and not self.generation_prompt.strip():
            raise UserError("--generation_prompt: expected some text to continue, got none; --generate_every 0 prints no samples")
        check_seed(self.seed)
        choose_device(self.device)
        _check_folder(self.folder)

    def _validate_depth(self) -> None:
        choices = self.cycle_choices
        if list(choices) != sorted(set(choices)) or any(choice < 1 for choice in choices):
            raise UserError(f"--cycle_choices: expected different cycle counts of at least 1, ascending, got {_listed(choices)}")
        if self.cycle_weights and len(self.cycle_weights) != len(choices):
            raise UserError(
                f"--cycle_weights: expected one for each of --cycle_choices ({_listed(choices)}), got {_listed(self.cycle_weights)}"
            )
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.cycle_weights):
            raise UserError(f"--cycle_weights: expected numbers above 0, got {_listed(self.cycle_weights)}")
        if self.depth_curriculum and len(choices) < 2:
            raise UserError("--depth_curriculum: there is one cycle count and nothing to open up; name several with --cycle_choices")
        if self.backprop == "cycle" and not self.enable_deep_supervision:
            raise UserError(
                "--backprop cycle: back-propagates the loss of each cycle, but only the last one is scored; add --enable_deep_supervision, "
                "or take --backprop last, which is the same without it"
            )
        if self.backprop == "last" and self.enable_deep_supervision:
            raise UserError(
                "--backprop last: only the last cycle has gradients, so --enable_deep_supervision has nothing to train; "
                "take --backprop cycle"
            )
        if self.start_gain is not None and not abs(self.start_gain) <= GAIN_MAX:
            raise UserError(f"--start_gain: expected a number between -{GAIN_MAX} and {GAIN_MAX}, got {self.start_gain}")

    def _validate_terms(self) -> None:
        for name in ("self_distill_weight", "monotone_weight", "halting_weight"):
            if getattr(self, name) and not self.enable_deep_supervision:
                raise UserError(f"--{name}: compares cycles, but only the last one is scored; add --enable_deep_supervision")
        if self.teacher is not None and not self.distill_weight:
            raise UserError(f"--teacher: nothing asks {self.teacher}; say how much it counts with --distill_weight")

    def validate_model(self, config: Any) -> None:
        """Check what depends on the model.

        Args:
            config: The model's configuration; a plain donor's has no cycles, and is trained as it is.

        Raises:
            UserError: No cycle to train, or sequences longer than the model has positions.
        """
        if self.start_gain is not None and getattr(config, "injection", "anchored") != "anchored":
            raise UserError(f"--start_gain: the loop of this model has no gains (injection {config.injection!r}); leave the flag out")
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
        return "the model"

    @property
    def separates(self) -> bool:
        """Whether documents are kept apart."""
        return self.separate_documents or self.has_questions

    @property
    def has_questions(self) -> bool:
        return any(is_questions(name) for name in (self.dataset_name, *(name for name, _ in parse_mix(self.mix))))

    @property
    def gain_learning_rate(self) -> float:
        return GAIN_LR_RATIO * self.lr if self.gain_lr is None else self.gain_lr

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


@dataclass(kw_only=True)
class FitSettings(RunSettings):
    """Training of a model in memory: all of it, by its next-token loss."""

    approach = "full"


# Help lists the fields of the last base first: where the model comes from, then the run.
@dataclass(kw_only=True)
class TrainSettings(FitSettings, RecursiveSource):
    """Fine-tune a recursive model on text."""

    @property
    def source(self) -> str:
        return self.checkpoint


@dataclass(kw_only=True)
class _FromDonor(Revision):
    """Model and tokenizer: the donor."""

    model_name: str = "Qwen/Qwen2-0.5B"
    """The donor: a hub id, or a folder with config.json and safetensors."""


@dataclass(kw_only=True)
class DonorSettings(RunSettings, LoopSettings, _FromDonor):
    """Loop: the approaches that start at a donor, whose embeddings they freeze, and train the loop alone."""

    resume_fields: ClassVar[tuple[str, ...]] = (*RunSettings.resume_fields, "model_name", "revision", "L_layers", "H_cycles", "L_cycles")

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

    def validate(self) -> None:
        super().validate()
        for name in ("distill_weight", "self_distill_weight", "monotone_weight", "halting_weight"):
            if getattr(self, name):
                raise UserError(f"--{name}: compares predictions of words, and this approach predicts embeddings; leave it out")

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


def _listed(values: Iterable[Any]) -> str:
    return " ".join(map(str, values)) or "none"


def _at_least(name: str, value: float, least: int) -> None:
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"--{name}: expected at least {least}, got {value}")

"""The flags of training: a class per group of `--help`, and a settings class per approach, which inherits them.

FitSettings          `fit`, RecursiveTrainer                  a model in memory
TrainSettings        `recursify train`                        a checkpoint
HybridSettings       `recursify train --approach hybrid`      a donor with frozen embeddings and head
EmbeddingSettings    `recursify train --approach embedding`   a donor, in its embedding space
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..checkpoints.settings import DonorPlace, RecursiveSource, Revision, TokenizerSource
from ..conversion.settings import LoopSettings
from ..data.question_sets import is_questions
from ..data.settings import DataSettings, parse_mix
from ..errors import UserError
from ..utils.device import check_seed, choose_device
from ..utils.options import DeviceOptions, Options

GAIN_LR_RATIO = 10.0

NOT_NEGATIVE = (
    "warmup_steps", "weight_decay", "max_grad_norm", "deep_supervision_weight", "distill_weight", "self_distill_weight", "monotone_weight",
    "halting_weight", "match_hidden_weight", "generate_every", "save_every", "keep_last", "early_stopping_patience",
)  # fmt: skip

# Settings that determine the tokens and labels of each step. They must not change on resume.
DATA_FIELDS = (
    "dataset_name", "dataset_config_name", "text_column", "mix", "train_on", "streaming", "separate_documents", "seq_len", "batch_size",
    "grad_accum_steps", "seed", "cycle_targets", "steps_per_cycle",
)  # fmt: skip
# Settings that determine the contents of the saved state, or which parameters have one. They must not change on resume.
STATE_FIELDS = ("optimizer", "ema_decay", "backprop", "halting_weight")
# Settings of the model that a run starts from, which a resumed run does not read again.
START_FIELDS = (
    "checkpoint",
    "model_name",
    "revision",
    "start_gain",
    "L_layers",
    "H_cycles",
    "L_cycles",
    "donor_loop",
    "fresh_loop",
    "tune_lm_head",
    "adapter",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_per",
)


@dataclass(kw_only=True)
class Packing(Options):
    """Sequences: how documents become training sequences."""

    seq_len: int = 128
    """Tokens per training sequence. Documents are concatenated, each followed by an end-of-text token, and cut to this length."""
    separate_documents: bool = False
    """Block-diagonal attention: packed documents do not attend to each other, and positions restart. Always on for questions and
    conversations."""


@dataclass(kw_only=True)
class RunLength(Options):
    """Batches and length of the run: how much is trained on, and when it is validated."""

    batch_size: int = 4
    """Sequences per forward pass and device."""
    grad_accum_steps: int = 1
    """Forward passes per optimizer step."""
    eval_batch_size: int | None = None
    """Sequences per forward pass of the validation. Default: batch_size."""
    num_epochs: int = 3
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after N optimizer steps; overrides num_epochs and repeats the data as needed. Default: num_epochs decides."""
    max_tokens: int | None = None
    """Stop after N training tokens, rounded up to whole steps; like max_steps. Default: num_epochs decides."""
    eval_every: int | None = None
    """Validate every N optimizer steps, in addition to the end of each epoch. Default: at the end of each epoch only."""
    early_stopping_patience: int = 0
    """Stop after N validations in a row without a lower validation loss; 0 disables it."""


@dataclass(kw_only=True)
class Recursion(Options):
    """Recursion: the depth of each step, and how far back gradients go."""

    cycle_choices: tuple[int, ...] = ()
    """Cycle counts to train at; each optimizer step samples one. Default: always the H_cycles of the model."""
    cycle_weights: tuple[float, ...] = ()
    """Relative sampling weights of cycle_choices. Default: uniform."""
    depth_curriculum: float = 0.0
    """Share of the run over which cycle_choices become available one after another, shallow ones first; 0 makes all available at once."""
    backprop: Literal["full", "cycle", "last"] = "full"
    """Backpropagate through all cycles (full), each separately at the memory of one (cycle), or the last only (last, as in TRM)."""
    start_gain: float | None = None
    """Start value of the gains, -0.45 to 0.45. Default: unchanged; if all are 0, the largest of 0.45 to 0.05 that raises the validation
    loss by at most 0.02 nats."""


@dataclass(kw_only=True)
class Adapter(Options):
    """Adapter: the donor frozen, the recursion and low-rank updates trained."""

    adapter: bool = False
    """Freeze the donor, and train gains, initial states and low-rank updates (LoRA) of the looped layers, which act in the loop and not in
    the plain pass: at 0 cycles the model stays its donor, bit for bit. Checkpoints hold the adapter alone. Needs a model that was
    converted with --keep_donor and not trained."""
    lora_rank: int = 16
    """Rank of the low-rank updates of --adapter."""
    lora_alpha: float = 32.0
    """Low-rank updates are scaled by lora_alpha / lora_rank."""
    lora_targets: Literal["all", "attention", "mlp"] = "all"
    """Linear layers of the loop with low-rank updates: those of attention, of the feed-forward (mlp), or all."""
    lora_per: Literal["model", "cycle"] = "model"
    """Low-rank updates shared by all cycles (model), or for each cycle its own (cycle); deeper cycles than H_cycles have the last."""
    load_in_4bit: bool = False
    """Train the adapter beside a donor whose linear layers are quantised to 4 bits (NF4, as in QLoRA): a quarter of the memory of bfloat16
    weights, at some loss of precision. Checkpoints hold the adapter alone, as without. Needs bitsandbytes."""

    def validate_adapter(self, config: Any) -> None:
        """Check the adapter's flags against the model that a run starts from.

        Raises:
            UserError: A value out of range, flags without --adapter, or other ones than those of an adapter that is trained on.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_per")}
        for name, value in given.items():
            if not self.adapter and value != getattr(Adapter(), name):
                raise UserError(f"--{name}: expected --adapter with it, got {value}; add --adapter, or leave --{name} out")
            if isinstance(value, int | float) and value <= 0:
                raise UserError(f"--{name}: expected a number above 0, got {value}")
        if self.load_in_4bit and not (self.adapter or getattr(config, "is_adapter", False)):
            raise UserError("--load_in_4bit: quantised weights cannot be trained, only frozen; add --adapter, or leave it out")
        if self.adapter and getattr(config, "is_adapter", False):
            of_model = {name: getattr(config, name) for name in ("lora_rank", "lora_alpha", "lora_targets")}
            of_model["lora_per"] = "cycle" if config.lora_pairs > 1 else "model"
            for name, value in of_model.items():
                if given[name] not in (value, getattr(Adapter(), name)):
                    raise UserError(f"--{name}: expected {value}, that of the adapter that is trained on, got {given[name]}; leave it out")


@dataclass(kw_only=True)
class Optimizer(Options):
    """Optimizer: learning rates, schedule and regularisation."""

    lr: float = 1e-5
    """Peak learning rate, reached after the warm-up."""
    gain_lr: float | None = None
    """Learning rate of the newly added parameters (gains, initial states, halting head); they have no weight decay. Default: 10 * lr."""
    lr_schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """Decay to 0 after the warm-up: linear or cosine over the whole run; wsd (warm-up, stable, decay) over decay_share of it."""
    decay_share: float = 0.2
    """Share of the run in which the learning rate decays under wsd."""
    warmup_steps: int = 100
    """Linear warm-up steps; reduced to a tenth of the run if they are more than half of it."""
    optimizer: Literal["adamw", "muon", "adamw_8bit"] = "adamw"
    """muon updates the layers' matrices by Muon and the rest by AdamW; adamw_8bit quantizes optimizer states (needs torchao)."""
    weight_decay: float = 0.01
    """Weight decay of matrices; norms, biases, low-rank updates and the newly added parameters have none."""
    max_grad_norm: float = 1.0
    """Gradient clipping norm; 0 disables clipping."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, e.g. 0.999, used for validation, samples and checkpoints; 0 disables it."""


@dataclass(kw_only=True)
class LossTerms(Options):
    """Objective: deep supervision, distillation and regularisers."""

    enable_deep_supervision: bool = False
    """Deep supervision: next-token loss at every cycle, not only at the last."""
    deep_supervision_weight: float = 0.5
    """Loss weight of the cycles before the last, whose weight is 1."""
    deep_supervision_schedule: Literal["linear_decay", "constant", "exponential_decay", "early_decay"] = "linear_decay"
    """Shape of the loss weights over earlier cycles: linear_decay and exponential_decay weight early cycles less, early_decay late ones."""
    cycle_targets: Literal["answer", "steps"] = "answer"
    """What cycles learn to predict: all of them the answer, or each what is known after its steps (steps): after c * steps_per_cycle of
    them in cycle c, the answer when they suffice. For question sets with known steps. Needs enable_deep_supervision."""
    steps_per_cycle: int = 1
    """Steps that each cycle makes, with --cycle_targets steps."""
    distill_weight: float = 0.0
    """Weight of knowledge distillation: forward KL from the teacher at every scored cycle."""
    distill_temperature: float = 1.0
    """Temperature of the distillation terms."""
    match_hidden_weight: float = 0.0
    """Weight of hidden-state matching: of H cycles the c-th is drawn to the teacher's hidden state after c/H of its layers, by the mean
    squared error of states of unit size. Needs enable_deep_supervision."""
    teacher: str | None = None
    """Teacher of distill_weight and match_hidden_weight: a folder, a hub id, or id@revision. Default: the donor that the checkpoint was
    converted from."""
    self_distill_weight: float = 0.0
    """Weight of self-distillation: KL of each earlier cycle from the last. Needs enable_deep_supervision."""
    monotone_weight: float = 0.0
    """Weight of the monotonicity penalty max(0, loss_c - loss_{c-1}) per token. Needs enable_deep_supervision."""
    halting_weight: float = 0.0
    """Loss weight of the halting head q_head for early exit; its gradient reaches no other weight. Needs enable_deep_supervision."""


@dataclass(kw_only=True)
class Logging(Options):
    """Checkpoints and logging: what a run saves, shows and reports."""

    output_dir: str = "."
    """Folder for checkpoints and metrics.jsonl; created if missing."""
    save_every: int = 1000
    """Save checkpoint_step_N.pt, which --resume continues from, every N optimizer steps; 0 disables it."""
    keep_last: int = 2
    """Keep the N newest step checkpoints, each of which has the weights and the state to resume from; 0 keeps all."""
    resume: bool = False
    """Resume exactly from the newest complete checkpoint_step_N.pt in output_dir."""
    log_every: int = 10
    """Log the training loss to metrics.jsonl every N optimizer steps."""
    report_to: tuple[str, ...] = ()
    """Also report metrics to tensorboard, wandb, mlflow, trackio or any other tracker that transformers supports."""
    generate_every: int = 500
    """Print a sample text every N optimizer steps; 0 disables it."""
    generation_prompt: str = "The quick brown fox"
    """Prompt of the samples."""


@dataclass(kw_only=True)
class Computation(DeviceOptions):
    """Hardware: precision, memory and several devices."""

    seed: int = 42
    """Random seed of the data order and everything else."""
    bf16: bool | None = None
    """bfloat16 autocast; the trained weights stay float32. Default: on GPUs that support it, and on CPUs where a probe finds it faster."""
    tf32: bool = False
    """Let NVIDIA GPUs from Ampere on round the factors of float32 matrix products to TF32, by up to 5e-4: faster where bf16 is off."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer and recompute the rest in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile, once for all of its applications and depths."""
    fsdp: bool = False
    """Under torchrun, shard weights, gradients and optimizer states with FSDP2. Default: DDP."""
    deepspeed: str | None = None
    """Under torchrun, a DeepSpeed JSON configuration with ZeRO stage 0 to 2, for adamw; such runs cannot be resumed. Default: none."""
    dry_run: bool = False
    """Print steps, tokens, FLOPs and memory of the run, and exit."""


# The groups of --help come in the order of the fields, which is that of the bases from the last to the first.
@dataclass(kw_only=True)
class RunSettings(Computation, Logging, LossTerms, Optimizer, Recursion, RunLength, Packing, DataSettings, TokenizerSource):
    """Settings that all training runs have."""

    approach: ClassVar[str]  # its row of `approaches.APPROACHES`
    resume_fields: ClassVar[tuple[str, ...]] = (*DATA_FIELDS, *STATE_FIELDS, *START_FIELDS)  # must not change on resume; all others may

    def validate(self) -> None:
        """Check everything that does not depend on the model.

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
            raise UserError(f"--seq_len: expected at least 2 tokens, for next-token prediction, got {self.seq_len}")
        self._validate_depth()
        self._validate_terms()
        if self.max_steps and self.max_tokens:
            raise UserError("--max_tokens: expected it or --max_steps, got both: each sets the length of the run; give one")
        parse_mix(self.mix)
        if self.streaming and not (self.max_steps or self.max_tokens):
            raise UserError("--streaming: the length of a stream is unknown; set the length of the run with --max_steps or --max_tokens")
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
            raise UserError("--depth_curriculum: expected several --cycle_choices, got one depth; name more or leave it out")
        if self.backprop == "cycle" and not self.enable_deep_supervision:
            raise UserError(
                "--backprop cycle: backpropagates the loss of each cycle, but only the last one is scored; add --enable_deep_supervision, "
                "or use --backprop last, which is the same without it"
            )
        if self.backprop == "last" and self.enable_deep_supervision:
            raise UserError(
                "--backprop last: only the last cycle has gradients, so --enable_deep_supervision has no effect; use --backprop cycle"
            )
        if self.start_gain is not None:
            _check_gain(self.start_gain)

    def _validate_terms(self) -> None:
        for name in ("self_distill_weight", "monotone_weight", "halting_weight", "match_hidden_weight"):
            if getattr(self, name) and not self.enable_deep_supervision:
                raise UserError(f"--{name}: compares cycles, but only the last one is scored; add --enable_deep_supervision")
        if self.steps_per_cycle < 1:
            raise UserError(f"--steps_per_cycle: expected at least 1, got {self.steps_per_cycle}")
        if self.cycle_targets == "steps":
            self._validate_steps()
        elif self.steps_per_cycle != 1:
            raise UserError(f"--steps_per_cycle: {self.steps_per_cycle} has no effect without --cycle_targets steps; add it")
        if self.teacher is not None and not self.needs_teacher:
            raise UserError(
                f"--teacher: {self.teacher} has no effect without --distill_weight or --match_hidden_weight; set the weight of one"
            )

    def _validate_steps(self) -> None:
        if not self.enable_deep_supervision:
            raise UserError("--cycle_targets steps: gives every cycle a target, but only the last is scored; add --enable_deep_supervision")
        for name in ("self_distill_weight", "monotone_weight", "halting_weight"):
            if getattr(self, name):
                raise UserError(f"--{name}: compares the losses of cycles, whose targets differ with --cycle_targets steps; leave one out")

    def validate_model(self, config: Any) -> None:
        """Check the settings that depend on the model.

        Args:
            config: The model's configuration; that of a plain donor has no cycles.

        Raises:
            UserError: No cycle to train, or sequences longer than the model has positions.
        """
        if self.start_gain is not None and getattr(config, "injection", "anchored") != "anchored":
            raise UserError(f"--start_gain: the loop of this model has no gains (injection {config.injection!r}); leave the flag out")
        if getattr(config, "H_cycles", 1) == 0:
            raise UserError(
                f"{self.source}: cannot train at 0 cycles: with H_cycles 0 the recursion is never run, so it is not trained; "
                "convert with --H_cycles 1 or more"
            )
        if hasattr(config, "at_depth"):
            from ..checkpoints.configs import check_cycles  # here: flags are read without transformers

            for cycles in self.cycle_choices:
                check_cycles(config, cycles, "cycle_choices")
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and self.seq_len > positions:
            raise UserError(f"--seq_len: expected at most {positions}, the positions that the model has, got {self.seq_len}")

    @property
    def source(self) -> str:
        """The source of the model, for error messages."""
        return "the model"

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss compares the model with a teacher."""
        return bool(self.distill_weight or self.match_hidden_weight)

    @property
    def separates(self) -> bool:
        """Whether the mask is block-diagonal: documents of a packed sequence do not attend to each other."""
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
    """Training of all parameters of a model in memory by the next-token loss."""

    approach = "full"


# --help lists the fields of the last base first: the model, then the run.
@dataclass(kw_only=True)
class TrainSettings(FitSettings, Adapter, DonorPlace, RecursiveSource):
    """Fine-tune a recursive model on text."""

    def validate_model(self, config: Any) -> None:
        super().validate_model(config)
        self.validate_adapter(config)

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
    """Loop: the approaches that start from a donor, freeze its embeddings and train the loop."""

    @property
    def source(self) -> str:
        return self.model_name

    @property
    def starts_fresh(self) -> bool:
        """Whether the looped layers are initialised randomly rather than from the donor."""
        raise NotImplementedError

    def validate(self) -> None:
        super().validate()
        for name, least in (("L_layers", 1), ("H_cycles", 1), ("L_cycles", 0)):
            _at_least(name, getattr(self, name), least)


@dataclass(kw_only=True)
class EmbeddingSettings(DonorSettings):
    """Train a recursive block that regresses next-token embeddings of a donor; without LM head, it cannot generate."""

    approach = "embedding"

    donor_loop: bool = False
    """Initialise the looped layers from the donor. Default: randomly, for which an lr near 3e-4 works better than 1e-5."""

    def validate(self) -> None:
        super().validate()
        for name in ("distill_weight", "self_distill_weight", "monotone_weight", "halting_weight", "match_hidden_weight"):
            if getattr(self, name):
                raise UserError(f"--{name}: needs next-token predictions, but this approach predicts embeddings; leave it out")

    @property
    def starts_fresh(self) -> bool:
        return not self.donor_loop


@dataclass(kw_only=True)
class HybridSettings(DonorSettings):
    """Train the looped layers only, between the frozen embeddings and head of a donor."""

    approach = "hybrid"

    fresh_loop: bool = False
    """Initialise the looped layers randomly; an lr near 3e-4 then works better than 1e-5. Default: from the donor."""
    tune_lm_head: bool = False
    """Also train the final norm and the head. A head tied to the embeddings is untied first; the embeddings stay frozen."""

    @property
    def starts_fresh(self) -> bool:
        return self.fresh_loop


def _check_folder(folder: Path) -> None:
    """Check that a folder, which may not exist yet, can be written."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir: expected a folder, got {existing}, which is a file")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--output_dir: {folder} cannot be written: {existing} is not writable; choose another")


def _check_gain(gain: float) -> None:
    from ..network.configuration_recursive_llm import GAIN_MAX  # here: most flags are read without torch

    if not abs(gain) <= GAIN_MAX:
        raise UserError(f"--start_gain: expected a number between -{GAIN_MAX} and {GAIN_MAX}, got {gain}")


def _listed(values: Iterable[Any]) -> str:
    return " ".join(map(str, values)) or "none"


def _at_least(name: str, value: float, least: int) -> None:
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"--{name}: expected at least {least}, got {value}")

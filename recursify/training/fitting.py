"""Training of a model in memory: `RecursiveTrainer` and `fit`. A plain causal model is trained as a model with one cycle.

Units: losses per token, in nats, or 1 - cosine for embeddings; lengths in tokens, steps are optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import has_length

from ..checkpoints import adapter, checkpoint
from ..checkpoints.tokenizer import check_vocabulary
from ..data.conversations import FORMS, form_of
from ..errors import UserError
from ..network.plan import notes_of, plan_of
from ..utils.device import choose_device
from ..utils.models import is_recursive
from .approaches import APPROACHES, cast_for_training, freeze_rest
from .arguments import check_tf32, choose_autocast, float32_products, from_training_arguments, total_steps, training_arguments
from .callbacks import AfterOptimizer, AtStart, EarlyStopping, MetricsFile, ProgressBar, Samples, SaveSteps, StopOnSignal, Summary, Validate
from .collate import Collate
from .depth import DepthSchedule
from .gains import start_gains
from .loss_module import LossModule, Supervision
from .parallel import check_launch, shard
from .quantize import check_4bit, quantize_layers
from .saving import METRICS, Saver, best_name, make_folder, resume_points, state_folder
from .settings import RunSettings
from .trainer import CycleTrainer

_ROWS = "train_dataset or eval_dataset"  # a table of rows has no name


@dataclass(frozen=True)
class FitResult:
    """Result of a training run.

    Args:
        history: All log entries, in order, each with `step`, `epoch`, `tokens`, `flops` and `seconds` so far. Training entries have `loss`
            (the minimised one), `loss_cycle_i` of scored cycles, `loss_<term>` of each additional term, `learning_rate`, `grad_norm`,
            `tokens_per_second`: means since the previous entry; and `memory`, the peak so far, in GiB. Validation entries have
            `train_loss` (last cycle, mean since the previous validation), `eval_loss` (at H_cycles), `eval_loss_cycle_i`, and
            `eval_perplexity`, or in embedding space `eval_nearest_right`: the share of tokens, 0 to 1, for which the embedding nearest to
            the state of the last cycle is the correct one. The first entry of a converted model that keeps all layers of its donor has
            `donor_loss`, the validation loss at 0 cycles before the first step.
        steps: Optimizer steps, including those before a resume.
        tokens: Training tokens.
        seconds: Wall-clock time, including validation and samples.
        eval_loss: The last validation loss; None if the run was interrupted before the first validation.
        best_eval_loss: The lowest finite validation loss.
        interrupted: Whether Ctrl-C or SIGTERM stopped the run.
    """

    history: list[dict[str, Any]]
    steps: int
    tokens: int
    seconds: float
    eval_loss: float | None
    best_eval_loss: float | None
    interrupted: bool = False


class RecursiveTrainer(CycleTrainer):
    """transformers' Trainer for a recursive model: deep supervision, sampled depths, exact resume.

        trainer = RecursiveTrainer(
            model=model, args=FitSettings(lr=1e-4), train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer
        )
        trainer.train()
        trainer.save_model("out")

    `fit` and `recursify train` use this trainer.

    Args:
        model: A recursive model, or any causal language model of transformers as a baseline. It is changed in place: cast to float32
            (of an adapter under bfloat16 autocast, what is trained), moved to the device of the settings, and frozen except for what the
            approach trains.
        args: `FitSettings`, or those of another approach; their fields are the flags of `recursify train`. Or transformers'
            TrainingArguments; arguments without counterpart here raise an error.
        train_dataset: Rows with `input_ids`, all of one length, and optionally `labels` and `position_ids`; or with a column `text`, or
            conversations (`messages`; `prompt` and `completion`; `instruction` and `output`), which are tokenized and packed into
            blocks of `seq_len`. A stream of rows with `input_ids` is supported as well.
        eval_dataset: Likewise; None disables validation, so no best checkpoint is kept.
        processing_class: The tokenizer.
        data_collator: Rows to a batch of `input_ids`, `labels` and, for a block-diagonal mask, `position_ids`.
        callbacks: As for the Trainer.
        teacher: The causal model for knowledge distillation (`distill_weight`, `match_hidden_weight`).
        saver: Writes checkpoints and metrics.jsonl. Default: to `output_dir` of the settings. None writes no files.
        resuming: Whether the model already has the weights of the checkpoint given to `train(resume_from_checkpoint=)`.
        console: Whether to show the progress bar, samples and summaries.

    Raises:
        UserError: A setting out of range or unsupported by the model or the machine; rows that cannot be trained on.
    """

    def __init__(
        self,
        model: Any = None,
        args: RunSettings | TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        *,
        teacher: Any = None,
        saver: Saver | Literal["output_dir"] | None = "output_dir",
        resuming: bool = False,
        console: bool = True,
    ):
        settings = args if isinstance(args, RunSettings) else from_training_arguments(args)
        settings.validate()
        settings.validate_model(model.config)
        device = choose_device(settings.device)
        check_launch(settings, device)
        check_tf32(settings, device)
        check_4bit(settings, device)
        settings = choose_autocast(settings, model.config, device)
        if saver == "output_dir":
            saver = _default_saver(model, settings, processing_class)
        if processing_class is not None:
            check_vocabulary(processing_class, model.config.vocab_size, "processing_class")
        train_dataset, eval_dataset = (tokenized_rows(each, settings, processing_class) for each in (train_dataset, eval_dataset))
        total = total_steps(train_dataset, settings)
        arguments = training_arguments(settings, device, saver, validates=eval_dataset is not None)  # initialises the process group
        freeze_rest(model, settings)
        cast_for_training(model, settings)
        if getattr(settings, "load_in_4bit", False):
            quantize_layers(model, device, torch.bfloat16 if settings.bf16 else torch.float32)
        depths = depth_schedule(model.config, settings, total)
        deepest = None if depths is None else max(depths.deepest, model.config.H_cycles)
        module = LossModule(
            model, Supervision.of(settings), APPROACHES[settings.approach].objective, deepest, _frozen_teacher(teacher, settings, device)
        )
        steps = (module.deepest, settings.steps_per_cycle) if settings.cycle_targets == "steps" else (0, 1)
        collate = data_collator or Collate(_separator_token(settings, processing_class), *steps)
        if not resuming:
            start_gains(module, train_dataset if eval_dataset is None else eval_dataset, collate, settings, device)
        if settings.gradient_checkpointing:
            checkpoint_layers(model)
        if settings.compile:
            compile_layers(model)
        if settings.fsdp:
            shard(module, device, reads_every_cycle=settings.enable_deep_supervision)
        super().__init__(
            module,
            arguments,
            settings,
            depths,
            saver,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            processing_class=processing_class,
        )
        self.resuming = resuming
        self.bar, save_steps = ProgressBar(), SaveSteps(settings.save_every if saver else 0)
        self.stop = StopOnSignal(save_steps if saver else None, self.any_rank)
        console_callbacks = _console_callbacks(self, processing_class, self.bar) if console else []
        for callback in (*console_callbacks, *_saving_callbacks(self, quiet=not console), save_steps, *callbacks, self.stop):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None) -> Any:
        """Train. Afterwards the model is in evaluation mode; with `fsdp` it stays sharded.

        Args:
            resume_from_checkpoint: A checkpoint_step_N.pt of a run with the same settings; True takes the newest in `output_dir`.

        Raises:
            UserError: A non-finite gradient, or no such checkpoint.
        """
        model, point = self.model.model, _resume_point(resume_from_checkpoint, self.settings)
        if point is not None and not self.resuming:
            _load_weights(model, point)
        state = None if point is None else str(state_folder(point))
        try:
            with self.stop.listening(), float32_products(self.settings.tf32):
                return super().train(state, trial, ignore_keys_for_eval)
        finally:
            self.bar.close()
            _disable_checkpointing(model)
            uncompile_layers(model)
            model.eval()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or its moving average if the run has one, as a folder or, with the suffix `.pt`, as a file."""
        saver = self.saver or _default_saver(self.model.model, self.settings, self.processing_class)
        with self.inference_model():
            if self.args.should_save:
                saver.save(
                    Path(output_dir or self.settings.folder / "model"), self.model.model, step=self.state.global_step, **self.notes()
                )


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: Any,
    eval_blocks: Any,
    settings: RunSettings,
    *,
    teacher: Any = None,
    saver: Saver | None = None,
    resume_from: Path | None = None,
    console: bool = True,
    callbacks: Iterable[TrainerCallback] = (),
) -> FitResult:
    """Train a model in memory with `RecursiveTrainer`.

    Args:
        model: As for `RecursiveTrainer`; so are train_blocks and eval_blocks (its datasets), settings (its args) and teacher.
        tokenizer: Its processing_class.
        saver: Writes checkpoints and metrics.jsonl; None writes no files.
        resume_from: A checkpoint_step_N.pt of a run with the same settings, whose weights `model` already has.
        console: Whether to show the progress bar, samples and summaries.

    Raises:
        UserError: As for `RecursiveTrainer` and its `train`.
    """
    trainer = RecursiveTrainer(
        model, settings, train_blocks, eval_blocks, tokenizer, callbacks=callbacks, teacher=teacher, saver=saver,
        resuming=resume_from is not None, console=console,
    )  # fmt: skip
    trainer.train(resume_from)
    return result_of(trainer.state, interrupted=trainer.stop.stopped)


def tokenized_rows(dataset: Any, settings: RunSettings, tokenizer: Any) -> Any:
    """A dataset with `input_ids`; rows of text or of conversations are tokenized and packed into blocks.

    Raises:
        UserError: Neither `input_ids`, `text` nor a conversation; rows without a tokenizer; malformed conversations.
    """
    columns = getattr(dataset, "column_names", None)
    if dataset is None or not columns or "input_ids" in columns:
        return dataset
    form = None if settings.text_column else form_of(columns)
    if "text" not in columns and form is None:
        forms = "; ".join(" and ".join(each) for each in FORMS)
        raise UserError(f"train_dataset: expected rows with input_ids, with text, or with {forms}; got the columns {', '.join(columns)}")
    if tokenizer is None:
        raise UserError("processing_class: expected the tokenizer of the model, which rows of text need, got None")
    from ..data.conversation_blocks import conversation_blocks  # here: the datasets library is only needed for text
    from ..data.conversation_tables import as_conversations
    from ..data.loading import tokenize

    if form is None:
        return tokenize(dataset, tokenizer, settings.seq_len)
    return conversation_blocks(as_conversations(dataset, form, _ROWS), tokenizer, settings.seq_len, settings.train_on, _ROWS)


def _resume_point(given: Any, settings: RunSettings) -> Path | None:
    if not given:
        return None
    points = resume_points(settings.folder) if given is True else [Path(given)]
    if not points or not state_folder(points[0]).is_dir():
        expected = f"a checkpoint_step_N.pt with its _state folder in {settings.folder}" if given is True else "one with a _state folder"
        raise UserError(f"resume_from_checkpoint: expected {expected}, got {'none' if given is True else given}")
    return points[0]


def _separator_token(settings: RunSettings, tokenizer: Any) -> int | None:
    """The token that ends a document, if the mask is block-diagonal."""
    if not settings.separates:
        return None
    if tokenizer is None:
        raise UserError("processing_class: expected the tokenizer of the model, which separate_documents needs, got None")
    return int(tokenizer.eos_token_id)


def _load_weights(model: Any, point: Path) -> None:
    """Load a checkpoint's weights; of an adapter, those that are trained."""
    alone = getattr(model.config, "is_adapter", False)
    state = checkpoint.load(point).model.state_dict()
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(adapter.PREFIX)} if alone else state
    model.load_state_dict(wanted, strict=not alone)


def _default_saver(model: Any, settings: RunSettings, tokenizer: Any) -> Saver:
    make_folder(settings.folder)
    plan, notes = (plan_of(model.config), notes_of(model.config)) if is_recursive(model) else (None, {})
    stored = torch.float32 if getattr(model.config, "is_adapter", False) else model.dtype
    return Saver(settings.folder, tokenizer, stored, plan, {**notes, "approach": settings.approach}, settings.keep_last)


def _console_callbacks(trainer: CycleTrainer, tokenizer: PreTrainedTokenizerBase | None, bar: ProgressBar) -> list[TrainerCallback]:
    settings, model = trainer.settings, trainer.model.model
    shows_text = settings.generate_every and tokenizer is not None and APPROACHES[settings.approach].generates
    samples = [Samples(model, tokenizer, settings, trainer.inference_model)] if shows_text else []
    return [*([bar] if trainer.is_world_process_zero() else []), *samples]


def _saving_callbacks(trainer: CycleTrainer, quiet: bool) -> list[TrainerCallback]:
    """Callbacks for metrics, validation and checkpoints."""
    settings, saver = trainer.settings, trainer.saver
    for callback in trainer.callback_handler.callbacks:  # next to the checkpoints, unless TENSORBOARD_LOGGING_DIR is set
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None and saver is not None:
            callback.logging_dir = str(saver.folder / "tensorboard")
    return [
        *([MetricsFile(saver.folder / METRICS)] if saver else []),
        *([AtStart(trainer.log_donor_loss)] if saver and saver.starts_as_donor and trainer.eval_dataset is not None else []),
        Summary(lambda metrics: _save_best(trainer), quiet, streamed=not has_length(trainer.train_dataset)),
        *([AfterOptimizer(trainer.update_average)] if settings.ema_decay else []),
        *([EarlyStopping(settings.early_stopping_patience)] if settings.early_stopping_patience else []),
        Validate(settings.eval_every),
    ]


def _frozen_teacher(teacher: Any, settings: RunSettings, device: torch.device) -> Any:
    """The teacher, frozen and on the device; None if no term of the loss needs one.

    Raises:
        UserError: A term without a teacher.
    """
    if not settings.needs_teacher:
        return None
    if teacher is None:
        raise UserError(f"--{'distill' if settings.distill_weight else 'match_hidden'}_weight: expected a teacher, got none")
    return teacher.to(device).eval().requires_grad_(False)


def depth_schedule(config: Any, settings: RunSettings, total: int) -> DepthSchedule | None:
    """The depth schedule of a run of `total` steps; None for a model without cycles."""
    if not hasattr(config, "H_cycles"):
        return None
    choices = settings.cycle_choices or (config.H_cycles,)
    weights = settings.cycle_weights or (1.0,) * len(choices)
    return DepthSchedule(choices, weights, round(settings.depth_curriculum * total), settings.seed)


def checkpoint_layers(model: Any) -> None:
    """Enable gradient checkpointing of the layers, by the method's name in the installed transformers: it changed in 5.23."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _disable_checkpointing(model: Any) -> None:
    name = "activation_checkpointing_disable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_disable")()


def compile_layers(model: Any) -> None:
    """Compile each layer separately: its code is compiled once for all layers and applications, so a new depth does not recompile."""
    for layer in model.base_model.layers:
        layer.compile()


def uncompile_layers(model: Any) -> None:
    for layer in model.base_model.layers:
        layer._compiled_call_impl = None


def _save_best(trainer: CycleTrainer) -> Path | None:
    """Collective; the first rank writes."""
    saver = trainer.saver
    if saver is None:
        return None
    best = saver.folder / best_name(trainer.model.model.config)
    with trainer.inference_model():
        if trainer.args.should_save:
            saver.save(best, trainer.model.model, step=trainer.state.global_step, **trainer.notes())
    return best


def result_of(state: TrainerState, interrupted: bool) -> FitResult:
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    finite = [loss for loss in losses if math.isfinite(loss)]
    last = state.log_history[-1] if state.log_history else {"seconds": 0.0}
    return FitResult(
        history=state.log_history,
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        seconds=last["seconds"],
        eval_loss=losses[-1] if losses else None,
        best_eval_loss=min(finite) if finite else None,
        interrupted=interrupted,
    )

"""Fine-tune a model in memory on rows in memory; a plain causal model of transformers is trained by it, too, as one "cycle".

Units: losses per token, in nats, or 1 - cosine for embeddings; lengths in tokens, steps are optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from ..errors import UserError
from ..utils.device import choose_device
from .approaches import APPROACHES, freeze_rest
from .arguments import total_steps, training_arguments
from .callbacks import AfterOptimizer, EarlyStopping, MetricsFile, ProgressBar, Samples, SaveSteps, StopOnSignal, Summary, Validate
from .collate import Collate
from .depth import DepthSchedule
from .gains import start_gains
from .loss_module import LossModule, Supervision
from .parallel import check_launch, shard
from .saving import BEST, METRICS, Saver, state_folder
from .settings import RunSettings
from .trainer import RecursiveTrainer


@dataclass(frozen=True)
class FitResult:
    """What a run did.

    Args:
        history: Every log entry, in order, each with `step`, `epoch`, `tokens`, `flops` and `seconds` so far. Training entries have `loss`
            (what was minimised), `loss_cycle_i` of the scored cycles, `loss_<term>` of each further term, `learning_rate`, `grad_norm`,
            `tokens_per_second`: means since the entry before; and `memory`, the most that was held so far, in GiB. Validation entries
            have `train_loss` (last cycle, mean since the one before), `eval_loss` (at H_cycles), `eval_loss_cycle_i`, and
            `eval_perplexity`; in embedding space `eval_nearest_right` instead: the share of tokens, 0 to 1, for which the embedding nearest
            to the last cycle's state is the right one.
        steps: Optimizer steps made, those before a resumption included.
        tokens: Tokens read.
        seconds: Wall-clock time, validation and samples included.
        eval_loss: The last validation loss, None if the run was interrupted before any.
        best_eval_loss: The lowest one that is a number.
        interrupted: Whether Ctrl-C or SIGTERM ended it.
    """

    history: list[dict[str, Any]]
    steps: int
    tokens: int
    seconds: float
    eval_loss: float | None
    best_eval_loss: float | None
    interrupted: bool = False


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
    """Train a model in memory.

    Args:
        model: A recursive model, or any causal language model of transformers for comparison. It is changed in place: to float32, on the
            device of the settings, what the approach does not train is frozen, and it is left in evaluation mode; with `fsdp` each
            process is left with its share of it.
        train_blocks, eval_blocks: Tables (or lists) of rows with `input_ids`, all of one length; a stream of them to train on, too.
        settings: Their class chooses the approach. Those that name files, donors and data sets are not looked at.
        teacher: The causal model that `distill_weight` means.
        saver: Where checkpoints and metrics.jsonl go; None writes nothing at all.
        resume_from: A checkpoint_step_N.pt that a run like this one wrote, whose weights `model` holds already.
        console: Whether to show the bar, samples and summaries.

    Raises:
        UserError: A setting out of range or one that the model or the machine cannot serve; a loss that is not a number.
    """
    settings.validate()
    settings.validate_model(model.config)
    device = choose_device(settings.device)
    check_launch(settings, device)
    chosen: dict[str, Any] = {"teacher": teacher, "saver": saver, "resume_from": resume_from, "console": console, "callbacks": callbacks}
    return fit_validated(model, tokenizer, train_blocks, eval_blocks, settings, device, **chosen)


def fit_validated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: Any,
    eval_blocks: Any,
    settings: RunSettings,
    device: torch.device,
    *,
    teacher: Any = None,
    saver: Saver | None = None,
    resume_from: Path | None = None,
    console: bool = True,
    callbacks: Iterable[TrainerCallback] = (),
) -> FitResult:
    """As `fit`, for settings that were checked, by themselves and against the model and the machine; a device of theirs."""
    approach = APPROACHES[settings.approach]
    total = total_steps(train_blocks, settings)
    args = training_arguments(settings, device, saver)  # this is where several processes find each other
    freeze_rest(model, settings)
    model.float()
    depths = depth_schedule(model.config, settings, total)
    deepest = None if depths is None else max(depths.deepest, model.config.H_cycles)
    supervised = LossModule(model, Supervision.of(settings), approach.objective, deepest, _ready(teacher, settings, device))
    collate = Collate(tokenizer.eos_token_id if settings.separates else None)
    if resume_from is None:
        start_gains(supervised, eval_blocks, collate, settings, device)
    if settings.gradient_checkpointing:
        _checkpoint_layers(model)
    if settings.compile:
        compile_layers(model)
    if settings.fsdp:
        shard(supervised, device, reads_every_cycle=settings.enable_deep_supervision)

    trainer = RecursiveTrainer(
        supervised, args, settings, depths, saver, train_dataset=train_blocks, eval_dataset=eval_blocks, data_collator=collate
    )
    bar, save_steps = ProgressBar(), SaveSteps(settings.save_every if saver else 0)
    stop = StopOnSignal(save_steps if saver else None, trainer.any_rank)
    shown = _console(trainer, tokenizer, bar) if console else []
    for callback in (*shown, *_saving_callbacks(trainer, quiet=not console), save_steps, *callbacks, stop):
        trainer.add_callback(callback)
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(state_folder(resume_from)))
    finally:
        bar.close()
        _keep_all(model)
        uncompile_layers(model)
        model.eval()
    return result_of(trainer.state, interrupted=stop.stopped)


def _console(trainer: RecursiveTrainer, tokenizer: PreTrainedTokenizerBase, bar: ProgressBar) -> list[TrainerCallback]:
    """What a run shows on its way."""
    settings, model = trainer.settings, trainer.model.model
    shows_text = settings.generate_every and APPROACHES[settings.approach].writes
    samples = [Samples(model, tokenizer, settings, trainer.shown)] if shows_text else []
    return [*([bar] if trainer.is_world_process_zero() else []), *samples]


def _saving_callbacks(trainer: RecursiveTrainer, quiet: bool) -> list[TrainerCallback]:
    """What measures, writes down and keeps, and so decides what is the best."""
    settings, saver = trainer.settings, trainer.saver
    for callback in trainer.callback_handler.callbacks:  # TensorBoard's files go beside the others, unless its own variable says where
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None and saver is not None:
            callback.logging_dir = str(saver.folder / "tensorboard")
    return [
        *([MetricsFile(saver.folder / METRICS)] if saver else []),
        Summary(lambda metrics: _save_best(trainer), quiet),
        *([AfterOptimizer(trainer.update_average)] if settings.ema_decay else []),
        *([EarlyStopping(settings.early_stopping_patience)] if settings.early_stopping_patience else []),
        Validate(settings.eval_every),
    ]


def _ready(teacher: Any, settings: RunSettings, device: torch.device) -> Any:
    """The teacher, frozen and on the device.

    Raises:
        UserError: There is a distillation term and no teacher.
    """
    if not settings.distill_weight:
        return None
    if teacher is None:
        raise UserError("--distill_weight: expected a teacher to stay near to, got none")
    return teacher.to(device).eval().requires_grad_(False)


def depth_schedule(config: Any, settings: RunSettings, total: int) -> DepthSchedule | None:
    """The depths of a run of `total` steps; None for a model without cycles."""
    if not hasattr(config, "H_cycles"):
        return None
    choices = settings.cycle_choices or (config.H_cycles,)
    weights = settings.cycle_weights or (1.0,) * len(choices)
    return DepthSchedule(choices, weights, round(settings.depth_curriculum * total), settings.seed)


def _checkpoint_layers(model: Any) -> None:
    """Layers keep their input only; under the name that transformers gives it, which changed in 5.23."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _keep_all(model: Any) -> None:
    """Undoes `_checkpoint_layers`."""
    name = "activation_checkpointing_disable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_disable")()


def compile_layers(model: Any) -> None:
    """Each layer by itself: its code is compiled once for all layers and all of their applications, so no depth compiles anew."""
    for layer in model.base_model.layers:
        layer.compile()


def uncompile_layers(model: Any) -> None:
    for layer in model.base_model.layers:
        layer._compiled_call_impl = None


def _save_best(trainer: RecursiveTrainer) -> Path | None:
    """All ranks take part; the first one writes."""
    saver = trainer.saver
    if saver is None:
        return None
    with trainer.shown():
        if trainer.args.should_save:
            saver.save(saver.folder / BEST, trainer.model.model, step=trainer.state.global_step, **trainer.notes())
    return saver.folder / BEST


def result_of(state: TrainerState, interrupted: bool) -> FitResult:
    measured = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    finite = [loss for loss in measured if math.isfinite(loss)]
    last = state.log_history[-1] if state.log_history else {"seconds": 0.0}
    return FitResult(
        history=state.log_history,
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        seconds=last["seconds"],
        eval_loss=measured[-1] if measured else None,
        best_eval_loss=min(finite) if finite else None,
        interrupted=interrupted,
    )

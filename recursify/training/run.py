"""A run from its settings to its results.

    train(settings)   from files to files: load or convert, find the text, fit, save
    fit(...)          the same loop on a model in memory; a plain causal model of transformers is trained by it, too, as one "cycle"

What is trained, and what for, is a row of `approaches.APPROACHES`; the settings name it. `saving` says what a run leaves on disk.

Units: losses per token, in nats, or 1 - cosine for embeddings; lengths in tokens, steps are optimizer steps. Floor 3.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from ..checkpoints import checkpoint
from ..checkpoints.donor import open_donor
from ..data.blocks import separate
from ..data.settings import DataSettings
from ..errors import UserError
from ..inference.options import is_recursive
from ..network.losses import IGNORED, counted
from ..utils.device import choose_device
from .approaches import APPROACHES, freeze_rest, from_donor
from .callbacks import AfterOptimizer, EarlyStopping, MetricsFile, ProgressBar, Samples, SaveSteps, StopOnSignal, Summary, Validate
from .cost import estimate
from .depth import DepthSchedule
from .gains import CALIBRATION_TOKENS, CANDIDATES, MAX_COST, all_zero, calibrate, set_gains
from .optimizers import warmup_of
from .parallel import check_launch, describe_launch, processes, shard
from .saving import BEST, METRICS, RUN, STATE, Saver, make_folder, read_json, resume_points, state_folder, step_of
from .settings import DonorSettings, RunSettings, TrainSettings
from .supervised import Supervised, Supervision
from .trainer import RecursiveTrainer

if TYPE_CHECKING:
    from ..data.loading import Blocks


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


@dataclass(frozen=True)
class TrainResult:
    """What a run left on disk, and what it did.

    Args:
        best: The best checkpoint, None if there was no validation.
        fit: None for a dry run.
    """

    best: Path | None
    fit: FitResult | None


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
    device, approach = choose_device(settings.device), APPROACHES[settings.approach]
    check_launch(settings, device)
    total = total_steps(train_blocks, settings)
    args = training_arguments(settings, device, saver)  # this is where several processes find each other
    freeze_rest(model, settings)
    model.float()
    depths = depth_schedule(model.config, settings, total)
    deepest = None if depths is None else max(depths.deepest, model.config.H_cycles)
    supervised = Supervised(model, Supervision.of(settings), approach.objective, deepest, _ready(teacher, settings, device))
    collate = Collate(tokenizer.eos_token_id if settings.separates else None)
    if resume_from is None:
        _start_gains(supervised, eval_blocks, collate, settings, device)
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
    for callback in (*shown, *_keepers(trainer, quiet=not console), save_steps, *callbacks, stop):
        trainer.add_callback(callback)
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(state_folder(resume_from)))
    finally:
        bar.close()
        _keep_all(model)
        uncompile_layers(model)
        model.eval()
    return _result(trainer.state, interrupted=stop.stopped)


def _console(trainer: RecursiveTrainer, tokenizer: PreTrainedTokenizerBase, bar: ProgressBar) -> list[TrainerCallback]:
    """What a run shows on its way."""
    settings, model = trainer.settings, trainer.model.model
    shows_text = settings.generate_every and APPROACHES[settings.approach].writes
    samples = [Samples(model, tokenizer, settings, trainer.shown)] if shows_text else []
    return [*([bar] if trainer.is_world_process_zero() else []), *samples]


def _keepers(trainer: RecursiveTrainer, quiet: bool) -> list[TrainerCallback]:
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


def train(settings: RunSettings) -> TrainResult:
    """Train a checkpoint, or what an approach makes of a donor, on a data set; leave checkpoints, the best one and metrics.jsonl.

    Raises:
        UserError: A setting out of range, a checkpoint, donor or data set that cannot be used, a folder that cannot be written, or a run to
            resume that was another one.
    """
    settings.validate()
    device = choose_device(settings.device)
    check_launch(settings, device)
    PartialState(cpu=device.type == "cpu")  # several processes find each other here, before the first of them is waited for
    point = _point_to_resume(settings) if settings.resume else None
    found = _starting_model(settings, point)
    tokenizer = checkpoint.need_tokenizer(found, point or settings.source)
    settings.validate_model(found.model.config)
    _check_tokenizer(found.model, tokenizer)

    blocks = _load_text(settings, tokenizer)
    total = total_steps(blocks.train, settings)
    _announce(f"Training on {describe_launch(settings, device)}")
    count = "a stream of" if settings.streaming else f"{len(blocks.train):,}"
    _announce(f"{count} training and {len(blocks.validation):,} validation sequences of {settings.seq_len} tokens: {total:,} steps")
    if warmup_of(settings, total) != settings.warmup_steps:
        _announce(f"--warmup_steps {settings.warmup_steps} is more than half of that: warming up for {warmup_of(settings, total)}")
    teacher = _load_teacher(settings, found, device)
    if settings.dry_run:
        as_computed = replace(settings, bf16=computes_in_bf16(settings, device))
        cost = estimate(found.model.config, as_computed, total, processes(), teacher and teacher.config)
        if PartialState().is_main_process:
            print(cost.render())
        return TrainResult(None, None)
    best = settings.folder / BEST
    if point is not None and step_of(point) >= total:
        _announce(f"{point} is the end of this run already; a larger --num_epochs or --max_steps would go on from it")
        state = TrainerState.load_from_json(str(state_folder(point) / STATE))
        return TrainResult(best, _result(state, interrupted=False))

    if best.exists() and point is None:
        _announce(f"{best} is there already: the best model of this run replaces it; another --output_dir keeps both")
    make_folder(settings.folder)
    saver = Saver(
        settings.folder, tokenizer, found.model.dtype, found.plan, {**found.notes, "approach": settings.approach}, settings.keep_last
    )
    result = fit(found.model, tokenizer, blocks.train, blocks.validation, settings, teacher=teacher, saver=saver, resume_from=point)
    if result.interrupted:
        _announce(f"Interrupted and saved at step {result.steps}; the same command with --resume goes on from there")
    return TrainResult(best if result.best_eval_loss is not None else None, result)


# What a run begins with


def _starting_model(settings: RunSettings, point: Path | None) -> checkpoint.Checkpoint:
    if point is not None or isinstance(settings, TrainSettings):
        return checkpoint.load(point or settings.source, tokenizer_path=settings.tokenizer_path)
    assert isinstance(settings, DonorSettings)
    return from_donor(settings, _announce)


def _load_text(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    from ..data.loading import load_blocks  # here: `fit`, on rows in memory, needs no library for data sets

    source = DataSettings(
        dataset_name=settings.dataset_name, dataset_config_name=settings.dataset_config_name, text_column=settings.text_column,
        mix=settings.mix, streaming=settings.streaming,
    )  # fmt: skip
    return load_blocks(source, tokenizer, settings.seq_len, settings.seed)


def _load_teacher(settings: RunSettings, found: checkpoint.Checkpoint, device: torch.device) -> Any:
    """The donor that is distilled from, once, in bfloat16 where the GPU has it; None where the run has no such term."""
    if not settings.distill_weight:
        return None
    name = settings.teacher or found.notes.get("donor")
    if name is None:
        raise UserError(f"--distill_weight: {settings.source} does not say which donor it comes from; name one with --teacher")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    teacher = open_donor(name).load(dtype=dtype)
    words, own = (model.get_output_embeddings().out_features for model in (teacher, found.model))
    if words != own:
        raise UserError(f"--teacher: expected one with the vocabulary of the model, but {name} knows {words} words, the model {own}")
    return teacher


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


def _start_gains(supervised: Supervised, blocks: Any, collate: Collate, settings: RunSettings, device: torch.device) -> None:
    """The gains that the loop starts from (see `gains`): those of the settings, else the swept ones where the model's own are all 0."""
    model = supervised.model
    if not is_recursive(model):
        return
    if settings.start_gain is not None:
        set_gains(model, settings.start_gain)
        return
    if not all_zero(model):
        return
    if isinstance(settings, DonorSettings) and settings.starts_fresh:  # a loop that knows nothing yet has nothing to lose
        set_gains(model, CANDIDATES[0])
        return
    model.to(device).eval()
    rows = [blocks[i] for i in range(min(max(1, CALIBRATION_TOKENS // settings.seq_len), len(blocks)))]
    batches = [collate(rows[i : i + settings.batch_size]) for i in range(0, len(rows), settings.batch_size)]
    scorer = Supervised(model, objective=supervised.objective)
    gain, sweep = calibrate(model, lambda: _loss_on(scorer, batches, device))
    (gain,) = broadcast_object_list([gain])  # of the first rank: others may round another way
    set_gains(model, gain)
    tried = ", ".join(f"{g:g} costs {cost:+.4f}" for g, cost in sweep)
    why = f"the largest that costs at most {MAX_COST:g}" if sweep[-1][1] <= MAX_COST else f"the smallest; all cost more than {MAX_COST:g}"
    _announce(f"The loop starts from gain {gain:g}, {why}: {tried} (--start_gain names another)")


@torch.no_grad()
def _loss_on(scorer: Supervised, batches: Sequence[dict[str, Tensor]], device: torch.device) -> float:
    """The mean loss of the cycle that is read out."""
    tokens = sum(int(counted(batch["labels"])) for batch in batches)
    parts = [scorer(**{name: value.to(device) for name, value in batch.items()}, num_items_in_batch=tokens) for batch in batches]
    return float(sum(part["loss"] for part in parts))


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


class Collate:
    """Rows of equal length as one batch; the labels are those of the rows, else the tokens themselves, unshifted.

    Args:
        eos_token_id: What ends a document, where no token is to see into another one; None lets them.
    """

    def __init__(self, eos_token_id: int | None):
        self.eos_token_id = eos_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = _stacked(rows, "input_ids")
        labels = _stacked(rows, "labels") if "labels" in rows[0] else ids
        if self.eos_token_id is None:
            return {"input_ids": ids, "labels": labels}
        position_ids, starts = separate(ids, self.eos_token_id)
        return {"input_ids": ids, "labels": labels.masked_fill(starts, IGNORED), "position_ids": position_ids}


def _stacked(rows: Sequence[dict[str, Any]], column: str) -> Tensor:
    return torch.stack([torch.as_tensor(row[column], dtype=torch.long) for row in rows])


# In the words of transformers


def training_arguments(settings: RunSettings, device: torch.device, saver: Saver | None) -> TrainingArguments:
    """Our settings in the words of transformers. What is not named here is decided by `RecursiveTrainer`.

    Raises:
        UserError: A second GPU, bfloat16 on a device without it, or an unknown tracker or one that is not installed.
    """
    if device.index and processes() == 1:
        raise UserError(f"--device: training takes the first GPU that it sees, got {device}; choose by CUDA_VISIBLE_DEVICES={device.index}")
    _check_trackers(settings.report_to)
    args = TrainingArguments(
        output_dir=str(saver.folder if saver else "."),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum_steps,
        num_train_epochs=settings.num_epochs,
        max_steps=named_steps(settings) or -1,
        learning_rate=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="no",  # SaveSteps asks instead
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        bf16=computes_in_bf16(settings, device),
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,  # idle parameters are frozen
        deepspeed=settings.deepspeed,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        seed=settings.seed,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer splits every batch over all GPUs with DataParallel, which is slower than one of them
    return args


def computes_in_bf16(settings: RunSettings, device: torch.device) -> bool:
    """What the settings say; where they leave it open, whether it is a GPU that has it: a CPU's is slower than its float32.

    Raises:
        UserError: It is asked of a device without it.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if settings.bf16 and not (on_gpu or device.type == "cpu"):
        raise UserError(f"--bf16: {device} does not compute in bfloat16; leave the flag out")
    return on_gpu if settings.bf16 is None else settings.bf16


def _check_trackers(names: Sequence[str]) -> None:
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to: expected one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(f"--report_to {name}: cannot be used: {error}") from error


def total_steps(blocks: Any, settings: RunSettings) -> int:
    """Optimizer steps of a run: those that the settings name, else those of the epochs. The last step of an epoch may have fewer
    micro-batches, the last micro-batch fewer sequences. A stream has no length, and is not asked for it."""
    if named := named_steps(settings):
        return named
    batches = math.ceil(len(blocks) / (settings.batch_size * processes()))
    return math.ceil(batches / settings.grad_accum_steps) * settings.num_epochs


def named_steps(settings: RunSettings) -> int | None:
    """max_steps, or as many as max_tokens take; None where the epochs decide."""
    if settings.max_tokens is None:
        return settings.max_steps
    return math.ceil(settings.max_tokens / (settings.seq_len * settings.batch_size * settings.grad_accum_steps * processes()))


# Resuming, and checks


def _point_to_resume(settings: RunSettings) -> Path | None:
    """The newest whole checkpoint; None where a run was stopped before its first one, and so begins again."""
    points = resume_points(settings.folder)
    if not points:
        _announce(f"--resume: no checkpoint_step_N.pt with its _state folder in {settings.folder.absolute()}; starting from the beginning")
        return None
    point = points[0]
    run, now = read_json(state_folder(point) / RUN), asdict(settings)
    if run["approach"] != settings.approach:
        raise UserError(
            f"--resume: {point} comes from a run of the {run['approach']} approach, this is one of the {settings.approach} approach; "
            "name its folder with --output_dir, or give no --resume"
        )
    before = run["settings"]
    known = [name for name in settings.resume_fields if name in before]  # an earlier version had fewer
    changed = [f"--{name} was {before[name]}, is {now[name]}" for name in known if _plain(before[name]) != _plain(now[name])]
    if changed:
        raise UserError(f"--resume: {point} comes from another run: {'; '.join(changed)}; give the same flags, or no --resume")
    _announce(f"Resuming from {point}")
    return point


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value


def _check_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--tokenizer_path: the tokenizer has {len(tokenizer)} entries, the model's vocabulary only {vocabulary}: they do not belong "
            "together; name the donor's tokenizer"
        )


def _save_best(trainer: RecursiveTrainer) -> Path | None:
    """All ranks take part; the first one writes."""
    saver = trainer.saver
    if saver is None:
        return None
    with trainer.shown():
        if trainer.args.should_save:
            saver.save(saver.folder / BEST, trainer.model.model, step=trainer.state.global_step, **trainer.notes())
    return saver.folder / BEST


def _result(state: TrainerState, interrupted: bool) -> FitResult:
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


def _announce(text: str) -> None:
    """On stderr, from the first process alone."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr)

"""The run itself, on `transformers.Trainer`: we write the objective and what is kept of a run, not the loop.

    train(settings)   from files to files: load or convert, make it float32, tokenise, fit, save
    fit(...)          the same loop on a model in memory; a plain causal model of transformers is trained by it, too, as one "cycle"

What is trained, and what for, is a row of `approaches.APPROACHES`; the settings name it.

A run writes into `output_dir`:

    qwen_recursive_finetuned_best.pt   the weights with the lowest validation loss at the end of an epoch, in the dtype they were loaded in
    checkpoint_step_N.pt               the weights after optimizer step N, likewise
    checkpoint_step_N_state/           what a resumed run needs beside them: optimizer, schedule, random numbers; the float32 weights
                                       where the .pt has rounded them
    metrics.jsonl                      every log entry

Units: losses per token, in nats, or 1 - cosine for embeddings; lengths in tokens, steps are optimizer steps. Floor 3.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .. import checkpoint
from ..data import DataSettings, load_documents, tokenize
from ..device import choose_device
from ..errors import UserError
from ..generation import is_recursive
from ..objective import IGNORED, counted, cycle_weights, deep_supervision
from ..plan import ConversionPlan
from .approaches import APPROACHES, NEXT_TOKEN, Objective, freeze_rest, from_donor
from .callbacks import EpochSummary, MetricsFile, ProgressBar, Samples, SaveSteps, StopOnSignal
from .settings import DonorSettings, RunSettings, TrainSettings

BEST = "qwen_recursive_finetuned_best.pt"
METRICS = "metrics.jsonl"
RUN, STATE, MASTERS = "run.json", "trainer_state.json", "float32_weights.pt"  # in a state folder
KEPT_STATES = 2  # only the newest is ever resumed from; the one before it is for the day that the disk fails


@dataclass(frozen=True)
class FitResult:
    """What a run did.

    Args:
        history: Every log entry, in order, each with `step`, `epoch`, `tokens` and `seconds` so far. Training entries have `loss` (what
            was minimised), `loss_cycle_i` of the supervised cycles, `learning_rate`, `grad_norm`: means since the entry before.
            Validation entries have `train_loss` (last cycle, mean over the epoch), `eval_loss` (last cycle), `eval_loss_cycle_i`, and
            `eval_perplexity`; in embedding space `eval_nearest_right` instead: the share of tokens, 0 to 1, for which the embedding nearest
            to the last cycle's state is the right one.
        steps: Optimizer steps made, those before a resumption included.
        tokens: Tokens read.
        seconds: Wall-clock time, validation and samples included.
        eval_loss: The last validation loss, None if the run was interrupted before any.
        best_eval_loss: The lowest one that is a number.
        interrupted: Whether Ctrl-C ended it.
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
        best: The best checkpoint, None if no epoch ended.
    """

    best: Path | None
    fit: FitResult


@dataclass(frozen=True)
class Saver:
    """Where a run saves, and what goes into a file beside the weights.

    Args:
        dtype: Type of the saved weights: that of the checkpoint the run began with, so a bfloat16 donor gives bfloat16 files.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plan: ConversionPlan | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path, model: Any, beside: Mapping[Path, Callable[[Path], Any]] | None = None, **notes: Any) -> Path:
        checkpoint.save(path, model, self.tokenizer, self.plan, {**self.notes, "training": notes}, dtype=self.dtype, beside=beside)
        return path


class Supervised(nn.Module):
    """A model together with what scores it: batches in, losses out.

    One module, so that whatever wraps the model for training (DDP, FSDP, compile) wraps the pass to the loss. It has no `config` on
    purpose: the Trainer would write `use_cache = False` into it, and every saved model would generate without a cache.

    Args:
        model: A recursive model, or a plain causal model of transformers, whose only "cycle" is its own pass.
        weights: How much each cycle's loss counts; a single one supervises the last cycle alone.
        objective: What a cycle's loss is.
    """

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # tells the Trainer that labels are shifted by the loss, when it counts tokens
    main_input_name = "input_ids"

    def __init__(self, model: Any, weights: Sequence[float] = (1.0,), objective: Objective = NEXT_TOKEN):
        super().__init__()
        self.model, self.weights, self.objective = model, list(weights), objective

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> dict[str, Tensor]:
        """`loss`, and `cycle_losses` `[supervised cycles]` detached; both divide by `num_items_in_batch` where it is given."""
        states = self.states(input_ids, every_cycle=len(self.weights) > 1)
        losses = self.objective.losses(states, labels, self.reader, num_items_in_batch)
        return {"loss": deep_supervision(losses, self.weights), "cycle_losses": losses.detach()}

    @torch.no_grad()
    def row_sums(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """`[B, cycles]`: the summed loss of each sequence at every cycle; where hits are counted, one more column with the last cycle's."""
        states = self.states(input_ids, every_cycle=True)
        columns = [self.objective.token_losses(state, labels, self.reader) for state in states]
        if self.objective.token_hits is not None:
            columns.append(self.objective.token_hits(states[-1], labels, self.reader))
        return torch.stack([column.sum(dim=1) for column in columns], dim=1)

    def states(self, input_ids: Tensor, every_cycle: bool) -> Sequence[Tensor]:
        """After the final norm: one `[B, T, D]` per cycle, or of the last cycle only."""
        base = self.model.base_model
        if not (is_recursive(self.model) and every_cycle):
            return (base(input_ids, use_cache=False).last_hidden_state,)
        return base(input_ids, use_cache=False, output_cycle_states=True).cycle_states

    @property
    def reader(self) -> nn.Module:
        return self.objective.reader(self.model)

    @property
    def cycles(self) -> int:
        return self.model.config.H_cycles if is_recursive(self.model) else 1


def supervision(config: Any, settings: RunSettings) -> list[float]:
    """The weight of each supervised cycle: of all of them with deep supervision, else of the last alone."""
    if not settings.enable_deep_supervision or not hasattr(config, "H_cycles"):
        return [1.0]
    return cycle_weights(settings.deep_supervision_schedule, settings.deep_supervision_weight, config.H_cycles)


def parameter_groups(model: Any, settings: RunSettings) -> list[dict[str, Any]]:
    """What the optimizer trains, in three groups: matrices, which decay; norms and biases; the recursion's own parameters."""
    own = {id(p) for p in model.model.recursion.parameters()} if is_recursive(model) else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    donors = [p for p in trained if id(p) not in own]
    return [
        {"params": [p for p in donors if p.ndim > 1], "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [p for p in donors if p.ndim <= 1], "lr": settings.lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in own], "lr": settings.gain_learning_rate, "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """What the learning rate is multiplied with in optimizer step `step`, from 0: up to 1 at the end of the warm-up, then down to 0 after
    the last step. No step has a rate of 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (total - step) / (total - warmup))


def warmup_of(settings: RunSettings, total: int) -> int:
    """The warm-up in optimizer steps: a tenth of the run where the one asked for would take more than half of it."""
    return settings.warmup_steps if settings.warmup_steps <= total // 2 else total // 10


class RecursiveTrainer(Trainer):
    """`Trainer` with our objective, our parameter groups, a validation loss per token, and checkpoints in our form."""

    loss_is_scaled_for_ga = True
    model: Any  # a Supervised
    optimizer: Any

    def __init__(self, model: Supervised, args: TrainingArguments, settings: RunSettings, saver: Saver | None, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.settings, self.saver = settings, saver
        # Since the last log entry: summed loss of each supervised cycle, and tokens they were summed over.
        self.window: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
        # Since the last validation, likewise, of the last cycle.
        self.epoch_loss, self.epoch_tokens = 0.0, 0.0
        self.started = time.perf_counter()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        here = counted(inputs["labels"])
        divisor = here if num_items_in_batch is None else num_items_in_batch
        self.window = (self.window[0] + outputs["cycle_losses"] * divisor, self.window[1] + here)
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.accelerator.num_processes
        # Each rank divides by the tokens of all ranks, and DDP takes the mean of their gradients.
        loss = outputs["loss"] * self.accelerator.num_processes if num_items_in_batch is not None else outputs["loss"]
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parameter_groups(self.model.model, self.settings), **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            warmup = warmup_of(self.settings, num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate_factor(step, warmup, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The loss of every cycle over all tokens of the validation text: a mean over tokens, not over batches."""
        self.model.eval()
        counts_hits = self.model.objective.token_hits is not None
        sums, tokens = torch.zeros(self.model.cycles + counts_hits, dtype=torch.float64), 0
        for batch in self.get_eval_dataloader(eval_dataset):
            with self.accelerator.autocast():
                rows = self.model.row_sums(**batch)
            scored = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
            rows, scored = self.accelerator.gather_for_metrics((rows, scored))
            sums += rows.cpu().double().sum(dim=0)
            tokens += int(scored.sum())
        metrics = self._summary((sums / max(1, tokens)).tolist(), metric_key_prefix)
        metrics["train_loss"] = self.epoch_loss / max(1.0, self.epoch_tokens)
        self.epoch_loss, self.epoch_tokens = 0.0, 0.0
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _summary(self, means: list[float], prefix: str) -> dict[str, float]:
        losses, hits = means[: self.model.cycles], means[self.model.cycles :]
        figure = ("nearest_right", hits[0]) if hits else ("perplexity", perplexity(losses[-1]))
        figures = [("loss", losses[-1]), figure, *((f"loss_cycle_{i}", loss) for i, loss in enumerate(losses, start=1))]
        return {f"{prefix}_{name}": value for name, value in figures}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:  # the Trainer's closing summary, which says nothing new
            return
        if "loss" in logs:
            logs |= self._drain_window()
        logs["tokens"], logs["seconds"] = self.state.num_input_tokens_seen, round(time.perf_counter() - self.started, 3)
        super().log(logs)

    def _drain_window(self) -> dict[str, float]:
        packed = torch.cat([torch.as_tensor(self.window[0]).flatten(), torch.as_tensor(self.window[1]).flatten()])
        *sums, tokens = self.accelerator.reduce(packed, "sum").tolist()
        self.window = (0.0, 0.0)
        self.epoch_loss, self.epoch_tokens = self.epoch_loss + sums[-1], self.epoch_tokens + tokens
        first = self.model.cycles - len(sums) + 1
        return {f"loss_cycle_{i}": total / max(1.0, tokens) for i, total in enumerate(sums, start=first)}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The weights, then beside them what only a resumed run needs: a checkpoint is whole once its state folder is there."""
        if self.saver is None or not self.args.should_save:
            return
        path = self.saver.folder / f"checkpoint_step_{self.state.global_step}.pt"
        shutil.rmtree(state_folder(path), ignore_errors=True)  # an earlier run's, which does not belong to these weights
        state = {state_folder(path): self._write_state}
        self.saver.save(path, self.model.model, state, step=self.state.global_step, epoch=self.state.epoch)
        for old in resume_points(self.saver.folder)[KEPT_STATES:]:
            shutil.rmtree(state_folder(old), ignore_errors=True)

    def _write_state(self, folder: Path) -> None:
        if self.saver is not None and self.saver.dtype != torch.float32:
            torch.save(self.model.model.state_dict(), folder / MASTERS)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / STATE))
        so_far = {"saved_at": time.time(), "epoch_loss": self.epoch_loss, "epoch_tokens": self.epoch_tokens}
        run = {**so_far, "approach": self.settings.approach, "settings": asdict(self.settings)}
        (folder / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The model was read from the .pt; what that has rounded comes from here."""
        folder = Path(resume_from_checkpoint)
        if (folder / MASTERS).is_file():
            self.model.model.load_state_dict(torch.load(folder / MASTERS, map_location="cpu", weights_only=True))
        run = _read_json(folder / RUN)
        self.epoch_loss, self.epoch_tokens = run["epoch_loss"], run["epoch_tokens"]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        spent = self.state.log_history[-1]["seconds"] if self.state.log_history else 0.0
        self.started = time.perf_counter() - spent
        return position


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: Any,
    eval_blocks: Any,
    settings: RunSettings,
    *,
    saver: Saver | None = None,
    resume_from: Path | None = None,
    console: bool = True,
    callbacks: Iterable[TrainerCallback] = (),
) -> FitResult:
    """Train a model in memory.

    Args:
        model: A recursive model, or any causal language model of transformers for comparison. It is changed in place: to float32, on the
            device of the settings, what the approach does not train is frozen, and it is left in evaluation mode.
        train_blocks, eval_blocks: Tables (or lists) of rows with `input_ids`, all of one length.
        settings: Their class chooses the approach. Those that name files, donors and data sets are not looked at.
        saver: Where checkpoints and metrics.jsonl go; None writes nothing at all.
        resume_from: A checkpoint_step_N.pt that a run like this one wrote, whose weights `model` holds already.
        console: Whether to show the bar, samples and epoch summaries.

    Raises:
        UserError: A setting out of range or one that the model cannot serve.
    """
    settings.validate()
    settings.validate_model(model.config)
    device, approach = choose_device(settings.device), APPROACHES[settings.approach]
    freeze_rest(model, settings)
    save_steps = SaveSteps(settings.save_every if saver else 0)
    stop, bar = StopOnSignal(save_steps if saver else None), ProgressBar()
    trainer = RecursiveTrainer(
        Supervised(model.float(), supervision(model.config, settings), approach.objective),
        training_arguments(settings, device, saver),
        settings,
        saver,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=collate,
        callbacks=[
            *([bar] if console else []),
            *([Samples(model, tokenizer, settings)] if console and settings.generate_every and approach.writes else []),
            *([MetricsFile(saver.folder / METRICS)] if saver else []),
            EpochSummary(lambda metrics: _save_best(saver, model, metrics) if saver else None, quiet=not console),
            save_steps,
            *callbacks,
            stop,
        ],
    )
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(state_folder(resume_from)))
    finally:
        bar.close()
        model.activation_checkpointing_disable()
        model.eval()
    return _result(trainer.state, interrupted=stop.asked)


def train(settings: RunSettings) -> TrainResult:
    """Train a checkpoint, or what an approach makes of a donor, on a data set; leave checkpoints, the best one and metrics.jsonl.

    Raises:
        UserError: A setting out of range, a checkpoint, donor or data set that cannot be used, a folder that cannot be written, or a run to
            resume that was another one.
    """
    settings.validate()
    point = _point_to_resume(settings) if settings.resume else None
    found = _starting_model(settings, point)
    tokenizer = checkpoint.need_tokenizer(found, point or settings.source)
    settings.validate_model(found.model.config)
    _check_tokenizer(found.model, tokenizer)

    documents = load_documents(
        DataSettings(dataset_name=settings.dataset_name, dataset_config_name=settings.dataset_config_name, text_column=settings.text_column)
    )
    train_blocks = tokenize(documents.train, tokenizer, settings.seq_len)
    eval_blocks = tokenize(documents.validation, tokenizer, settings.seq_len)
    total = total_steps(len(train_blocks), settings)
    _announce(f"{len(train_blocks):,} training and {len(eval_blocks):,} validation sequences of {settings.seq_len} tokens: {total:,} steps")
    if warmup_of(settings, total) != settings.warmup_steps:
        _announce(f"--warmup_steps {settings.warmup_steps} is more than half of that: warming up for {warmup_of(settings, total)}")
    if _all_gains_are_zero(found.model):
        _announce("All gains are 0, where half of them get no gradient and the loop hardly learns; convert with --gain 0.2 to train it")
    best = settings.folder / BEST
    if point is not None and _step(point) >= total:
        _announce(f"{point} is the end of this run already; a larger --num_epochs or --max_steps would go on from it")
        state = TrainerState.load_from_json(str(state_folder(point) / STATE))
        return TrainResult(best, _result(state, interrupted=False))

    if best.exists() and point is None:
        _announce(f"{best} is there already: the best model of this run replaces it; another --output_dir keeps both")
    _make_folder(settings.folder)
    saver = Saver(settings.folder, tokenizer, found.model.dtype, found.plan, {**found.notes, "approach": settings.approach})
    result = fit(found.model, tokenizer, train_blocks, eval_blocks, settings, saver=saver, resume_from=point)
    if result.interrupted:
        _announce(f"Interrupted and saved at step {result.steps}; the same command with --resume goes on from there")
    return TrainResult(best if result.best_eval_loss is not None else None, result)


def _starting_model(settings: RunSettings, point: Path | None) -> checkpoint.Checkpoint:
    if point is not None or isinstance(settings, TrainSettings):
        return checkpoint.load(point or settings.source, tokenizer_path=settings.tokenizer_path)
    assert isinstance(settings, DonorSettings)
    return from_donor(settings, _announce)


def _all_gains_are_zero(model: Any) -> bool:
    gains = [p for name, p in model.model.recursion.named_parameters() if ".theta_" in name]
    return bool(gains) and not any(p.any() for p in gains)


def training_arguments(settings: RunSettings, device: torch.device, saver: Saver | None) -> TrainingArguments:
    """Our settings in the words of transformers. What is not named here is decided by `RecursiveTrainer`.

    Raises:
        UserError: A second GPU, or bfloat16 on a device without it.
    """
    if device.index:
        raise UserError(f"--device: training takes the first GPU that it sees, got {device}; choose by CUDA_VISIBLE_DEVICES={device.index}")
    has_bf16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    if settings.bf16 and not has_bf16:
        raise UserError(f"--bf16: {device} does not compute in bfloat16; leave the flag out")
    args = TrainingArguments(
        output_dir=str(saver.folder if saver else "."),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum_steps,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="no",  # SaveSteps asks instead
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        bf16=has_bf16 and device.type == "cuda" if settings.bf16 is None else settings.bf16,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,  # idle parameters are frozen
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer splits every batch over all GPUs with DataParallel, which is slower than one of them
    return args


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of equal length as one batch; the labels are the tokens themselves, unshifted."""
    ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
    return {"input_ids": ids, "labels": ids}


def total_steps(sequences: int, settings: RunSettings) -> int:
    """Optimizer steps of a run; the last step of an epoch may have fewer micro-batches, the last micro-batch fewer sequences."""
    per_epoch = math.ceil(math.ceil(sequences / settings.batch_size) / settings.grad_accum_steps)
    return settings.max_steps or per_epoch * settings.num_epochs


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def state_folder(path: Path) -> Path:
    """Beside `checkpoint_step_N.pt`: `checkpoint_step_N_state/`."""
    return path.with_name(path.stem + "_state")


def resume_points(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, the one that was written last first: an earlier run may have left a higher step behind.

    A .pt is a zip archive, whose list of contents stands at its end: a truncated one is none.
    """
    paths = [path for path in folder.glob("checkpoint_step_*.pt") if (state_folder(path) / RUN).is_file() and is_zipfile(path)]
    return sorted(paths, key=lambda path: _read_json(state_folder(path) / RUN)["saved_at"], reverse=True)


def _point_to_resume(settings: RunSettings) -> Path | None:
    """The newest whole checkpoint; None where a run was stopped before its first one, and so begins again."""
    points = resume_points(settings.folder)
    if not points:
        _announce(f"--resume: no checkpoint_step_N.pt with its _state folder in {settings.folder.absolute()}; starting from the beginning")
        return None
    point = points[0]
    run, now = _read_json(state_folder(point) / RUN), asdict(settings)
    if run["approach"] != settings.approach:
        raise UserError(
            f"--resume: {point} comes from a run of the {run['approach']} approach, this is one of the {settings.approach} approach; "
            "name its folder with --output_dir, or give no --resume"
        )
    before = run["settings"]
    changed = [f"--{name} was {before[name]}, is {now[name]}" for name in settings.resume_fields if before[name] != now[name]]
    if changed:
        raise UserError(f"--resume: {point} comes from another run: {'; '.join(changed)}; give the same flags, or no --resume")
    _announce(f"Resuming from {point}")
    return point


def _check_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--tokenizer_path: the tokenizer has {len(tokenizer)} entries, the model's vocabulary only {vocabulary}: they do not belong "
            "together; name the donor's tokenizer"
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: the folder {folder} cannot be made ({error.strerror}); choose another") from error
    checkpoint.check_writable(folder / BEST)


def _save_best(saver: Saver, model: Any, metrics: dict[str, float]) -> Path:
    return saver.save(saver.folder / BEST, model, epoch=metrics["epoch"], eval_loss=metrics["eval_loss"])


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


def _step(point: Path) -> int:
    return int(point.stem.rsplit("_", 1)[1])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _announce(text: str) -> None:
    print(text, file=sys.stderr)

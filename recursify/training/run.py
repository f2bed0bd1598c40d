"""A training run from settings to files.

    train(settings)   from files to files: load or convert, find the text, fit, save

The same on a model in memory, plain causal models of transformers included, is `fit` in fitting.py.

What is trained, and what for, is a row of `approaches.APPROACHES`; the settings name it. `saving` says what a run leaves on disk.

Units: losses per token, in nats, or 1 - cosine for embeddings; lengths in tokens, steps are optimizer steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerState

from ..checkpoints import checkpoint
from ..checkpoints.donor import open_donor
from ..checkpoints.repository import split_revision
from ..errors import UserError
from ..utils.device import choose_device
from ..utils.files import read_json
from .approaches import from_donor
from .arguments import computes_in_bf16, total_steps
from .cost import estimate
from .fitting import FitResult, fit, result_of
from .optimizers import warmup_of
from .parallel import announce, check_launch, describe_launch, processes
from .saving import BEST, RUN, STATE, Saver, make_folder, resume_points, state_folder, step_of
from .settings import DonorSettings, RunSettings, TrainSettings

if TYPE_CHECKING:
    from ..data.loading import Blocks


@dataclass(frozen=True)
class TrainResult:
    """Result of the training command.

    Args:
        best: Path of the best checkpoint; None without validation.
        fit: None for a dry run.
    """

    best: Path | None
    fit: FitResult | None


def train(settings: RunSettings) -> TrainResult:
    """Train a checkpoint, or the model that an approach builds from a donor; writes checkpoints, the best one and metrics.jsonl.

    Raises:
        UserError: A setting out of range, a checkpoint, donor or dataset that cannot be used, a folder that cannot be written, or a resume
            from a run with other settings.
    """
    settings.validate()
    device = choose_device(settings.device)
    check_launch(settings, device)
    PartialState(cpu=device.type == "cpu")  # several processes find each other here, before the first of them is waited for
    point = _point_to_resume(settings) if settings.resume else None
    found = _starting_model(settings, point)
    tokenizer = checkpoint.require_tokenizer(found, point or settings.source)
    settings.validate_model(found.model.config)
    _check_tokenizer(found.model, tokenizer)

    blocks = _load_text(settings, tokenizer)
    total = total_steps(blocks.train, settings)
    announce(f"Training on {describe_launch(settings, device)}")
    count = "a stream of" if settings.streaming else f"{len(blocks.train):,}"
    announce(f"{count} training and {len(blocks.validation):,} validation sequences of {settings.seq_len} tokens: {total:,} steps")
    if warmup_of(settings, total) != settings.warmup_steps:
        announce(f"--warmup_steps {settings.warmup_steps} is more than half of that: warming up for {warmup_of(settings, total)}")
    teacher = _load_teacher(settings, found, device)
    if settings.dry_run:
        as_computed = replace(settings, bf16=computes_in_bf16(settings, device))
        cost = estimate(found.model.config, as_computed, total, processes(), teacher and teacher.config)
        if PartialState().is_main_process:
            print(cost.render())
        return TrainResult(None, None)
    best = settings.folder / BEST
    if point is not None and step_of(point) >= total:
        announce(f"{point} is the end of this run already; increase --num_epochs or --max_steps to continue")
        state = TrainerState.load_from_json(str(state_folder(point) / STATE))
        return TrainResult(best, result_of(state, interrupted=False))

    if best.exists() and point is None:
        announce(f"{best} is there already: the best model of this run replaces it; another --output_dir keeps both")
    make_folder(settings.folder)
    saver = Saver(
        settings.folder, tokenizer, found.model.dtype, found.plan, {**found.notes, "approach": settings.approach}, settings.keep_last
    )
    result = fit(found.model, tokenizer, blocks.train, blocks.validation, settings, teacher=teacher, saver=saver, resume_from=point)
    if result.interrupted:
        announce(f"Interrupted and saved at step {result.steps}; the same command with --resume continues from there")
    return TrainResult(best if result.best_eval_loss is not None else None, result)


# What a run begins with


def _starting_model(settings: RunSettings, point: Path | None) -> checkpoint.Checkpoint:
    if point is not None or isinstance(settings, TrainSettings):
        revision = settings.revision if point is None and isinstance(settings, TrainSettings) else None
        return checkpoint.load(point or settings.source, tokenizer_path=settings.tokenizer_path, revision=revision)
    assert isinstance(settings, DonorSettings)
    return from_donor(settings, announce)


def _load_text(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    from ..data.loading import load_blocks  # here: `fit`, on rows in memory, needs no library for data sets

    return load_blocks(settings, tokenizer, settings.seq_len, settings.seed)


def _load_teacher(settings: RunSettings, found: checkpoint.Checkpoint, device: torch.device) -> Any:
    """Load the teacher, in bfloat16 if the GPU supports it; None if the run does not distill."""
    if not settings.distill_weight:
        return None
    notes = found.notes
    name, revision = split_revision(settings.teacher) if settings.teacher else (notes.get("donor"), notes.get("revision"))
    if name is None:
        raise UserError(f"--distill_weight: {settings.source} does not say which donor it comes from; name one with --teacher")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    teacher = open_donor(name, revision=revision).load(dtype=dtype)
    words, own = (model.get_output_embeddings().out_features for model in (teacher, found.model))
    if words != own:
        raise UserError(f"--teacher: expected one with the vocabulary of the model, but {name} has {words} entries, the model {own}")
    return teacher


# Resuming, and checks


def _point_to_resume(settings: RunSettings) -> Path | None:
    """The newest complete checkpoint; None if the run stopped before its first one and starts over."""
    points = resume_points(settings.folder)
    if not points:
        announce(f"--resume: no checkpoint_step_N.pt with its _state folder in {settings.folder.absolute()}; starting from the beginning")
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
    announce(f"Resuming from {point}")
    return point


def _plain(value: Any) -> Any:
    """The value after a JSON round trip."""
    return list(value) if isinstance(value, tuple) else value


def _check_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--tokenizer_path: the tokenizer has {len(tokenizer)} entries, the model's vocabulary only {vocabulary}: they do not belong "
            "together; name the donor's tokenizer"
        )

"""A training run that reads and writes files.

    train(settings)   load or convert the model, load the text, fit, save

`fit` in fitting.py does the same for a model in memory, including plain causal models of transformers.

The settings name the approach (`approaches.APPROACHES`), which determines trained parameters and objective. `saving` documents the files.

Units: losses per token, in nats, or 1 - cosine for embeddings; lengths in tokens, steps are optimizer steps.
"""

from __future__ import annotations

import hashlib
import itertools
import shlex
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerState

from ..checkpoints import checkpoint
from ..checkpoints.donor import open_donor, recorded_donor
from ..checkpoints.repository import split_revision
from ..conversion.adapter import as_adapter
from ..data.question_sets import is_questions
from ..data.settings import parse_mix
from ..errors import UserError
from ..utils.device import choose_device
from ..utils.files import read_json
from .approaches import from_donor
from .arguments import check_tf32, choose_autocast, total_steps
from .cost import estimate
from .fitting import FitResult, fit, result_of
from .gains import sweep_length
from .lock import sole_run
from .optimizers import warmup_of
from .parallel import announce, check_launch, describe_launch, processes
from .quantize import check_4bit
from .saving import RUN, STATE, Saver, best_name, keep_previous, make_folder, sound_point, state_folder, step_of
from .settings import DonorSettings, RunSettings, TrainSettings

if TYPE_CHECKING:
    from ..data.loading import Blocks

_HASHED_ROWS = 200_000


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run on files.

    Args:
        best: The best checkpoint; None without validation.
        fit: None for a dry run.
    """

    best: Path | None
    fit: FitResult | None


def train(settings: RunSettings) -> TrainResult:
    """Train a checkpoint, or the initial model of an approach, on a dataset; write checkpoints, the best model and metrics.jsonl.

    Raises:
        UserError: A setting out of range, an unusable checkpoint, donor or dataset, a folder that cannot be written or that another run
            is writing to, or a resume with other settings or of damaged checkpoints.
    """
    settings.validate()
    device = choose_device(settings.device)
    check_launch(settings, device)
    check_tf32(settings, device)
    check_4bit(settings, device)
    PartialState(cpu=device.type == "cpu")  # initialises the process group before the first collective
    if settings.dry_run:
        return _train(settings, device, lambda: None)
    with sole_run(settings.folder) as lock:
        return _train(settings, device, lock)


def _train(settings: RunSettings, device: torch.device, lock: Callable[[], None]) -> TrainResult:
    point = _point_to_resume(settings) if settings.resume else None
    if point is not None and settings.bf16 is None:  # what a probe chose then holds: another choice would not be the same run
        settings = replace(settings, bf16=read_json(state_folder(point) / RUN)["settings"].get("bf16"))
    loaded = _starting_model(settings, point)
    tokenizer = checkpoint.require_tokenizer(loaded, point or settings.source)
    settings.validate_model(loaded.model.config)

    blocks = _load_text(settings, tokenizer)
    total = total_steps(blocks.train, settings)
    announce(f"Training on {describe_launch(settings, device)}")
    count = "a stream of" if settings.streaming else f"{len(blocks.train):,}"
    announce(f"{count} training and {len(blocks.validation):,} validation sequences of {settings.seq_len} tokens: {total:,} steps")
    if warmup_of(settings, total) != settings.warmup_steps:
        used = warmup_of(settings, total)
        announce(f"Warm-up of {used} steps: {settings.warmup_steps} (--warmup_steps) exceed half of the {total:,} steps")
    teacher = _load_teacher(settings, loaded, device)
    if settings.dry_run:
        settings = choose_autocast(settings, loaded.model.config, device)
        cost = estimate(loaded.model.config, settings, total, processes(), teacher and teacher.config)
        if PartialState().is_main_process:
            print(cost.render())
            if swept := sweep_length(loaded.model, blocks.validation or blocks.train, settings):
                print(f"\nbefore the first step, the start gain is chosen on {swept} validation sequences (--start_gain skips this)")
        return TrainResult(None, None)
    data = fingerprint(blocks.train, settings)
    if point is not None:
        _check_data(point, data)
    best = settings.folder / best_name(loaded.model.config)
    make_folder(settings.folder)
    lock()
    notes = {**loaded.notes, "approach": settings.approach}
    stored = torch.float32 if loaded.model.config.is_adapter else loaded.model.dtype
    saver = Saver(settings.folder, tokenizer, stored, loaded.plan, notes, settings.keep_last, data)
    if point is not None and step_of(point) >= total:
        announce(f"{point} is already the end of this run; increase --num_epochs or --max_steps to continue")
        if PartialState().is_main_process:
            saver.delete_old(point)  # what a kill after the last save has left
        state = TrainerState.load_from_json(str(state_folder(point) / STATE))
        return TrainResult(best, result_of(state, interrupted=False))

    if best.exists() and point is None:
        announce(f"{best} is of an earlier run; it is kept as {keep_previous(best).name}, the last one before this run")
    result = fit(loaded.model, tokenizer, blocks.train, blocks.validation, settings, teacher=teacher, saver=saver, resume_from=point)
    if result.interrupted:
        announce(f"Interrupted and saved at step {result.steps}; the same command with --resume continues from there")
    elif result.best_eval_loss is not None:
        announce(closing_summary(result, best, settings, converses="position_ids" in blocks.validation.column_names))
    return TrainResult(best if result.best_eval_loss is not None else None, result)


def closing_summary(result: FitResult, best: Path, settings: RunSettings, converses: bool = False) -> str:
    """What matters at the end of a run: validation loss by cycle beside the donor's, the best model, the folder, and the next commands.

    Args:
        converses: Whether the model was trained on conversations.
    """
    last = next(entry for entry in reversed(result.history) if "eval_loss" in entry)
    losses = {int(name.rpartition("_")[2]): loss for name, loss in last.items() if name.startswith("eval_loss_cycle_")}
    lines = [f"Best validation loss {result.best_eval_loss:.4f}: {best}", f"All files of this run are in {settings.folder.absolute()}"]
    if len(losses) > 1:
        shown = ", ".join(f"{cycle}: {loss:.4f}" for cycle, loss in losses.items())
        donor = next((f"; of the donor: {entry['donor_loss']:.4f}" for entry in result.history if "donor_loss" in entry), "")
        lines.insert(0, f"Validation loss by cycle at the end: {shown}; lowest at cycle {min(losses, key=losses.__getitem__)}{donor}")
    if settings.approach != checkpoint.EMBEDDING:
        model, data = shlex.quote(str(best)), shlex.quote(settings.dataset_name)
        if converses:
            return "\n".join([*lines, f"Next: recursify chat --checkpoint {model}"])
        held_out = f"--questions {data}" if is_questions(settings.dataset_name) else f"--dataset_name {data} --split validation"
        lines.append(f'Next: recursify generate --checkpoint {model} --prompt "..."')
        lines.append(f"      recursify evaluate --checkpoint {model} {held_out}")
    return "\n".join(lines)


# Inputs


def _starting_model(settings: RunSettings, point: Path | None) -> checkpoint.Checkpoint:
    if point is not None or isinstance(settings, TrainSettings):
        revision = settings.revision if point is None and isinstance(settings, TrainSettings) else None
        donor = settings.donor if isinstance(settings, TrainSettings) else None
        found = checkpoint.load(point or settings.source, tokenizer_path=settings.tokenizer_path, revision=revision, donor=donor)
        if isinstance(settings, TrainSettings) and settings.adapter and not found.model.config.is_adapter:
            settings.validate_model(found.model.config)
            torch.manual_seed(settings.seed)
            lora = {name: getattr(settings, name) for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_per")}
            found.model = as_adapter(found.model, donor=donor, **lora)
        return found
    assert isinstance(settings, DonorSettings)
    return from_donor(settings, announce)


def fingerprint(rows: Any, settings: RunSettings) -> str | None:
    """A hash of the training data: of the tokens of a table, of sizes and ends of the local files of a stream; None for the hub's streams.

    Of more than `_HASHED_ROWS` rows, that many are read, evenly spaced.
    """
    digest = hashlib.blake2b(digest_size=8)
    if not settings.streaming:
        chosen = range(0, len(rows), max(1, len(rows) // _HASHED_ROWS))
        digest.update(f"{len(rows)} rows".encode())
        for start in range(0, len(chosen), 1000):
            for column in sorted(batch := rows[chosen[start : start + 1000]]):
                digest.update(array("q", itertools.chain.from_iterable(batch[column])).tobytes())
        return digest.hexdigest()
    names = (settings.dataset_name, *(name for name, _ in parse_mix(settings.mix)))
    files = [file for name in names for file in _local_files(Path(name).expanduser())]
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + stream.read(2**16))
            stream.seek(max(0, file.stat().st_size - 2**16))
            digest.update(stream.read())
    return digest.hexdigest() if files else None


def _local_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []


def _load_text(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    from ..data.loading import load_blocks  # here: `fit` does not need the datasets library

    return load_blocks(settings, tokenizer, settings.seq_len, settings.seed, with_steps=settings.cycle_targets == "steps")


def _load_teacher(settings: RunSettings, loaded: checkpoint.Checkpoint, device: torch.device) -> Any:
    """The teacher, in bfloat16 on GPUs that support it; None if no term of the loss needs one."""
    if not settings.needs_teacher:
        return None
    name, revision = split_revision(settings.teacher) if settings.teacher else _recorded_donor(loaded.notes, settings)
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    try:
        teacher = open_donor(name, revision=revision).load(dtype=dtype)
    except UserError as error:
        raise UserError(f"--teacher: {error}") from error
    size, own_size = (model.get_output_embeddings().out_features for model in (teacher, loaded.model))
    if size != own_size:
        raise UserError(f"--teacher: expected one with the vocabulary of the model, but {name} has {size} entries, the model {own_size}")
    size, own_size = teacher.config.hidden_size, loaded.model.config.hidden_size
    if settings.match_hidden_weight and size != own_size:
        raise UserError(f"--match_hidden_weight: expected a teacher of the model's hidden size {own_size}, but {name} has {size}")
    return teacher


def _recorded_donor(notes: dict[str, Any], settings: RunSettings) -> tuple[str, str | None]:
    """Name and revision of the donor that a checkpoint was converted from."""
    name, revision, missing = recorded_donor(notes)
    flag = "--distill_weight" if settings.distill_weight else "--match_hidden_weight"
    if missing:
        raise UserError(f"{flag}: {settings.source} was converted from the folder {name}, which is not there; name it with --teacher")
    if name is None:
        raise UserError(f"{flag}: {settings.source} does not say which donor it comes from; name one with --teacher")
    return name, revision


# Resuming, and checks


def _point_to_resume(settings: RunSettings) -> Path | None:
    """The newest sound checkpoint; None if there is none, and the run starts from the beginning."""
    point = sound_point(settings.folder, announce)
    if point is None:
        announce(f"--resume: no checkpoint_step_N.pt with its _state folder in {settings.folder.absolute()}; starting from the beginning")
        return None
    run, now = read_json(state_folder(point) / RUN), asdict(settings)
    if run["approach"] != settings.approach:
        raise UserError(
            f"--resume: {point} comes from a run of the {run['approach']} approach, this is one of the {settings.approach} approach; "
            "name its folder with --output_dir, or give no --resume"
        )
    before = run["settings"]
    known = [name for name in settings.resume_fields if name in before and name in now]  # earlier versions had fewer fields
    changed = [f"--{name} was {before[name]}, is {now[name]}" for name in known if _plain(name, before[name]) != _plain(name, now[name])]
    if changed:
        raise UserError(f"--resume: {point} comes from another run: {'; '.join(changed)}; give the same flags, or no --resume")
    announce(f"Resuming from {point}")
    return point


def _check_data(point: Path, data: str | None) -> None:
    """Raise a UserError if the training data are not those that a checkpoint was trained on, whatever their name."""
    before = read_json(state_folder(point) / RUN).get("data")  # absent in checkpoints of version 0.1.0
    if before is not None and data is not None and before != data:
        raise UserError(
            f"--resume: {point} was trained on other data: their contents have changed (fingerprint {before}, now {data}), so the steps "
            "that it made cannot be told from those to come; restore the data, or give no --resume"
        )


def _plain(name: str, value: Any) -> Any:
    """The value of a setting after a round trip through JSON. The default of text_column was "text" before conversations were read."""
    if name == "text_column" and value is None:
        return "text"
    return list(value) if isinstance(value, tuple) else value

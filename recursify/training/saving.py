"""Files of a run, and which of them a resumed run continues from.

    qwen_recursive_finetuned_best.pt   the weights with the lowest validation loss, in the dtype they were loaded in; of another family,
                                       such as llama, llama_recursive_finetuned_best.pt
    ..._best_previous.pt               the best model that an earlier run left in the folder
    checkpoint_step_N.pt               the weights after optimizer step N, likewise
    checkpoint_step_N_state/           further state for a resume: optimizer, schedule, random states of each rank; the float32 weights if
                                       those in the .pt are rounded or averaged; SHA256SUMS of the whole checkpoint, for sha256sum -c
    .recursify.lock                    held by the run that writes here, until it ends or is killed
    metrics.jsonl                      all log entries

Both parts of a checkpoint are written to a temporary folder, synced and renamed together, so a kill at any moment leaves the previous
checkpoint intact; the next run in that folder deletes leftover temporary files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase, TrainerState

from ..checkpoints import checkpoint
from ..errors import UserError
from ..network.configuration_recursive_llm import PREFIX
from ..network.plan import ConversionPlan
from ..utils.atomic import clear_leftovers
from ..utils.checksums import first_damaged, write_sums
from ..utils.files import read_json
from .optimizers import warmup_of
from .parallel import processes
from .settings import RunSettings

BEST = "qwen_recursive_finetuned_best.pt"  # of Qwen donors, as the guides name it
BEST_ADAPTER = "qwen_recursive_adapter_best"
METRICS = "metrics.jsonl"
RUN, STATE, MASTERS, AVERAGES = "run.json", "trainer_state.json", "float32_weights.pt", "averaged_weights.pt"  # in a state folder
KEPT_STATES = 2  # only the newest is resumed from; the previous one is a backup in case it is damaged
# Settings recorded in a checkpoint: those that affect the weights. Paths and hardware are not recorded.
_RECORDED_SETTINGS = (
    "dataset_name", "dataset_config_name", "mix", "seq_len", "separate_documents", "batch_size", "grad_accum_steps", "cycle_choices",
    "backprop", "lr", "gain_lr", "lr_schedule", "warmup_steps", "optimizer", "weight_decay", "ema_decay", "enable_deep_supervision",
    "distill_weight", "self_distill_weight", "monotone_weight", "halting_weight",
)  # fmt: skip
_STEP_NAME = re.compile(r"checkpoint_step_\d+")  # not a user's copy such as checkpoint_step_1000_good.pt


def best_name(config: Any) -> str:
    """Name of the best model of a run, after the donor's family: a file, or of an adapter a folder."""
    family = config.model_type.removeprefix(PREFIX)
    name = BEST_ADAPTER if getattr(config, "is_adapter", False) else BEST
    return name if family.startswith("qwen") else name.replace("qwen", re.sub("[^a-z0-9]", "", family.lower()), 1)


def keep_previous(best: Path) -> Path:
    """Rename the best model of an earlier run, and its tokenizer, before a new run writes its own; return its new path.

    One is kept: that of the run before it is replaced.
    """
    previous = best.with_stem(f"{best.stem}_previous")
    if PartialState().is_main_process:
        if previous.is_dir():
            shutil.rmtree(previous)
        best.replace(previous)
        own, kept = checkpoint.tokenizer_folder(best), checkpoint.tokenizer_folder(previous)
        if own.is_dir():
            shutil.rmtree(kept, ignore_errors=True)
            own.rename(kept)
    return previous


def training_notes(settings: RunSettings, state: TrainerState) -> dict[str, Any]:
    """Metadata of a run for its checkpoints, in JSON types: progress, data, settings, and the last validation.

    Deterministic: without times. Settings that are off (0, None, empty) are omitted. `eval_loss_cycles` has the validation loss of each
    cycle, from the first.
    """
    recorded = {
        name: list(value) if isinstance(value, tuple) else value for name in _RECORDED_SETTINGS if (value := getattr(settings, name))
    }
    if state.max_steps > 0 and "warmup_steps" in recorded:  # as they were used
        recorded["warmup_steps"] = warmup_of(settings, state.max_steps)
    notes = {"epoch": state.epoch, "tokens": state.num_input_tokens_seen, "processes": processes(), **recorded, "seed": settings.seed}
    validation = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), None)
    if validation is not None:
        cycles = [loss for name, loss in validation.items() if name.startswith("eval_loss_cycle_")]
        notes |= {"eval_loss": validation["eval_loss"], "eval_loss_cycles": cycles, "eval_step": validation["step"]}
    return notes


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of a run.

    Args:
        dtype: Type of the saved weights: that of the initial checkpoint, so a bfloat16 donor gives bfloat16 files.
        keep_last: Number of checkpoints to keep; 0 keeps all.
        data: Fingerprint of the training data, which a resumed run compares.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plan: ConversionPlan | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    keep_last: int = 0
    data: str | None = None

    @property
    def starts_as_donor(self) -> bool:
        """Whether the model that the run starts from is its donor at 0 cycles: all layers kept, and not trained yet."""
        return self.plan is not None and not self.plan.dropped and "training" not in self.notes and self.notes["approach"] == "full"

    def save(self, path: Path, model: Any, beside: Mapping[Path, Callable[[Path], Any]] | None = None, **notes: Any) -> Path:
        checkpoint.save(path, model, self.tokenizer, self.plan, {**self.notes, "training": notes}, dtype=self.dtype, beside=beside)
        return path

    def save_step(self, step: int, model: Any, write_state: Callable[[Path], Any] | None, **notes: Any) -> Path:
        """Save a checkpoint to resume from, and delete old ones as set by `keep_last`.

        Args:
            write_state: Writes the further state for a resume into a folder. None makes a checkpoint that cannot be resumed from.

        Raises:
            UserError: The disk is full, or fails.
        """
        path = self.folder / f"checkpoint_step_{step}.pt"
        try:
            _delete_state(path)  # left by an earlier run with other weights
            self.save(path, model, {} if write_state is None else {state_folder(path): _with_sums(write_state, path)}, step=step, **notes)
        except OSError as error:
            raise _disk_failed(path, error) from error
        self.delete_old(path)
        return path

    def delete_old(self, newest: Path) -> None:
        """Delete old states, and checkpoints as set by `keep_last`. Those without state are older than those with state.

        Args:
            newest: The checkpoint that was written last, which comes first even if the clock was set back.

        Raises:
            UserError: The disk fails.
        """
        try:
            self._delete_old(newest)
        except OSError as error:
            raise _disk_failed(newest, error) from error

    def _delete_old(self, newest: Path) -> None:
        points = [newest, *(point for point in resume_points(self.folder) if point != newest)]
        for old in points[KEPT_STATES:]:
            _delete_state(old)
        if not self.keep_last:
            return
        others = [path for path in _checkpoints(self.folder) if path not in points]
        newest_first = points + sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest_first[self.keep_last :]:
            _delete_state(old)
            shutil.rmtree(checkpoint.tokenizer_folder(old), ignore_errors=True)
            old.unlink()  # last: if killed before, the next save still finds it and deletes the rest


def _disk_failed(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: could not be written, or older ones not deleted ({error.strerror}: {error.filename}); the checkpoints saved so "
        "far are intact. Mend the disk, or free some space, then continue with --resume"
    )


def state_folder(path: Path) -> Path:
    """The state folder of `checkpoint_step_N.pt`, `checkpoint_step_N_state/`."""
    return path.with_name(path.stem + "_state")


def resume_points(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, latest first by time of writing: an earlier run may have left a higher step."""
    written = {path: when for path in _checkpoints(folder) if (when := _saved_at(path)) is not None}
    return sorted(written, key=written.__getitem__, reverse=True)


def sound_point(folder: Path, say: Callable[[str], object]) -> Path | None:
    """The newest complete checkpoint whose files are as they were written; None if none was written. Collective; rank 0 reads.

    Args:
        say: Called with a line for every checkpoint that is damaged.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    found: list[Any] = [None, []]
    if PartialState().is_main_process:
        found = list(_sound_point(folder))
    point, damaged = broadcast_object_list(found)
    for file in damaged:
        say(f"{file} is damaged: it is not as it was written; that checkpoint is not resumed from")
    if point is None and damaged:
        raise UserError(
            f"--resume: no checkpoint in {folder} is sound; restore {damaged[0]} from a backup, or give no --resume, which starts anew"
        )
    return point


def _sound_point(folder: Path) -> tuple[Path | None, list[Path]]:
    """The point, and what is damaged, also in older ones: what says when a checkpoint was written may be what is damaged."""
    points = resume_points(folder)
    damaged = {point: file for point in points if (file := first_damaged(state_folder(point))) is not None}
    undated = [path for path in _checkpoints(folder) if path not in points and (state_folder(path) / RUN).exists()]
    return next((point for point in points if point not in damaged), None), [*undated, *damaged.values()]


def _with_sums(write: Callable[[Path], Any], path: Path) -> Callable[[Path], Any]:
    """A writer of a state folder that adds the checksums of the checkpoint, which has been written beside it."""

    def write_with_sums(state: Path) -> None:
        write(state)
        weights = state.parent / path.name
        write_sums(state, [weights, *checkpoint.tokenizer_folder(weights).glob("*"), *state.glob("*")])

    return write_with_sums


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint_step_*.pt") if _STEP_NAME.fullmatch(path.stem)]


def _saved_at(path: Path) -> float | None:
    """When a checkpoint was written, in seconds; None if it is incomplete.

    A .pt is a zip archive, whose directory is at its end: a truncated file is not a valid archive.
    """
    try:
        return float(read_json(state_folder(path) / RUN)["saved_at"]) if is_zipfile(path) else None
    except (OSError, ValueError, KeyError, TypeError):  # no state, or a damaged one
        return None


def _delete_state(path: Path) -> None:
    """Delete a checkpoint's state, run.json first, so that a kill in between leaves no state that counts as complete."""
    (state_folder(path) / RUN).unlink(missing_ok=True)
    shutil.rmtree(state_folder(path), ignore_errors=True)


def step_of(point: Path) -> int:
    return int(point.stem.rsplit("_", 1)[1])


def make_folder(folder: Path) -> None:
    """Create the output folder, check that it is writable, and delete leftovers of killed runs.

    Raises:
        UserError: It cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: the folder {folder} cannot be created ({error.strerror}); choose another") from error
    checkpoint.check_writable(folder / BEST)
    if PartialState().is_main_process:
        _delete_leftovers(folder)


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed saves left, and states without weights."""
    clear_leftovers(folder)
    for state in folder.glob("checkpoint_step_*_state"):
        path = state.with_name(state.name.removesuffix("_state") + ".pt")
        if _STEP_NAME.fullmatch(path.stem) and not path.exists():
            shutil.rmtree(state, ignore_errors=True)

"""Files of a run, and which of them a resumed run continues from.

    qwen_recursive_finetuned_best.pt   the weights with the lowest validation loss, in the dtype they were loaded in
    checkpoint_step_N.pt               the weights after optimizer step N, likewise
    checkpoint_step_N_state/           what a resumed run needs beside them: optimizer, schedule, random numbers of each rank; the float32
                                       weights where the .pt has rounded or averaged them
    metrics.jsonl                      every log entry

Both parts of a checkpoint are written aside, synced and renamed together, so a kill at any moment leaves the one before it; what else it
leaves behind, the next run in that folder clears away.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerState

from ..checkpoints import checkpoint
from ..errors import UserError
from ..network.plan import ConversionPlan
from ..utils.files import read_json
from .parallel import processes
from .settings import RunSettings

BEST = "qwen_recursive_finetuned_best.pt"
METRICS = "metrics.jsonl"
RUN, STATE, MASTERS, AVERAGES = "run.json", "trainer_state.json", "float32_weights.pt", "averaged_weights.pt"  # in a state folder
KEPT_STATES = 2  # a run resumes from the newest; the one before it is a backup
SOON_FILLED = 60.0  # seconds before an empty temporary folder counts as abandoned
# Settings that matter to a reader of the weights. Paths and devices are left out.
_RECORDED = (
    "dataset_name", "dataset_config_name", "mix", "seq_len", "separate_documents", "batch_size", "grad_accum_steps", "cycle_choices",
    "backprop", "lr", "gain_lr", "lr_schedule", "warmup_steps", "optimizer", "weight_decay", "ema_decay", "enable_deep_supervision",
    "distill_weight", "self_distill_weight", "monotone_weight", "halting_weight",
)  # fmt: skip
_STEP = re.compile(r"checkpoint_step_\d+")  # does not match a user's copy such as checkpoint_step_1000_good.pt
_SAVED = re.compile(rf"({_STEP.pattern}|{Path(BEST).stem})(\.pt|_tokenizer|_state)")  # what a save has in its folder aside


def training_notes(settings: RunSettings, state: TrainerState) -> dict[str, Any]:
    """Training metadata of a checkpoint, in JSON types: progress, data, settings and the last validation.

    Deterministic: no timestamps. Settings that are off (0, None, empty) are omitted. `eval_loss_cycles` has the validation loss
    of each cycle, the shallowest first.
    """
    recorded = {name: list(value) if isinstance(value, tuple) else value for name in _RECORDED if (value := getattr(settings, name))}
    notes = {"epoch": state.epoch, "tokens": state.num_input_tokens_seen, "processes": processes(), **recorded, "seed": settings.seed}
    measured = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), None)
    if measured is not None:
        cycles = [loss for name, loss in measured.items() if name.startswith("eval_loss_cycle_")]
        notes |= {"eval_loss": measured["eval_loss"], "eval_loss_cycles": cycles, "eval_step": measured["step"]}
    return notes


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of a run.

    Args:
        dtype: Type of the saved weights: that of the checkpoint the run began with, so a bfloat16 donor gives bfloat16 files.
        keep_last: Number of checkpoints to keep; 0 keeps all.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plan: ConversionPlan | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    keep_last: int = 0

    def save(self, path: Path, model: Any, beside: Mapping[Path, Callable[[Path], Any]] | None = None, **notes: Any) -> Path:
        checkpoint.save(path, model, self.tokenizer, self.plan, {**self.notes, "training": notes}, dtype=self.dtype, beside=beside)
        return path

    def save_step(self, step: int, model: Any, write_state: Callable[[Path], Any] | None, **notes: Any) -> Path:
        """Write a checkpoint that can be resumed, and delete old ones.

        Args:
            write_state: Writes the resume state into a folder; None writes weights only.
        """
        path = self.folder / f"checkpoint_step_{step}.pt"
        _drop_state(path)  # of an earlier run; does not belong to these weights
        self.save(path, model, {} if write_state is None else {state_folder(path): write_state}, step=step, **notes)
        # The checkpoint just written counts as the newest even if the clock was set back.
        points = [path, *(point for point in resume_points(self.folder) if point != path)]
        for old in points[KEPT_STATES:]:
            _drop_state(old)
        if self.keep_last:
            self._delete_old(points)
        return path

    def _delete_old(self, points: list[Path]) -> None:
        """Delete all but the newest. Checkpoints without a state are older than those with one."""
        others = [path for path in _checkpoints(self.folder) if path not in points]
        newest_first = points + sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest_first[self.keep_last :]:
            _drop_state(old)
            shutil.rmtree(checkpoint.tokenizer_folder(old), ignore_errors=True)
            old.unlink()  # last: as long as it is there, the next save finds what a kill in between has left


def state_folder(path: Path) -> Path:
    """Beside `checkpoint_step_N.pt`: `checkpoint_step_N_state/`."""
    return path.with_name(path.stem + "_state")


def resume_points(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, last written first: an earlier run may have left one with a higher step."""
    written = {path: when for path in _checkpoints(folder) if (when := _saved_at(path)) is not None}
    return sorted(written, key=written.__getitem__, reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint_step_*.pt") if _STEP.fullmatch(path.stem)]


def _saved_at(path: Path) -> float | None:
    """Modification time of a checkpoint in seconds; None if it is incomplete.

    A .pt is a zip archive with its directory at the end, so a truncated file is not a valid one.
    """
    try:
        return float(read_json(state_folder(path) / RUN)["saved_at"]) if is_zipfile(path) else None
    except (OSError, ValueError, KeyError, TypeError):  # no state, or a damaged one
        return None


def _drop_state(path: Path) -> None:
    """Delete a checkpoint's state, its marker file first, so that a kill in between leaves nothing that looks resumable."""
    (state_folder(path) / RUN).unlink(missing_ok=True)
    shutil.rmtree(state_folder(path), ignore_errors=True)


def step_of(point: Path) -> int:
    return int(point.stem.rsplit("_", 1)[1])


def make_folder(folder: Path) -> None:
    """Create the output folder, check that it is writable and clean up after killed runs.

    Raises:
        UserError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: the folder {folder} cannot be made ({error.strerror}); choose another") from error
    checkpoint.check_writable(folder / BEST)
    if PartialState().is_main_process:
        _clear_leftovers(folder)


def _clear_leftovers(folder: Path) -> None:
    """Delete temporary folders of killed saves, and states whose weights were never written. Two runs do not share a folder; another
    command may be writing in it, so its temporary folder stays, and so does an empty one until it is old."""
    for aside in folder.glob(".recursify-*"):
        entries = list(aside.iterdir())
        if entries and all(_SAVED.fullmatch(entry.name.removesuffix(".old")) for entry in entries):
            for old in aside.glob("*.old"):
                _clear_replaced(old, folder / old.stem)
            if not any(aside.glob("*.old")):
                shutil.rmtree(aside, ignore_errors=True)
        elif not entries and time.time() - aside.stat().st_mtime > SOON_FILLED:
            aside.rmdir()
    for state in folder.glob("checkpoint_step_*_state"):
        path = state.with_name(state.name.removesuffix("_state") + ".pt")
        if _STEP.fullmatch(path.stem) and not path.exists():
            shutil.rmtree(state, ignore_errors=True)


def _clear_replaced(old: Path, place: Path) -> None:
    """A folder that made way to a new one: back to its place where the new one never came, deleted where it has nothing that is not there
    as well. Somebody's files in it stay."""
    if not place.exists():
        old.rename(place)
    elif all((place / entry.name).exists() for entry in old.iterdir()):
        shutil.rmtree(old, ignore_errors=True)

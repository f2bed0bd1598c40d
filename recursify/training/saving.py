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
KEPT_STATES = 2  # only the newest is ever resumed from; the one before it is for the day that the disk fails
EMPTY_FOLDER_GRACE = 60.0  # seconds, of a folder aside that was just made
# What of the settings a reader of the weights wants to know. Where the run lay and on what it ran is nobody's business elsewhere.
_RECORDED_SETTINGS = (
    "dataset_name", "dataset_config_name", "mix", "seq_len", "separate_documents", "batch_size", "grad_accum_steps", "cycle_choices",
    "backprop", "lr", "gain_lr", "lr_schedule", "warmup_steps", "optimizer", "weight_decay", "ema_decay", "enable_deep_supervision",
    "distill_weight", "self_distill_weight", "monotone_weight", "halting_weight",
)  # fmt: skip
_STEP_NAME = re.compile(r"checkpoint_step_\d+")  # a copy that somebody put by as checkpoint_step_1000_good.pt is none of ours
_SAVED_NAME = re.compile(rf"({_STEP_NAME.pattern}|{Path(BEST).stem})(\.pt|_tokenizer|_state)")  # what a save has in its folder aside


def training_notes(settings: RunSettings, state: TrainerState) -> dict[str, Any]:
    """What a checkpoint says of the run behind it, in JSON types: how far it was, on what and how it trained, and the last validation.

    The same run says the same: no times. Settings that are off (0, None, empty) are left out. `eval_loss_cycles` has the validation loss
    of each cycle, the shallowest first.
    """
    recorded = {
        name: list(value) if isinstance(value, tuple) else value for name in _RECORDED_SETTINGS if (value := getattr(settings, name))
    }
    notes = {"epoch": state.epoch, "tokens": state.num_input_tokens_seen, "processes": processes(), **recorded, "seed": settings.seed}
    measured = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), None)
    if measured is not None:
        cycles = [loss for name, loss in measured.items() if name.startswith("eval_loss_cycle_")]
        notes |= {"eval_loss": measured["eval_loss"], "eval_loss_cycles": cycles, "eval_step": measured["step"]}
    return notes


@dataclass(frozen=True)
class Saver:
    """Where a run saves, and what goes into a file beside the weights.

    Args:
        dtype: Type of the saved weights: that of the checkpoint the run began with, so a bfloat16 donor gives bfloat16 files.
        keep_last: Checkpoints that stay; 0 keeps all.
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
        """A checkpoint that a run can go on from; older ones are thinned out.

        Args:
            write_state: Writes what only a resumed run needs into a folder. None leaves a checkpoint that no run can go on from.
        """
        path = self.folder / f"checkpoint_step_{step}.pt"
        _delete_state(path)  # an earlier run's, which does not belong to these weights
        self.save(path, model, {} if write_state is None else {state_folder(path): write_state}, step=step, **notes)
        # What was just written comes first even where the clock was put back.
        points = [path, *(point for point in resume_points(self.folder) if point != path)]
        for old in points[KEPT_STATES:]:
            _delete_state(old)
        if self.keep_last:
            self._delete_old(points)
        return path

    def _delete_old(self, points: list[Path]) -> None:
        """Delete all but the newest. Those that lost their states long ago are older than those that have them."""
        others = [path for path in _checkpoints(self.folder) if path not in points]
        newest_first = points + sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest_first[self.keep_last :]:
            _delete_state(old)
            shutil.rmtree(checkpoint.tokenizer_folder(old), ignore_errors=True)
            old.unlink()  # last: as long as it is there, the next save finds what a kill in between has left


def state_folder(path: Path) -> Path:
    """Beside `checkpoint_step_N.pt`: `checkpoint_step_N_state/`."""
    return path.with_name(path.stem + "_state")


def resume_points(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, the one that was written last first: an earlier run may have left a higher step behind."""
    written = {path: when for path in _checkpoints(folder) if (when := _saved_at(path)) is not None}
    return sorted(written, key=written.__getitem__, reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint_step_*.pt") if _STEP_NAME.fullmatch(path.stem)]


def _saved_at(path: Path) -> float | None:
    """When a checkpoint was written, in seconds; None where it is not whole.

    A .pt is a zip archive, whose list of contents stands at its end: a truncated one is none.
    """
    try:
        return float(read_json(state_folder(path) / RUN)["saved_at"]) if is_zipfile(path) else None
    except (OSError, ValueError, KeyError, TypeError):  # no state, or one that a failing disk has damaged
        return None


def _delete_state(path: Path) -> None:
    """Delete a checkpoint's state; the file that makes it one goes first, so that a kill in between leaves nothing to go on from."""
    (state_folder(path) / RUN).unlink(missing_ok=True)
    shutil.rmtree(state_folder(path), ignore_errors=True)


def step_of(point: Path) -> int:
    return int(point.stem.rsplit("_", 1)[1])


def make_folder(folder: Path) -> None:
    """The output folder, checked by writing into it, without what killed runs left there.

    Raises:
        UserError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: the folder {folder} cannot be made ({error.strerror}); choose another") from error
    checkpoint.check_writable(folder / BEST)
    if PartialState().is_main_process:
        _delete_leftovers(folder)


def _delete_leftovers(folder: Path) -> None:
    """Delete the folders aside of saves that were killed, and states whose weights never came. Two runs do not share a folder; another
    command may write in it right now, so its folder aside stays, and an empty one, which may be about to be filled, until it is old."""
    for aside in folder.glob(".recursify-*"):
        entries = list(aside.iterdir())
        if entries and all(_SAVED_NAME.fullmatch(entry.name.removesuffix(".old")) for entry in entries):
            for old in aside.glob("*.old"):
                _restore_or_delete(old, folder / old.stem)
            if not any(aside.glob("*.old")):
                shutil.rmtree(aside, ignore_errors=True)
        elif not entries and time.time() - aside.stat().st_mtime > EMPTY_FOLDER_GRACE:
            aside.rmdir()
    for state in folder.glob("checkpoint_step_*_state"):
        path = state.with_name(state.name.removesuffix("_state") + ".pt")
        if _STEP_NAME.fullmatch(path.stem) and not path.exists():
            shutil.rmtree(state, ignore_errors=True)


def _restore_or_delete(old: Path, place: Path) -> None:
    """A folder that made way to a new one: back to its place where the new one never came, deleted where it has nothing that is not there
    as well. Somebody's files in it stay."""
    if not place.exists():
        old.rename(place)
    elif all((place / entry.name).exists() for entry in old.iterdir()):
        shutil.rmtree(old, ignore_errors=True)

"""Second half of the demo: state tracking, with a base model that solves short sequences and fails on long ones.

The task is synthetic (`recursify.data.tasks`): each letter of a sequence permutes three things, and the model predicts the product after
each. The baseline is the donor fine-tuned for the same wall-clock time: it is faster, so it makes more steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..checkpoints import checkpoint
from ..checkpoints.donor import open_donor
from ..conversion import convert as conversion
from ..data.loading import DataSettings, load_blocks
from ..data.question_sets import load_questions
from ..data.tasks import Item
from ..evaluation.accuracy import evaluate_questions
from ..inference.options import DecodingOptions
from ..network.configuration_recursive_llm import GAIN_MAX
from ..training import TrainSettings, fit
from ..utils.tables import table
from .report_tracking import Share, Tracker, Tracking, finding, shown_lengths
from .stages import Clock, raise_if_interrupted

PRETRAINED, TRAINED, ASKED = 8, 10, 14  # letters
FRAME = 7  # tokens of an item besides its moves, answer and end token included
WORDS = 400
ASKED_SET = f"permutations:difficulty={ASKED},count={WORDS}"
L_LAYERS, H_CYCLES, L_CYCLES = 2, 3, 1
DEPTHS = (1, 2, 3, 6)
BATCH_SIZE = 64
PACE_STEPS = 16
AS_IS, TUNED, RECURSIVE = "tracker as is", "tracker fine-tuned for the same time", "recursive tracker"


def tracker_folder() -> Path:
    """The donor's folder inside the package."""
    return Path(str(resources.files(__package__) / "donors" / "tracker"))


def run(out: Path, steps: int, seed: int, clock: Clock) -> Tracking:
    """Convert, fine-tune twice and evaluate; writes the checkpoint `tracker.pt` into the folder.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped a fine-tuning.
    """
    train = settings(out, steps, seed)
    convert = conversion.ConvertSettings(
        qwen_model=str(tracker_folder()), keep_donor=True, L_layers=L_LAYERS, H_cycles=H_CYCLES, L_cycles=L_CYCLES,
        output_path=train.checkpoint, seq_len=train.seq_len,
    )  # fmt: skip
    with clock.stage("convert the tracker"):
        conversion.run(convert)
    found = checkpoint.load(convert.output_path)
    model, tokenizer = found.model.float(), checkpoint.require_tokenizer(found, convert.output_path)
    donor = open_donor(convert.qwen_model).load().float()
    for each in (model, donor):
        each.set_attn_implementation("eager")  # faster than sdpa at these lengths
    with clock.stage("generate sequences and evaluate the tracker as it is"):
        words = load_blocks(DataSettings(dataset_name=train.dataset_name), tokenizer, train.seq_len, seed)
        held = words.validation.select(range(min(train.batch_size, len(words.validation))))
        items = load_questions(ASKED_SET, "test")
        (as_is,) = accuracy_by_length(donor, tokenizer, items, (None,))
    with clock.stage("fine-tune the recursive tracker"):
        fitted = raise_if_interrupted(fit(model, tokenizer, words.train, held, train))
    checkpoint.save(out / "tracker.pt", model, tokenizer, found.plan, {**found.notes, "trained_on": train.dataset_name})
    with clock.stage("fine-tune the tracker itself for the same time"):
        pace = seconds_per_step(copy.deepcopy(donor), tokenizer, words.train, held, train)
        longer = replace(train, **baseline_settings(max(1, round(fitted.seconds / pace))))
        tuned = raise_if_interrupted(fit(donor, tokenizer, words.train, held, longer))
    with clock.stage("evaluate both on sequences of every length"):
        depths = accuracy_by_length(model, tokenizer, items, DEPTHS)
        (after,) = accuracy_by_length(donor, tokenizer, items, (None,))
    return Tracking(
        states=len(set(items[0].labels) | {label for item in items for label in item.labels}),
        words=len(items),
        example=(" ".join(items[0].question.split()[:4]), " ".join(items[0].labels[:4])),
        pretrained=PRETRAINED,
        trained=TRAINED,
        H_cycles=convert.H_cycles,
        donor_as_is=Tracker(name=AS_IS, shares=as_is),
        donor_tuned=Tracker(name=TUNED, shares=after, steps=tuned.steps, seconds=tuned.seconds),
        depths=tuple(
            Tracker(name=at_depth(H), shares=shares, H_cycles=H, steps=fitted.steps, seconds=fitted.seconds)
            for H, shares in zip(DEPTHS, depths, strict=True)
        ),
    )


def settings(out: Path, steps: int, seed: int) -> TrainSettings:
    """Training settings of the recursive model: four epochs, with depths around its own drawn as well so that they keep working."""
    count = max(40, steps * BATCH_SIZE // 4)
    return TrainSettings(
        checkpoint=str(out / "tracker_init.pt"), dataset_name=f"permutations:difficulty={TRAINED},count={count},seed={seed}",
        seq_len=TRAINED + FRAME, batch_size=BATCH_SIZE, max_steps=steps, lr=1e-3, gain_lr=1e-2, lr_schedule="wsd", decay_share=0.4,
        warmup_steps=steps // 10, weight_decay=0.1, start_gain=GAIN_MAX, enable_deep_supervision=True, cycle_choices=(1, 2, 3, 4, 6),
        cycle_weights=(1, 1, 4, 1, 1), generate_every=0, save_every=0, log_every=max(1, steps // 10), seed=seed,
        output_dir=str(out / "tracker"),
    )  # fmt: skip


def baseline_settings(steps: int) -> dict[str, Any]:
    """Settings that differ for a plain model."""
    return {
        "max_steps": steps, "warmup_steps": steps // 10, "start_gain": None, "gain_lr": None, "enable_deep_supervision": False,
        "cycle_choices": (), "cycle_weights": (),
    }  # fmt: skip


def seconds_per_step(donor: Any, tokenizer: Any, blocks: Any, held: Any, train: TrainSettings) -> float:
    """Seconds per training step of the donor, which is modified by the measurement."""
    probe = replace(train, **baseline_settings(PACE_STEPS), log_every=PACE_STEPS // 2)  # the first half is a warm-up
    fitted = raise_if_interrupted(fit(donor, tokenizer, blocks, held, probe, console=False))
    logged = [entry for entry in fitted.history if "loss" in entry]
    return train.batch_size * train.seq_len / float(logged[-1]["tokens_per_second"])


def accuracy_by_length(model: Any, tokenizer: Any, items: list[Item], depths: tuple[int | None, ...]) -> list[tuple[Share, ...]]:
    """Accuracy after each move, at each depth."""
    runs = [DecodingOptions(H_cycles=H) for H in depths]
    found, _ = evaluate_questions(model, tokenizer, "permutations", items, runs, "labels", batch_size=100)
    by_depth: dict[int | None, list[Share]] = {H: [] for H in depths}
    for line in found.rows:
        if line.difficulty is not None:
            by_depth[line.H_cycles].append(Share(letters=line.difficulty, accuracy=line.accuracy, standard_error=line.standard_error))
    return [tuple(by_depth[H]) for H in depths]


def at_depth(H_cycles: int) -> str:
    return f"{RECURSIVE}, {H_cycles} cycle{'s' if H_cycles > 1 else ''}"


def commands(out: Path, steps: int, seed: int) -> tuple[str, ...]:
    """The steps of the recursive tracker as shell commands."""
    train = settings(out, steps, seed)
    return (
        f"recursify convert --qwen_model {tracker_folder()} --keep_donor --L_layers {L_LAYERS} --H_cycles {H_CYCLES} --L_cycles {L_CYCLES} "
        f"--seq_len {train.seq_len} --output_path {train.checkpoint}",
        f"recursify train --checkpoint {train.checkpoint} --dataset_name {train.dataset_name} --seq_len {train.seq_len} "
        f"--batch_size {train.batch_size} --max_steps {steps} --lr {train.lr} --gain_lr {train.gain_lr} --lr_schedule {train.lr_schedule} "
        f"--decay_share {train.decay_share} "
        f"--warmup_steps {train.warmup_steps} --weight_decay {train.weight_decay} --start_gain {train.start_gain} "
        f"--cycle_choices {_spaced(train.cycle_choices)} --cycle_weights {_spaced(train.cycle_weights)} --enable_deep_supervision "
        f"--generate_every 0 --seed {seed} --output_dir {train.output_dir}",
        f"recursify evaluate --checkpoint {out / 'tracker.pt'} --questions {ASKED_SET} --judge labels --cycles {_spaced(DEPTHS)}",
    )


def _spaced(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def lines(tracking: Tracking) -> list[str]:
    """The short table of the page, for the terminal."""
    lengths = shown_lengths(tracking)
    rows = [
        (tracker.name, *(f"{100 * share.accuracy:.1f}" for share in tracker.shares if share.letters in lengths))
        for tracker in tracking.models
    ]
    return [*table(("accuracy in % by sequence length", *map(str, lengths)), rows, left=1), "", finding(tracking)]

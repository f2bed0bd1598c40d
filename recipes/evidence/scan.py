"""SCAN: commands such as "jump around left twice and walk" and the actions they stand for (github.com/brendenlake/SCAN).

A published synthetic dataset: the meaning of a command is computed from its parts, and long answers take many steps. The donor is
pretrained on commands of up to 12 actions and fails beyond; all rows are fine-tuned on commands of every length, and evaluated on held-out
ones of every length: one command in five, chosen by a hash.

The donor has two layers, one of which is looped. Needs the files of the length split: RECURSIFY_SCAN names their folder
(tasks_train_length.txt and tasks_test_length.txt, or length_train.txt and length_test.txt).
"""

from __future__ import annotations

import hashlib
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.evidence.study import Figures, Row, Size, Study, rows_of_questions, small_model
from recursify.data.tasks import Item, as_text, read
from recursify.errors import UserError
from recursify.evaluation.accuracy import evaluate_questions
from recursify.inference.options import DecodingOptions
from recursify.training import TrainSettings, fit

EASY = 12  # actions
SEQ_LEN = 64
BINS = ((1, 8), (9, 12), (13, 16), (17, 20), (21, 24), (25, 32), (33, 36), (37, 48))  # actions
NAMES = (("tasks_train_length.txt", "tasks_test_length.txt"), ("length_train.txt", "length_test.txt"))

SIZES = {
    "cpu": Size({"hidden_size": 64, "intermediate_size": 128, "layers": 2}, 300, steps=300, items=80, batch_size=32, seeds=3),
    "gpu": Size({"hidden_size": 256, "intermediate_size": 512, "layers": 4}, 2000, steps=2000, items=400, batch_size=128, seeds=3),
    "test": Size({"hidden_size": 16, "intermediate_size": 32, "layers": 2}, 1, steps=1, items=1, batch_size=2, seeds=1),
}

SHAPE = {"keep_donor": True, "L_layers": 1, "H_cycles": 3, "L_cycles": 1}
OURS = "ours: keep_donor, H 3, L 1"


def rows() -> list[Row]:
    return [
        Row("donor as it is", budget="none"),
        Row("donor, fine-tuned on the same tokens", seeds=3),
        Row("donor, fine-tuned for the same FLOPs", budget="flops", seeds=3),
        Row("naive loop", shape=SHAPE, rival="naive"),
        Row(OURS, shape=SHAPE, seeds=3),
    ]


def study(size: Size) -> Study:
    settings: dict[str, Any] = {
        "seq_len": SEQ_LEN, "lr": 2e-3, "warmup_steps": max(1, size.steps // 8), "weight_decay": 0.1, "lr_schedule": "wsd",
        "dataset_name": "scan:tasks_train_length.txt",
    }  # fmt: skip

    def donor(folder: Path) -> dict[str, Any]:
        items, shape = commands("train"), size.donor
        tokenizer = make_tokenizer([as_text(item) for item in items])
        model = small_model(shape, len(tokenizer))
        blocks = rows_of_questions([item for item in items if item.difficulty <= EASY], tokenizer, SEQ_LEN)
        own = settings | {"max_steps": size.donor_steps, "batch_size": size.batch_size, "generate_every": 0, "save_every": 0}
        fit(model, tokenizer, blocks, blocks[: size.batch_size], TrainSettings(checkpoint="", **own), console=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {"trained_on": f"commands of up to {EASY} actions", "steps": size.donor_steps, **shape}

    def train(tokenizer: Any, count: int) -> tuple[Any, Any]:
        blocks = rows_of_questions(commands("train"), tokenizer, SEQ_LEN)
        return blocks, blocks[:16]

    return Study("scan", OURS, settings, rows(), donor, train, partial(measure, size.items))


def measure(count: int, model: Any, tokenizer: Any, depths: Any) -> Figures:
    """Exact match of the generated actions, at every depth."""
    runs = [DecodingOptions(H_cycles=H) for H in depths] or [DecodingOptions()]
    asked = commands("test")
    found: Figures = {"donor" if run.H_cycles is None else str(run.H_cycles): {} for run in runs}
    for low, high in BINS:
        items = [item for item in asked if low <= item.difficulty <= high][:count]
        report, _ = evaluate_questions(model, tokenizer, "scan", items, runs, batch_size=40)
        for row in report.rows:
            if row.difficulty is None:
                found["donor" if row.H_cycles is None else str(row.H_cycles)][f"{low}-{high}"] = round(row.accuracy, 4)
    return found


def commands(split: str) -> list[Item]:
    """Of both files together, in random order; one in five is held out.

    Raises:
        UserError: The files are not there.
    """
    folder = Path(os.environ.get("RECURSIFY_SCAN", "."))
    files = next((names for names in NAMES if all((folder / name).exists() for name in names)), None)
    if files is None:
        raise UserError(f"RECURSIFY_SCAN: expected a folder with {' and '.join(NAMES[0])} of SCAN's length split, got {str(folder)!r}")
    items = [item for name in files for item in read("scan", folder / name)]
    kept = [item for item in items if (_hash(item.question) % 5 == 0) == (split == "test")]
    random.Random(0).shuffle(kept)
    return kept


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One word, one token."""
    whole = Tokenizer(models.WordLevel(unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>", unk_token="<unk>")

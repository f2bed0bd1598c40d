"""The flags of evaluate and compare, and their validation before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..checkpoints.settings import ModelSource, TokenizerSource
from ..data.question_sets import file_wanted, is_questions, load_questions
from ..data.settings import TextSource
from ..data.tasks import FORMATS, GENERATED, Item
from ..errors import UserError
from ..inference.options import EarlyExit
from ..utils.options import DeviceOptions, JsonOutput, ModelDtype, check_page

DEFAULT_TEXT = "wikitext"
Judge = Literal["answer", "labels"]


_OF_TEXT = ("dataset_config_name", "stride", "max_windows", "split")  # settings without effect if no text is measured


@dataclass(kw_only=True)
class TextMeasurement(TextSource, DeviceOptions):
    """Text and depths: what loss is measured on, and at which cycle counts."""

    dataset_name: str | None = None  # type: ignore[assignment]
    """Text: wikitext or another hub dataset, of which the validation split is measured; a local file (.txt, .jsonl, .parquet, ...), which
    is measured whole; or a folder, of which the validation files are, else the test files, else all. Default: wikitext, unless
    --questions or --tasks are given."""
    split: Literal["validation", "test", "all"] | None = None
    """Part of the text: validation is what training validates on, held out of the text if it has none of its own; test, the test files of
    a folder; all, everything. Default: validation of a hub dataset, all of a file, and of a folder the first of the three that it
    has."""
    cycles: tuple[int, ...] = ()
    """Cycle counts to measure at, e.g. --cycles 0,1,3,5. Default: 1 to twice that of the checkpoint."""
    seq_len: int = 128
    """Tokens per window of the text."""
    batch_size: int = 8
    """Windows per forward pass."""
    max_windows: int | None = None
    """Measure only the first N windows of the text."""


@dataclass(kw_only=True)
class MeasureSettings(TextMeasurement, ModelDtype, EarlyExit, JsonOutput):
    """Measurement: what is measured beside the loss on a text, and how.

    With --halt, a run in which tokens exit early is measured, too: its loss, its layer applications, the cycles that tokens exit at, the
    accuracy of its answers, its tasks. It has at most the checkpoint's own cycles, or the largest of --cycles if that is less.
    """

    batch_size: int = TextMeasurement.batch_size
    """Windows, questions or lm-eval requests per forward pass."""
    stride: int | None = None
    """Tokens between the starts of windows; below seq_len, windows overlap and every token is scored once with at least seq_len - stride
    tokens of context. Default: seq_len."""
    questions: tuple[str, ...] = ()
    """Question sets, e.g. --questions permutations:difficulty=4-32/4,count=200 babi:qa2_test.txt. Synthetic: permutations, pointers,
    addition, booleans, chains, facts, with difficulty, count, seed and options of their own. Read from a file: gsm8k, svamp, prosqa,
    babi, scan, each with a local one, e.g. gsm8k:test.jsonl, or one of a dataset on the hub, e.g.
    gsm8k:openai/gsm8k/main/test-00000-of-00001.parquet."""
    judge: Judge = "answer"
    """Metric of the questions: exact match of the generated answer, or, for state tracking, teacher-forced accuracy at every label."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, e.g. --tasks hellaswag,arc_easy. Needs recursify[lm_eval]."""
    tasks_folder: str | None = None
    """Folder with your own YAML tasks for --tasks."""
    max_items: int | None = None
    """Maximum questions per set, evenly spread over it, and documents per lm-eval task, the first ones."""
    report: str | None = None
    """Write a self-contained HTML page with charts to this file, e.g. report.html."""

    def validate(self) -> None:
        """Check everything that needs no model.

        Raises:
            UserError: A value out of range, mutually exclusive ones, missing questions or tasks.
        """
        if self.seq_len < 2 or self.batch_size < 1:
            raise UserError(f"--seq_len must be at least 2 and --batch_size at least 1, got {self.seq_len} and {self.batch_size}")
        if self.stride is not None and not 1 <= self.stride <= self.seq_len:
            raise UserError(f"--stride: expected 1 to the {self.seq_len} tokens of a window (--seq_len), got {self.stride}")
        for name in ("max_windows", "max_items"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name}: expected at least 1, got {value}")
        super().validate()
        if any(H < 0 for H in self.cycles) or len(set(self.cycles)) < len(self.cycles):
            raise UserError(f"--cycles: expected whole numbers of at least 0, each once, got {list(self.cycles)}")
        self._validate_together()
        if self.report is not None:
            check_page(Path(self.report))
        question_sets(self)
        if self.tasks:
            from . import lm_eval_harness  # here: flags are read without torch

            lm_eval_harness.check(self.tasks, self.tasks_folder)

    def _validate_together(self) -> None:
        for name in _OF_TEXT if self.text is None else ():
            if (value := getattr(self, name)) is not None:
                raise UserError(
                    f"--{name}: applies to text, and none is measured; name one with --dataset_name, or leave out --{name} {value}"
                )
        if self.judge != "answer" and not self.questions:
            raise UserError(f"--judge: expected --questions with it, got {self.judge} and no --questions")
        if self.tasks_folder is not None and not self.tasks:
            raise UserError(f"--tasks_folder: expected --tasks with it, got {self.tasks_folder} and no --tasks")
        if self.max_items is not None and not (self.questions or self.tasks):
            raise UserError(f"--max_items: expected --questions or --tasks with it, got {self.max_items} and neither")

    @property
    def text(self) -> str | None:
        """The dataset to measure on; None for none."""
        return self.dataset_name or (None if self.questions or self.tasks else DEFAULT_TEXT)


@dataclass(kw_only=True)
class EvaluateSettings(MeasureSettings, TokenizerSource, ModelSource):
    """Measure a model at several cycle counts: loss on text, accuracy on questions, tasks of lm-eval."""


def question_sets(settings: MeasureSettings) -> dict[str, list[Item]]:
    """Name -> items of every requested question set."""
    found: dict[str, list[Item]] = {}
    for name in settings.questions:
        if name in FORMATS:
            raise UserError(f"--questions: {file_wanted(name)}")
        if not is_questions(name):
            raise UserError(
                f"--questions: expected one of {', '.join(GENERATED)}, or {', '.join(FORMATS)} with a file as NAME:FILE, got {name!r}"
            )
        if name in found:
            raise UserError(f"--questions: {name} is given twice; leave one out")
        found[name] = _spread(load_questions(name, "test"), settings.max_items)
    return found


def _spread(items: list[Item], most: int | None) -> list[Item]:
    count = len(items)
    return items if most is None or most >= count else [items[number * count // most] for number in range(most)]


@dataclass(kw_only=True)
class CompareSettings(MeasureSettings, TokenizerSource):
    """Measure several models on the same items and report paired significance tests."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    """At least two models, recursive or plain: .pt files, folders, hub ids, or hub ids with a revision (id@revision). The first is the
    baseline."""
    cycles: tuple[int, ...] = ()
    """Cycle counts to measure beside each model's own, e.g. --cycles 0,1,3,5. Default: 1 to twice each model's own."""

    def validate(self) -> None:
        """As `MeasureSettings.validate`."""
        paths = self.checkpoints
        if len(paths) < 2:
            raise UserError(f"recursify compare: expected at least two checkpoints, the baseline first, got {' '.join(paths) or 'none'}")
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise UserError(f"recursify compare: expected different checkpoints, got {twice[0]} twice")
        super().validate()

"""How good is a model at every depth? Text, questions with one right answer, and tasks of lm-eval, for a checkpoint or a plain donor.

    run(settings)                                         what `recursify evaluate` does
    evaluate(model, tokenizer, settings)                  the same for a model in memory
    evaluate_paired(model, tokenizer, settings, name)     and what a comparison of models on the same items needs

text_losses.py measures on text, answers.py on questions, harness.py runs tasks, passages.py looks into a text. Under `torchrun
--nproc_per_node N` every process holds the model and does its share; the figures are those of one process. Floor 3.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from ..checkpoints import checkpoint
from ..checkpoints.donor import load_tokenizer, open_donor, read_json
from ..data.question_sets import is_questions, load_questions
from ..data.settings import DataSettings
from ..data.tasks import FORMATS, GENERATED, Item
from ..errors import UserError
from ..inference.options import Effort, Halt
from ..network.configuration_recursive_llm import CONFIGS
from ..network.modeling_recursive_llm import RecursiveLLM
from ..utils.device import choose_device
from ..utils.distributed import is_first
from . import lm_eval_harness
from .accuracy import Judge, QuestionsReport, ask
from .lm_eval_harness import TaskScore, run_tasks, split_names
from .text_loss import PairedText, Text, TextReport, measure_text, open_text
from .token_view import Passage, read_passage

DEFAULT_TEXT = "wikitext"
_PASSAGES, _PASSAGE_TOKENS = 3, 128  # of a text, what is shown on a page
_OF_TEXT = ("dataset_config_name", "stride", "max_windows")  # settings that say nothing where no text is measured


@dataclass(kw_only=True)
class MeasureSettings:
    """What is measured, on what, and how."""

    dataset_name: str | None = None
    """The text: wikitext, another hub data set, or a local file (.txt, .jsonl, .parquet) or folder. Its validation split is measured.
    Default: wikitext, unless --questions or --tasks are given."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set."""
    text_column: str = "text"
    """Column that holds the text."""
    cycles: tuple[int, ...] = ()
    """Cycle counts to measure, e.g. --cycles 0 1 3 5. Default: 1 to twice the checkpoint's own."""
    seq_len: int = 128
    """Tokens per window."""
    stride: int | None = None
    """Tokens from one window to the next. Default: seq_len, windows side by side, each of which scores all its tokens but the first. With
    less, windows overlap and every token is scored once, with at least seq_len - stride tokens before it, at seq_len/stride the cost."""
    batch_size: int = 8
    """Windows, questions or requests of a task per pass."""
    max_windows: int | None = None
    """Measure only the first so many windows."""
    questions: tuple[str, ...] = ()
    """Question sets, e.g. --questions permutations:difficulty=4-32/4,count=200 babi:qa2_test.txt. Made: permutations, pointers, addition,
    booleans, with difficulty, count of each, seed, group, nodes. Read from a file, or a hub data set's owner/name/path: gsm8k, svamp,
    prosqa, babi, scan."""
    judge: Judge = "answer"
    """How questions are judged: by the answer that the model writes, or, for state tracking, by its likeliest token at each label's place,
    which is one pass."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, e.g. --tasks hellaswag,arc_easy. Needs recursify[lm_eval]."""
    tasks_folder: str | None = None
    """Folder with YAML tasks of one's own, for --tasks."""
    max_items: int | None = None
    """Of each question set ask only so many, evenly spread over it; of each task of lm-eval, the first so many."""
    halt: Halt = "none"
    """Measure a run in which tokens halt, too: its loss, its layer applications, and the cycles that tokens halt at; the accuracy of its
    answers; its tasks. It has at most the checkpoint's own cycles, or the largest of --cycles."""
    halt_threshold: float | None = None
    """When a token halts, as in recursify generate; the criterion's own threshold where not given."""
    device: str | None = None
    """cpu, cuda, mps; the best there is where not given."""
    json: bool = False
    """Print the result as one JSON object on stdout; everything else goes to stderr."""
    report: str | None = None
    """Write a page with charts to this file, e.g. report.html; it needs no other file and no network."""

    @property
    def text(self) -> str | None:
        """The data set that is measured; None for none."""
        return self.dataset_name or (None if self.questions or self.tasks else DEFAULT_TEXT)

    @property
    def task_names(self) -> tuple[str, ...]:
        return split_names(self.tasks)


@dataclass(kw_only=True)
class EvaluateSettings(MeasureSettings):
    """Measure a checkpoint, or a plain donor, at several cycle counts: on text, on questions with one right answer, on tasks of lm-eval."""

    checkpoint: str
    """A recursive checkpoint (a .pt file or a folder), or a plain donor (folder or hub id) for comparison."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer, when the checkpoint has none."""


@dataclass(frozen=True)
class EvaluateReport:
    """What was measured of one model.

    Args:
        trained_cycles: The checkpoint's own; None for a plain donor.
        text: None where none was measured.
        questions: Of every set.
        tasks: Every figure of every task.
        passages: Pieces of the text token by token, where a page is asked for.
    """

    checkpoint: str
    trained_cycles: int | None
    text: TextReport | None = None
    questions: list[QuestionsReport] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What is of the text stands at the top, too, as it does where nothing else is measured."""
        text = None if self.text is None else self.text.to_dict()
        parts = {name: [part.to_dict() for part in getattr(self, name)] for name in ("questions", "tasks", "passages")}
        return {"checkpoint": self.checkpoint, "trained_cycles": self.trained_cycles, **(text or {}), "text": text, **parts}

    def render(self) -> str:
        parts = [] if self.text is None else [self.text.lines(self.trained_cycles)]
        parts += [part.lines() for part in self.questions]
        parts += [lm_eval_harness.lines(self.tasks)] if self.tasks else []
        return "\n\n".join([self.checkpoint, *("\n".join(lines) for lines in parts)])


@dataclass(frozen=True)
class Paired:
    """What it takes to compare two models on the same items, in runs without halting.

    Args:
        depths: Cycle counts; `[None]` for a plain donor.
        text: The losses of every window; None where no text was measured.
        rights: Of each question set, by its name, `[depths, items]` whether the answer is right.
    """

    depths: list[int | None]
    text: PairedText | None
    rights: dict[str, Tensor]


def check(settings: MeasureSettings) -> None:
    """What can be said of the settings before a model is loaded.

    Raises:
        UserError: A value out of range, two that exclude each other, questions or tasks that are not there.
    """
    if settings.seq_len < 2 or settings.batch_size < 1:
        raise UserError(f"--seq_len must be at least 2 and --batch_size at least 1, got {settings.seq_len} and {settings.batch_size}")
    if settings.stride is not None and not 1 <= settings.stride <= settings.seq_len:
        raise UserError(f"--stride: expected 1 to the {settings.seq_len} tokens of a window (--seq_len), got {settings.stride}")
    for name in ("max_windows", "max_items"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}")
    Effort(halt=settings.halt, halt_threshold=settings.halt_threshold).check()
    if any(H < 0 for H in settings.cycles) or len(set(settings.cycles)) < len(settings.cycles):
        raise UserError(f"--cycles: expected whole numbers of at least 0, each once, got {list(settings.cycles)}")
    _check_together(settings)
    if settings.report is not None:
        _check_page(Path(settings.report))
    question_sets(settings)
    if settings.task_names:
        lm_eval_harness.check(settings.task_names, settings.tasks_folder)


def _check_together(settings: MeasureSettings) -> None:
    for name in _OF_TEXT if settings.text is None else ():
        if (value := getattr(settings, name)) is not None:
            raise UserError(f"--{name}: is about a text, and none is measured; name one with --dataset_name, or leave out --{name} {value}")
    if settings.judge != "answer" and not settings.questions:
        raise UserError(f"--judge: expected --questions with it, got {settings.judge} and no --questions")
    if settings.tasks_folder is not None and not settings.task_names:
        raise UserError(f"--tasks_folder: expected --tasks with it, got {settings.tasks_folder} and no --tasks")
    if settings.max_items is not None and not (settings.questions or settings.task_names):
        raise UserError(f"--max_items: expected --questions or --tasks with it, got {settings.max_items} and neither")


def _check_page(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--report: expected a file in a folder that exists, such as report.html, got {path}")


def question_sets(settings: MeasureSettings) -> dict[str, list[Item]]:
    """The items of every set that is asked for, by its name."""
    found: dict[str, list[Item]] = {}
    for name in settings.questions:
        if not is_questions(name):
            raise UserError(
                f"--questions: expected one of {', '.join(GENERATED)}, or {', '.join(FORMATS)} with a file behind a colon, got {name!r}"
            )
        if name in found:
            raise UserError(f"--questions: {name} stands there twice")
        found[name] = _spread(load_questions(name, "test"), settings.max_items)
    return found


def _spread(items: list[Item], most: int | None) -> list[Item]:
    count = len(items)
    return items if most is None or most >= count else [items[number * count // most] for number in range(most)]


def join_processes(settings: MeasureSettings) -> None:
    """Under torchrun, the processes find each other here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=choose_device(settings.device).type == "cpu")


def run(settings: EvaluateSettings) -> EvaluateReport:
    """What `recursify evaluate` does.

    Raises:
        UserError: Bad input.
    """
    check(settings)
    join_processes(settings)
    model, tokenizer = load_any(settings.checkpoint, settings.tokenizer_path)
    return evaluate(model, tokenizer, settings)


def evaluate(model: Any, tokenizer: Any, settings: EvaluateSettings) -> EvaluateReport:
    """As `evaluate_paired`, the report alone."""
    return evaluate_paired(model, tokenizer, settings, settings.checkpoint)[0]


def evaluate_paired(model: Any, tokenizer: Any, settings: MeasureSettings, name: str) -> tuple[EvaluateReport, Paired]:
    """Measure a model in memory on what the settings name; it is left on the device of the settings.

    Where `torch.distributed` has several processes, all of them must call this; each does its share and returns the whole report.

    Args:
        name: Of the model, for the report.

    Raises:
        UserError: Text, questions or tasks that cannot be used, more tokens than the model has positions, or halting that it cannot do.
    """
    own = model.config.H_cycles if isinstance(model, RecursiveLLM) else None
    depths: list[int | None] = [None] if own is None else [*(settings.cycles or range(1, 2 * own + 1) or (0,))]
    halting = _halting(model, settings)
    runs = [*(Effort(H_cycles=H) for H in depths), *([] if halting is None else [halting])]
    model.to(choose_device(settings.device))
    text, paired_text, passages = None, None, []
    if settings.text is not None:
        opened = _open(model, tokenizer, settings)
        text, paired_text = measure_text(model, opened, depths, halting, batch_size=settings.batch_size)
        passages = _passages(model, tokenizer, opened, depths) if settings.report is not None and is_first() else []
    questions, rights = [], {}
    for asked, items in question_sets(settings).items():
        answered, right = ask(model, tokenizer, asked, items, runs, settings.judge, batch_size=settings.batch_size)
        questions.append(answered)
        rights[asked] = right[: len(depths)]
    scores = _scores(model, tokenizer, settings, runs) if settings.task_names else []
    return EvaluateReport(name, own, text, questions, scores, passages), Paired(depths, paired_text, rights)


def _scores(model: Any, tokenizer: Any, settings: MeasureSettings, runs: Sequence[Effort]) -> list[TaskScore]:
    shape: dict[str, Any] = {"batch_size": settings.batch_size, "max_items": settings.max_items}
    return run_tasks(model, tokenizer, settings.task_names, runs, folder=settings.tasks_folder, **shape)


def _halting(model: Any, settings: MeasureSettings) -> Effort | None:
    """The run in which tokens halt, with its cycles at most; None where none was asked for."""
    if settings.halt == "none":
        return None
    effort = Effort(H_cycles=max(settings.cycles, default=None), halt=settings.halt, halt_threshold=settings.halt_threshold)
    effort.arguments(model)  # refuses what the model cannot do
    return effort.settled(model)


def _open(model: Any, tokenizer: Any, settings: MeasureSettings) -> Text:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.seq_len > positions:
        raise UserError(f"--seq_len: expected at most {positions}, the positions that the model has, got {settings.seq_len}")
    source = DataSettings(
        dataset_name=settings.text or "", dataset_config_name=settings.dataset_config_name, text_column=settings.text_column
    )
    return open_text(source, tokenizer, seq_len=settings.seq_len, stride=settings.stride, max_windows=settings.max_windows)


def _passages(model: Any, tokenizer: Any, text: Text, depths: Sequence[int | None]) -> list[Passage]:
    rows = text.windows.ids(0, min(_PASSAGES, len(text.windows)))[:, :_PASSAGE_TOKENS]
    deepest = max((H for H in depths if H is not None), default=0)
    return [read_passage(model, tokenizer, ids, deepest) for ids in rows]


def load_any(path: str, tokenizer_path: str | None = None) -> tuple[Any, Any]:
    """A recursive checkpoint or a plain donor, with its tokenizer.

    Raises:
        UserError: Neither, no tokenizer, or a model without a head to measure.
    """
    config = Path(path) / "config.json"
    if Path(path).is_file() or checkpoint.is_file_form(path) or (config.is_file() and read_json(config).get("model_type") in CONFIGS):
        found = checkpoint.load(path, tokenizer_path=tokenizer_path)
        checkpoint.need_head(found, path)
        return found.model, checkpoint.need_tokenizer(found, path)
    return open_donor(path).load(), load_tokenizer(tokenizer_path or path)

"""Evaluation of one model at every depth, on text, questions and tasks of lm-eval.

    run(settings)                                         what `recursify evaluate` does
    evaluate(model, tokenizer, settings)                  the same for a model in memory
    evaluate_paired(model, tokenizer, settings, name)     and what a comparison of models on the same items needs

text_loss.py measures on text, accuracy.py on questions, lm_eval_harness.py runs tasks, token_view.py looks into a text. Under `torchrun
--nproc_per_node N` every process holds the model and does its share; the figures are those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..checkpoints.configs import check_cycles
from ..checkpoints.loading import load_model
from ..checkpoints.tokenizer import check_vocabulary
from ..data.settings import TextSource
from ..data.tasks import Item
from ..errors import UserError
from ..inference.options import DecodingOptions
from ..network.modeling_recursive_llm import RecursiveLLM
from ..utils.device import choose_device, placed
from ..utils.distributed import is_first
from . import lm_eval_harness
from .accuracy import QuestionsReport, evaluate_questions
from .lm_eval_harness import TaskScore, run_tasks
from .settings import EvaluateSettings, MeasureSettings, question_sets
from .text_loss import PairedText, Text, TextReport, measure_text, open_text
from .token_view import Passage, read_passage

_PASSAGES, _PASSAGE_TOKENS = 3, 128  # tokens of a passage on the page


@dataclass(frozen=True)
class EvaluateReport:
    """Results of one model.

    Args:
        H_cycles: Of the configuration, whether trained or not; None for a plain model.
        text: None if no text was measured.
        questions: Results of each question set.
        tasks: All metrics of all harness tasks.
        passages: Passages with per-token losses, if a page is written.
    """

    checkpoint: str
    H_cycles: int | None
    text: TextReport | None = None
    questions: list[QuestionsReport] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON types. The results on text are repeated at the top level, where they are when nothing else is measured."""
        text = None if self.text is None else self.text.to_dict()
        parts = {name: [part.to_dict() for part in getattr(self, name)] for name in ("questions", "tasks", "passages")}
        return {"checkpoint": self.checkpoint, "H_cycles": self.H_cycles, **(text or {}), "text": text, **parts}

    def render(self, legend: bool = True) -> str:
        """As text; `legend` is whether the statistics of the cycles are explained."""
        parts = [] if self.text is None else [self.text.lines(self.H_cycles, legend)]
        parts += [part.lines() for part in self.questions]
        parts += [lm_eval_harness.lines(self.tasks)] if self.tasks else []
        return "\n\n".join([self.checkpoint, *("\n".join(lines) for lines in parts)])


@dataclass(frozen=True)
class Paired:
    """Per-item results for paired comparisons, without halting.

    Args:
        depths: Cycle counts; `[None]` for a plain donor.
        text: Losses of every window; None if no text was measured.
        rights: Name of a question set -> `[depths, items]` whether the answer is right.
    """

    depths: list[int | None]
    text: PairedText | None
    rights: dict[str, Tensor]


def join_processes(settings: MeasureSettings) -> None:
    """Under torchrun, initialise the process group."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=choose_device(settings.device).type == "cpu")


def run(settings: EvaluateSettings) -> EvaluateReport:
    """Run `recursify evaluate`.

    Raises:
        UserError: Invalid input.
    """
    settings.validate()
    sets = question_sets(settings)
    join_processes(settings)
    model, tokenizer = load_model(settings.checkpoint, settings.tokenizer_path, revision=settings.revision, donor=settings.donor)
    model = placed(model, choose_device(settings.device), settings.dtype)
    return evaluate_paired(model, tokenizer, settings, settings.checkpoint, sets)[0]


def evaluate(model: Any, tokenizer: Any, settings: MeasureSettings | None = None) -> EvaluateReport:
    """Evaluate a model in memory: loss on text, accuracy on questions, tasks of lm-eval, at several cycle counts.

    Args:
        model: A recursive model, or any causal language model of transformers. It is moved to the device of the settings.
        tokenizer: Its tokenizer.
        settings: What to measure; None is the defaults, WikiText's validation split. The fields are the flags of `recursify evaluate`.

    Raises:
        UserError: As `evaluate_paired`.
    """
    settings = settings or MeasureSettings()
    settings.validate()
    if settings.dtype != "auto":
        model.to(getattr(torch, settings.dtype))
    name = getattr(settings, "checkpoint", "") or model.config.name_or_path or type(model).__name__
    check_vocabulary(tokenizer, model.config.vocab_size, name)
    return evaluate_paired(model, tokenizer, settings, name, question_sets(settings))[0]


def evaluate_paired(
    model: Any, tokenizer: Any, settings: MeasureSettings, name: str, sets: Mapping[str, list[Item]]
) -> tuple[EvaluateReport, Paired]:
    """Evaluate a model in memory as the settings say; it stays on the device of the settings.

    Collective under `torch.distributed`: the work is divided, and every rank returns the whole report.

    Args:
        name: Name of the model in the report.
        sets: The questions, as from `question_sets`.

    Raises:
        UserError: Unusable text, questions or tasks, more tokens than the model has positions, or an unsupported halting criterion.
    """
    own = model.config.H_cycles if isinstance(model, RecursiveLLM) else None
    for cycles in settings.cycles if own is not None else ():
        check_cycles(model.config, cycles, "cycles")
    depths: list[int | None] = [None] if own is None else [*(settings.cycles or range(1, 2 * own + 1) or (0,))]
    halting = _halting(model, settings)
    runs = [*(DecodingOptions(H_cycles=H) for H in depths), *([] if halting is None else [halting])]
    model.to(choose_device(settings.device))
    text, paired_text, passages = None, None, []
    if settings.text is not None:
        opened = _open(model, tokenizer, settings)
        text, paired_text = measure_text(model, opened, depths, halting, batch_size=settings.batch_size)
        passages = _passages(model, tokenizer, opened, depths, halting) if settings.report is not None and is_first() else []
    questions, rights = [], {}
    for asked, items in sets.items():
        answered, right = evaluate_questions(model, tokenizer, asked, items, runs, settings.judge, batch_size=settings.batch_size)
        questions.append(answered)
        rights[asked] = right[: len(depths)]
    scores = _scores(model, tokenizer, settings, runs) if settings.tasks else []
    return EvaluateReport(name, own, text, questions, scores, passages), Paired(depths, paired_text, rights)


def _scores(model: Any, tokenizer: Any, settings: MeasureSettings, runs: Sequence[DecodingOptions]) -> list[TaskScore]:
    shape: dict[str, Any] = {"batch_size": settings.batch_size, "max_items": settings.max_items}
    return run_tasks(model, tokenizer, settings.tasks, runs, folder=settings.tasks_folder, **shape)


def _halting(model: Any, settings: MeasureSettings) -> DecodingOptions | None:
    """The run with early exit, at the model's own depth or the largest of `cycles` if that is less; None if not requested."""
    if settings.criterion is None:
        return None
    own = DecodingOptions(halt=settings.halt, halt_threshold=settings.halt_threshold)
    own.generate_kwargs(model)  # refuses what the model cannot do
    run = replace(own, H_cycles=min(own.cycles(model), max(settings.cycles, default=own.cycles(model))))
    run.generate_kwargs(model)
    return run.resolved(model)


def _open(model: Any, tokenizer: Any, settings: MeasureSettings) -> Text:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.seq_len > positions:
        raise UserError(f"--seq_len: expected at most {positions}, the positions that the model has, got {settings.seq_len}")
    source = TextSource(
        dataset_name=settings.text or "", dataset_config_name=settings.dataset_config_name, text_column=settings.text_column
    )
    return open_text(
        source, tokenizer, seq_len=settings.seq_len, stride=settings.stride, max_windows=settings.max_windows, split=settings.split
    )


def _passages(model: Any, tokenizer: Any, text: Text, depths: Sequence[int | None], halting: DecodingOptions | None) -> list[Passage]:
    rows = text.windows.ids(0, min(_PASSAGES, len(text.windows)))[:, :_PASSAGE_TOKENS]
    deepest = max((H for H in depths if H is not None), default=0)
    return [read_passage(model, tokenizer, ids, deepest, halting) for ids in rows]

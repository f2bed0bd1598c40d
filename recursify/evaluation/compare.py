"""Several models on the same items, each paired with the first one, the baseline: the command `recursify compare`.

    run(settings)         measures one model after another, with one in memory at a time
    compare(...)          the differences between measured models, and how sure they are

Losses are compared window by window (paired t-test), answers question by question (exact McNemar test), each model at its own cycle count.
Models whose tokenizers cut the text into other tokens read other windows: their bits per byte stand side by side, and are not paired; their
answers are.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.loading import load_model
from ..checkpoints.repository import split_revision
from ..data.tasks import Item
from ..network.modeling_recursive_llm import RecursiveLLM
from ..utils.device import choose_device, placed
from ..utils.tables import table
from .cycle_stats import LEGEND
from .evaluate import EvaluateReport, Paired, evaluate_paired, join_processes
from .settings import CompareSettings, question_sets
from .statistics import SIGNIFICANT, format_p, mcnemar_p, mean_and_error, student_p, verdict


class Measured(NamedTuple):
    """Results of a model, kept after it is freed."""

    report: EvaluateReport
    paired: Paired

    @property
    def own(self) -> int:
        """Index of the row at its own cycle count."""
        return self.paired.depths.index(self.report.H_cycles)

    @property
    def name(self) -> str:
        return self.report.checkpoint


@dataclass(frozen=True)
class TextDifference:
    """Loss of a model minus that of the baseline, each at its own cycle count, in nats per token.

    Args:
        H_cycles, baseline_H_cycles: None for a plain donor.
        standard_error, p: Of the difference, paired by window; None for a single window.
    """

    model: str
    H_cycles: int | None
    baseline_H_cycles: int | None
    loss: float
    baseline_loss: float
    difference: float
    standard_error: float | None
    p: float | None


@dataclass(frozen=True)
class QuestionDifference:
    """Accuracy of a model minus that of the baseline, each at its own cycle count.

    Args:
        name: Name of the question set.
        difficulty: Difficulty of the items; None for all.
        count: Number of questions.
        model_only, baseline_only: Number of questions that only this model answered right.
        standard_error: Of the difference.
        p: Of McNemar's exact test.
    """

    model: str
    name: str
    judge: str
    difficulty: int | None
    H_cycles: int | None
    baseline_H_cycles: int | None
    count: int
    accuracy: float
    baseline_accuracy: float
    model_only: int
    baseline_only: int
    difference: float
    standard_error: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Several evaluations, the baseline first, and the differences from it.

    Args:
        paths: Paths or hub ids of the models as given; the reports have short names.
        same_windows: Whether all models were measured on the same windows of the text.
        unpaired: (model, reason) if text cannot be compared window by window.
    """

    paths: list[str]
    reports: list[EvaluateReport]
    same_windows: bool
    text_differences: list[TextDifference]
    question_differences: list[QuestionDifference]
    unpaired: list[dict[str, str]]

    @property
    def baseline(self) -> str:
        return self.reports[0].checkpoint

    def to_dict(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "models": [{**report.to_dict(), "path": path} for path, report in zip(self.paths, self.reports, strict=True)],
            "same_windows": self.same_windows,
            "text_differences": [vars(line) for line in self.text_differences],
            "question_differences": [vars(line) for line in self.question_differences],
            "unpaired": self.unpaired,
        }

    def render(self) -> str:
        """As text: the differences, all models and depths in order, then each model's own figures."""
        parts = [*self._differences(), *(line["reason"] for line in self.unpaired), *self._rankings()]
        parts += [report.render(legend=False) for report in self.reports]
        found = [report.text.telemetry for report in self.reports if report.text is not None and report.text.telemetry is not None]
        return "\n\n".join([*parts, *(["\n".join(LEGEND)] if any(stats.steps for stats in found) else [])])

    def _differences(self) -> list[str]:
        """The opening words, and for each model a table of its loss and one of each question set; nothing where nothing is paired."""
        parts = []
        for report in self.reports[1:]:
            found = [line for line in self.text_differences if line.model == report.checkpoint]
            asked = [line for line in self.question_differences if line.model == report.checkpoint]
            of = _at(report)
            if found:
                rows = table(_TEXT_HEAD, map(_text_row, found))
                parts.append("\n".join([f"{of}: loss in nats per token; a difference below 0 is better", *rows]))
            for name in dict.fromkeys(line.name for line in asked):
                lines = [line for line in asked if line.name == name]
                labels = ", at the last label of each question" if lines[0].judge == "labels" else ""
                title = f"{of}, {name}: accuracy in %{labels}; a difference above 0 is better"
                parts.append("\n".join([title, *table(_QUESTION_HEAD, map(_question_row, lines))]))
        opening = (
            f"Against {_at(self.reports[0])}, the baseline,\n"
            "each model at its own cycle count, on the same items; a difference is called\n"
            f"better or worse where p is below {SIGNIFICANT}."
        )
        return [opening, *parts] if parts or self.unpaired else []

    def _rankings(self) -> list[str]:
        """All models at all depths, the best first: by loss, where they read the same windows, and by accuracy on each question set."""
        parts = []
        texts = [(report.checkpoint, row) for report in self.reports if report.text is not None for row in report.text.rows]
        if texts and self.same_windows:
            rows = [
                (f"{row.loss:.4f}", str(row.layer_applications), _cycles(row.H_cycles), name)
                for name, row in sorted(texts, key=lambda entry: entry[1].loss)
            ]
            parts.append(
                "\n".join(["loss, all depths, the best first:", *table(("loss (nats)", "layer applications", "H_cycles", ""), rows)])
            )
        for name in dict.fromkeys(answered.name for report in self.reports for answered in report.questions):
            found = [
                (report.checkpoint, row)
                for report in self.reports
                for answered in report.questions
                if answered.name == name
                for row in answered.rows
                if row.difficulty is None and row.halt is None
            ]
            ranked = sorted(found, key=lambda entry: -entry[1].accuracy)
            shares = [(f"{100 * row.accuracy:.1f}", _cycles(row.H_cycles), model) for model, row in ranked]
            parts.append("\n".join([f"{name}, all depths, the best first:", *table(("accuracy in %", "H_cycles", ""), shares)]))
        return parts


_TEXT_HEAD = ("loss", "baseline", "difference", "p", "")
_QUESTION_HEAD = ("difficulty", "right", "baseline", "difference", "only it", "only base", "p", "")


def _text_row(line: TextDifference) -> tuple[str, ...]:
    error = "" if line.standard_error is None else f" +- {line.standard_error:.4f}"
    figures = f"{line.loss:.4f}", f"{line.baseline_loss:.4f}", f"{line.difference:+.4f}{error}"
    return *figures, format_p(line.p), verdict(line.difference, line.p, less_is_better=True) or ""


def _question_row(line: QuestionDifference) -> tuple[str, ...]:
    which = "all" if line.difficulty is None else str(line.difficulty)
    shares = f"{100 * line.accuracy:.1f}", f"{100 * line.baseline_accuracy:.1f}"
    difference = f"{100 * line.difference:+.1f} +-{100 * line.standard_error:5.1f}"
    split = str(line.model_only), str(line.baseline_only), format_p(line.p)
    return which, *shares, difference, *split, verdict(line.difference, line.p, less_is_better=False) or ""


def _at(report: EvaluateReport) -> str:
    """A model and its own cycle count."""
    return f"{report.checkpoint} ({'plain' if report.H_cycles is None else f'H_cycles {report.H_cycles}'})"


def _cycles(H_cycles: int | None) -> str:
    return "plain" if H_cycles is None else str(H_cycles)


def run(settings: CompareSettings) -> Comparison:
    """Run `recursify compare`.

    Raises:
        UserError: Invalid input.
    """
    join_processes(settings)
    settings.validate()
    sets = question_sets(settings)
    names = short_names(settings.checkpoints)
    measured = [_measure(path, name, settings, sets) for path, name in zip(settings.checkpoints, names, strict=True)]
    difficulties = {name: [item.difficulty for item in items] for name, items in sets.items()}
    return compare(settings.checkpoints, measured, difficulties)


def _measure(path: str, name: str, settings: CompareSettings, sets: Mapping[str, list[Item]]) -> Measured:
    """Measure at the cycles of the settings and at the model's own, and free the model."""
    source, revision = split_revision(path)
    model, tokenizer = load_model(source, settings.tokenizer_path, revision=revision)
    model = placed(model, choose_device(settings.device), settings.dtype)
    if isinstance(model, RecursiveLLM):
        cycles = tuple(dict.fromkeys((*settings.cycles, model.config.H_cycles))) if settings.cycles else ()
        settings = replace(settings, cycles=cycles)
    else:
        settings = replace(settings, halt="none", halt_threshold=None)  # a plain model cannot halt
    measured = Measured(*evaluate_paired(model, tokenizer, settings, name, sets))
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return measured


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest trailing parts of the paths that distinguish them."""
    parts = [PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(PurePath(*each[-count:])) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)  # such as x and ./x


def compare(paths: Sequence[str], measured: Sequence[Measured], difficulties: dict[str, list[int]]) -> Comparison:
    """Compare each model with the first.

    Args:
        paths: Paths of the models.
        difficulties: Name of a question set -> difficulties of its items.
    """
    base, others = measured[0], measured[1:]
    paired = [model for model in others if _same_windows(model, base)]
    return Comparison(
        paths=list(paths),
        reports=[model.report for model in measured],
        same_windows=len(paired) == len(others),
        text_differences=[_text_difference(model, base) for model in paired if model.paired.text is not None],
        question_differences=[
            line for name, each in difficulties.items() for model in others for line in _on_questions(model, base, name, each)
        ],
        unpaired=[{"model": model.name, "reason": _unpaired_reason(model, base)} for model in others if model not in paired],
    )


def _same_windows(model: Measured, base: Measured) -> bool:
    ours, theirs = model.paired.text, base.paired.text
    return ours is None or theirs is None or ours.key == theirs.key


def _text_difference(model: Measured, base: Measured) -> TextDifference:
    ours, theirs = model.paired.text, base.paired.text
    assert ours is not None and theirs is not None
    nats, other = ours.nats[model.own], theirs.nats[base.own]
    difference, error = mean_and_error(nats - other, ours.tokens, ours.per_piece)
    pieces = -(-len(nats) // ours.per_piece)
    loss, baseline_loss = (mean_and_error(row, ours.tokens)[0] for row in (nats, other))
    p = None if error is None else student_p(difference, error, pieces)
    return TextDifference(model.name, *_depths(model, base), loss, baseline_loss, difference, error, p)


def _depths(model: Measured, base: Measured) -> tuple[int | None, int | None]:
    return model.report.H_cycles, base.report.H_cycles


def _unpaired_reason(model: Measured, base: Measured) -> str:
    bits = [_bits_per_byte(each) for each in (model, base)]
    return (
        f"{model.name} cuts the text into other tokens than {base.name}, so their losses cannot be paired; bits per byte can be compared: "
        f"{bits[0]} and {bits[1]}."
    )


def _bits_per_byte(model: Measured) -> str:
    assert model.report.text is not None
    bits = model.report.text.rows[model.own].bits_per_byte
    return "unknown" if bits is None else f"{bits:.4f}"


def _on_questions(model: Measured, base: Measured, name: str, difficulties: Sequence[int]) -> list[QuestionDifference]:
    """Differences over all items, then over each difficulty if there are several."""
    ours, theirs = model.paired.rights[name][model.own].bool(), base.paired.rights[name][base.own].bool()
    each, [judge] = torch.tensor(difficulties), {asked.judge for asked in model.report.questions if asked.name == name}
    graded = sorted(set(difficulties))
    chosen = [(None, torch.ones_like(ours)), *((d, each == d) for d in graded if len(graded) > 1)]
    return [_question_difference(model, base, (name, judge, d), ours[kept], theirs[kept]) for d, kept in chosen]


def _question_difference(
    model: Measured, base: Measured, what: tuple[str, str, int | None], ours: Tensor, theirs: Tensor
) -> QuestionDifference:
    count, only, other = len(ours), int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    difference = (only - other) / count
    error = max(0.0, (only + other) / count - difference**2) ** 0.5 / count**0.5
    accuracy, baseline = ours.double().mean().item(), theirs.double().mean().item()
    return QuestionDifference(
        model.name, *what, *_depths(model, base), count, accuracy, baseline, only, other, difference, error, mcnemar_p(only, other)
    )

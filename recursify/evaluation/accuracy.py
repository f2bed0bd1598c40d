"""Accuracy on questions by difficulty and cycle count, of a recursive or plain model.

    runs = [DecodingOptions(H_cycles=H) for H in (1, 2, 3)]
    report, rights = evaluate_questions(model, tokenizer, "permutations:difficulty=4-32/4", items, runs)

Two judges. `answer`: the model reads the question and writes, greedily, one token more than the longest answer of the set takes; the text
ends at an end token or a new line - where the items come with worked steps, at a blank line or the next question - and `tasks.is_right`
looks at it. `labels`, for state tracking: one pass over the question, and at the place of each label the likeliest of all tokens must be
it; the difficulty of a guess is the number of its label.

Standard errors take questions as independent, and the labels of one question together. Several processes share the batches
(utils/distributed.py); who is in a batch depends on nothing but the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.question_rows import label_tokens
from ..data.tasks import Item, as_text, is_right, prompt
from ..errors import UserError
from ..inference.generation import generate_batch
from ..inference.options import DecodingOptions, Sampling
from ..inference.prompt import prompt_ids
from ..network.losses import read_out
from ..utils.distributed import map_jobs
from ..utils.models import evaluating
from ..utils.tables import table
from .statistics import mean_and_error
from .text_loss import states_at

if TYPE_CHECKING:
    from .settings import Judge  # with the flags' own library, which measuring does without

Labelled = tuple[list[int], list[int], list[int]]  # prompt ids; label positions; label ids


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one run.

    Args:
        H_cycles: None for a plain donor.
        halt: The halting criterion; None at fixed depth.
        difficulty: None for all difficulties together.
        standard_error: Of the accuracy; None for a single question.
    """

    H_cycles: int | None
    halt: str | None
    difficulty: int | None
    right: int
    count: int
    standard_error: float | None

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "accuracy": self.accuracy}


@dataclass(frozen=True)
class QuestionsReport:
    """Results on one question set.

    Args:
        items: Number of questions.
        rows: Per run: all difficulties together, then each separately.
    """

    name: str
    judge: Judge
    items: int
    rows: list[Accuracy]

    def to_dict(self) -> dict[str, Any]:
        """Runs with halting are listed separately: one cycle count may have both kinds."""
        rows, halting = ([row.to_dict() for row in self.rows if (row.halt is not None) == halts] for halts in (False, True))
        return {**vars(self), "rows": rows, "halting": halting}

    def lines(self) -> list[str]:
        """A table for the terminal: one row per difficulty, one column per run."""
        columns = list(dict.fromkeys(column(row.H_cycles, row.halt) for row in self.rows))
        judged = "exact match of the generated answer" if self.judge == "answer" else "teacher-forced accuracy at every label"
        rows: list[list[str]] = []
        for difficulty in dict.fromkeys(row.difficulty for row in self.rows):
            same = [row for row in self.rows if row.difficulty == difficulty]
            rows.append(["all" if difficulty is None else str(difficulty), f"{same[0].count:,}", *map(_percent, same)])
        head = f"{self.name}: {self.items:,} questions, {judged}; accuracy in %, +- standard error"
        return [head, "", *table(("difficulty", "count", *columns), rows)]


def column(H_cycles: int | None, halt: str | None) -> str:
    """The column heading of a run."""
    name = "plain" if H_cycles is None else f"H_cycles {H_cycles}"
    return f"<= {H_cycles}, {halt}" if halt else name


def _percent(row: Accuracy) -> str:
    error = "" if row.standard_error is None else f" +-{100 * row.standard_error:4.1f}"
    return f"{100 * row.accuracy:.1f}{error}"


def evaluate_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    items: Sequence[Item],
    runs: Sequence[DecodingOptions],
    judge: Judge = "answer",
    *,
    batch_size: int = 8,
) -> tuple[QuestionsReport, Tensor]:
    """Evaluate a model on a question set in every run.

    Where `torch.distributed` has several processes, all of them must call this.

    Args:
        name: Name of the set, for the report and error messages.
        items: At least one.
        runs: Cycles and halting of each run; one `DecodingOptions()` for a plain donor.

    Returns:
        The report, and `[runs, items]`: whether the answer is right (with `labels`, the last label).

    Raises:
        UserError: Questions longer than the model's context; with `labels`, a label that is missing or not one token.
    """
    if judge == "answer":
        found = _generated_answers(model, tokenizer, name, items, runs, batch_size)
        difficulties = [[item.difficulty] for item in items]
    else:
        found = _label_guesses(model, tokenizer, name, items, runs, batch_size)
        difficulties = [list(range(1, len(guesses) + 1)) for guesses in found[0]]
    rows = [row for run, guesses in zip(runs, found, strict=True) for row in _accuracies(run, guesses, difficulties)]
    return QuestionsReport(name, judge, len(items), rows), torch.tensor([[guesses[-1] for guesses in run] for run in found])


def _accuracies(run: DecodingOptions, guesses: Sequence[Sequence[bool]], difficulties: Sequence[Sequence[int]]) -> list[Accuracy]:
    """Accuracy over all difficulties, then over each; `guesses` has a list per item."""
    rows = []
    for wanted in (None, *sorted({difficulty for each in difficulties for difficulty in each})):
        kept = [
            [right for right, difficulty in zip(rights, each, strict=True) if wanted in (None, difficulty)]
            for rights, each in zip(guesses, difficulties, strict=True)
        ]
        sums = torch.tensor([[sum(rights), len(rights)] for rights in kept if rights]).T
        right, count = sums.sum(dim=1).tolist()
        rows.append(Accuracy(run.H_cycles, run.criterion, wanted, right, count, mean_and_error(sums[0], sums[1])[1]))
    return rows


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of item indices, grouped by length."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _in_order(batches: Sequence[Sequence[int]], found: Sequence[Sequence[Sequence[Any]]]) -> list[list[Any]]:
    """`[batches][runs][items of the batch]` as `[runs][items]`."""
    places = {number: (batch, row) for batch, numbers in enumerate(batches) for row, number in enumerate(numbers)}
    spots = [places[number] for number in range(len(places))]
    return [[found[batch][run][row] for batch, row in spots] for run in range(len(found[0]))]


def _check_positions(model: Any, name: str, tokens: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(
            f"--questions {name}: the longest question takes {tokens} tokens with its answer, the model has {positions} positions; "
            "ask for a smaller difficulty"
        )


# Judged by the answer


def _generated_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, name: str, items: Sequence[Item], runs: Sequence[DecodingOptions], batch_size: int
) -> list[list[list[bool]]]:
    """`[runs][items][1]`."""
    lengths = [len(prompt_ids(tokenizer, prompt(item))) for item in items]
    wholes = [len(prompt_ids(tokenizer, as_text(item, with_steps=True))) for item in items]
    longest = max(whole - length for whole, length in zip(wholes, lengths, strict=True))
    new = longest + 1  # an answer that continues is a different one
    _check_positions(model, name, max(lengths) + new)
    stop = ("\n\n", "\nQuestion:") if any(item.steps for item in items) else ("\n",)
    batches = _batches(lengths, batch_size)

    def answer(batch: Sequence[int]) -> list[list[list[bool]]]:
        asked = [items[number] for number in batch]
        found = []
        for run in runs:
            sampling = Sampling(H_cycles=run.H_cycles, halt=run.halt, halt_threshold=run.halt_threshold, max_new_tokens=new, temperature=0,
                                stop=stop)  # fmt: skip
            texts = generate_batch(model, tokenizer, [prompt(item) for item in asked], sampling)
            found.append([[is_right(item, written.text)] for item, written in zip(asked, texts, strict=True)])
        return found

    return _in_order(batches, map_jobs(batches, answer))


# Judged by the labels


def _label_guesses(
    model: Any, tokenizer: PreTrainedTokenizerBase, name: str, items: Sequence[Item], runs: Sequence[DecodingOptions], batch_size: int
) -> list[list[list[bool]]]:
    """`[runs][items][labels]`."""
    labelled = [_labelled(item, tokenizer, name) for item in items]
    lengths = [len(ids) for ids, _, _ in labelled]
    _check_positions(model, name, max(lengths))
    batches = _batches(lengths, batch_size)

    def guess(batch: Sequence[int]) -> list[list[list[bool]]]:
        ids, targets, places = (part.to(model.device) for part in as_batch([labelled[number] for number in batch]))
        counts = [len(labelled[number][1]) for number in batch]
        with evaluating(model), torch.no_grad():
            rights = [read_out(model.get_output_embeddings(), state, targets, places)[1].bool() for state in _states(model, ids, runs)]
        return [[part.tolist() for part in right.split(counts)] for right in rights]

    return _in_order(batches, map_jobs(batches, guess))


def _labelled(item: Item, tokenizer: PreTrainedTokenizerBase, name: str) -> Labelled:
    found = label_tokens(item, tokenizer)
    if found is None:
        of = f"labels such as {item.labels[-1]!r}" if item.labels else "questions without labels"
        raise UserError(
            f"--judge labels: expected labels of one token each, which permutations of the group S3 and pointers have; {name} has {of}; "
            "use --judge answer"
        )
    return found


def as_batch(rows: Sequence[Labelled]) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T]` ids, right-padded (causality hides the padding); `[B, T]` labels, each one after its position; `[B, T - 1]` positions."""
    shape = len(rows), max(len(ids) for ids, _, _ in rows) + 1
    batch, targets, places = (torch.zeros(shape, dtype=dtype) for dtype in (torch.long, torch.long, torch.bool))
    for row, (ids, spots, labels) in enumerate(rows):
        batch[row, : len(ids)] = torch.tensor(ids)
        targets[row, torch.tensor(spots) + 1] = torch.tensor(labels)
        places[row, spots] = True
    return batch, targets, places[:, :-1]


def _states(model: Any, ids: Tensor, runs: Sequence[DecodingOptions]) -> list[Tensor]:
    """Final hidden states of each run, `[B, T, D]`; one forward pass serves all runs without halting."""
    plain = iter(states_at(model, ids, depths) if (depths := [run.H_cycles for run in runs if run.criterion is None]) else [])
    return [next(plain) if run.criterion is None else _halted(model, ids, run) for run in runs]


def _halted(model: Any, ids: Tensor, run: DecodingOptions) -> Tensor:
    return model.model(ids, H_cycles=run.H_cycles, use_cache=False, halt_rule=run.rule(model)).last_hidden_state

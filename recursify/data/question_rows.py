"""Questions as token ids: training rows, and prompts with label positions for evaluation.

    question_rows(items, tokenizer, seq_len=128)     a table with `input_ids` and `labels`
    question_columns(items, tokenizer, seq_len=128)  the same as lists, without the datasets library
    label_tokens(items[0], tokenizer)                ids of its prompt, and the positions of its labels

What is trained is the answer, and for state tracking the state at every word: nothing is learnt about the words of a question, which are
random or given. A label stands at the place after the token that is to tell it, as everywhere: position t is scored against label t + 1.

With steps, rows also say what is known after how many steps (`--cycle_targets steps`): `step_places`, `step_counts` and `step_labels` list,
in ascending order of the count, the label of a place that is known after so many steps. A state is known after as many steps as there are
words up to it. Of an intermediate answer, which is written like the answer, the first token that differs is the label at its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..network.losses import IGNORED
from .tasks import Item, as_text, label_ends, prompt

if TYPE_CHECKING:
    from datasets import Dataset, Features


STEP_COLUMNS = ("step_places", "step_counts", "step_labels")


def question_rows(items: Sequence[Item], tokenizer: Any, seq_len: int, with_steps: bool = False) -> Dataset:
    """Pack questions with answers into rows, each followed by an end-of-text token; rows are padded with that token.

    Train on them with `separate_documents`, or questions attend to earlier ones.

    Args:
        tokenizer: A fast tokenizer (it must map tokens to characters) with an end-of-text token.
        seq_len: Tokens per row.
        with_steps: Whether rows say what is known after how many steps.

    Returns:
        A table with `input_ids` and `labels`, `seq_len` each: labels are -100 but for answers, their end-of-text token, and states; and the
        lists of `STEP_COLUMNS`, if wanted.

    Raises:
        UserError: An unsuitable tokenizer, a question longer than a row, or one without steps where they are wanted.
    """
    from datasets import Dataset  # here: labels and columns need no datasets

    return Dataset.from_dict(question_columns(items, tokenizer, seq_len, with_steps), features=row_features(seq_len, with_steps))


def question_columns(items: Sequence[Item], tokenizer: Any, seq_len: int, with_steps: bool = False) -> dict[str, list[list[int]]]:
    """The columns of `question_rows`, which has the arguments and errors."""
    rows = [_Tokens()]
    known: dict[str, int | None] = {}
    for item in items:
        tokens = _labelled(item, tokenizer, known, with_steps)
        if len(tokens.ids) > seq_len:
            longest = max(len(_labelled(other, tokenizer, known).ids) for other in items)
            raise UserError(f"--seq_len: expected at least {longest}, the tokens of the longest question, got {seq_len}")
        if len(rows[-1].ids) + len(tokens.ids) > seq_len:
            rows.append(_Tokens())
        rows[-1].add(tokens)
    rows = [row for row in rows if row.ids]
    columns = {
        "input_ids": [row.ids + [tokenizer.eos_token_id] * (seq_len - len(row.ids)) for row in rows],
        "labels": [row.labels + [IGNORED] * (seq_len - len(row.ids)) for row in rows],
    }
    steps = [[[step[n] for step in sorted(row.steps, key=lambda step: step[1])] for row in rows] for n in range(3)]
    return columns | (dict(zip(STEP_COLUMNS, steps, strict=True)) if with_steps else {})


def row_features(seq_len: int, with_steps: bool = False) -> Features:
    from datasets import Features, List, Value

    lists = {name: List(Value("int32")) for name in STEP_COLUMNS} if with_steps else {}
    return Features({name: List(Value("int32"), length=seq_len) for name in ("input_ids", "labels")} | lists)


@dataclass
class _Tokens:
    """Token ids, their labels, and what is known after how many steps: place, count of steps, label."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    steps: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, other: _Tokens) -> None:
        self.steps += [(len(self.ids) + place, count, label) for place, count, label in other.steps]
        self.ids, self.labels = self.ids + other.ids, self.labels + other.labels


def _labelled(item: Item, tokenizer: Any, known: dict[str, int | None], with_steps: bool = False) -> _Tokens:
    """Question, answer and end of text."""
    begins = len(prompt(item))
    ids, spans = _tokens(as_text(item), tokenizer)
    trains_answer = not item.unscored
    labels = [token if end > begins and trains_answer else IGNORED for token, (_, end) in zip(ids, spans, strict=True)]
    if ids[-1] != tokenizer.eos_token_id:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id if trains_answer else IGNORED]
    elif trains_answer:
        labels[-1] = ids[-1]
    answer = [place for place, label in enumerate(labels) if label != IGNORED]
    states = [(place + 1, target) for place, target in _states(item, spans, tokenizer, known)]
    for place, target in states:
        labels[place] = target
    found = _Tokens(ids, labels)
    if with_steps:
        found.steps = [(place, count, target) for count, (place, target) in enumerate(states, start=1)]
        found.steps += _steps_of_answer(item, ids, answer, tokenizer)
    return found


def _steps_of_answer(item: Item, ids: Sequence[int], places: Sequence[int], tokenizer: Any) -> list[tuple[int, int, int]]:
    """Place, count of steps and label of the answer's tokens, intermediate answers included.

    Args:
        places: Of the answer, its end-of-text token included; empty where the answer is not trained.
    """
    reached = item.reached or item.labels
    if not reached:
        raise UserError(
            "--cycle_targets steps: expected questions that say what is known after each step, got one without: "
            f"{item.question[:60]!r}; permutations, pointers, chains, facts, gsm8k and prosqa have steps; else use --cycle_targets answer"
        )
    found = []
    for count, text in enumerate(reached[:-1] if places else (), start=1):
        other = _tokens(f"{prompt(item)} {text}", tokenizer)[0] if text and text != item.answer else []
        differs = next((place for place in places if place < len(other) and other[place] != ids[place]), None)
        if differs is not None:
            found.append((differs, count, other[differs]))
    return found + [(place, len(reached), ids[place]) for place in places]


def label_tokens(item: Item, tokenizer: Any) -> tuple[list[int], list[int], list[int]] | None:
    """Inputs and targets to predict every state of an item in a single forward pass.

    Returns:
        The prompt ids; the position at which each state is predicted; the target ids. None for an item without labels, or with a
        label that is not one token.
    """
    ids, spans = _tokens(prompt(item), tokenizer)
    states = _states(item, spans, tokenizer, {})
    return (ids, [place for place, _ in states], [target for _, target in states]) if states else None


def _states(item: Item, spans: Sequence[tuple[int, int]], tokenizer: Any, known: dict[str, int | None]) -> list[tuple[int, int]]:
    """Position from which each state is known, and its target id; empty if a state is not one token.

    Args:
        known: Cache of state ids, updated in place.
    """
    covering = [next(i for i, (start, end) in enumerate(spans) if start < at <= end) for at in label_ends(item)]
    known |= {label: _one_token(label, tokenizer) for label in set(item.labels) - set(known)}
    targets = [token for label in item.labels if (token := known[label]) is not None]
    return list(zip(covering, targets, strict=True)) if len(targets) == len(item.labels) else []


def _one_token(label: str, tokenizer: Any) -> int | None:
    """The id of a word, with a leading space if the vocabulary has it with one."""
    for written in (f" {label}", label):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    return None


def _tokens(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and their character spans."""
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}: questions need one with an eos_token that knows where its "
            "tokens stand in the text (a fast one, with tokenizer.json)"
        )
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]

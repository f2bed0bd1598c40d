"""Questions as token ids: training rows, and prompts with label positions for evaluation.

    question_rows(items, tokenizer, seq_len=128)     a table with `input_ids` and `labels`
    question_columns(items, tokenizer, seq_len=128)  the same as lists, without the datasets library
    label_tokens(items[0], tokenizer)                ids of its prompt, and the positions of its labels

What is trained is the answer, and for state tracking the state at every word: nothing is learnt about the words of a question, which are
random or given. A label stands at the place after the token that is to tell it, as everywhere: position t is scored against label t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..network.losses import IGNORED
from .tasks import Item, as_text, label_ends, prompt

if TYPE_CHECKING:
    from datasets import Dataset, Features


def question_rows(items: Sequence[Item], tokenizer: Any, seq_len: int) -> Dataset:
    """Pack questions with answers into rows, each followed by an end-of-text token; rows are padded with that token.

    Train on them with `separate_documents`, or questions attend to earlier ones.

    Args:
        tokenizer: A fast tokenizer (it must map tokens to characters) with an end-of-text token.
        seq_len: Tokens per row.

    Returns:
        A table with `input_ids` and `labels`, `seq_len` each: labels are -100 but for answers, their end-of-text token, and states.

    Raises:
        UserError: An unsuitable tokenizer, or a question longer than a row.
    """
    from datasets import Dataset  # here: labels and columns need no datasets

    return Dataset.from_dict(question_columns(items, tokenizer, seq_len), features=row_features(seq_len))


def question_columns(items: Sequence[Item], tokenizer: Any, seq_len: int) -> dict[str, list[list[int]]]:
    """The columns of `question_rows`, which has the arguments and errors."""
    filler = (tokenizer.eos_token_id, IGNORED)
    rows: list[list[tuple[int, int]]] = [[]]
    known: dict[str, int | None] = {}
    for item in items:
        tokens = _labelled(item, tokenizer, known)
        if len(tokens) > seq_len:
            longest = max(len(_labelled(other, tokenizer, known)) for other in items)
            raise UserError(f"--seq_len: expected at least {longest}, the tokens of the longest question, got {seq_len}")
        if len(rows[-1]) + len(tokens) > seq_len:
            rows.append([])
        rows[-1] += tokens
    filled = [row + [filler] * (seq_len - len(row)) for row in rows if row]
    return {"input_ids": [[i for i, _ in row] for row in filled], "labels": [[label for _, label in row] for row in filled]}


def row_features(seq_len: int) -> Features:
    from datasets import Features, List, Value

    return Features({name: List(Value("int32"), length=seq_len) for name in ("input_ids", "labels")})


def _labelled(item: Item, tokenizer: Any, known: dict[str, int | None]) -> list[tuple[int, int]]:
    """Ids and labels of question, answer and end of text."""
    begins = len(prompt(item))
    ids, spans = _tokens(as_text(item), tokenizer)
    labels = [token if end > begins else IGNORED for token, (_, end) in zip(ids, spans, strict=True)]
    for place, target in _states(item, spans, tokenizer, known):
        labels[place + 1] = target
    if ids[-1] != tokenizer.eos_token_id:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    else:
        labels[-1] = ids[-1]
    return list(zip(ids, labels, strict=True))


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

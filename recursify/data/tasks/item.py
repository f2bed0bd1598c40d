"""What a question with one right answer is, and how it is written as text.

    Question: Mary went to the kitchen. Where is Mary?
    Answer: kitchen

The white space before an answer belongs to the answer: tokenizers join it to the word behind it, so the ids of a prompt are the first ids
of the whole text. An item is one document; what divides documents (an end-of-text token, a row of a table) is for the caller to join.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Match = Literal["words", "digits", "number"]

QUESTION = "Question: "
ANSWER = "\nAnswer:"
FINAL = "#### "  # stands before the answer where steps come first, as in GSM8K


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        question: All that is needed to answer it, stories and mappings included. Without white space at its ends.
        answer: The right answer, alone.
        difficulty: At least 1, in the units of the set: steps, hops, digits, depth, length.
        match: How an answer is recognised, see scoring.py: "words", "digits" or "number".
        steps: A worked way to the answer, for the sets that come with one; else empty.
        labels: The answer so far at each of the last len(labels) words of the question, for state tracking: the last of them is
            ``answer``. Else empty.
        reached: The answer after each step, in the same form, the last of them ``answer``; "" where a step has none. Else empty.
        unscored: Words at the end of the question that are read and have no label: these are of the words before them, and ``answer``
            is not trained.
    """

    question: str
    answer: str
    difficulty: int
    match: Match = "words"
    steps: str = ""
    labels: tuple[str, ...] = ()
    reached: tuple[str, ...] = ()
    unscored: int = 0


def prompt(item: Item) -> str:
    """The text up to where the answer begins, without the white space before it."""
    return f"{QUESTION}{item.question}{ANSWER}"


def as_text(item: Item, with_steps: bool = False) -> str:
    """Question and answer as one document; it begins with ``prompt(item)``.

    Args:
        with_steps: Write the steps, where the item has any, and the answer behind ``####`` on a line of its own.
    """
    if with_steps and item.steps:
        return f"{prompt(item)} {item.steps}\n{FINAL}{item.answer}"
    return f"{prompt(item)} {item.answer}"


def label_ends(item: Item) -> list[int]:
    """Where in ``prompt(item)`` each label is due: the number of characters up to the end of its word.

    The token that covers the character before it is the first to know all that the label depends on.
    """
    if not item.labels:
        return []
    ends = [len(QUESTION) + word.end() for word in re.finditer(r"\S+", item.question)]
    return ends[-len(item.labels) - item.unscored : len(ends) - item.unscored]

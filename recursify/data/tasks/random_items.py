"""Random items that are the same on every machine, never twice, and for ever on one side of the line between training and test.

Which side is read off the item itself, by a hash: no seed can bring a test item into training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...errors import UserError
from .item import Item

T = TypeVar("T")

SPLITS = ("train", "test")
TEST_SHARE = 5  # one in five is for test
PATIENCE = 10_000  # draws in a row without anything new, after which there is nothing new


class Draw:
    """Random choices made of ``random()`` alone: the one sequence that Python promises to keep from version to version.

    Args:
        key: What the choices depend on.
    """

    def __init__(self, *key: object):
        self._random = random.Random(_hash(" ".join(map(str, key)))).random

    def below(self, end: int) -> int:
        """A whole number from 0 to end - 1."""
        return int(self._random() * end)

    def one(self, things: Sequence[T]) -> T:
        return things[self.below(len(things))]

    def shuffled(self, things: Sequence[T]) -> list[T]:
        rest = list(things)
        for last in range(len(rest) - 1, 0, -1):
            other = self.below(last + 1)
            rest[last], rest[other] = rest[other], rest[last]
        return rest


def split_of(key: str) -> str:
    """``test`` for one key in five, else ``train``."""
    return "test" if _hash(key) % TEST_SHARE == 0 else "train"


def distinct(make: Callable[[Draw], tuple[Item, str]], count: int, draw: Draw, split: str) -> list[Item]:
    """``count`` items of one split, no question twice; fewer would be the first of these.

    If there are fewer, all of them, repeated in another order. That there are no more is concluded after 10,000
    draws in a row without a new one.

    Args:
        make: Draws an item, and the key that decides on its split.

    Returns:
        An empty list where the split has none.
    """
    found: dict[str, Item] = {}
    missed = 0
    while len(found) < count and missed < PATIENCE:
        item, key = make(draw)
        missed += 1
        if split_of(key) == split and item.question not in found:
            found[item.question] = item
            missed = 0
    items = list(found.values())
    while found and len(items) < count:
        items += draw.shuffled(list(found.values()))
    return items[:count]


def some(
    name: str, make: Callable[[Draw], tuple[Item, str]], difficulty: int, count: int, seed: int, split: str, option: object = ""
) -> list[Item]:
    """`distinct` items of a task.

    Args:
        option: What the choices depend on besides.

    Raises:
        UserError: The split has none.
    """
    items = distinct(make, count, Draw(name, option, difficulty, seed, split), split)
    if not items:
        raise UserError(f"{name}: no item of difficulty {difficulty} falls to the split {split}; expected a higher difficulty")
    return items


def check(name: str, difficulty: int, count: int, split: str, hardest: int | None = None) -> None:
    """What all tasks ask of their arguments.

    Raises:
        UserError: A difficulty or count below 1, a difficulty above ``hardest``, or an unknown split.
    """
    if difficulty < 1 or (hardest is not None and difficulty > hardest):
        wanted = "of at least 1" if hardest is None else f"from 1 to {hardest}"
        raise UserError(f"{name}: expected a difficulty {wanted}, got {difficulty}")
    if count < 1:
        raise UserError(f"{name}: expected a count of at least 1, got {count}")
    if split not in SPLITS:
        raise UserError(f"{name}: expected the split train or test, got {split!r}")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")

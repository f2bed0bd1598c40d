"""The types of settings fields, held to wherever a value comes from: the command line, a recipe, a line at the keyboard, Python.

Choices are also taken in capitals, and under the names that transformers and torch have for them.
"""

from __future__ import annotations

import contextlib
import numbers
import os
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
SWITCHES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

# What others call a choice -> what it is here.
SYNONYMS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_torch_8bit": "adamw_8bit",
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
# A choice of others that does not exist here -> the choice nearest to it, and how that becomes the same, if it does.
NEAREST = {
    "constant": ("wsd", "the same with decay_share 0 and warmup_steps 0"),
    "constant_with_warmup": ("wsd", "the same with decay_share 0"),
    "cosine_with_restarts": ("cosine", "without the restarts"),
    "cosine_with_min_lr": ("cosine", "which ends at 0"),
    "cosine_warmup_with_min_lr": ("cosine", "which ends at 0"),
    "inverse_sqrt": ("cosine", "which ends at 0"),
    "polynomial": ("linear", "which is a polynomial of power 1"),
    "reduce_lr_on_plateau": ("wsd", "which decays at the end"),
    "greedy": ("wsd", "which decays at the end"),
}


def typed(value: Any, hint: Any, text: bool = False) -> Any:
    """A value as the type of a field: lists become tuples, paths text, numpy's numbers Python's, synonyms our choices.

    Args:
        text: The value was read from text, as YAML 1.1 is, which takes 1e-5 (it has no dot) for a string: strings may be numbers.

    Raises:
        TypeError: It is of another type; the message says what is expected.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _chosen(value, choices)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(typed(item, choices[0], text) for item in value)
    if origin in (Union, UnionType):
        return _one_of(value, choices, text)
    return _simple(value, hint, text)


def spelt(word: str, hint: Any) -> Any:
    """A word of a command line as the type of a field; None is spelt None.

    Raises:
        TypeError: It is none of that type; the message says what is expected.
    """
    kind = without_none(hint)
    if kind is not hint and word == "None":
        return None
    if kind is bool and word.lower() in SWITCHES:
        return SWITCHES[word.lower()]
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            raise TypeError(WORDS[kind]) from None
    return typed(word, kind)


def expectation(hint: Any) -> str:
    """What a field of this type expects, other than None, in words."""
    kind = without_none(hint)
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else WORDS[kind]


def without_none(hint: Any) -> Any:
    """int of ``int | None``; every other type is itself."""
    kinds = [each for each in get_args(hint) if each is not type(None)]
    return kinds[0] if get_origin(hint) in (Union, UnionType) and len(kinds) == 1 else hint


def _chosen(value: Any, choices: tuple[Any, ...]) -> Any:
    name = value.lower() if isinstance(value, str) else ""
    for found in (name, SYNONYMS.get(name)):
        if found in choices:
            return found
    near, how = NEAREST.get(name, ("", ""))
    hint = f" (nearest to {name}: {near}, {how})" if near in choices else ""
    raise TypeError(f"one of {', '.join(choices)}{hint}")


def _one_of(value: Any, hints: tuple[Any, ...], text: bool) -> Any:
    """The value as the first of several types that it fits."""
    if type(None) in hints and value is None:
        return None
    expected = []
    for hint in (hint for hint in hints if hint is not type(None)):
        try:
            return typed(value, hint, text)
        except TypeError as error:
            expected.append(str(error))
    raise TypeError(" or ".join(expected))


def _simple(value: Any, hint: Any, text: bool) -> Any:
    if hint is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # a whole number may be larger than any other
            if isinstance(value, numbers.Real):
                return value if isinstance(value, int) and not text else float(value)
            if text and isinstance(value, str):
                return float(value)
    raise TypeError(f"{WORDS[hint]} (in quotes, where YAML reads it as something else)" if text and hint is str else WORDS[hint])

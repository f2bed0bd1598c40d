"""The types of settings fields, held to wherever a value comes from: a recipe, a line at the keyboard, Python."""

from __future__ import annotations

import numbers
import os
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def typed(value: Any, hint: Any, text: bool = False) -> Any:
    """A value as the type of a field: lists become tuples, paths text, numpy's numbers Python's.

    Args:
        text: The value was read from text, as YAML 1.1 is, which takes 1e-5 (it has no dot) for a string: strings may be numbers.

    Raises:
        TypeError: It is of another type; the message says what is expected.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in choices or isinstance(value, bool):
            raise TypeError(f"one of {', '.join(choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(typed(item, choices[0], text) for item in value)
    if origin in (Union, UnionType):
        return _one_of(value, choices, text)
    return _simple(value, hint, text)


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
        if isinstance(value, numbers.Real):
            return value if isinstance(value, int) and not text else float(value)
        if text and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    raise TypeError(f"{WORDS[hint]} (in quotes, where YAML reads it as something else)" if text and hint is str else WORDS[hint])

"""A value from YAML or JSON as the type of a settings field."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, get_args, get_origin


def typed(value: Any, hint: Any) -> Any:
    """A value that YAML gave as the type of a field.

    Raises:
        TypeError: It is none; the message says what is expected.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in choices:
            raise TypeError(f"one of {', '.join(choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError("a list in [brackets]")
        return tuple(typed(item, choices[0]) for item in value)
    if isinstance(hint, UnionType):
        return _one_of(value, choices)
    if hint is float:
        return _float(value)
    if type(value) is not hint:
        raise TypeError(_WORDS[hint])
    return value


def _one_of(value: Any, hints: tuple[Any, ...]) -> Any:
    """The value as the first of several types that it fits."""
    if type(None) in hints and value is None:
        return None
    expected = []
    for hint in (hint for hint in hints if hint is not type(None)):
        try:
            return typed(value, hint)
        except TypeError as error:
            expected.append(str(error))
    raise TypeError(" or ".join(expected))


_WORDS = {int: "a whole number", str: "text (in quotes, where YAML reads it as something else)", bool: "true or false"}


def _float(value: Any) -> float:
    """YAML 1.1 takes 1e-5, which has no dot, for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("a number")
    try:
        return float(value)
    except ValueError:
        raise TypeError("a number") from None

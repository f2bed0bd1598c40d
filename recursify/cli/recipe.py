"""Recipes: YAML files with the settings of several jobs, a section for each, read with the types of the settings classes.

    about: what the recipe is for         # for people, as `cost` is
    convert: {L_layers: 4, keep_donor: true}
    train: {checkpoint: init.pt, lr: 3e-5, cycle_choices: [1, 2, 3]}

What is unknown or of another type is refused by name. Floor 0.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..errors import UserError

JOB_SECTIONS = ("convert", "train", "train_trm", "train_trm_hybrid", "evaluate", "compare", "generate", "chat", "serve", "export")
NOTES = ("about", "cost")  # sections that no job reads


def read_section(path: str | Path, job: str, settings_class: type) -> dict[str, Any]:
    """The settings of a job that a recipe gives, with the types of the settings class.

    Raises:
        UserError: A file that cannot be read or is no YAML, a section or key that does not exist, or a value of another type.
    """
    sections = _read_yaml(path)
    _known(path, "section", sections, (*JOB_SECTIONS, *NOTES))
    if job not in sections:
        raise UserError(f"--config: {path} has no section {job!r} for this job; it has {', '.join(sections) or 'none'}")
    section = {} if sections[job] is None else sections[job]
    if not isinstance(section, dict):
        raise UserError(f"--config: {path}: expected flags and their values under {job!r}, got {section!r}")
    hints = {field.name: get_type_hints(settings_class)[field.name] for field in dataclasses.fields(settings_class)}
    _known(path, f"key under {job!r}", section, hints)
    values = {}
    for name, value in section.items():
        try:
            values[name] = typed(value, hints[name])
        except TypeError as error:
            raise UserError(f"--config: {path}: {job}: {name}: expected {error}, got {value!r}") from None
    return values


def _read_yaml(path: str | Path) -> dict[Any, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceEach)
    except OSError as error:
        raise UserError(f"--config: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {path}: expected a section for each job ({', '.join(JOB_SECTIONS)}), got {type(content).__name__}")
    return content


class _OnceEach(yaml.SafeLoader):
    """YAML in which a key may stand once only: plain YAML takes the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _known(path: str | Path, kind: str, given: Iterable[Any], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--config: {path}: unknown {kind}: {name!r}; {hint}known are {', '.join(known)}")


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

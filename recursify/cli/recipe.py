"""Recipes: YAML files with settings for several commands, one section each, typed by the settings classes.

    about: what the recipe is for         # for people, as `cost` is
    convert: {L_layers: 4, keep_donor: true}
    train: {checkpoint: init.pt, lr: 3e-5, cycle_choices: [1, 2, 3]}

What is unknown or of another type is refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..errors import UserError, shown
from ..utils.typed import typed
from .names import fields_by_name

JOB_SECTIONS = ("convert", "train", "train_trm", "train_trm_hybrid", "evaluate", "compare", "generate", "chat", "serve", "export")
APPROACHES = ("full", "hybrid", "embedding")  # of training
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
        raise UserError(f"--config: {path}: expected flags and their values under {job!r}, got {shown(section)}")
    section = {name: value for name, value in section.items() if job != "train" or name != "approach"}
    section = _under_our_names(path, section, fields_by_name(settings_class))
    hints = {field.name: get_type_hints(settings_class)[field.name] for field in dataclasses.fields(settings_class)}
    _known(path, f"key under {job!r}", section, hints)
    values = {}
    for name, value in section.items():
        try:
            values[name] = typed(value, hints[name], text=True)
        except TypeError as error:
            raise UserError(f"--config: {path}: {job}: {name}: expected {error}, got {shown(value)}") from None
    return values


def _under_our_names(path: str | Path, section: dict[Any, Any], ours: dict[str, str]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for given, value in section.items():
        if (name := ours.get(given, given)) in found or (name != given and name in section):
            raise UserError(f"--config: {path}: {given} is another name of {name}, which is given too; leave out one of the two")
        found[name] = value
    return found


def read_approach(path: str | Path) -> str | None:
    """The approach that the section `train` of a recipe names, if it does.

    Raises:
        UserError: A file that cannot be read or is no YAML, or no such approach.
    """
    section = _read_yaml(path).get("train")
    approach = section.get("approach") if isinstance(section, dict) else None
    if approach not in (None, *APPROACHES):
        raise UserError(f"--config: {path}: train: approach: expected one of {', '.join(APPROACHES)}, got {shown(approach)}")
    return approach


def _read_yaml(path: str | Path) -> dict[Any, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceEach)
    except OSError as error:
        raise UserError(f"--config: {path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"--config: {path} is not valid YAML: nested too deeply") from error
    except Exception as error:  # what is no number or date raises whatever Python's own reader of them does
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
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"--config: {path}: unknown {kind}: {name!r}; {hint}")

"""Names of flags beside those of their fields: transformers' for trainings, and the same for the model in every command."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..utils.options import ALIASES

# The field that names the model of a command is the first of these that it has, and has these other names.
MODEL_FIELDS, MODEL_NAMES = ("checkpoint", "qwen_model", "model_name"), ("model", "model_name_or_path")
# Field -> its other names, in every command that has it.
OTHER_NAMES = {"out": ("output_dir", "output_path"), "output_path": ("output_dir",)}


def model_field(settings_class: type[Any]) -> str | None:
    """The field that names the model which a command opens; None if it has none, or several."""
    names = [field.name for field in fields(settings_class)]
    return next((name for name in MODEL_FIELDS if name in names), None)


def other_names(settings_class: type[Any]) -> dict[str, tuple[str, ...]]:
    """Field -> other names of its flag, of the fields that have any."""
    found = {name: (alias,) for name, alias in ALIASES.items() if ".training." in settings_class.__module__} | OTHER_NAMES
    if (model := model_field(settings_class)) is not None:
        found[model] = MODEL_NAMES
    return {field.name: found[field.name] for field in fields(settings_class) if field.name in found}


def fields_by_name(settings_class: type[Any]) -> dict[str, str]:
    """Other name of a flag -> its field."""
    return {other: name for name, others in other_names(settings_class).items() for other in others}

"""Flags that commands of several subpackages have: each stands here once, with one help text and one default, and is inherited."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from ..errors import UserError
from .typed import typed

# Field of a training -> what transformers' TrainingArguments, or trl, call it.
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "compile": "torch_compile",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_every": "eval_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "keep_last": "save_total_limit",
    "log_every": "logging_steps",
    "lr": "learning_rate",
    "lr_schedule": "lr_scheduler_type",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "resume": "resume_from_checkpoint",
    "save_every": "save_steps",
    "seq_len": "max_length",
}


@dataclass(kw_only=True)
class Options:
    """What all settings are: known fields of the types that they declare, wherever the values come from."""

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Refuse unknown names in our words; the generated `__init__` sees the same ones next."""
        known = [field.name for field in fields(cls)]
        for name in (name for name in named if name not in known):
            ours = next((field for field, theirs in ALIASES.items() if theirs == name and field in known), None)
            near = [ours] if ours else difflib.get_close_matches(name, known, n=1)
            hint = f"; it is {near[0]} here" if ours else f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{cls.__name__} has no {name}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                setattr(self, field.name, typed(value, hints[field.name]))
            except TypeError as error:
                raise UserError(f"--{field.name}: expected {error}, got {value!r}") from None


@dataclass(kw_only=True)
class DeviceOptions(Options):
    """Hardware: what a job runs on."""

    device: str | None = None
    """cpu, cuda, cuda:1 or mps. Default: cuda where there is one, else mps, else cpu."""


@dataclass(kw_only=True)
class ModelDtype(Options):
    """Compute: the type that a model runs in."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and KV cache. auto: the stored one, or float32 where a probe of milliseconds finds it faster on this CPU, or the
    GPU has no bfloat16."""


@dataclass(kw_only=True)
class JsonOutput(Options):
    """Output: how the result of a job is printed."""

    json: bool = False
    """Print the result as one JSON object on stdout; everything else goes to stderr."""


def check_page(path: Path) -> None:
    """Check the file of --report.

    Raises:
        UserError: A folder, or a file in a folder that does not exist.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--report: expected a file in a folder that exists, such as report.html, got {path}")

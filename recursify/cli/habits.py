"""Spellings that users of transformers and trl are used to: those of training flags are rewritten into ours before the flags are parsed;
for flags of other tools, or of another of our commands, the error names ours.

--gradient_checkpointing True    a switch with a value
--bf16                           a value that may be left out
--optim adamw_torch              a value with another name
--report_to none                 an empty list
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ..errors import UserError
from ..utils.options import ALIASES, VALUE_ALIASES

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


# Command -> flag that it does not have -> what to do instead. Those of train are of all trainings.
INSTEAD: dict[str, dict[str, str]] = {
    "convert": {"model_name_or_path": "--model names the donor", "checkpoint": "--model names the donor", "output_dir": "--output_path"},
    "train": {
        "H_cycles": "the depth belongs to the checkpoint; --cycle_choices 1 3 5 trains at others",
        "cycles": "the depth belongs to the checkpoint; --cycle_choices 1 3 5 trains at others",
        "model": "--checkpoint names the model",
        "warmup_ratio": "--warmup_steps N",
        "eval_strategy": "--eval_every N validates every N steps, besides the end of each epoch",
        "save_strategy": "--save_every N; 0 saves none",
        "logging_strategy": "--log_every N",
        "assistant_only_loss": "--train_on assistant, which is the default, or --train_on all",
        "completion_only_loss": "--train_on assistant, which is the default, or --train_on all",
        "dataset_text_field": "--text_column",
        "packing": "documents are always packed; --separate_documents masks them from each other",
        "fp16": "--bf16",
        "train_file": "--dataset_name takes files and folders",
        "freeze_embeddings": "it is a flag of convert",
        "keep_donor": "it is a flag of convert",
        "gain": "--start_gain",
    },
    "generate": {
        "cycles": "--H_cycles", "depths": "--H_cycles", "model": "--checkpoint names the model",
        "do_sample": "--temperature 0 is greedy decoding, above 0 it samples", "max_length": "--max_new_tokens counts the new tokens",
    },
    "chat": {"cycles": "--H_cycles", "depths": "--H_cycles", "model": "--checkpoint names the model"},
    "serve": {"H_cycles": "--depths; requests choose from them", "cycles": "--depths", "model": "--checkpoint names the model"},
    "evaluate": {"H_cycles": "--cycles 1 3 5", "depths": "--cycles 1 3 5", "model": "--checkpoint names the model"},
    "compare": {
        "H_cycles": "--cycles 1 3 5", "depths": "--cycles 1 3 5",
        "checkpoint": "the models are named without a flag: recursify compare A B",
        "model": "the models are named without a flag: recursify compare A B",
    },
    "inspect": {"model": "--checkpoint names the model"},
    "export": {
        "output_dir": "the folder is named without a flag: recursify export OUT",
        "output_path": "the folder is named without a flag: recursify export OUT",
    },
}  # fmt: skip


def check_foreign(words: Sequence[str], settings_class: type[Any], job: str) -> None:
    """Refuse flags of other tools and commands with what to do instead.

    Raises:
        UserError: Such a flag.
    """
    ours = {field.name for field in dataclasses.fields(settings_class)}
    instead = INSTEAD.get("train" if job.startswith("train") else job, {})
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in instead and name not in ours:
            raise UserError(f"--{name}: not a flag of {job}; instead: {instead[name]}")


def as_ours(words: Sequence[str], settings_class: type[Any]) -> list[str]:
    """The words of a training's command line with these spellings replaced. Trainings have no positional arguments: what follows a
    switch can only be its value.

    Raises:
        UserError: A value for a switch that takes none, such as a path for --resume.
    """
    hints, ours = get_type_hints(settings_class), {field.name for field in dataclasses.fields(settings_class)}
    names = {alias: name for name, alias in ALIASES.items()}
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, joined, value = word.partition("=")
        name = names.get(flag.removeprefix("--"), flag.removeprefix("--")) if word.startswith("--") else ""
        if name not in ours or not _has_habits(name, hints[name]):
            found.append(word)
            continue
        if joined:
            rest.insert(0, value)
        following = rest[0] if rest and (joined or not rest[0].startswith("--")) else None
        if hints[name] is bool and following is not None:
            rest.pop(0)
            found += [flag] if _switched_on(flag, name, following) else []
        elif set(get_args(hints[name])) == {bool, type(None)} and following is None:
            found += [flag, "True"]
        elif name == "report_to" and following == "none":
            rest.pop(0)
        elif following is not None and following in VALUE_ALIASES.get(name, {}):
            found += [flag, VALUE_ALIASES[name][rest.pop(0)]]
        else:
            found.append(flag)
            found += [rest.pop(0)] if joined else []
    return found


def _has_habits(name: str, hint: Any) -> bool:
    return bool in (hint, *get_args(hint)) or name == "report_to" or name in VALUE_ALIASES


def _switched_on(word: str, name: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    more = "; it continues the newest checkpoint in --output_dir" if name == "resume" else ""
    raise UserError(f"{word}: takes no value, got {value!r}{more}")

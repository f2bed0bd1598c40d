"""Read transformers' configurations, and describe the errors of damaged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

from ..errors import UserError, short
from ..utils.typed import typed

# Errors that transformers raises when a configuration has an invalid value.
CONFIG_FAULTS = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, AssertionError, RuntimeError, StrictDataclassError)

# Types of what generation reads; transformers takes any, and fails while it writes.
_NUMBERS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "num_beams", "num_return_sequences", "no_repeat_ngram_size",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty",
    "encoder_repetition_penalty", "guidance_scale",
)  # fmt: skip
_SWITCHES = (
    "do_sample",
    "use_cache",
    "renormalize_logits",
    "remove_invalid_values",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
)
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_NUMBERS, float | None),
    **dict.fromkeys(_SWITCHES, bool | None),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), int | None),
    "eos_token_id": int | tuple[int, ...] | None,
}


def generation_config(fields: dict[str, Any], where: str | Path) -> GenerationConfig:
    """A generation config as transformers reads it from a file: it may be inconsistent, and can still be saved unchanged.

    Raises:
        UserError: A value of another type than transformers' own.
    """
    try:
        for name, hint in _TYPES.items():
            try:
                typed(fields.get(name), hint)
            except TypeError as error:
                raise ValueError(f"{name}: expected {error}, got {short(fields[name])}") from None
        found = GenerationConfig.from_dict(fields)
    except CONFIG_FAULTS as error:
        raise UserError(f"{where}: its generation config is damaged: {reason(error)}; mend or delete it") from error
    found._original_object_hash = hash(found)
    return found


def check_cycles(config: Any, cycles: int, flag: str) -> None:
    """Check that a recursive model can run at a number of cycles.

    Raises:
        UserError: More layer applications than any pass may have.
    """
    try:
        config.at_depth(H_cycles=cycles)
    except ValueError as error:
        raise UserError(f"--{flag} {cycles}: {error}") from error


def reason(error: Exception) -> str:
    """The message of an error on one line, with the type of errors whose message is only a name."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: {text}"

"""Read transformers' configurations, and describe the errors of damaged ones."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

# Errors that transformers raises when a configuration has an invalid value.
CONFIG_FAULTS = (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError, StrictDataclassError)


def generation_config(fields: dict[str, Any]) -> GenerationConfig:
    """A generation config as transformers reads it from a file: it may be inconsistent, and can still be saved unchanged."""
    found = GenerationConfig.from_dict(fields)
    found._original_object_hash = hash(found)
    return found


def reason(error: Exception) -> str:
    """The message of an error on one line, with the type of errors whose message is only a name."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: {text}"

"""What transformers makes of configuration files, and raises over damaged ones."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    GenerationConfig,
)

# What transformers raises, in no order, when it builds from a configuration with a value that makes no sense.
CONFIG_FAULTS = (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError, StrictDataclassError)


def generation_config(fields: dict[str, Any]) -> GenerationConfig:
    """As transformers reads it from a file: a published one may contradict itself, and may still be saved again as it is."""
    found = GenerationConfig.from_dict(fields)
    found._original_object_hash = hash(found)
    return found


def reason(error: Exception) -> str:
    """All that an error over a configuration says, on one line; with its kind where it says no more than a name."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: {text}"

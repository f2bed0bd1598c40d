"""The tokens that a model processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def reading(model: Any) -> Iterator[list[int]]:
    """Tokens of each pass through the embeddings."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].shape[1]))
    try:
        yield counts
    finally:
        hook.remove()

"""What holds for any model, recursive or plain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_recursive(model: Any) -> bool:
    """Whether the model has cycles; false for a plain model of transformers."""
    return hasattr(model.config, "H_cycles")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout and the like; its training mode is put back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

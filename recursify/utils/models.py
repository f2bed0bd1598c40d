"""Helpers for recursive and plain models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_recursive(model: Any) -> bool:
    """Whether the model has cycles; False for a plain transformers model."""
    return hasattr(model.config, "H_cycles")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout); the training mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

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


@contextmanager
def without_donor_settings(model: Any) -> Iterator[None]:
    """Put an empty generation config in the place of the model's inside the context.

    `generate` fills every setting that a call leaves open from it: published models have penalties, cutoffs, stop strings or several
    return sequences there, which no flag of ours asked for; and some are inconsistent, which `save_pretrained` refuses.
    """
    from transformers import GenerationConfig  # here: flags are read without it

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own

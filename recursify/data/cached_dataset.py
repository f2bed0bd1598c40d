"""Datasets that are computed once and then read from the cache of `datasets`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..errors import UserError


def make_table(generator: Callable[..., Iterator[Any]], gen_kwargs: dict[str, Any], features: Features, key: Any, at_once: int) -> Dataset:
    """The rows of a generator as a cached table on disk. ``key`` identifies the contents: a known key is read from the cache."""
    if next(generator(**gen_kwargs), None) is None:  # from_generator cannot make an empty table
        return Dataset.from_dict({name: [] for name in features}, features=features)
    fingerprint = Hasher.hash([generator.__name__, key])
    try:
        return Dataset.from_generator(
            generator, gen_kwargs=gen_kwargs, features=features, fingerprint=fingerprint, writer_batch_size=at_once
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def identity_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A cache key of the tokenizer. The pickle of a fast tokenizer changes at its first use, so it cannot serve as one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer if backend is None else [backend.to_str(), tokenizer.eos_token_id]


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Disable the progress bars of ``datasets`` inside the context if stderr is not a terminal."""
    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()

"""The KV cache of a conversation, so that a turn prefills only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .options import DecodingOptions


class PrefixCache:
    """The KV cache of one conversation with one model, kept between calls.

    A prompt that starts with the cached tokens prefills only the rest; otherwise the cache is cropped to the common prefix. Another
    depth, cache policy, halting or drafting means other keys and values, so the cache is dropped; so is one that cannot be
    cropped (a sliding window has discarded older tokens). Not thread-safe.

    Greedy text is the same as without a cache, except with `cache_policy="last"`: there tokens of one prefill attend to each other at every
    cycle and to earlier ones at their last, so the result depends on how the text was split into turns.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop and free the cache."""
        self.cache: Any = None
        self.ids: list[int] = []
        self.model: Any = None
        self.options: DecodingOptions | None = None

    def lookup(self, model: Any, ids: Sequence[int], options: DecodingOptions) -> Any:
        """The cache of the longest cached proper prefix of `ids`, or None.

        Ownership moves to the caller until `keep`: an interrupted run leaves it incomplete.
        """
        cache, known, fits = self.cache, self.ids, self.model is model and self.options == options
        self.forget()
        if cache is None or not fits:
            return None
        shared = _shared(known, ids[:-1])
        if not shared:
            return None
        if shared < len(known):
            try:
                cache.crop(shared - len(known))
            except RuntimeError:  # a sliding window that has slid
                return None
        return cache

    def store(self, model: Any, ids: Sequence[int], options: DecodingOptions, cache: Any) -> None:
        """Store the cache of a run.

        Args:
            ids: Prompt and completion. The cache may be shorter: the last generated token has not been processed.
        """
        self.model, self.options, self.cache = model, options, cache
        self.ids = list(ids[: int(cache.get_seq_length())])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)

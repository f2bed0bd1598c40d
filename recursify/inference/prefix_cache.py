"""The KV cache of a conversation, so that a turn prefills only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .options import DecodingOptions


class PrefixCache:
    """What one conversation with one model has left in its cache, kept from call to call.

    A prompt that begins with what is remembered goes on from there; where it differs, the cache is cut back to what the two share. Another
    depth, cache policy, halting or drafting means other keys and values, so the memory is dropped then; so it is where a cache cannot be
    cut back (a sliding window forgets what it has slid past). Not for several threads at a time.

    Greedy text is the same as without, but where it matters which tokens are read at once: with `cache_policy="last"` they see each other
    at every cycle and what was read before at its last, so there the turns are part of the text.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew; frees the cache."""
        self.cache: Any = None
        self.ids: list[int] = []
        self.model: Any = None
        self.effort: DecodingOptions | None = None

    def recall(self, model: Any, ids: Sequence[int], effort: DecodingOptions) -> Any:
        """The cache of the longest beginning of `ids` that is remembered, at least one token short of them; None where there is none.

        It is forgotten here until `keep` brings it back: a run that breaks off leaves it half-written.
        """
        cache, known, fits = self.cache, self.ids, self.model is model and self.effort == effort
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

    def keep(self, model: Any, ids: Sequence[int], effort: DecodingOptions, cache: Any) -> None:
        """Remember the cache of a run.

        Args:
            ids: Read and written. The cache may lack the end of them: the last token written has not been read.
        """
        self.model, self.effort, self.cache = model, effort, cache
        self.ids = list(ids[: int(cache.get_seq_length())])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)

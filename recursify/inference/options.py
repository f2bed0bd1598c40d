"""How much depth a run spends: its cycles, how it caches them, where a token may halt, how far a shallow pass drafts ahead.

Checked by itself and against a model, and put into the words of the model's `forward` and `generate`. Floor 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import UserError

CachePolicy = Literal["full", "last"]
Halt = Literal["none", "q_head", "kl", "entropy"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The fields are the flags of the same name; None leaves the choice to the model."""

    H_cycles: int | None = None
    cache_policy: CachePolicy = "full"
    halt: Halt = "none"
    halt_threshold: float | None = None
    draft_cycles: int | None = None
    draft_tokens: int = 16

    def check(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            UserError: A value out of range, or two that exclude each other.
        """
        if self.H_cycles is not None and self.H_cycles < 0:
            raise UserError(f"--H_cycles: expected at least 0 (0 is one plain pass), got {self.H_cycles}")
        for name, value, kind in (("cache_policy", self.cache_policy, CachePolicy), ("halt", self.halt, Halt)):
            if value not in get_args(kind):
                raise UserError(f"--{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
        self._check_halting()
        self._check_drafting()

    def _check_halting(self) -> None:
        if self.halt_threshold is None:
            return
        if self.halt == "none":
            raise UserError(f"--halt_threshold: expected --halt q_head, kl or entropy with it, got {self.halt_threshold} and no --halt")
        most = 1.0 if self.halt == "q_head" else math.inf
        if not 0 <= self.halt_threshold <= most:
            expected = "0 (always) to 1 (never)" if self.halt == "q_head" else "0 (never) or more (inf is always)"
            raise UserError(f"--halt_threshold: expected {expected} for --halt {self.halt}, got {self.halt_threshold}")

    def _check_drafting(self) -> None:
        if self.draft_tokens < 1:
            raise UserError(f"--draft_tokens: expected at least 1, got {self.draft_tokens}")
        if self.draft_cycles is None:
            return
        if self.draft_cycles < 0:
            raise UserError(f"--draft_cycles: expected at least 0 (0 is one plain pass), got {self.draft_cycles}")
        for name, value, off in (("halt", self.halt, "none"), ("cache_policy", self.cache_policy, "full")):
            if value != off:
                raise UserError(f"--draft_cycles: expected --{name} {off} with it, got --{name} {value}; leave out one of the two")

    def arguments(self, model: Any) -> dict[str, Any]:
        """What differs from the model's own way, as arguments of its `generate`; of a plain model of transformers nothing may differ.

        Raises:
            UserError: A model without cycles, drafts that are not shallower than the run, a `q_head` that was never trained.
        """
        own = {field.name: field.default for field in fields(Effort)}
        asked = {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}
        if self.draft_cycles is None:
            asked.pop("draft_tokens", None)
        else:
            asked["draft_tokens"] = self.draft_tokens
        if not is_recursive(model):
            for name in asked:
                kind = type(model).__name__
                raise UserError(f"--{name}: expected a recursive model, got a {kind}, which has no cycles; leave --{name} out")
            return {}
        self._check_model(model)
        return asked

    def _check_model(self, model: Any) -> None:
        cycles = self.cycles(model)
        if self.halt != "none" and cycles == 0:
            raise UserError(f"--halt: expected a run of at least 1 cycle, got --halt {self.halt} with 0 cycles, which is one plain pass")
        if self.draft_cycles is not None and self.draft_cycles >= cycles:
            raise UserError(
                f"--draft_cycles: expected fewer than the {cycles} cycles of the run, got {self.draft_cycles}: a draft as deep as the "
                "check saves nothing"
            )
        # initialised at exactly 0, and moved by the first step that trains it
        if self.halt == "q_head" and not model.base_model.recursion.q_head.bias.any():
            raise UserError(
                "--halt q_head: this model's q_head was never trained; train it (recursify train --enable_deep_supervision "
                "--halting_weight 0.1), or use --halt kl or --halt entropy, which need no training"
            )

    def cycles(self, model: Any) -> int:
        """Cycles of a run of this recursive model."""
        return int(model.config.H_cycles if self.H_cycles is None else self.H_cycles)

    def settled(self, model: Any) -> Effort:
        """The effort alone, with the model's own cycles where none are asked for: equal for runs that can share a cache."""
        alone = Effort(**{field.name: getattr(self, field.name) for field in fields(Effort)})
        return replace(alone, H_cycles=alone.cycles(model)) if is_recursive(model) else alone


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

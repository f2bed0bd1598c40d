"""How much depth a run spends: its cycles, how it caches them, where a token may halt, how far a shallow pass drafts ahead.

Checked by itself and against a model, and put into the words of the model's `forward` and `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from transformers import GenerationConfig

from ..errors import UserError
from ..network.decoding_recursive_llm import HaltRule
from ..utils.models import is_recursive
from ..utils.options import Options

# Below this a distribution is its largest entry anyway, and logits divided by less are no longer finite.
GREEDY_BELOW = 1e-5
# What changes nothing, in transformers' words.
_NO_PENALTY: dict[str, Any] = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_NO_CUTOFF: dict[str, Any] = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
WHERE_A_DONOR_HAS_IT: dict[str, Any] = {"min_length": 0, "min_new_tokens": 0, "min_p": 0.0}  # else they cost time, or a warning
CachePolicy = Literal["full", "last"]
Halt = Literal["none", "q_head", "kl", "entropy"]


@dataclass(kw_only=True)
class EarlyExit(Options):
    """Early exit: when a token leaves the loop before the last cycle."""

    halt: Halt = "none"
    """Let each token stop at the cycle at which it is ready: as q_head has learnt, when a cycle changes little (kl), or when the next token
    is certain (entropy)."""
    halt_threshold: float | None = None
    """Ready means: q_head above this (default 0.5), kl below it (5e-4 nats), entropy below it (0.1 nats)."""

    def validate(self) -> None:
        """Check all that can be checked without the model.

        Raises:
            UserError: A value out of range, or two that exclude each other.
        """
        _one_of("halt", self.halt, Halt)
        if self.halt_threshold is None:
            return
        if self.halt == "none":
            raise UserError(f"--halt_threshold: expected --halt q_head, kl or entropy with it, got {self.halt_threshold} and no --halt")
        most = 1.0 if self.halt == "q_head" else math.inf
        if not 0 <= self.halt_threshold <= most:
            expected = "0 (always) to 1 (never)" if self.halt == "q_head" else "0 (never) or more (inf is always)"
            raise UserError(f"--halt_threshold: expected {expected} for --halt {self.halt}, got {self.halt_threshold}")

    @property
    def criterion(self) -> str | None:
        """Of `HALT_CRITERIA`; None for a run at fixed depth."""
        return None if self.halt == "none" else self.halt

    def rule(self, model: Any) -> HaltRule | None:
        """The rule by which tokens of this model halt; None at fixed depth."""
        return HaltRule.of(model, self.criterion, self.halt_threshold)


@dataclass(kw_only=True)
class DecodingOptions(EarlyExit):
    """Depth and KV cache: how much depth a run spends; None leaves the choice to the model."""

    H_cycles: int | None = None
    """Cycles per token; 0 is one plain pass. Default: the checkpoint's."""
    cache_policy: CachePolicy = "full"
    """What is kept of earlier tokens: full, one slot per application of a layer; last, one per layer, as few as a plain model has."""
    draft_cycles: int | None = None
    """Draft with so many cycles and check several drafts at a time at full depth: the same text, sooner. 0 drafts with a plain pass."""
    draft_tokens: int = 16
    """Draft at most so many tokens at a time; how many follows from how often drafts have been right."""

    def validate(self) -> None:
        """As `EarlyExit.validate`."""
        if self.H_cycles is not None and self.H_cycles < 0:
            raise UserError(f"--H_cycles: expected at least 0 (0 is one plain pass), got {self.H_cycles}")
        _one_of("cache_policy", self.cache_policy, CachePolicy)
        super().validate()
        self._validate_drafting()

    def _validate_drafting(self) -> None:
        if self.draft_tokens < 1:
            raise UserError(f"--draft_tokens: expected at least 1, got {self.draft_tokens}")
        if self.draft_cycles is None:
            return
        if self.draft_cycles < 0:
            raise UserError(f"--draft_cycles: expected at least 0 (0 is one plain pass), got {self.draft_cycles}")
        for name, value, off in (("halt", self.halt, "none"), ("cache_policy", self.cache_policy, "full")):
            if value != off:
                raise UserError(f"--draft_cycles: expected --{name} {off} with it, got --{name} {value}; leave out one of the two")

    def generate_kwargs(self, model: Any) -> dict[str, Any]:
        """What differs from the model's own way, as arguments of its `generate`; of a plain model of transformers nothing may differ.

        Raises:
            UserError: A model without cycles, drafts that are not shallower than the run, a `q_head` that was never trained.
        """
        own = {field.name: field.default for field in fields(DecodingOptions)}
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

    def settled(self, model: Any) -> DecodingOptions:
        """The effort alone, with the model's own cycles where none are asked for: equal for runs that can share a cache."""
        alone = DecodingOptions(**{field.name: getattr(self, field.name) for field in fields(DecodingOptions)})
        return replace(alone, H_cycles=alone.cycles(model)) if is_recursive(model) else alone


@dataclass(kw_only=True)
class Sampling(DecodingOptions):
    """Sampling: how the next token is chosen, from which depth, and where the text ends."""

    max_new_tokens: int = 100
    """Write at most so many tokens; an end token ends the text earlier."""
    temperature: float = 0.8
    """Randomness of the choice; 0 always takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1.0 is off."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """End the text before the first of these strings, e.g. --stop "Question:" "###"."""

    def validate(self) -> None:
        """As `EarlyExit.validate`."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature: expected a number of at least 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p: expected a number above 0 and at most 1 (1 is off), got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"--top_k: expected at least 0 (0 is off), got {self.top_k}")
        if "" in self.stop:
            raise UserError("--stop: expected some text before which to end, got ''")
        super().validate()

    def as_transformers(self, ends: Sequence[int], pad: int) -> GenerationConfig:
        """The same in transformers' words. Penalties, cutoffs and several texts that a donor's generation_config.json sets are switched
        off: what is None here would be taken from there."""
        greedy = self.temperature < GREEDY_BELOW
        choice = {} if greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, **_NO_CUTOFF}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=not greedy,
            num_beams=1,
            num_return_sequences=1,
            **_NO_PENALTY,
            use_cache=True,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **choice,
        )


def _one_of(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise UserError(f"--{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")

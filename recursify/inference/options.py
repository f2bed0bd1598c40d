"""Decoding options: cycles, KV cache policy, early exit, self-speculative decoding, sampling.

They are validated alone and against a model, and translated into arguments of the model's `forward` and `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import UserError
from ..utils.models import is_recursive
from ..utils.options import Options

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from ..network.decoding_recursive_llm import HaltRule

# Below this the distribution is one-hot, and dividing logits by less overflows.
GREEDY_BELOW = 1e-5
DRAFT_TOKENS = 16
STATIC_CACHE_PAYS = 256  # new tokens from which a compilation of some seconds is worth it; a guess until a GPU has measured it
CachePolicy = Literal["full", "last"]
Halt = Literal["none", "q_head", "kl", "entropy"]


@dataclass(kw_only=True)
class EarlyExit(Options):
    """Early exit: when a token stops before the last cycle."""

    halt: Halt = "none"
    """Early exit per token: by the trained halting head (q_head), by the KL divergence between successive cycles (kl), or by the entropy
    of the prediction (entropy)."""
    halt_threshold: float | None = None
    """Exit when q_head is above it, KL below it, or entropy below it. Default: 0.5, 5e-4 nats, 0.1 nats."""

    def validate(self) -> None:
        """Check everything that needs no model.

        Raises:
            UserError: A value out of range, or mutually exclusive ones.
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
        """One of `HALT_CRITERIA`; None at fixed depth."""
        return None if self.halt == "none" else self.halt

    def rule(self, model: Any) -> HaltRule | None:
        """The halting rule for this model; None at fixed depth."""
        from ..network.decoding_recursive_llm import HaltRule  # here: flags are read without torch

        return HaltRule.of(model, self.criterion, self.halt_threshold)


@dataclass(kw_only=True)
class DecodingOptions(EarlyExit):
    """Depth and KV cache: number of cycles and cache policy. None uses the model's default."""

    H_cycles: int | None = None
    """Cycles per token; 0 is one plain pass. Default: that of the checkpoint."""
    cache_policy: CachePolicy = "full"
    """KV cache: full, one slot per layer application; last, one per layer, as small as that of a plain model, but an approximation."""
    static_cache: bool | None = None
    """Decode with a static KV cache and compiled passes: faster per token on a GPU, after some seconds of compilation. Default: on GPUs,
    for 256 or more new tokens, without early exit, drafts or a conversation that goes on."""
    draft_cycles: int | None = None
    """Self-speculative decoding: draft tokens with N cycles (0: a plain pass) and verify them at full depth. Greedy output is
    identical in float32. Default: off."""
    draft_tokens: int = DRAFT_TOKENS
    """Longest draft; the actual length adapts to the acceptance rate."""

    def validate(self) -> None:
        """As `EarlyExit.validate`."""
        if self.H_cycles is not None and self.H_cycles < 0:
            raise UserError(f"--H_cycles: expected at least 0 (0 is one plain pass), got {self.H_cycles}")
        _one_of("cache_policy", self.cache_policy, CachePolicy)
        super().validate()
        if self.static_cache and self.halt != "none":
            raise UserError(f"--static_cache: expected --halt none with it, got --halt {self.halt}, whose passes are of unequal depth")
        self._validate_drafting()

    def _validate_drafting(self) -> None:
        if self.draft_tokens < 1:
            raise UserError(f"--draft_tokens: expected at least 1, got {self.draft_tokens}")
        if self.draft_cycles is None:
            if self.draft_tokens != DRAFT_TOKENS:
                raise UserError(f"--draft_tokens: expected --draft_cycles with it, got {self.draft_tokens} and no --draft_cycles")
            return
        if self.draft_cycles < 0:
            raise UserError(f"--draft_cycles: expected at least 0 (0 is one plain pass), got {self.draft_cycles}")
        if self.static_cache:
            raise UserError(
                "--draft_cycles: drafts take tokens back, which a static cache cannot; leave out --static_cache or --draft_cycles"
            )
        for name, value, off in (("halt", self.halt, "none"), ("cache_policy", self.cache_policy, "full")):
            if value != off:
                raise UserError(f"--draft_cycles: expected --{name} {off} with it, got --{name} {value}; leave out one of the two")

    def generate_kwargs(self, model: Any) -> dict[str, Any]:
        """The options that are set, as arguments of the model's `generate`; empty for a plain model.

        Raises:
            UserError: A model without cycles, draft_cycles not below the depth, a `q_head` that was never trained.
        """
        own = {field.name: field.default for field in fields(DecodingOptions)}
        asked = {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}
        asked.pop("static_cache", None)  # in the generation config
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
        from ..checkpoints.configs import check_cycles  # here: flags are read without transformers

        check_cycles(model.config, cycles, "H_cycles")
        if self.halt != "none" and cycles == 0:
            raise UserError(f"--halt: expected a run of at least 1 cycle, got --halt {self.halt} with 0 cycles, which is one plain pass")
        if self.draft_cycles is not None and self.draft_cycles >= cycles:
            raise UserError(
                f"--draft_cycles: expected fewer than the {cycles} cycles of the run, got {self.draft_cycles}: a draft as deep as the "
                "verification saves nothing"
            )
        # initialised at exactly 0; the first training step changes it
        if self.halt == "q_head" and not model.base_model.recursion.q_head.bias.any():
            raise UserError(
                "--halt q_head: this model's q_head was never trained; train it (recursify train --enable_deep_supervision "
                "--halting_weight 0.1), or use --halt kl or --halt entropy, which need no training"
            )

    def cycles(self, model: Any) -> int:
        """The number of cycles for this recursive model."""
        return int(model.config.H_cycles if self.H_cycles is None else self.H_cycles)

    def resolved(self, model: Any) -> DecodingOptions:
        """These options with the model's defaults filled in: equal for runs that can share a KV cache."""
        alone = DecodingOptions(**{field.name: getattr(self, field.name) for field in fields(DecodingOptions)})
        return replace(alone, H_cycles=alone.cycles(model)) if is_recursive(model) else alone


@dataclass(kw_only=True)
class Sampling(DecodingOptions):
    """Sampling: how the next token is chosen and when generation stops."""

    max_new_tokens: int = 100
    """Maximum number of new tokens; an end token ends the text earlier."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this total probability; 1.0 is off."""
    top_k: int = 0
    """Sample among the N most likely tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """Stop strings, not included in the output, e.g. --stop "Question:" "###"."""

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
            raise UserError("--stop: expected strings of at least one character, got ''")
        super().validate()

    def uses_static_cache(self, device: Any) -> bool:
        """Whether a text on this `torch.device` that begins without a cache is decoded with a static one."""
        if self.static_cache is not None:
            return self.static_cache
        pays = device.type == "cuda" and self.max_new_tokens >= STATIC_CACHE_PAYS
        return pays and self.draft_cycles is None and self.halt == "none"

    def as_transformers(self, ends: Sequence[int], pad: int, static_cache: bool = False) -> GenerationConfig:
        """As a GenerationConfig, for `generate` inside `without_donor_settings`: what is None here would be taken from the model's."""
        from transformers import GenerationConfig

        greedy = self.temperature < GREEDY_BELOW
        choice = {} if greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=not greedy,
            use_cache=True,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            cache_implementation="static" if static_cache else None,
            **choice,
        )


def _one_of(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise UserError(f"--{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")

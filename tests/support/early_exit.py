"""A random recursive model whose tokens exit at different cycles, and thresholds at which they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
)

from recursify import RecursiveLLM
from recursify.network.configuration_recursive_llm import from_donor
from tests.support.tiny import tiny_config

CRITERIA = ("q_head", "kl", "entropy")


NEVER = {"q_head": 1.0, "kl": 0.0, "entropy": 0.0}


def earliest(model: RecursiveLLM, criterion: str) -> int:
    """The first cycle at which a token can halt."""
    return model.config.first_exit + (criterion == "kl")


@cache
def recursive(family: str = "qwen2", layers: int = 6, seed: int = 0, **shape: int) -> RecursiveLLM:
    """Random, stirred, in evaluation mode, and shared: read only. By default prelude 2, loop 2, coda 2, H 3, L 1."""
    overrides = {"vocab_size": shape.pop("vocab_size", 96), "num_hidden_layers": layers}
    shape = {"prelude_layers": 2, "coda_layers": 2, "H_cycles": 3, "L_cycles": 1, "lora_alpha": shape.get("lora_rank", 1) or 1} | shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        donor = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        config = from_donor(donor.config, list(range(layers)), L_layers=layers - shape["prelude_layers"] - shape["coda_layers"], **shape)
        model = RecursiveLLM(config)
        model.load_state_dict(donor.state_dict(), strict=False)
        with torch.no_grad():
            for name, parameter in model.model.recursion.named_parameters():
                parameter.normal_(std=0.1 if "init" in name else 0.3 if "lora" in name else 1.0)  # states still differ from token to token
    return model.eval()


def ids(*shape: int, seed: int = 1, below: int = 96) -> torch.Tensor:
    return torch.randint(1, below, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def tokens_through(*modules: torch.nn.Module) -> Iterator[list[int]]:
    """How many token columns went through each module in all."""
    counts = [0] * len(modules)

    def counter(i: int) -> Any:
        def count(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            counts[i] += args[0].shape[-2]

        return count

    handles = [module.register_forward_pre_hook(counter(i)) for i, module in enumerate(modules)]
    yield counts
    for handle in handles:
        handle.remove()


@cache
@torch.no_grad()
def _middling(model: RecursiveLLM, criterion: str, quantile: float) -> float:
    out = model.model(ids(2, 16, seed=9), use_cache=False, output_cycle_states=True, H_cycles=2)
    early, late = (model.lm_head(state).log_softmax(-1) for state in out.cycle_states)
    scores = {
        "q_head": out.halt_logits[0].sigmoid(),
        "kl": (late.exp() * (late - early)).sum(-1),
        "entropy": -(early.exp() * early).sum(-1),
    }
    return scores[criterion].quantile(quantile).item()


def middling(model: RecursiveLLM, criterion: str, quantile: float = 0.5) -> float:
    """A threshold at which some tokens halt at the earliest cycle, and some do not."""
    return _middling(model, criterion, round(quantile, 1))


@torch.no_grad()
def splitting(model: RecursiveLLM, x: torch.Tensor, criterion: str, quantile: float = 0.5, mask: torch.Tensor | None = None) -> float:
    """A threshold at which some of these tokens halt at the earliest cycle and some do not: between two neighbouring scores of the
    criterion at its earliest cycle. Needs a deeper cycle and tokens with different scores."""
    cycle, plain = earliest(model, criterion), model.model(x, attention_mask=mask, use_cache=False, H_cycles=0)
    out = model.model(x, attention_mask=mask, use_cache=False, output_cycle_states=True, H_cycles=max(1, cycle))
    before, now = (
        model.lm_head(state).log_softmax(-1)
        for state in (plain.last_hidden_state, plain.last_hidden_state, *out.cycle_states)[cycle : cycle + 2]
    )
    if criterion == "q_head":
        out = model.model(x, attention_mask=mask, use_cache=False, output_cycle_states=True, halt="q_head", halt_threshold=0.0)
        score = out.halt_logits[0].sigmoid()  # all tokens exit at the first cycle that they can exit at
    else:
        score = torch.distributions.Categorical(logits=now).entropy() if criterion == "entropy" else (now.exp() * (now - before)).sum(-1)
    ordered = score[torch.ones_like(x).bool() if mask is None else mask.bool()].unique()
    above = 1 + round(quantile * (len(ordered) - 2))
    return ((ordered[above - 1] + ordered[above]) / 2).item()


def exits(halt_cycles: torch.Tensor, mask: torch.Tensor | None = None) -> int:
    """Number of different cycles at which tokens halted, without padding."""
    return len(set((halt_cycles if mask is None else halt_cycles[mask.bool()]).flatten().tolist()))

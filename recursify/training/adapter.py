"""Recursion as an adapter: the donor's weights are frozen; gains, initial states and low-rank updates of the looped layers are trained."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..checkpoints import checkpoint
from ..errors import UserError
from ..network.modeling_recursive_llm import RecursiveLLM


def with_adapter(model: Any, rank: int = 16, alpha: float = 32.0, targets: str = "all", per: str = "model") -> RecursiveLLM:
    """The model as an adapter of its donor, with low-rank updates that do nothing yet; the tensors are those of the model.

    Args:
        model: A recursive model with all layers of its donor.
        rank, alpha: Of the updates, which are scaled by alpha / rank.
        targets: `attention`, `mlp` or `all` linear layers of the loop.
        per: `model`, one update for all cycles, or `cycle`, one for each.
    """
    config = copy.deepcopy(model.config)
    pairs = max(1, config.H_cycles) if per == "cycle" else 1
    for name, value in {"lora_rank": rank, "lora_alpha": alpha, "lora_targets": targets, "lora_pairs": pairs}.items():
        setattr(config, name, value)
    other = checkpoint.build(config, model.state_dict(), "adapter", model.dtype)
    other.generation_config = model.generation_config
    return other

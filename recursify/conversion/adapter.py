"""From a converted model to an adapter of its donor.

The donor's weights are frozen; trained is the recursion alone, with low-rank updates (LoRA, arXiv 2106.09685) of the linear layers in the
loop. The formula is in network/modeling_recursive_llm.py.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch

from ..checkpoints import adapter, checkpoint
from ..checkpoints.donor import open_donor
from ..errors import UserError
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import plan_of

RANK, ALPHA = 16, 32.0


def as_adapter(
    model: RecursiveLLM,
    *,
    lora_rank: int = RANK,
    lora_alpha: float = ALPHA,
    lora_targets: Literal["all", "attention", "mlp"] = "all",
    lora_per: Literal["model", "cycle"] = "model",
    donor: str | None = None,
) -> RecursiveLLM:
    """A converted model as an adapter of its donor: the same tensors, frozen, and low-rank updates that change nothing yet.

    Trained, saved and loaded, it is the donor at 0 cycles, bit for bit; a saved adapter holds the parameters of the recursion alone.

    Args:
        model: A model with all layers of its donor, not trained yet. It shares its tensors with the result.
        lora_rank, lora_alpha: Rank of the updates, which are scaled by lora_alpha / lora_rank.
        lora_targets: Which linear layers of the loop have updates.
        lora_per: `model`: one update for all cycles; `cycle`: one for each of the H_cycles, the last also for deeper ones.
        donor: Folder or hub id of the donor, if not the one that the model was converted from.

    Raises:
        UserError: A value out of range, a model that lacks layers of its donor, or a donor that is not there or has other weights.
    """
    plan, name = plan_of(model.config), "--adapter"
    if plan is None or not plan.keeps_donor:
        raise UserError(f"{name}: expected a model with all layers of its donor; convert it with --keep_donor")
    record = dict(model.config.conversion or {})
    place, revision = (donor, None) if donor is not None else adapter.donor_place(record, name)
    found = open_donor(place, revision=revision)
    state = model.state_dict()
    differ = [tensor for tensor in found.tensor_names if tensor in state and not _equal(found.read(tensor), state[tensor])]
    if differ:
        raise UserError(
            f"{name}: expected the weights of {place}, but {len(differ)} tensors differ, {differ[0]} first: the model was trained, or "
            "another model was converted; start from a model that was converted with --keep_donor and not trained"
        )
    config = copy.deepcopy(model.config)
    config.conversion = record | {adapter.HASH: adapter.donor_hash(found)}
    fields = {"lora_rank": lora_rank, "lora_alpha": float(lora_alpha), "lora_targets": lora_targets}
    try:
        if lora_rank < 1:
            raise ValueError(f"lora_rank: expected at least 1, got {lora_rank}")
        for field, value in {**fields, "lora_pairs": config.H_cycles if lora_per == "cycle" else 1}.items():
            setattr(config, field, value)
        config.check_adapter()
    except ValueError as error:
        raise UserError(f"--{error}") from error
    other = checkpoint.build(config, state, name, model.dtype)
    other.generation_config = model.generation_config
    return other


def _equal(stored: torch.Tensor, tensor: torch.Tensor) -> bool:
    return torch.equal(stored.to(tensor.dtype), tensor.detach().cpu())

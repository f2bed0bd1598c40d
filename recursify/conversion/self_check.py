"""Check a finished conversion: every tensor against the donor's files, the logits against transformers' own class."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints import checkpoint
from ..checkpoints.donor import Donor
from ..errors import UserError
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import ConversionPlan
from .mapping import TensorMapping

_COMPARED_TOKENS = 4  # few, because each pass reads all weights; equality is bit by bit


@dataclass(frozen=True)
class SelfCheck:
    """Result of the comparison on a few tokens.

    Args:
        reference: The model of the comparison.
        plain_difference: Largest absolute difference of the logits of a plain pass (H_cycles = 0). Always 0.
        cycle_differences: The same after each cycle: 0 at gain 0, otherwise the effect of the start gain.
        tensors_compared: Number of tensors compared with the donor's files, element by element.
    """

    reference: str
    plain_difference: float
    cycle_differences: tuple[float, ...]
    tensors_compared: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "plain_difference": self.plain_difference,
            "cycle_differences": list(self.cycle_differences),
            "tensors_compared": self.tensors_compared,
        }


def compare_tensors(donor: Donor, mapping: TensorMapping, model: RecursiveLLM) -> None:
    """Compare every copied tensor with its file, which is read again.

    Raises:
        RuntimeError: A tensor differs.
    """
    state = model.state_dict()
    for ours, source in mapping.copied.items():
        if not _same_bits(state[ours], donor.pieces(source)):
            raise RuntimeError(f"{ours} differs from {source} of {donor.name} after conversion")


def compare_logits(donor: Donor, plan: ConversionPlan, mapping: TensorMapping, model: RecursiveLLM, twin: Any) -> SelfCheck:
    """Compare the logits of a plain pass, and of every cycle, with transformers' own class over the same layers.

    Args:
        twin: A model of that class with the same tensors.

    Raises:
        UserError: The donor's own logits are not finite.
        RuntimeError: The logits of a plain pass differ.
    """
    ids = torch.randint(model.config.vocab_size, (1, _COMPARED_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = twin(ids, use_cache=False).logits
        if not expected.isfinite().all():
            raise UserError(f"{donor.name}: its layers {plan.indices} give logits that are not finite; the donor's weights are damaged")
        plain_state = model.model(ids, H_cycles=0, use_cache=False).last_hidden_state
        plain = (model.lm_head(plain_state) - expected).abs().max().item()
        cycles = model.model(ids, output_cycle_states=True, use_cache=False).cycle_states
        # a head with a large vocabulary takes as long as several layers; equal states need not be read out again
        by_cycle = tuple(plain if torch.equal(z, plain_state) else (model.lm_head(z) - expected).abs().max().item() for z in cycles)
    if plain != 0.0:
        raise RuntimeError(f"a plain pass differs from {type(twin).__name__} over layers {plan.indices} by {plain}")
    name = "the donor itself" if plan.keeps_donor else f"{type(twin).__name__} over layers {plan.indices}"
    return SelfCheck(name, plain, by_cycle, len(mapping.copied))


def _same_bits(tensor: torch.Tensor, pieces: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor has the same bits as a sequence of pieces of a file."""
    flat, start = tensor.flatten(), 0
    for piece in pieces:
        one, other = flat[start : start + len(piece)], piece.to(tensor.dtype)
        # torch compares element by element: single bytes, which fit any tensor, take seven times as long as 8-byte words
        wide = len(one) * one.itemsize % 8 == 0 and one.storage_offset() * one.itemsize % 8 == 0
        if not torch.equal(*(part.view(torch.int64 if wide else torch.uint8) for part in (one, other))):
            return False
        start += len(piece)
    return start == len(flat)


def plain_twin(donor_config: PreTrainedConfig, plan: ConversionPlan, model: RecursiveLLM) -> Any:
    """transformers' own model over the plan's layers, with the same tensors (not copies)."""
    config = copy.deepcopy(donor_config)
    config.num_hidden_layers, config.tie_word_embeddings = len(plan.indices), model.config.tie_word_embeddings
    for name in ("layer_types", "no_rope_layers"):
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[i] for i in plan.indices])
    state = {name: tensor for name, tensor in model.state_dict().items() if ".recursion." not in name}
    kernel = model.config._attn_implementation
    with checkpoint.quiet():
        twin = model.donor_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype, attn_implementation=kernel)
    return twin.eval()

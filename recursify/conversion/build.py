"""Build the recursive model around a donor's tensors."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoints import checkpoint
from ..checkpoints.donor import Donor
from ..checkpoints.guide_names import EMBED, HEAD
from ..errors import UserError
from ..network.configuration_recursive_llm import from_donor
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import ConversionPlan, conversion_record
from .mapping import TensorMapping, match_tensors
from .settings import ConvertSettings


def recursive_config(donor: Donor, plan: ConversionPlan, settings: ConvertSettings) -> Any:
    """The configuration of the model that a plan describes.

    Raises:
        UserError: A cycle count, gain or injection out of range.
    """
    try:
        return from_donor(
            donor.config,
            plan.indices,
            prelude_layers=len(plan.prelude),
            L_layers=len(plan.loop),
            coda_layers=len(plan.coda),
            H_cycles=settings.H_cycles,
            L_cycles=settings.L_cycles,
            gain_init=settings.gain,
            injection=settings.injection,
            freeze_embeddings=settings.freeze_embeddings,
            conversion=conversion_record(plan, donor.origin),
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error


def build_model(donor: Donor, plan: ConversionPlan, config: Any, dtype: torch.dtype | None = None) -> tuple[RecursiveLLM, TensorMapping]:
    """The model around the donor's tensors, and the mapping of tensors.

    Args:
        config: From `recursive_config`. `tie_word_embeddings` is set to False in it where the donor's files have a head of their own.
        dtype: Dtype of the model; that in which transformers loads the donor where None.
    """
    config.tie_word_embeddings = tied = bool(config.tie_word_embeddings) and not _has_own_head(donor)
    names = [name for name in checkpoint.stored_names(config) if not (tied and name == HEAD)]
    mapping = match_tensors(donor.tensor_names, names, plan, tied)
    state = {name: donor.read(source) for name, source in mapping.copied.items()}
    model = checkpoint.build(config, state, donor.name, dtype or donor.dtype)
    model.generation_config = donor.generation_config()
    return model, mapping


def _has_own_head(donor: Donor) -> bool:
    """Whether the files hold a head that differs from the embeddings. As in transformers, the files override `tie_word_embeddings`."""
    return {HEAD, EMBED} <= set(donor.tensor_names) and not torch.equal(donor.read(HEAD), donor.read(EMBED))

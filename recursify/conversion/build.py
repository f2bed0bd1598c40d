"""The recursive model around a donor's tensors."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoints import checkpoint
from ..checkpoints.donor import Donor
from ..checkpoints.guide_names import EMBED, HEAD
from ..errors import UserError
from ..network.configuration_recursive_llm import from_donor
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import ConversionPlan
from .mapping import TensorMapping, match_tensors
from .settings import ConvertSettings


def recursive_config(donor: Donor, plan: ConversionPlan, settings: ConvertSettings) -> Any:
    """The configuration of the model that a plan makes.

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
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error


def build_model(donor: Donor, plan: ConversionPlan, config: Any) -> tuple[RecursiveLLM, TensorMapping]:
    """The model, around the donor's tensors in the type in which transformers loads the donor, and where each tensor went.

    Args:
        config: As `recursive_config` makes it; a tie that the donor's files contradict is undone in it.
    """
    config.tie_word_embeddings = tied = bool(config.tie_word_embeddings) and not _has_own_head(donor)
    ours = [name for name in checkpoint.stored_names(config) if not (tied and name == HEAD)]
    fates = match_tensors(donor.tensor_names, ours, plan, tied)
    model = checkpoint.build(config, {name: donor.read(source) for name, source in fates.copied.items()}, donor.name, donor.dtype)
    model.generation_config = donor.generation_config()
    return model, fates


def _has_own_head(donor: Donor) -> bool:
    """Whether the files hold a head of its own, whatever the configuration says of a tie; transformers, too, goes by the files then."""
    return {HEAD, EMBED} <= set(donor.tensor_names) and not torch.equal(donor.read(HEAD), donor.read(EMBED))

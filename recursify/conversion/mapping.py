"""Which tensor of a donor becomes which of ours, and the law that none is lost on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checkpoints.guide_names import HEAD, LAYER, differences
from ..errors import UserError
from ..network.modeling_recursive_llm import View
from ..network.plan import ConversionPlan

# Saved by old releases of transformers; a function of the configuration.
_DERIVED = re.compile(r".*rotary_emb\.inv_freq")


@dataclass
class TensorMapping:
    """What becomes of every tensor of a conversion.

    Args:
        copied: Our name -> the donor's.
        dropped: The donor's name -> why it goes nowhere.
        fresh: Our name -> why no donor tensor fills it.
    """

    copied: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)


def match_tensors(donor_names: Iterable[str], our_names: Iterable[str], plan: ConversionPlan, tied: bool) -> TensorMapping:
    """Give every tensor a fate, in both directions.

    Args:
        donor_names: Every tensor in the donor's files.
        our_names: Every tensor that our model stores, under our names; without the head when it is tied.
        tied: Whether the head is the embedding matrix.

    Raises:
        UserError: A donor tensor that nobody wants, or a tensor of ours that nobody fills, by name.
    """
    fates, place = TensorMapping(), {donor: ours for ours, donor in enumerate(plan.indices)}
    wanted, leftover = set(our_names), []
    for name in donor_names:
        layer = LAYER.fullmatch(name)
        ours = name if layer is None else f"model.layers.{place.get(int(layer[1]))}.{layer[2]}"
        if _DERIVED.fullmatch(name):
            fates.dropped[name] = "a function of the configuration, recomputed"
        elif layer is not None and int(layer[1]) < plan.donor_layers and int(layer[1]) not in place:
            fates.dropped[name] = f"layer {layer[1]} is not in the plan"
        elif name == HEAD and tied:
            fates.dropped[name] = "tied: the head is the embedding matrix"
        elif ours in wanted:
            fates.copied[ours] = name
        else:
            leftover.append(name)
    fates.fresh = {name: "the donor has no recursion" for name in sorted(wanted - set(fates.copied)) if name.startswith("model.recursion.")}
    missing = sorted(wanted - set(fates.copied) - set(fates.fresh))
    if missing or leftover:
        raise UserError(
            f"conversion of {plan.donor}: tensors without a fate: {differences(missing, sorted(leftover))}. "
            "The donor's files do not match its config.json; each tensor must be copied, dropped with a reason, or initialised with one"
        )
    return fates


def _copy_module(source: Any, target: Any) -> None:
    source, target = (part.module if isinstance(part, View) else part for part in (source, target))
    theirs, ours = source.state_dict(), target.state_dict()
    shapes = {name: [state[name].shape if name in state else None for state in (theirs, ours)] for name in {**theirs, **ours}}
    if differ := [name for name, (there, here) in shapes.items() if there != here]:
        raise UserError(
            f"{type(source).__name__} -> {type(target).__name__}: {', '.join(differ)} do not match in name or shape; "
            "the recursive model must have the donor's own configuration"
        )
    target.load_state_dict(theirs)


def copy_attention_weights(source: nn.Module, target: Any) -> None:
    """Copy a donor's attention into ours: q, k, v, o with their biases, and the q/k norms where there are any (guide, step 4).

    Raises:
        UserError: Names or shapes differ; nothing is copied then.
    """
    _copy_module(source, target)


def copy_mlp_weights(source: nn.Module, target: Any) -> None:
    """Copy a donor's feed-forward into ours: gate, up and down (guide, step 4).

    Raises:
        UserError: Names or shapes differ; nothing is copied then.
    """
    _copy_module(source, target)

"""The mapping from a donor's tensors to those of the recursive model. Unmapped tensors are an error, in both directions."""

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

# Saved by old releases of transformers; computed from the configuration.
_DERIVED = re.compile(r".*rotary_emb\.inv_freq")


@dataclass
class TensorMapping:
    """The mapping of every tensor of a conversion.

    Args:
        copied: Name in the recursive model -> name in the donor.
        dropped: Name in the donor -> reason why it is not copied.
        fresh: Name in the recursive model -> reason why it is initialised.
    """

    copied: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)


def match_tensors(donor_names: Iterable[str], names: Iterable[str], plan: ConversionPlan, tied: bool) -> TensorMapping:
    """Map every tensor, in both directions.

    Args:
        donor_names: Every tensor in the donor's files.
        names: Every tensor that the recursive model stores, under transformers' names; without the head where it is tied.
        tied: Whether the head is the embedding matrix.

    Raises:
        UserError: Unmapped tensors on either side, by name.
    """
    mapping, place = TensorMapping(), {donor: own for own, donor in enumerate(plan.indices)}
    wanted, leftover = set(names), []
    for name in donor_names:
        layer = LAYER.fullmatch(name)
        own = name if layer is None else f"model.layers.{place.get(int(layer[1]))}.{layer[2]}"
        if _DERIVED.fullmatch(name):
            mapping.dropped[name] = "computed from the configuration"
        elif layer is not None and int(layer[1]) < plan.donor_layers and int(layer[1]) not in place:
            mapping.dropped[name] = f"layer {layer[1]} is not in the plan"
        elif name == HEAD and tied:
            mapping.dropped[name] = "tied: the head is the embedding matrix"
        elif own in wanted:
            mapping.copied[own] = name
        else:
            leftover.append(name)
    unfilled = sorted(wanted - set(mapping.copied))
    mapping.fresh = {name: "the donor has no recursion" for name in unfilled if name.startswith("model.recursion.")}
    missing = [name for name in unfilled if name not in mapping.fresh]
    if missing or leftover:
        raise UserError(
            f"conversion of {plan.donor}: unmapped tensors: {differences(missing, sorted(leftover))}. "
            "The donor's files do not match its config.json; download or copy the donor again"
        )
    return mapping


def _copy_module(source: Any, target: Any) -> None:
    source, target = (part.module if isinstance(part, View) else part for part in (source, target))
    given, own = source.state_dict(), target.state_dict()
    shapes = {name: [state[name].shape if name in state else None for state in (given, own)] for name in {**given, **own}}
    if differ := [name for name, (there, here) in shapes.items() if there != here]:
        raise UserError(
            f"{type(source).__name__} -> {type(target).__name__}: {', '.join(differ)} do not match in name or shape; "
            "the recursive model must have the donor's own configuration"
        )
    target.load_state_dict(given)


def copy_attention_weights(source: nn.Module, target: Any) -> None:
    """Copy the attention of a donor layer: q, k, v, o with their biases, and q/k norms if any (guide, step 4).

    Raises:
        UserError: Names or shapes differ; nothing is copied.
    """
    _copy_module(source, target)


def copy_mlp_weights(source: nn.Module, target: Any) -> None:
    """Copy the feed-forward of a donor layer: gate, up and down (guide, step 4).

    Raises:
        UserError: Names or shapes differ; nothing is copied.
    """
    _copy_module(source, target)

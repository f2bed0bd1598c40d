"""Names of tensors: donor to ours, ours to the guides', and the law that none is lost on the way.

Three namings of one tensor, for layer 10 of a donor that became layer 1 of the loop behind two prelude layers:

    donor    model.layers.10.self_attn.q_proj.weight
    ours     model.layers.3.self_attn.q_proj.weight          transformers' names, as PEFT and quantisers expect them
    guides'  inner.L_level.layers.1.self_attn.wq.weight      in `.pt` files, and as attributes of `model.inner`

The table of names is GUIDE_NAMES beside the model; everything here is derived from it. Floor 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..conversion.layer_selection import ConversionPlan
from ..errors import UserError
from ..network.configuration_recursive_llm import RecursiveLLMConfig
from ..network.modeling_recursive_llm import GUIDE_NAMES, View

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
# Saved by old releases of transformers; a function of the configuration.
_DERIVED = re.compile(r".*rotary_emb\.inv_freq")


def guide_name(name: str, config: RecursiveLLMConfig) -> str:
    """The guides' name of one of our tensors."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return "inner." + name.removeprefix("model.").removeprefix("recursion.")
    index, rest = int(match[1]), match[2]
    P, K = config.prelude_layers, config.L_layers
    part, first = ("prelude", 0) if index < P else ("L_level", P) if index < P + K else ("coda", P + K)
    module, _, tail = rest.partition(".")
    for guides, ours in GUIDE_NAMES.get(module, {}).items():
        if tail.split(".")[0] == ours:
            tail = tail.replace(ours, guides, 1)
    return f"inner.{part}.layers.{index - first}.{module}.{tail}"


def guide_names(names: Iterable[str], config: RecursiveLLMConfig) -> dict[str, str]:
    """Our name -> the guides', one to one."""
    table = {name: guide_name(name, config) for name in names}
    assert len(set(table.values())) == len(table), "two tensors of ours share one of the guides' names"
    return table


def to_guides(state: dict[str, Any], config: RecursiveLLMConfig) -> dict[str, Any]:
    """A state dict under the guides' names; the same tensors."""
    table = guide_names(state, config)
    return {table[name]: tensor for name, tensor in state.items()}


def from_guides(state: dict[str, Any], ours: Iterable[str], config: RecursiveLLMConfig, where: str) -> dict[str, Any]:
    """The inverse of `to_guides`.

    Args:
        state: As read from a file.
        ours: Every name of ours that the model has.
        where: The file, for the message.

    Raises:
        UserError: Names missing or left over.
    """
    table = {guides: name for name, guides in guide_names(ours, config).items()}
    missing, extra = sorted(set(table) - set(state)), sorted(set(state) - set(table))
    if missing or extra:
        raise UserError(f"{where}: model_state_dict does not match its config: {_differences(missing, extra)}")
    return {table[name]: tensor for name, tensor in state.items()}


def _differences(missing: list[str], extra: list[str], most: int = 6) -> str:
    parts = [f"{len(names)} {word} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
             for word, names in (("missing", missing), ("left over", extra)) if names]  # fmt: skip
    return "; ".join(parts)


@dataclass
class Fates:
    """What becomes of every tensor of a conversion.

    Args:
        copied: Our name -> the donor's.
        dropped: The donor's name -> why it goes nowhere.
        fresh: Our name -> why no donor tensor fills it.
    """

    copied: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)


def settle(donor_names: Iterable[str], our_names: Iterable[str], plan: ConversionPlan, tied: bool) -> Fates:
    """Give every tensor a fate, in both directions.

    Args:
        donor_names: Every tensor in the donor's files.
        our_names: Every tensor that our model stores, under our names; without the head when it is tied.
        tied: Whether the head is the embedding matrix.

    Raises:
        UserError: A donor tensor that nobody wants, or a tensor of ours that nobody fills, by name.
    """
    fates, place = Fates(), {donor: ours for ours, donor in enumerate(plan.indices)}
    wanted, leftover = set(our_names), []
    for name in donor_names:
        layer = _LAYER.fullmatch(name)
        ours = name if layer is None else f"model.layers.{place.get(int(layer[1]))}.{layer[2]}"
        if _DERIVED.fullmatch(name):
            fates.dropped[name] = "a function of the configuration, recomputed"
        elif layer is not None and int(layer[1]) < plan.donor_layers and int(layer[1]) not in place:
            fates.dropped[name] = f"layer {layer[1]} is not in the plan"
        elif name == _HEAD and tied:
            fates.dropped[name] = "tied: the head is the embedding matrix"
        elif ours in wanted:
            fates.copied[ours] = name
        else:
            leftover.append(name)
    fates.fresh = {name: "the donor has no recursion" for name in sorted(wanted - set(fates.copied)) if name.startswith("model.recursion.")}
    missing = sorted(wanted - set(fates.copied) - set(fates.fresh))
    if missing or leftover:
        raise UserError(
            f"conversion of {plan.donor}: tensors without a fate: {_differences(missing, sorted(leftover))}. "
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

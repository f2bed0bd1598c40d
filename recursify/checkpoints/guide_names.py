"""Translate between transformers' names of tensors and those of the guides.

The names of one tensor, for layer 10 of a donor that is layer 1 of the loop after two prelude layers:

    donor            model.layers.10.self_attn.q_proj.weight
    recursive model  model.layers.3.self_attn.q_proj.weight          transformers' names, as PEFT and quantisers expect them
    guides           inner.L_level.layers.1.self_attn.wq.weight      in `.pt` files, and as attributes of `model.inner`

The table is GUIDE_NAMES in modeling_recursive_llm.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import UserError
from ..network.configuration_recursive_llm import RecursiveLLMConfig
from ..network.modeling_recursive_llm import GUIDE_NAMES

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def guide_name(name: str, config: RecursiveLLMConfig) -> str:
    """The guides' name of a tensor."""
    match = LAYER.fullmatch(name)
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
    """transformers' name -> the guides' name, one to one."""
    table = {name: guide_name(name, config) for name in names}
    assert len(set(table.values())) == len(table), "two tensors have the same name in the guides"
    return table


def to_guides(state: dict[str, Any], config: RecursiveLLMConfig) -> dict[str, Any]:
    """A state dict with the guides' names and the same tensors."""
    table = guide_names(state, config)
    return {table[name]: tensor for name, tensor in state.items()}


def from_guides(state: dict[str, Any], names: Iterable[str], config: RecursiveLLMConfig, where: str) -> dict[str, Any]:
    """The inverse of `to_guides`.

    Args:
        state: As read from a file.
        names: transformers' names of all tensors of the model.
        where: The file, for the message.

    Raises:
        UserError: Missing or unexpected names.
    """
    table = {guides: name for name, guides in guide_names(names, config).items()}
    missing, extra = sorted(set(table) - set(state)), sorted(set(state) - set(table))
    if missing or extra:
        raise UserError(f"{where}: model_state_dict does not match its config: {differences(missing, extra)}")
    return {table[name]: tensor for name, tensor in state.items()}


def differences(missing: list[str], extra: list[str], most: int = 6) -> str:
    """A description of missing and unexpected names, with the first few of each."""
    parts = [f"{len(names)} {word} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
             for word, names in (("missing", missing), ("left over", extra)) if names]  # fmt: skip
    return "; ".join(parts)

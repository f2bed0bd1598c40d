"""The size of a model, from its configuration alone: parameters by part, and bytes of a cache slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .configuration_recursive_llm import RecursiveLLMConfig


@dataclass(frozen=True)
class Shape:
    """The sizes that determine the cost of a model. Keys of the dictionaries are parts; a plain model has the part `layers`.

    Args:
        parameters: Number of parameters. A tied head has 0.
        matrices: Number of weights in matrix products of every token, those of a tied head included.
        layers: Number of transformer layers.
        hidden, inner, heads, keys: Widths: D, that of the feed-forward, of all queries together and of all keys together.
        norms_heads: Whether queries and keys are normalised.
        vocabulary: Size of the vocabulary.
    """

    parameters: dict[str, int]
    matrices: dict[str, int]
    layers: dict[str, int]
    hidden: int
    inner: int
    heads: int
    keys: int
    norms_heads: bool
    vocabulary: int


_SHAPES: dict[str, Shape] = {}


def shape_of(config: PreTrainedConfig) -> Shape:
    """The sizes of a model, counted on the meta device and cached by configuration."""
    key = config.to_json_string(use_diff=False)
    if key not in _SHAPES:
        _SHAPES[key] = _count(config)
    return _SHAPES[key]


def _count(config: Any) -> Shape:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, tied = model.get_output_embeddings(), config.tie_word_embeddings
    parts = _recursive_parts(model, config) if isinstance(config, RecursiveLLMConfig) else _donor_parts(model)
    layers = {name: len(part) for name, part in parts.items() if isinstance(part, nn.ModuleList)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Shape(
        parameters={**{name: _numbers(part) for name, part in parts.items()}, "lm_head": 0 if tied else _numbers(head)},
        matrices={**{name: _numbers(parts[name], matrices=True) for name in layers}, "lm_head": head.weight.numel()},
        layers=layers,
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=config.num_attention_heads * head_dim,
        keys=keys * head_dim,
        norms_heads=any("q_norm" in name for name, _ in model.named_modules()),
        vocabulary=config.vocab_size,
    )


def _recursive_parts(model: Any, config: RecursiveLLMConfig) -> dict[str, nn.Module]:
    base, first, last = model.model, config.prelude_layers, config.prelude_layers + config.L_layers
    return {
        "embeddings": base.embed_tokens,
        "prelude": base.layers[:first],
        "L_level": base.layers[first:last],
        "coda": base.layers[last:],
        "norm": base.norm,
        "recursion": base.recursion,
    }


def _donor_parts(model: Any) -> dict[str, nn.Module]:
    """Parts of any causal model of transformers: its list of layers, its embeddings, and the rest."""
    children = list(model.base_model.children())
    tables = nn.ModuleDict({str(i): child for i, child in enumerate(children) if isinstance(child, nn.Embedding)})
    layers = next(child for child in children if isinstance(child, nn.ModuleList))
    rest = nn.ModuleDict({str(i): child for i, child in enumerate(children) if child is not layers and not isinstance(child, nn.Embedding)})
    return {"embeddings": tables, "layers": layers, "norm": rest}


def _numbers(part: Any, matrices: bool = False) -> int:
    return sum(p.numel() for p in part.parameters() if p.ndim > 1 or not matrices)


def parameters_by_part(config: PreTrainedConfig) -> dict[str, int]:
    """Part -> number of parameters, counted on the meta device; a tied head counts 0."""
    return dict(shape_of(config).parameters)


def slot_bytes(config: PreTrainedConfig, number: int = 2) -> int:
    """Bytes of keys and values of one cache slot, per token of context, at `number` bytes per number."""
    return 2 * shape_of(config).keys * number

"""The layers: `make_layers` makes those that exist, of vLLM's own classes by family; `view` is one of them as it runs at one slot of the KV
cache, with the same weights, and keys and values of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index

# As vLLM's models declare them: a linear layer here, and those in the file that it holds.
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class NoRotary(nn.Module):
    """In the place of a rotary embedding, where a layer has none."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


class SmolLM3DecoderLayer(LlamaDecoderLayer):
    """Llama's layer; some have no rotary embedding. vLLM itself runs this family through transformers."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, config: Any):
        super().__init__(vllm_config, prefix, config)
        if not config.no_rope_layers[extract_layer_index(prefix)]:
            self.self_attn.rotary_emb = NoRotary()


class Olmo2Attention(LlamaAttention):
    """Llama's attention with norms over all queries and over all keys, so one process must have them all."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.q_norm, self.k_norm = RMSNorm(self.q_size, eps=config.rms_norm_eps), RMSNorm(self.kv_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, self.q_norm(q.contiguous()), self.k_norm(k.contiguous()))
        out: Tensor = self.o_proj(self.attn(q, k, v))[0]
        return out


class Olmo2DecoderLayer(LlamaDecoderLayer):
    """Norms behind attention and MLP instead of before them. vLLM itself runs this family through transformers."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, config: Any):
        super().__init__(vllm_config, prefix, config, attn_layer_type=Olmo2Attention)
        del self.input_layernorm
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, None]:
        x = hidden_states + self.post_attention_layernorm(self.self_attn(positions, hidden_states))
        return x + self.post_feedforward_layernorm(self.mlp(x)), None


# Model type -> layer, and whether it takes the whole configuration of vLLM, as Llama's, or its parts, as Qwen's.
LAYERS: dict[str, tuple[Any, bool]] = {
    "recursive_qwen2": (Qwen2DecoderLayer, False),
    "recursive_qwen3": (Qwen3DecoderLayer, False),
    "recursive_llama": (LlamaDecoderLayer, True),
    "recursive_mistral": (MistralDecoderLayer, True),
    "recursive_smollm3": (SmolLM3DecoderLayer, True),
    "recursive_olmo2": (Olmo2DecoderLayer, True),
    "recursive_phi3": (LlamaDecoderLayer, True),
}


def make_layers(vllm_config: VllmConfig, prefix: str) -> nn.ModuleList:
    """The layers that exist: prelude, loop, coda. The attention that each is made with is forgotten again: slots have theirs."""
    config = vllm_config.model_config.hf_config
    layer_class, of_llama = LAYERS[config.model_type]
    physical: Any = config.as_physical()  # as the donor's classes expect it: one entry per layer in its lists
    shared = {"cache_config": vllm_config.cache_config, "quant_config": vllm_config.quant_config}
    given: dict[str, Any] = {"vllm_config": vllm_config} if of_llama else shared
    layers = nn.ModuleList(layer_class(config=physical, prefix=f"{prefix}.{i}", **given) for i in range(config.physical_layers))
    for i in range(config.physical_layers):
        del vllm_config.compilation_config.static_forward_context[f"{prefix}.{i}.self_attn.attn"]
    return layers


def attention_like(made: Attention, kind: str, prefix: str, vllm_config: VllmConfig) -> Attention:
    """One more attention of a layer, with keys and values of its own.

    Args:
        made: The one that the layer was made with.
        kind: `full_attention` or `sliding_attention`.
        prefix: Its name in vLLM, with the number of its slot as the only number.
    """
    window = vllm_config.model_config.hf_config.sliding_window if kind == "sliding_attention" else None
    return Attention(
        made.num_heads, made.head_size, made.impl.scale, num_kv_heads=made.num_kv_heads, cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config, per_layer_sliding_window=window, attn_type=made.attn_type, prefix=prefix,
    )  # fmt: skip


def view(layer: Any, attention: Attention, updates: dict[str, nn.Module]) -> Any:
    """A layer as it runs at one slot. All of its parts are the layer's own, but for the attention.

    Args:
        updates: Name of a linear layer -> what to put in its place.
    """
    other = _with_parts(layer, {})
    other.self_attn = _with_parts(layer.self_attn, {"attn": attention} | {n: m for n, m in updates.items() if hasattr(layer.self_attn, n)})
    other.mlp = _with_parts(layer.mlp, {n: m for n, m in updates.items() if hasattr(layer.mlp, n)})
    return other


def _with_parts(module: nn.Module, parts: dict[str, nn.Module]) -> Any:
    """A shallow copy of a module, with other parts; the module keeps its own."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    return other


class LowRank(nn.Module):
    """Low-rank updates of one linear layer, one pair or several: `A` is `[pairs, rank, in]`, `B` is `[pairs, out, rank]`."""

    def __init__(self, pairs: int, rank: int, inputs: int, outputs: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(pairs, rank, inputs), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(pairs, outputs, rank), requires_grad=False)


class Updated(nn.Module):
    """A linear layer of vLLM with the low-rank updates of an adapter added.

    Args:
        parts: Of each linear layer that `plain` holds, in the order of its outputs.
        scale: Of the updates.
    """

    def __init__(self, plain: nn.Module, parts: list[LowRank], pair: int, scale: float):
        super().__init__()
        self.plain, self.parts, self.pair, self.scale = plain, nn.ModuleList(parts), pair, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        out, bias = self.plain(x)
        each: Any = self.parts
        added = [linear(linear(x, part.A[self.pair]), part.B[self.pair]) for part in each]
        return out + torch.cat(added, dim=-1) * self.scale, bias


def low_rank_updates(layer: Any, config: Any) -> nn.ModuleDict:
    """The low-rank updates that an adapter has for a layer, under the names in its files."""
    wanted = {"attention": (layer.self_attn,), "mlp": (layer.mlp,)}.get(config.lora_targets, (layer.self_attn, layer.mlp))
    found = {}
    for name, plain in ((name, part) for owner in wanted for name, part in owner.named_children() if hasattr(part, "output_size")):
        split = name in PACKED and config.model_type != "recursive_phi3"  # whose files hold them packed, too
        names = PACKED[name] if split else [name]
        sizes = plain.output_sizes if split else [plain.output_size]
        for part, size in zip(names, sizes, strict=True):
            found[part] = LowRank(config.lora_pairs, config.lora_rank, plain.input_size, size)
    return nn.ModuleDict(found)


def updated(layer: Any, found: Any, pair: int, config: Any) -> dict[str, nn.Module]:
    """Name -> linear layer with updates, of those that an adapter updates."""
    names = {name: [part for part in PACKED.get(name, []) if part in found] or [name] for name in (*PACKED, "o_proj", "down_proj")}
    scale = config.lora_alpha / config.lora_rank
    return {
        name: Updated(getattr(layer.self_attn, name, None) or getattr(layer.mlp, name), [found[part] for part in parts], pair, scale)
        for name, parts in names.items()
        if parts[0] in found
    }

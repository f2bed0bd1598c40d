"""The recursive model of vLLM: the donor's own vLLM layers, and one attention, hence one slot of the KV cache, per layer application.

    e = prelude(embeddings)
    z_L, z_H = e + L_init, e + H_init
    H_cycles times: L_cycles updates z_L = block(mix(e, z_L, z_H)), then z_H = block(mix(e, z_H, z_L))
    output = norm(coda(z_H));  at 0 cycles norm(coda(block(e)))

as in recursify/network/modeling_recursive_llm.py, which the tests compare with. Slots are numbered as there: prelude, coda, then the
applications of the block. Weights are there once, and read under their names in the folder.

Shape letters: N tokens of all requests in a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import llama, mistral, qwen2, qwen3
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

GAIN_SUM = 0.9  # as in recursify/network/configuration_recursive_llm.py
DONORS: dict[str, Any] = {
    "recursive_qwen2": qwen2.Qwen2Model,
    "recursive_qwen3": qwen3.Qwen3Model,
    "recursive_llama": llama.LlamaModel,
    "recursive_mistral": mistral.MistralModel,
    "recursive_phi3": llama.LlamaModel,
}


class Applications(nn.Module):
    """In the place of a layer's attention: one for each application of the layer, each with keys and values of its own.

    Args:
        first: The attention that the donor's layer was made with; its like are made.
        slots: Numbers of the KV slots, one per application.
        names: From a slot's number to the name that vLLM knows its attention by.
    """

    def __init__(self, first: Attention, slots: list[int], names: Any, vllm_config: VllmConfig):
        super().__init__()
        self.each = nn.ModuleList(
            Attention(
                first.num_heads, first.head_size, first.impl.scale, num_kv_heads=first.num_kv_heads, cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config, per_layer_sliding_window=first.sliding_window, prefix=names(slot),
                attn_type=first.attn_type,
            )
            for slot in slots
        )  # fmt: skip
        self.number = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.each[self.number](*args, **kwargs)
        return out


class Injection(nn.Module):
    """x = e + A * (own - e) + B * (other - e), with the gains A and B per channel."""

    def __init__(self, size: int):
        super().__init__()
        self.theta_A, self.theta_B = (nn.Parameter(torch.zeros(size), requires_grad=False) for _ in range(2))

    def forward(self, e: Tensor, own: Tensor, other: Tensor) -> Tensor:
        A, B = torch.tanh(self.theta_A.float()), torch.tanh(self.theta_B.float())
        excess = ((A.abs() + B.abs()) / GAIN_SUM).clamp(min=1.0)
        return e + (A / excess).to(e.dtype) * (own - e) + (B / excess).to(e.dtype) * (other - e)


class Recursion(nn.Module):
    """The parameters that the donor does not have, but for the halting head: tokens do not halt here."""

    def __init__(self, config: Any):
        super().__init__()
        self.H_init, self.L_init = (nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False) for _ in range(2))
        self.anchored, self.eps = config.injection == "anchored", config.rms_norm_eps
        if self.anchored:
            self.inject_L, self.inject_H = Injection(config.hidden_size), Injection(config.hidden_size)

    def mix(self, e: Tensor, z_L: Tensor, z_H: Tensor, of_H: bool) -> Tensor:
        """The input of the block that updates `z_H`, or else `z_L`; a tensor of its own, since vLLM's norms write into theirs."""
        if not self.anchored:
            return z_H + z_L if of_H else z_L + z_H + e
        mixed: Tensor = self.inject_H(e, z_H, z_L) if of_H else self.inject_L(e, z_L, z_H)
        return mixed

    def after(self, z: Tensor) -> Tensor:
        """TRM's norm without weights behind the block of `sum_norm`."""
        return z if self.anchored else nn.functional.rms_norm(z.float(), z.shape[-1:], eps=self.eps).to(z.dtype)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class RecursiveModel(nn.Module):
    """Embeddings, layers and recursion, up to the input of the head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.donor_class = DONORS[config.model_type]
        donor = _donor(self.donor_class, vllm_config, prefix)
        self.embed_tokens, self.layers, self.norm = donor.embed_tokens, donor.layers, donor.norm
        self.recursion = Recursion(config)
        self.P, self.K, self.C = config.prelude_layers, config.L_layers, config.coda_layers
        self.H_cycles, self.steps = config.H_cycles, config.L_cycles + 1
        known = vllm_config.compilation_config.static_forward_context
        for layer in self.layers:
            for name in [name for name, each in known.items() if each is layer.self_attn.attn]:
                del known[name]  # made with the layer; those of the slots take its place
        for index, layer in enumerate(self.layers):
            names = lambda slot: f"{prefix}.layers.{slot}.self_attn.attn"  # noqa: E731
            layer.self_attn.attn = Applications(layer.self_attn.attn, self._slots(index), names, vllm_config)

    def _slots(self, index: int) -> list[int]:
        """The slots of a physical layer: prelude and coda have one; of the block, one per application."""
        P, K, C = self.P, self.K, self.C
        if index < P:
            return [index]
        if index >= P + K:
            return [index - K]
        return [P + C + n * K + index - P for n in range(max(1, self.H_cycles * self.steps))]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """`[N, D]`, the input of the head.

        Args:
            positions: `[N]`.
        """
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        e = self._run(positions, x, 0, self.P)
        z = self._cycles(positions, e) if self.H_cycles else self._block(positions, e, 0)
        out: Tensor = self.norm(self._run(positions, z, self.P + self.K, self.C))
        return out

    def _cycles(self, positions: Tensor, e: Tensor) -> Tensor:
        recursion = self.recursion
        z_L, z_H = e + recursion.L_init.to(e.dtype), e + recursion.H_init.to(e.dtype)
        for n in range(self.H_cycles * self.steps):
            of_H = n % self.steps == self.steps - 1
            z = recursion.after(self._block(positions, recursion.mix(e, z_L, z_H, of_H), n))
            z_L, z_H = (z_L, z) if of_H else (z, z_H)
        return z_H

    def _block(self, positions: Tensor, x: Tensor, n: int) -> Tensor:
        for layer in self.layers[self.P : self.P + self.K]:
            layer.self_attn.attn.number = n
        return self._run(positions, x, self.P, self.K)

    def _run(self, positions: Tensor, x: Tensor, first: int, count: int) -> Tensor:
        """Layers one after another. vLLM's carry the residual beside the state; it is added at the end."""
        residual = None
        for layer in self.layers[first : first + count]:
            x, residual = layer(positions, x, residual)
        return x if residual is None else x + residual

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        wanted = ((name, weight) for name, weight in weights if not name.startswith("recursion.q_head."))
        loaded: set[str] = AutoWeightsLoader(self).load_weights(wanted, mapper=self.donor_class.hf_to_vllm_mapper)
        return loaded


class RecursiveForCausalLM(nn.Module):
    """A recursive model with its head, for all families."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        _check(vllm_config)
        self.model = RecursiveModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        wanted = ((name, weight) for name, weight in weights if not (self.config.tie_word_embeddings and name.startswith("lm_head.")))
        loaded: set[str] = AutoWeightsLoader(self).load_weights(wanted)
        return loaded


def _donor(donor_class: Any, vllm_config: VllmConfig, prefix: str) -> Any:
    """vLLM's own model of the donor's family with the physical layers, of which the parts are taken."""
    config = vllm_config.model_config.hf_config
    shape = config.num_hidden_layers, config.layer_types
    config.num_hidden_layers, config.layer_types = config.physical_layers, config.block_types
    try:
        return donor_class(vllm_config=vllm_config, prefix=prefix)
    finally:
        config.num_hidden_layers, config.layer_types = shape


def _check(vllm_config: VllmConfig) -> None:
    """Refuse what the plugin cannot do.

    Raises:
        ValueError: A family without layers of vLLM's own, an adapter, or pipeline parallelism.
    """
    config = vllm_config.model_config.hf_config
    if config.model_type not in DONORS:
        raise ValueError(
            f"{config.model_type}: expected one of {', '.join(DONORS)}: vLLM has no layers of its own for this family; serve it with "
            "`recursify serve`"
        )
    if config.lora_rank:
        raise ValueError(
            f"lora_rank: expected a model without low-rank updates in its loop, got {config.lora_rank}: vLLM's layers cannot take those of "
            "an adapter; serve it with `recursify serve`"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("pipeline_parallel_size: expected 1: the loop returns to earlier layers; use tensor parallelism")

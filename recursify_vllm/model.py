"""The recursive model of vLLM: a donor's layers, applied several times, each application with a slot of the KV cache of its own.

    e = prelude(embeddings)
    z_L, z_H = e + L_init, e + H_init
    H_cycles times: L_cycles updates z_L = block(mix(e, z_L, z_H)), then z_H = block(mix(e, z_H, z_L))
    output = norm(coda(z_H));  at 0 cycles norm(coda(block(e)))

as in recursify/network/modeling_recursive_llm.py, with which the tests compare it. Slots are numbered as there: prelude, coda, then the
applications of the block. `layers` holds the weights, once, under their names in the folder; `slots` holds a view of a layer for each slot.

Shape letters: N tokens of all requests in a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op

from recursify.network.configuration_recursive_llm import GAIN_SUM, applications

from .layers import LAYERS, PACKED, attention_like, low_rank_updates, make_layers, updated, view

logger = init_logger(f"vllm.{__name__}")

RECURSION, HALTING_HEAD = "model.recursion.", "model.recursion.q_head."


def state(x: Tensor) -> Tensor:
    """A copy, as an operation that compilation cannot look into. A sum would be computed where it is used, which for a state is also behind
    later layers: by then, compiled on a CPU, these have written into the buffers that it is the sum of."""
    return x.clone()


direct_register_custom_op("recursify_state", state, fake_impl=state)


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
    """The parameters that the donor does not have, but for the halting head: every token runs all cycles."""

    def __init__(self, config: Any, looped: Iterable[Any]):
        super().__init__()
        self.H_init, self.L_init = (nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False) for _ in range(2))
        self.anchored, self.eps = config.injection == "anchored", config.rms_norm_eps
        if self.anchored:
            self.inject_L, self.inject_H = Injection(config.hidden_size), Injection(config.hidden_size)
        if config.is_adapter:
            self.lora = nn.ModuleList(low_rank_updates(layer, config) for layer in looped)

    def mix(self, e: Tensor, z_L: Tensor, z_H: Tensor, of_H: bool) -> Tensor:
        """The input of the block for the update of `z_H`, or of `z_L`."""
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
        self.P, self.K, self.C = config.prelude_layers, config.L_layers, config.coda_layers
        self.H_cycles, self.steps, self.is_adapter = config.H_cycles, config.L_cycles + 1, config.is_adapter
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = make_layers(vllm_config, f"{prefix}.layers")
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.recursion = Recursion(config, self.layers[self.P : self.P + self.K])
        self.slots = nn.ModuleList(self._make_slots(vllm_config, f"{prefix}.layers"))

    def _make_slots(self, vllm_config: VllmConfig, prefix: str) -> Iterator[Any]:
        """A view of a layer for each slot."""
        for slot, (i, n) in enumerate(slot_order(self.config)):
            layer: Any = self.layers[i]
            kind = self.config.block_types[i]
            attention = attention_like(layer.self_attn.attn, kind, f"{prefix}.{slot}.self_attn.attn", vllm_config)
            updates = {}
            if self.is_adapter and n > 0:  # the first application is the donor's own
                pair = min(n // self.steps, self.config.lora_pairs - 1)
                updates = updated(layer, self.recursion.lora[i - self.P], pair, self.config)
            yield view(layer, attention, updates)
            if n == 0:  # so that no attention without a slot is left
                layer.self_attn.attn = attention

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
            input_ids, positions: `[N]`.
            inputs_embeds: `[N, D]`, instead of `input_ids`.
        """
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        e = self._run(positions, x, 0, self.P)
        z = self._cycles(positions, e) if self.H_cycles else self._block(positions, e, 0)
        out: Tensor = self.norm(self._run(positions, z, self.P, self.C))
        return out

    def _cycles(self, positions: Tensor, e: Tensor) -> Tensor:
        recursion = self.recursion
        z_L, z_H = e + recursion.L_init.to(e.dtype), e + recursion.H_init.to(e.dtype)
        for n in range(self.H_cycles * self.steps):
            of_H = n % self.steps == self.steps - 1
            x = e if self.is_adapter and n == 0 else recursion.mix(e, z_L, z_H, of_H)
            z = recursion.after(self._block(positions, x, n))
            z_L, z_H = (z_L, z) if of_H else (z, z_H)
        return z_H

    def _block(self, positions: Tensor, x: Tensor, n: int) -> Tensor:
        """The looped block as application number `n`."""
        return self._run(positions, x, self.P + self.C + n * self.K, self.K)

    def _run(self, positions: Tensor, x: Tensor, first: int, count: int) -> Tensor:
        """The layers of a range of slots."""
        # vLLM's layers carry the residual beside the state, and their fused norms write into what they are given: a state that is needed
        # again must be another tensor, and the two are added before they are mixed with others
        x, residual = x.clone(), None
        for slot in range(first, first + count):
            x, residual = self.slots[slot](positions, x, residual)
        out: Tensor = torch.ops.vllm.recursify_state(x if residual is None else x + residual)
        return out


class RecursiveForCausalLM(nn.Module):
    """A recursive model with its head, of any family."""

    packed_modules_mapping = PACKED
    mapper = WeightsMapper(
        orig_to_new_stacked={
            f".{part}": (f".{name}", shard if name == "gate_up_proj" else part[0])
            for name, parts in PACKED.items()
            for shard, part in enumerate(parts)
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        check(vllm_config)
        self.secondary_weights = donor_of_adapter(vllm_config.model_config.model, config)  # which vLLM's loader reads, too
        self.model = RecursiveModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        logger.info(
            "recursify: H_cycles %d, L_cycles %d: %d applications of %d layers, each with a KV slot; no early exit, every token runs all",
            config.H_cycles, config.L_cycles, config.num_hidden_layers, config.physical_layers,
        )  # fmt: skip

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
        """Names of the tensors that were loaded; vLLM compares them with those of the model."""
        own, loaded = dict(self.named_parameters()), set()

        def of_donor() -> Iterator[tuple[str, Tensor]]:
            """The donor's tensors, for vLLM's loader; those of the recursion are copied on the way."""
            for name, tensor in weights:
                if not name.startswith(RECURSION):
                    yield name, tensor
                elif not name.startswith(HALTING_HEAD):
                    own[name].data.copy_(tensor)
                    loaded.add(name)

        return AutoWeightsLoader(self).load_weights(of_donor(), mapper=self.mapper) | loaded


def slot_order(config: Any) -> list[tuple[int, int]]:
    """(physical layer, application) of each slot: prelude, coda, then the applications of the block, as caches of recursify have them."""
    P, K, C = config.prelude_layers, config.L_layers, config.coda_layers
    once = [*range(P), *range(P + K, P + K + C)]
    return [(i, 0) for i in once] + [(P + j, n) for n in range(applications(config.H_cycles, config.L_cycles)) for j in range(K)]


def donor_of_adapter(folder: str, config: Any) -> list[DefaultModelLoader.Source]:
    """Where the donor's weights are, for the folder of an adapter, which holds its own alone. None for whole models.

    Raises:
        ValueError: The donor is not there, or its weights are not those that the adapter was trained on.
    """
    from recursify.checkpoints import adapter
    from recursify.checkpoints.donor import open_donor

    if not config.is_adapter or not adapter.is_adapter_folder(Path(folder)):
        return []
    name, revision = adapter.donor_place(config.conversion or {}, folder)
    if adapter.donor_hash(open_donor(name, revision=revision)) != (config.conversion or {}).get(adapter.HASH):
        raise ValueError(f"{folder}: an adapter of other weights than those of {name}; serve what `recursify export {folder} OUT` writes")
    return [DefaultModelLoader.Source(name, revision)]


def check(vllm_config: VllmConfig) -> None:
    """Refuse what cannot be served, by name. (Pipeline parallelism, in which the loop would go back to earlier processes, vLLM refuses for
    models that do not declare it.)

    Raises:
        ValueError: It names the setting, what was expected and what to do instead.
    """
    config, processes = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    if config.model_type not in LAYERS:
        raise ValueError(f"model_type: expected one of {', '.join(LAYERS)}, got {config.model_type}; use `recursify serve`")
    if (config.conversion or {}).get("approach") == "embedding":
        raise ValueError("this model predicts embeddings and has no trained head (approach embedding), so it cannot write text")
    for name, plain in (("halt", None), ("cache_policy", "full")):
        if (got := getattr(config, name, plain)) != plain:
            raise ValueError(
                f"{name}: expected {plain!r}, got {got!r}: here every token runs all cycles, with a slot for each application; use "
                "`recursify generate`, or fewer H_cycles"
            )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "enable_lora: expected False: a LoRA of a request would act in every application of a layer, for which none was trained; "
            "merge it into the weights"
        )
    if processes > 1 and (config.is_adapter or config.model_type == "recursive_olmo2"):
        what = "low-rank updates of an adapter" if config.is_adapter else "OLMo2's norms over all queries"
        raise ValueError(f"tensor_parallel_size: expected 1, got {processes}: {what} are not divided between processes")

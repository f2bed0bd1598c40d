# Copyright 2026 The recursify authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The network: a donor's layers, looped over two states in the manner of Tiny Recursive Models (TRM, arXiv 2510.04871).

    e = prelude(embed(x))
    z_L, z_H = e + L_init, e + H_init
    for each of H_cycles:
        L_cycles times:  z_L = F(e + A_L * (z_L - e) + B_L * (z_H - e))        F is L_level, the looped block
        once:            z_H = F(e + A_H * (z_H - e) + B_H * (z_L - e))
        logits = lm_head(norm(coda(z_H)))                                      any cycle can be read out

The affine mix is TRM's plain sum z_L + z_H + e, anchored at e: with pre-norm blocks a plain sum would grow without bound.
With all gains A, B at 0 every F gets e, so any number of cycles equals the plain pass, bit for bit.

An adapter (`lora_rank` above 0) leaves the donor as it is. The first application of F is the donor's own, in all others F has low-rank
updates (LoRA) of its linear layers, F':

    z_L = F(e)                                       the donor's own application; with 0 cycles it is read out: lm_head(norm(coda(z_L)))
    then as above, with F' in the place of F         z_H before the first cycle is e + H_init; L_init is not used

With gains and updates at 0 the model is the donor at every depth; whatever they are, it is the donor at 0 cycles.

The layers are transformers' classes; only the forward pass over them is new. A layer that is applied n times has n cache slots. Each
application sees its slots through a view of the cache that adds an offset, so no module changes its `layer_idx`.

Shape letters: B batch, T tokens, D hidden size, V vocabulary. This file is saved beside the weights: it imports only torch, transformers
and the files beside it.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Olmo2ForCausalLM,
    Olmo2Model,
    Phi3ForCausalLM,
    Phi3Model,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_recursive_llm import (
    GAIN_SUM,
    RecursiveLlamaConfig,
    RecursiveLLMConfig,
    RecursiveMistralConfig,
    RecursiveOlmo2Config,
    RecursivePhi3Config,
    RecursiveQwen2Config,
    RecursiveQwen3Config,
    RecursiveSmolLM3Config,
    from_guide,
)
from .decoding_recursive_llm import (
    CacheSlots,
    Drafted,
    HaltingSlots,
    HaltRule,
    PagedCacheSlots,
    RecursiveCache,
    ScratchSlots,
    ShiftedInstances,
    claim_cache,
    draft_applications,
    self_speculation,
    slotted,
)


@auto_docstring(custom_intro="Output of the base model.")
@dataclass
class RecursiveModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    cycle_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_cycle_states=True`):
        One `[B, T, D]` per cycle, after coda and final norm: the inputs of `lm_head`. The last is `last_hidden_state`.
    halt_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_cycle_states=True`):
        One `[B, T]` per cycle: the halting logit of `q_head` for the detached state.
    halt_cycles (`torch.LongTensor`, *optional*, returned when `halt` is given):
        `[B, T]`: the cycle at which each token halted (its early exit); 0 for padding, and where a token of an adapter exits before the
        first cycle.
    """

    cycle_states: tuple[torch.FloatTensor, ...] | None = None
    halt_logits: tuple[torch.FloatTensor, ...] | None = None
    halt_cycles: torch.LongTensor | None = None


@auto_docstring(custom_intro="Output of the model with its head.")
@dataclass
class RecursiveCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    cycle_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_cycle_logits=True`):
        One `[B, T, V]` per cycle, the last equal to `logits`. Without a cache, entry c equals a run at `H_cycles = c + 1`.
        With a cache and a coda, the coda attends, at every cycle, to keys and values that earlier tokens wrote at *their* last cycle.
    halt_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_cycle_logits=True`):
        One `[B, T]` per cycle: the halting logit of `q_head`.
    halt_cycles (`torch.LongTensor`, *optional*, returned when `halt` is given):
        `[B, T]`: the cycle at which each token halted (its early exit); 0 for padding, and where a token of an adapter exits before the
        first cycle.
    """

    cycle_logits: tuple[torch.FloatTensor, ...] | None = None
    halt_logits: tuple[torch.FloatTensor, ...] | None = None
    halt_cycles: torch.LongTensor | None = None


class AnchoredInjection(nn.Module):
    """x = e + A * (own - e) + B * (other - e). A and B are gains per channel, each the tanh of its theta; where |A| + |B| exceeds
    `GAIN_SUM`, both are scaled down to that sum."""

    def __init__(self, config: RecursiveLLMConfig):
        super().__init__()
        self.theta_A = nn.Parameter(torch.zeros(config.hidden_size))
        self.theta_B = nn.Parameter(torch.zeros(config.hidden_size))

    def gains(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, each `[D]`, computed in float32, once per pass. A call of the module, so that accelerate brings offloaded weights."""
        return self(dtype)

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = torch.tanh(self.theta_A.float()), torch.tanh(self.theta_B.float())
        excess = ((A.abs() + B.abs()) / GAIN_SUM).clamp(min=1.0)
        return (A / excess).to(dtype), (B / excess).to(dtype)

    @staticmethod
    def mix(e: torch.Tensor, own: torch.Tensor, other: torch.Tensor, gains: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        A, B = gains
        return e + A * (own - e) + B * (other - e)


class HaltHead(nn.Module):
    """One halting logit per token. Not an `nn.Linear`, so quantisers and LoRA on "all-linear" skip it."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T]`. The input is normalised: norms of a donor's states differ by a factor of 1000 between tokens."""
        direction = nn.functional.rms_norm(z.float(), z.shape[-1:], eps=1e-6).to(self.weight.dtype)
        return nn.functional.linear(direction, self.weight, self.bias).squeeze(-1)


class LoRA(nn.Module):
    """Low-rank updates `scale * B @ A` of a linear layer (arXiv 2106.09685), one or several pairs. B starts at 0: nothing changes."""

    def __init__(self, linear: Any, rank: int, alpha: float, pairs: int):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(pairs, rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(pairs, linear.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor, pair: int) -> torch.Tensor:
        """`[..., in]` to `[..., out]`, on the device and in the dtype of `x`."""
        A, B = self.A[pair].to(x.device, x.dtype), self.B[pair].to(x.device, x.dtype)
        return nn.functional.linear(nn.functional.linear(x, A), B) * self.scale


class LayerLoRA(nn.ModuleDict):
    """The low-rank updates of a layer's linear layers, by name. `attach` hooks them into the layer, whose modules and tensors stay as they
    are. A call `layer(..., lora=pair)` adds the updates of that pair; a call without, none.

    The pair is an argument of the layer's call, which the layer passes on to its attention, the first of its parts: a recomputation of the
    layer (gradient checkpointing) sets the same one again.
    """

    def __init__(self, layer: Any, config: RecursiveLLMConfig):
        found = _linear_layers(layer, config.lora_targets)
        super().__init__({name: LoRA(linear, config.lora_rank, config.lora_alpha, config.lora_pairs) for name, linear in found.items()})
        self.targets = config.lora_targets
        self.pair: int | None = None

    def attach(self, layer: Any) -> None:
        """Hook the updates into a layer whose linear layers may have been replaced since (quantisation)."""
        if self._choose not in layer.self_attn._forward_pre_hooks.values():
            layer.self_attn.register_forward_pre_hook(self._choose, with_kwargs=True)
        for name, linear in _linear_layers(layer, self.targets).items():
            if not any(isinstance(hook, _AddLoRA) for hook in linear._forward_hooks.values()):
                linear.register_forward_hook(_AddLoRA(self, name))

    def _choose(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.pair = kwargs.pop("lora", None)
        return args, kwargs


class _AddLoRA:
    """The hook of a linear layer."""

    def __init__(self, updates: LayerLoRA, name: str):
        self.updates, self.name = updates, name

    def __call__(self, linear: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        pair = self.updates.pair
        return output if pair is None else output + self.updates[self.name](args[0], pair)


def _linear_layers(layer: nn.Module, targets: str) -> dict[str, Any]:
    """Name -> linear layer, also a quantised one, of a layer's attention, its MLP or both."""
    parts: Any = {"attention": (layer.self_attn,), "mlp": (layer.mlp,)}.get(targets, (layer.self_attn, layer.mlp))
    return {name: child for part in parts for name, child in part.named_children() if hasattr(child, "in_features")}


class Recursion(nn.Module):
    """All parameters that the donor does not have, and the loop.

    A module of its own: the donor's constructor has already marked its modules as initialised, so parameters that were added to them would
    stay at zero.
    """

    def __init__(self, config: RecursiveLLMConfig, layers: Any):
        super().__init__()
        self.H_init = nn.Parameter(torch.zeros(config.hidden_size))
        self.L_init = nn.Parameter(torch.zeros(config.hidden_size))
        self.anchored = config.injection == "anchored"
        if self.anchored:
            self.inject_L = AnchoredInjection(config)
            self.inject_H = AnchoredInjection(config)
        self.eps = config.rms_norm_eps
        self.q_head = HaltHead(config.hidden_size)
        self.is_adapter = config.is_adapter
        if self.is_adapter:
            self.lora = nn.ModuleList(LayerLoRA(layer, config) for layer in layers)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`L_init` and `H_init`, each `[D]`. A call of the module, so that accelerate brings offloaded weights."""
        return self.L_init, self.H_init

    def start(self, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`z_L` and `z_H` before the first cycle, each `[B, T, D]`."""
        L_init, H_init = self()
        return e + L_init.to(e.device, e.dtype), e + H_init.to(e.device, e.dtype)

    def advance(
        self, e: torch.Tensor, states: tuple[torch.Tensor, torch.Tensor], block: Any, applications: range, L_cycles: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a range of the applications of the block (from 0) on `(z_L, z_H)`, and return the new states."""
        gains = self._gains(e) if applications else None  # the range is empty for every token of a draft with 0 cycles
        for n in applications:
            states = self._advance_one(e, *states, block, n, L_cycles, gains)
        return states

    def steps(
        self, e: torch.Tensor, block: Any, H_cycles: int, L_cycles: int, backprop: str = "full", plain: bool = False
    ) -> Iterator[torch.Tensor]:
        """The cycles. Yields `z_H` `[B, T, D]` after each cycle.

        Args:
            e: Output of the prelude, `[B, T, D]`.
            block: `block(x, n)` applies the looped block to `x` as application number `n`.
            backprop: Backpropagation of a cycle's loss: "full", through all earlier cycles; "cycle", truncated at the start of the cycle;
                "last", as "cycle", with cycles before the last computed without gradients (TRM).
            plain: Of an adapter: yield, before the first cycle, the output of the donor's own application.
        """
        z_L, z_H = self.start(e)
        gains, count = self._gains(e), L_cycles + 1
        for cycle in range(H_cycles):
            if backprop == "cycle" and cycle > 0:  # the graph of the gains is freed with that of the cycle
                gains = self._gains(e)
            for n in range(cycle * count, (cycle + 1) * count):
                with torch.no_grad() if backprop == "last" and cycle < H_cycles - 1 else nullcontext():
                    z_L, z_H = self._advance_one(e, z_L, z_H, block, n, L_cycles, gains)
                if plain and n == 0:
                    yield z_L
            yield z_H
            if backprop != "full":
                z_L, z_H = z_L.detach(), z_H.detach()

    def _gains(self, e: torch.Tensor) -> Any:
        """(A, B) of `z_L` and of `z_H`, on the device of `e`; None without gains."""
        if not self.anchored:
            return None
        return [[gain.to(e.device) for gain in injection.gains(e.dtype)] for injection in (self.inject_L, self.inject_H)]

    def _advance_one(
        self, e: torch.Tensor, z_L: torch.Tensor, z_H: torch.Tensor, block: Any, n: int, L_cycles: int, gains: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One application of the block: the last of a cycle updates `z_H`, the others `z_L`."""
        of_H = n % (L_cycles + 1) == L_cycles
        own, other = (z_H, z_L) if of_H else (z_L, z_H)
        if self.is_adapter and n == 0:
            x = e  # the donor's own application
        elif self.anchored:
            x = AnchoredInjection.mix(e, own, other, gains[of_H])
        else:
            x = z_H + z_L if of_H else z_L + z_H + e
        z = self._block_norm(block(x, n))
        return (z_L, z) if of_H else (z, z_H)

    def _block_norm(self, z: torch.Tensor) -> torch.Tensor:
        """TRM's norm without weights after the block; the anchored form is bounded without it."""
        return z if self.anchored else nn.functional.rms_norm(z.float(), z.shape[-1:], eps=self.eps).to(z.dtype)


class ForwardPass:
    """State that all layer applications of one forward pass share: masks, positions, the cache and its slots.

    A pass with early exit sets `halting`, and keeps in `halted` `[B, T]` which tokens have halted.
    """

    def __init__(
        self,
        model: Any,
        masks: dict[str, Any],
        rope: Any,
        position_ids: torch.Tensor,
        cache: Cache | None,
        depth: tuple[int, int],
        cache_policy: str,
        kwargs: dict[str, Any],
    ):
        self.layers, self.types, self.masks = model.layers, model.config.block_types, masks
        self.P, self.K, self.C = model.config.prelude_layers, model.config.L_layers, model.config.coda_layers
        self.shared = {"position_embeddings": rope, "position_ids": position_ids, **kwargs}
        self.cache, self.paged, self.instances = cache, self.shared.pop("cache", None), self.shared.pop("attention_instances", None)
        self.cycles, self.steps, self.one_slot = depth[0], depth[1] + 1, cache_policy == "last"
        self.applications = max(1, depth[0] * self.steps)
        self.lora_pairs = model.config.lora_pairs if model.config.is_adapter else 0
        self.first_exit = model.config.first_exit
        self.readouts = model.config.depth(*depth)  # the first slot of the codas of early cycles, if they have slots
        self.halting = False
        self.halted: torch.Tensor | None = None
        # (step, layer) -> keys and values of these tokens in the previous cycle; step -1 for codas that run at every cycle
        self.kept: dict[tuple[int, int], Any] = {}

    def prelude(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x, 0, self.P, 0, self._slots(0))

    def block(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """The looped block as application number `n`, on the device of `x`. Its slots follow those of prelude and coda."""
        slots: Any = self._loop_slots(n)
        if self.halting:
            slots = HaltingSlots(slots, self.kept, n % self.steps, self.halted)
        pair = min(n // self.steps, self.lora_pairs - 1) if self.lora_pairs and n > 0 else None
        return self._run(x, self.P, self.K, self.C + n * self.K, slots, pair).to(x.device)

    def coda(self, x: torch.Tensor, peek: bool = False) -> torch.Tensor:
        """The layers after the loop. With `peek` the cache is read but not written."""
        return self._run(x, self.P + self.K, self.C, -self.K, self._slots(-self.K, peek))

    def coda_at(self, x: torch.Tensor, cycle: int) -> torch.Tensor:
        """The coda of a given cycle, for exit criteria that read logits: it attends to the coda states of earlier tokens at that cycle."""
        slots: Any = HaltingSlots(self._readout_slots(cycle), self.kept, -1, self.halted)
        return self._run(x, self.P + self.K, self.C, -self.K, slots)

    def fill_skipped_slots(self, cycles: int) -> None:
        """Fill the slots of cycles that are not computed, after all tokens have halted, with keys and values of the last computed."""
        for n in range(max(1, cycles * self.steps), self.applications):
            self._fill(self._loop_slots(n), n % self.steps if cycles > 0 else 0, range(self.P, self.P + self.K))
        coda = range(self.P + self.K, self.P + self.K + self.C)
        if coda and (-1, coda[0]) in self.kept:
            for cycle in (self.cycles,) if self.one_slot else range(cycles + 1, self.cycles + 1):
                self._fill(self._slots(-self.K) if self.one_slot else self._readout_slots(cycle), -1, coda)

    def _fill(self, slots: CacheSlots | None, step: int, layers: range) -> None:
        if slots is not None:
            for layer in layers:
                slots.update(*self.kept[step, layer], layer)

    def _readout_slots(self, cycle: int) -> CacheSlots | None:
        """The coda of the last cycle has the usual slots; those of earlier cycles follow all other slots."""
        if self.one_slot:  # written by `fill_skipped_slots`, once the last cycle is known
            return self._slots(-self.K, peek=True)
        return self._slots(-self.K if cycle == self.cycles else self.readouts + (cycle - self.first_exit) * self.C - self.P - self.K)

    def _loop_slots(self, n: int) -> CacheSlots | None:
        if self.one_slot:  # only the last application writes
            return self._slots(self.C, peek=n < self.applications - 1)
        return self._slots(self.C + n * self.K)

    def _slots(self, offset: int, peek: bool = False) -> CacheSlots | None:
        return None if self.cache is None else ScratchSlots(self.cache, offset) if peek else CacheSlots(self.cache, offset)

    def _run(self, x: torch.Tensor, first: int, count: int, offset: int, slots: CacheSlots | None, pair: int | None = None) -> torch.Tensor:
        kwargs = dict(self.shared) if pair is None else {**self.shared, "lora": pair}
        if self.paged is not None:
            kwargs["cache"] = PagedCacheSlots(self.paged, offset)
        if self.instances is not None:
            kwargs["attention_instances"] = ShiftedInstances(self.instances, offset)
        for i in range(first, first + count):
            x = self.layers[i](x, attention_mask=self.masks[self.types[i]], past_key_values=slots, **kwargs)
        return x


class RecursiveModelMixin(PreTrainedModel):
    """The base model of a family, without head: the donor's modules with the recursive forward pass."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: Any
    rotary_emb: Any

    def __init__(self, config: Any):
        shape = config.num_hidden_layers, config.layer_types
        # The donor's constructor builds the physical layers. It must get the same config object that the model keeps.
        config.num_hidden_layers, config.layer_types = config.physical_layers, config.block_types
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers, config.layer_types = shape
        self.recursion = Recursion(config, self.looped_layers)
        self._no_split_modules = [*(self._no_split_modules or ()), "Recursion"]  # by device_map
        self.restore()
        self.post_init()

    @property
    def looped_layers(self) -> nn.ModuleList:
        """The layers of the loop."""
        return self.layers[self.config.prelude_layers : self.config.prelude_layers + self.config.L_layers]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, with what it undoes restored."""
        return _restored(super().from_pretrained(*args, **kwargs))

    def restore(self) -> None:
        """Restore what `PreTrainedModel.from_pretrained` undoes. It makes every parameter trainable: freeze those that get no gradient from
        a next-token loss (DDP fails on them), and those that the configuration freezes. It may replace linear layers by quantised ones:
        hook the low-rank updates into these."""
        # CODEPATH: checkpoints of `recursify train --adapter` (lora_rank above 0); all others train the donor, too
        if self.config.is_adapter:
            self.requires_grad_(False)
            self.recursion.requires_grad_(True)
            self.recursion.L_init.requires_grad_(False)  # the donor's own application does not read it
            for updates, layer in zip(self.recursion.lora, self.looped_layers, strict=True):
                updates.attach(layer)  # type: ignore[operator]
        self.recursion.q_head.requires_grad_(False)
        if self.recursion.anchored:
            self.recursion.inject_L.requires_grad_(self.config.L_cycles > 0)
        self.embed_tokens.requires_grad_(not (self.config.freeze_embeddings or self.config.is_adapter))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AnchoredInjection):
            theta = math.atanh(self.config.gain_init)
            init.constant_(module.theta_A, theta)
            init.constant_(module.theta_B, theta)
        elif isinstance(module, Recursion):
            init.normal_(module.H_init, std=self.config.state_init_std)
            init.normal_(module.L_init, std=self.config.state_init_std)
        elif isinstance(module, LoRA):
            init.normal_(module.A, std=module.A.shape[-1] ** -0.5)
            init.zeros_(module.B)
        elif isinstance(module, HaltHead):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)

    def cycles(self, H_cycles: int | None = None, L_cycles: int | None = None) -> tuple[int, int]:
        """(H, L) of a pass: the arguments, else the configuration's.

        A lowered `num_hidden_layers`, with which transformers' `assistant_early_exit` selects a draft, overrides both.
        """
        config = self.config
        L = config.L_cycles if L_cycles is None else L_cycles
        H = config.H_cycles if H_cycles is None else H_cycles
        # CODEPATH: no checkpoint; only `assistant_early_exit` lowers it, during a draft
        if config.num_hidden_layers < config.depth():
            loop = config.num_hidden_layers - config.prelude_layers - config.coda_layers
            H = max(0, loop) // (config.L_layers * (L + 1))
        for name, value in (("H_cycles", H), ("L_cycles", L)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}")
        config.check_adapter(L)
        return H, L

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(
        custom_intro="One forward pass: `[B, T]` token ids or `[B, T, D]` embeddings to the `[B, T, D]` inputs of `lm_head`. "
        "Raises a ValueError for both or neither of them, a negative depth, or a cache of another depth."
    )
    def forward(  # type: ignore[misc]  # position_ids is in TransformersKwargs too, as in the donors
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        H_cycles: int | None = None,
        L_cycles: int | None = None,
        output_cycle_states: bool = False,
        cache_policy: str = "full",
        halt: str | None = None,
        halt_threshold: float | None = None,
        halt_rule: HaltRule | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RecursiveModelOutputWithPast:
        r"""
        H_cycles (`int`, *optional*):
            Cycles of this pass; the configuration's where None. 0 is one plain pass.
        L_cycles (`int`, *optional*):
            Updates of `z_L` in each cycle of this pass; the configuration's where None.
        output_cycle_states (`bool`, *optional*, defaults to `False`):
            Also return the state after every cycle, and the logits of `q_head`.
        cache_policy (`str`, *optional*, defaults to `"full"`):
            `full`, one cache slot per layer application, or `last`, one per layer: see `RecursiveCache`.
        halt (`str`, *optional*):
            Criterion of early exit per token: `q_head`; or `kl` and `entropy`, which need the model with its head.
        halt_threshold (`float`, *optional*):
            Threshold of the criterion, see `HaltRule`; its default where None.
        halt_rule (`HaltRule`, *optional*):
            Instead of `halt` and `halt_threshold`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        H, L = self.cycles(H_cycles, L_cycles)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        halt_rule = halt_rule or HaltRule.of(self, halt, halt_threshold)
        criterion = None if halt_rule is None else halt_rule.criterion
        seen = past_key_values
        if seen is not None:
            claim_cache(seen, self.config, H, L, cache_policy, criterion)
        elif use_cache and not self.training:
            # Filled in this pass but not passed to the masks: packed documents are only separated where the masks see no cache.
            past_key_values = RecursiveCache(self.config, H, L, cache_policy, criterion)
            claim_cache(past_key_values, self.config, H, L, cache_policy, criterion)
        shared = {"use_cache": use_cache, **kwargs}
        one_pass = self._one_pass(inputs_embeds, attention_mask, position_ids, seen, past_key_values, (H, L), cache_policy, shared)

        e = one_pass.prelude(inputs_embeds)
        if halt_rule is not None and H > 0:
            return self._halting(one_pass, e, H, L, halt_rule, _token_mask(attention_mask, e), use_cache, output_cycle_states)
        states, halts, z_H = [], [], None
        for cycle, z_H in enumerate(self.recursion.steps(e, one_pass.block, H, L), start=1):
            if output_cycle_states:
                halts.append(self.recursion.q_head(z_H.detach()))
                if cycle < H:
                    states.append(self.norm(one_pass.coda(z_H, peek=True)))
        last = self.norm(one_pass.coda(one_pass.block(e, 0) if z_H is None else z_H))
        if isinstance(past_key_values, RecursiveCache):
            past_key_values.record_cycles(None, H, (e.shape[0], e.shape[1]))
        return RecursiveModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values if use_cache else None,
            cycle_states=(*states, last) if output_cycle_states else None,
            halt_logits=tuple(halts) if output_cycle_states else None,
            halt_cycles=None if halt_rule is None else torch.zeros_like(e[..., 0], dtype=torch.long),  # type: ignore[arg-type]
        )

    def _halting(
        self,
        one_pass: ForwardPass,
        e: torch.Tensor,
        H: int,
        L: int,
        rule: HaltRule,
        tokens: torch.Tensor,
        use_cache: bool | None,
        output_cycle_states: bool,
    ) -> RecursiveModelOutputWithPast:
        """The cycles with early exit. A halted token keeps its state, and its keys and values, in all deeper cycles.

        They end when all tokens have halted; of an adapter, possibly before the first cycle. The decision about a token depends on
        that token alone, so prefill and incremental decoding halt at the same cycles.

        Args:
            tokens: `[B, T]`, False for padding.
        """
        if one_pass.paged is not None:
            raise ValueError("halt: continuous batching runs all tokens of a batch at one depth; leave halt out")
        one_pass.halting = True
        active, chosen = tokens, e
        used: Any = torch.zeros(tokens.shape, dtype=torch.long, device=e.device)
        states: list[Any] = []
        halts: list[Any] = []
        last: Any = None
        first = self.config.first_exit
        for cycle, z_H in enumerate(self.recursion.steps(e, one_pass.block, H, L, plain=first == 0), start=first):
            chosen = self._unless_halted(one_pass, z_H, chosen)
            used = torch.where(active, cycle, used)
            if rule.reads_logits:
                last = self._unless_halted(one_pass, self.norm(one_pass.coda_at(chosen, cycle)).to(e.device), last)
            if output_cycle_states and cycle > 0 and (rule.reads_logits or cycle < H):
                states.append(last if rule.reads_logits else self.norm(one_pass.coda(chosen, peek=True)))
            if output_cycle_states or (not rule.reads_logits and cycle < H):
                halts.append(self.recursion.q_head(chosen.detach()))
            if cycle < H:
                halts_now = rule.by_readout(last) if last is not None else rule.by_head(halts[-1])
                active = active & ~halts_now.to(active.device)
                one_pass.halted = tokens & ~active  # padding is computed as without halting, but does not keep the cycles running
            if cycle == H or not active.any():
                one_pass.fill_skipped_slots(cycle)
                break
        if last is None:
            last = self.norm(one_pass.coda(chosen))
        if isinstance(one_pass.cache, RecursiveCache):
            one_pass.cache.record_cycles(used, H, (e.shape[0], e.shape[1]))
        return RecursiveModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=one_pass.cache if use_cache else None,
            cycle_states=(*states, *[last] * (H - len(states))) if output_cycle_states else None,
            halt_logits=(*halts, *halts[-1:] * (H + 1 - first - len(halts)))[1 - first :] if output_cycle_states else None,
            halt_cycles=used,
        )

    @staticmethod
    def _unless_halted(one_pass: ForwardPass, new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        """The new `[B, T, D]` states, but the old ones of tokens that have halted."""
        return new if one_pass.halted is None or old is None else torch.where(one_pass.halted.unsqueeze(-1), old, new)

    def draft(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor, cache: RecursiveCache, depth: tuple[int, int]
    ) -> tuple[torch.Tensor, Drafted]:
        """Draft step of self-speculative decoding: tokens `[B, T]` through prelude, the first cycles and a coda.

        Args:
            mask: `[B, tokens so far]`, None without padding.
            cache: Made with `draft_cycles`. Prelude and first cycles share the slots of the full model; the draft's coda has its own.
            depth: (H, L) of the full model.

        Returns:
            The `[B, T, D]` inputs of `lm_head`, equal to those at `H_cycles = draft_cycles`; and the states for `verify`.
        """
        x = self.embed_tokens(input_ids)
        one_pass = self._one_pass(x, mask, position_ids, cache, cache, depth, "full", {}, slot=self._draft_slot(cache, depth))
        drafted = self._draft_states(one_pass, x)
        return self._read_draft(one_pass, drafted), drafted

    def skip_draft(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor, cache: RecursiveCache, depth: tuple[int, int]
    ) -> Drafted:
        """As `draft`, without what only a draft needs: with `verify` after it, a plain step. `read_draft` makes up for it."""
        x = self.embed_tokens(input_ids)
        one_pass = self._one_pass(x, mask, position_ids, cache, cache, depth, "full", {}, slot=self.config.prelude_layers)
        return self._draft_states(one_pass, x)

    def read_draft(
        self, drafted: Drafted, mask: torch.Tensor | None, position_ids: torch.Tensor, cache: RecursiveCache, depth: tuple[int, int]
    ) -> torch.Tensor:
        """The coda of the draft, for tokens that went through `skip_draft`. Returns the `[B, T, D]` inputs of `lm_head`."""
        slot = self._draft_slot(cache, depth)
        return self._read_draft(self._one_pass(drafted.e, mask, position_ids, cache, cache, depth, "full", {}, slot=slot), drafted)

    def _draft_slot(self, cache: RecursiveCache, depth: tuple[int, int]) -> int:
        """A slot whose length is the number of earlier tokens of a draft: it has at least one of its own, unless it shares all."""
        shares_all = draft_applications(self.config, cache.draft_cycles, depth[1]) > 0 and self.config.coda_layers == 0
        return self.config.prelude_layers if shares_all else self.config.depth(*depth)

    def _draft_states(self, one_pass: ForwardPass, x: torch.Tensor) -> Drafted:
        e = one_pass.prelude(x)
        cache: Any = one_pass.cache
        L_cycles = one_pass.steps - 1
        shared = draft_applications(self.config, cache.draft_cycles, L_cycles)
        z_L, z_H = self.recursion.advance(e, self.recursion.start(e), one_pass.block, range(shared), L_cycles)
        return Drafted(e, z_L, z_H)

    def _read_draft(self, one_pass: ForwardPass, drafted: Drafted) -> torch.Tensor:
        cache: Any = one_pass.cache
        P, K, C, own = one_pass.P, one_pass.K, one_pass.C, self.config.depth(one_pass.cycles, one_pass.steps - 1)
        inner = drafted.z_H
        # CODEPATH: checkpoints of `recursify train --adapter`, whose first application is the plain pass; all others run it for the draft
        if cache.draft_cycles == 0 and self.config.is_adapter:
            inner = drafted.z_L
        elif cache.draft_cycles == 0:
            inner = one_pass._run(drafted.e, P, K, 0, CacheSlots(cache, own + C - P))
        return self.norm(one_pass._run(inner, P + K, C, 0, CacheSlots(cache, own - P - K)))

    def verify(
        self, drafted: Drafted, mask: torch.Tensor | None, position_ids: torch.Tensor, cache: RecursiveCache, depth: tuple[int, int]
    ) -> torch.Tensor:
        """Verify step: drafted tokens through the other cycles and the coda in one pass. Returns the `[B, T, D]` inputs of `lm_head`."""
        shared = draft_applications(self.config, cache.draft_cycles, depth[1])
        first = self.config.prelude_layers + self.config.coda_layers + shared * self.config.L_layers
        one_pass = self._one_pass(drafted.e, mask, position_ids, cache, cache, depth, "full", {}, slot=first)
        states = (drafted.z_L, drafted.z_H)
        z_H = self.recursion.advance(drafted.e, states, one_pass.block, range(shared, one_pass.applications), depth[1])[1]
        return self.norm(one_pass.coda(z_H))

    def begin_pass(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, e: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor, int], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
        """Start a pass without a cache, for code that runs the cycles itself.

        Args:
            e: `[B, T, D]`, the output of the prelude if it is known already.

        Returns:
            e `[B, T, D]`; `block(x, n)` for `Recursion.steps`; `read(z_H)`, which returns the `[B, T, D]` input of `lm_head`.
        """
        x = self.embed_tokens(input_ids) if e is None else e
        one_pass = self._one_pass(x, None, position_ids, None, None, self.cycles(), "full", {"use_cache": False})
        return one_pass.prelude(x) if e is None else e, one_pass.block, lambda z_H: self.norm(one_pass.coda(z_H))

    def _one_pass(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        seen: Cache | None,
        cache: Cache | None,
        depth: tuple[int, int],
        cache_policy: str,
        kwargs: dict[str, Any],
        slot: int | None = None,
    ) -> ForwardPass:
        """The shared state of a forward pass.

        Args:
            seen, cache: The cache that the masks are computed for, and the one that is filled.
            depth: (H, L) of the pass.
            slot: A slot whose length is the number of earlier tokens; None where all slots have the same length.
        """
        # before positions are filled in: only given positions can restart within a row
        masks = attention_mask if isinstance(attention_mask, dict) else self._masks(inputs_embeds, attention_mask, seen, position_ids, slot)
        if position_ids is None:
            start = 0 if seen is None else seen.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)
        rope = self.rotary_emb(inputs_embeds, position_ids)
        return ForwardPass(self, masks, rope, position_ids, cache, depth, cache_policy, kwargs)

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        slot: int | None = None,
    ) -> dict[str, Any]:
        """Attention type -> mask."""
        masks = {}
        for kind in dict.fromkeys(self.config.block_types):
            make_mask: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
            masks[kind] = make_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
                layer_idx=slot,
            )
        return masks


def _select(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states for the head, by transformers' `logits_to_keep`: the last n, 0 for all; or those at positions `[n]`, at positions of each
    row `[B, n]`, or where a mask `[B, T]` is True. (transformers before 5.23, on which the benchmarks run too, has no function for it.)"""
    if isinstance(logits_to_keep, int):
        return states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim < 2:
        return states[:, logits_to_keep]
    return states[logits_to_keep] if logits_to_keep.dtype == torch.bool else torch.take_along_dim(states, logits_to_keep[..., None], dim=1)


def _token_mask(attention_mask: Any, x: torch.Tensor) -> torch.Tensor:
    """`[B, T]`, False for padding. All True without a two-dimensional mask."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -x.shape[1] :].to(device=x.device, dtype=torch.bool)
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


# Names in the guides -> names in transformers, which the modules have.
GUIDE_NAMES = {
    "self_attn": {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"},
    "mlp": {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}
GUIDE_RECURSION = ("H_init", "L_init", "q_head", "inject_H", "inject_L")


class View:
    """A module's parts under other names: the same parameters, not copied and not registered."""

    names: ClassVar[dict[str, str]] = {}

    def __init__(self, module: nn.Module):
        object.__setattr__(self, "module", module)

    def __getattr__(self, name: str) -> Any:
        if name in self.names and not hasattr(self.module, self.names[name]):
            parts = ", ".join(child for child, _ in self.module.named_children())
            raise AttributeError(f"{type(self.module).__name__} has no {name}: its projections are fused; it has {parts}")
        return getattr(self.module, self.names.get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.module, self.names.get(name, name), value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r})"


class Attention(View):
    """Attention with the guides' names `wq`, `wk`, `wv`, `wo`."""

    names = GUIDE_NAMES["self_attn"]


class SwiGLU(View):
    """Feed-forward with the guides' names `w1` (gate), `w2` (down), `w3` (up)."""

    names = GUIDE_NAMES["mlp"]


class Layer(View):
    """A layer whose `self_attn` and `mlp` have the guides' names."""

    @property
    def self_attn(self) -> Attention:
        return Attention(self.module.self_attn)

    @property
    def mlp(self) -> SwiGLU:
        return SwiGLU(self.module.mlp)


class LLevel(View):
    """A group of layers as in the guides: `L_level.layers[i]`."""

    @property
    def layers(self) -> list[Layer]:
        return [Layer(layer) for layer in self.module]


class Inner(View):
    """`model.inner` of the guides: embed_tokens, prelude, L_level, coda, norm, lm_head, H_init, L_init, q_head."""

    def _owner(self, name: str) -> nn.Module:
        base = self.module.model
        return self.module if name == "lm_head" else base.recursion if name in GUIDE_RECURSION else base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._owner(name), name, value)

    @property
    def prelude(self) -> LLevel:
        return LLevel(self.module.model.layers[: self.module.config.prelude_layers])

    @property
    def L_level(self) -> LLevel:
        first = self.module.config.prelude_layers
        return LLevel(self.module.model.layers[first : first + self.module.config.L_layers])

    @property
    def coda(self) -> LLevel:
        return LLevel(self.module.model.layers[self.module.config.prelude_layers + self.module.config.L_layers :])


# Arguments of a forward pass that plain models do not have.
RECURSION_ARGUMENTS = ("H_cycles", "L_cycles", "cache_policy", "halt", "halt_threshold")
# Arguments of `from_pretrained` that locate a configuration.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class RecursiveLLM(PreTrainedModel, GenerationMixin):
    """A recursive language model with its head: the base class of the model classes of all donor families.

    Like transformers' Auto classes, the base class returns an instance of a subclass: `RecursiveLLM(config)` and
    `RecursiveLLM.from_pretrained(name)` return that of the configuration's family, such as `RecursiveQwen2ForCausalLM`.

    To make a model from a donor use `recursify.convert`; to make an untrained model use a `RecursiveLLMConfig`.

    Args:
        config: A `RecursiveLLMConfig`. A dictionary with the technical guide's keys is accepted for compatibility with the guides. With
            `pretrained_model_name` in it, embeddings, final norm and head are loaded from that donor; the layers are random until the
            guide's step 4 copies them.
    """

    config_class: Any
    donor_class: Any
    base_class: Any

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(FAMILIES[_resolve(config).model_type] if cls is RecursiveLLM else cls)

    def __init__(self, config: Any):
        donor = config.get("pretrained_model_name") if isinstance(config, dict) else None
        config = _resolve(config)
        super(self.donor_class, self).__init__(config)  # the donor's own constructor would build the donor's base model
        self.model = self.base_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        _restored(self)
        if donor is not None:
            self._load_outside_layers(donor)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; `AutoModel` also finds the base model with `trust_remote_code`."""
        if self.is_remote_code():
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = known | {"AutoModel": f"{type(self).__module__.split('.')[-1]}.{self.base_class.__name__}"}
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, with fields of the configuration, such as `H_cycles=5`, as further arguments."""
        if cls is RecursiveLLM:
            config = kwargs.get("config")
            if config is None:
                hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
                config = RecursiveLLMConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            return FAMILIES[config.model_type].from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return _restored(super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs))

    @property
    def inner(self) -> Inner:
        """The parts of the model under the guides' names: a view of the same parameters."""
        return Inner(self)

    @can_return_tuple
    @auto_docstring(custom_intro="Logits `[B, T, V]` after the last cycle and, with `labels` `[B, T]`, the next-token loss in nats.")
    def forward(  # type: ignore[misc]  # position_ids is in TransformersKwargs too, as in the donors
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        H_cycles: int | None = None,
        L_cycles: int | None = None,
        output_cycle_logits: bool = False,
        cache_policy: str = "full",
        halt: str | None = None,
        halt_threshold: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RecursiveCausalLMOutputWithPast:
        r"""
        H_cycles (`int`, *optional*):
            Cycles of this pass; the configuration's where None. 0 is one plain pass.
        L_cycles (`int`, *optional*):
            Updates of `z_L` in each cycle of this pass; the configuration's where None.
        output_cycle_logits (`bool`, *optional*, defaults to `False`):
            Also return the logits after every cycle, and those of `q_head`.
        cache_policy (`str`, *optional*, defaults to `"full"`):
            `full`, one cache slot per layer application, or `last`, one per layer: see `RecursiveCache`.
        halt (`str`, *optional*):
            Criterion of early exit per token: `q_head`, `kl` or `entropy`; see `HaltRule`.
        halt_threshold (`float`, *optional*):
            Threshold of the criterion; its default where None.
        """
        rule = HaltRule.of(self, halt, halt_threshold)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            H_cycles=H_cycles,
            L_cycles=L_cycles,
            output_cycle_states=output_cycle_logits,
            cache_policy=cache_policy,
            halt_rule=rule,
            **kwargs,
        )
        if rule is not None and rule.logits is not None and rule.state is outputs.last_hidden_state:  # computed by the rule already
            logits = _select(rule.logits, logits_to_keep)
        else:
            logits = self.lm_head(_select(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cycle_logits = None
        if output_cycle_logits:
            early = [self.lm_head(_select(state, logits_to_keep)) for state in outputs.cycle_states[:-1]]
            cycle_logits = (*early, logits)
        return RecursiveCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cycle_logits=cycle_logits,
            halt_logits=outputs.halt_logits,
            halt_cycles=outputs.halt_cycles,
        )

    def generate(self, *args: Any, draft_cycles: int | None = None, draft_tokens: int | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`, with `H_cycles`, `L_cycles`, `cache_policy`, `halt` and `halt_threshold` as in `forward`.

        Args:
            draft_cycles: Self-speculative decoding: draft with this many cycles (0 is one plain pass), verify the drafted tokens with all
                cycles in one pass. Greedy output is identical, sampled output has the same distribution. The output object also has
                `drafted` and `accepted`.
            draft_tokens: Largest number of tokens per draft, 16 where None; the actual number adapts to the acceptance rate.

        Raises:
            ValueError: A draft that is not shallower than the model, or a combination that is not supported.
        """
        if kwargs.get("halt") is not None:  # the depth depends on the data, so the pass cannot be compiled
            if kwargs.get("generation_config") is None:
                kwargs["disable_compile"] = True
            else:
                kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
                kwargs["generation_config"].disable_compile = True
        if draft_cycles is not None:
            if kwargs.get("assistant_model") is not None:
                raise ValueError("draft_cycles: the model is its own assistant; leave draft_cycles out, or assistant_model")
            most = 16 if draft_tokens is None else draft_tokens
            # bound here, because `generate` does not pass the streamer to a custom loop
            loop = partial(self_speculation, draft_cycles=draft_cycles, draft_tokens=most, streamer=kwargs.get("streamer"))
            kwargs["custom_generate"] = loop
        elif draft_tokens is not None:
            raise ValueError("draft_tokens: expected draft_cycles, too; give both, or leave draft_tokens out")
        return GenerationMixin.generate(self, *args, **kwargs)  # type: ignore[arg-type]

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Prepare a cache with the slots of the call's depth and policy instead of the configuration's."""
        H, L = self.model.cycles(model_kwargs.get("H_cycles"), model_kwargs.get("L_cycles"))
        policy, halt = model_kwargs.get("cache_policy", "full"), model_kwargs.get("halt")
        # A shallow copy: other threads may be reading this model's configuration.
        at_depth = copy.copy(self)
        at_depth.config = slotted(self.config, H, L, policy, halt)
        result = GenerationMixin._prepare_cache_for_generation(at_depth, generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if type(made) is DynamicCache and not made.offloading and not getattr(made, "_is_user_defined", False):
            model_kwargs["past_key_values"] = RecursiveCache(self.config, H, L, policy, halt)
            if generation_config.is_assistant:  # as transformers does with its own caches: rejected tokens are removed
                model_kwargs["past_key_values"].activate_past_recording()
        if hasattr(at_depth, "_previous_max_cache_length"):  # where transformers remembers the length of the static cache
            self._previous_max_cache_length = at_depth._previous_max_cache_length
        return result

    def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Remove the depth arguments for an assistant model, which drafts at its own depth."""
        given = kwargs["model_kwargs"]
        kwargs["model_kwargs"] = {name: value for name, value in given.items() if name not in RECURSION_ARGUMENTS}
        return GenerationMixin._get_candidate_generator(self, *args, **kwargs)

    def _load_outside_layers(self, name: str) -> None:
        """Load embeddings, final norm and head of a donor (the guide's step 3; step 4 copies the layers)."""
        donor = AutoModelForCausalLM.from_pretrained(name)
        self.model.embed_tokens.load_state_dict(donor.get_input_embeddings().state_dict())
        self.model.norm.load_state_dict(donor.model.norm.state_dict())
        self.lm_head.load_state_dict(donor.get_output_embeddings().state_dict())
        warnings.warn(
            f"RecursiveLLM: embeddings, final norm and head come from {name}; the layers are random until they are copied. The guide's "
            "step 4 copies attention and feed-forward but no layer norms; recursify.convert copies everything and checks it.",
            stacklevel=3,
        )


def _restored(loaded: Any) -> Any:
    """A model, or the pair of it and its loading information of `from_pretrained`, after `restore`; an adapter's head is frozen, too."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.base_model.restore()
    if model.config.is_adapter and (head := model.get_output_embeddings()) is not None:
        head.requires_grad_(False)
    return loaded


def _resolve(config: Any) -> Any:
    return from_guide(config) if isinstance(config, dict) else config


_BASE = "The donor's layers, looped, without a head."
_WITH_HEAD = "The donor's layers, looped, with its language modeling head."


@auto_docstring(custom_intro=_BASE)
class RecursiveQwen2Model(RecursiveModelMixin, Qwen2Model):
    config: RecursiveQwen2Config


@auto_docstring(custom_intro=_WITH_HEAD)
class RecursiveQwen2ForCausalLM(RecursiveLLM, Qwen2ForCausalLM, GenerationMixin):
    config: RecursiveQwen2Config
    donor_class, base_class = Qwen2ForCausalLM, RecursiveQwen2Model


@auto_docstring(custom_intro=_BASE)
class RecursiveQwen3Model(RecursiveModelMixin, Qwen3Model):
    config: RecursiveQwen3Config


@auto_docstring(custom_intro=_WITH_HEAD)
class RecursiveQwen3ForCausalLM(RecursiveLLM, Qwen3ForCausalLM, GenerationMixin):
    config: RecursiveQwen3Config
    donor_class, base_class = Qwen3ForCausalLM, RecursiveQwen3Model


@auto_docstring(custom_intro=_BASE)
class RecursiveLlamaModel(RecursiveModelMixin, LlamaModel):
    config: RecursiveLlamaConfig


@auto_docstring(custom_intro=_WITH_HEAD)
class RecursiveLlamaForCausalLM(RecursiveLLM, LlamaForCausalLM, GenerationMixin):
    config: RecursiveLlamaConfig
    donor_class, base_class = LlamaForCausalLM, RecursiveLlamaModel


@auto_docstring(custom_intro=_BASE)
class RecursiveMistralModel(RecursiveModelMixin, MistralModel):
    config: RecursiveMistralConfig


@auto_docstring(custom_intro=_WITH_HEAD)
class RecursiveMistralForCausalLM(RecursiveLLM, MistralForCausalLM, GenerationMixin):
    config: RecursiveMistralConfig
    donor_class, base_class = MistralForCausalLM, RecursiveMistralModel


@auto_docstring(custom_intro=_BASE)
class RecursiveSmolLM3Model(RecursiveModelMixin, SmolLM3Model):
    config: RecursiveSmolLM3Config


@auto_docstring(custom_intro=_WITH_HEAD)
class RecursiveSmolLM3ForCausalLM(RecursiveLLM, SmolLM3ForCausalLM, GenerationMixin):
    config: RecursiveSmolLM3Config
    donor_class, base_class = SmolLM3ForCausalLM, RecursiveSmolLM3Model


@auto_docstring(custom_intro=_BASE)
class RecursiveOlmo2Model(RecursiveModelMixin, Olmo2Model):
    config: RecursiveOlmo2Config


@auto_docstring(custom_intro=_WITH_HEAD)
class RecursiveOlmo2ForCausalLM(RecursiveLLM, Olmo2ForCausalLM, GenerationMixin):
    config: RecursiveOlmo2Config
    donor_class, base_class = Olmo2ForCausalLM, RecursiveOlmo2Model


@auto_docstring(custom_intro=_BASE)
class RecursivePhi3Model(RecursiveModelMixin, Phi3Model):
    config: RecursivePhi3Config


@auto_docstring(custom_intro=_WITH_HEAD)
class RecursivePhi3ForCausalLM(RecursiveLLM, Phi3ForCausalLM, GenerationMixin):
    config: RecursivePhi3Config
    donor_class, base_class = Phi3ForCausalLM, RecursivePhi3Model


FAMILIES: dict[str, Any] = {
    family.config_class.model_type: family
    for family in (
        RecursiveQwen2ForCausalLM,
        RecursiveQwen3ForCausalLM,
        RecursiveLlamaForCausalLM,
        RecursiveMistralForCausalLM,
        RecursiveSmolLM3ForCausalLM,
        RecursiveOlmo2ForCausalLM,
        RecursivePhi3ForCausalLM,
    )
}

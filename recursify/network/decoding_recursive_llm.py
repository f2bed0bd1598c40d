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
"""Decoding: KV cache, early exit per token (halting), and self-speculative decoding.

    RecursiveCache      one slot per layer application ("full"), or one per layer ("last")
    CacheSlots, ...     views of a cache that map a shared layer to the slots of its current application
    HaltRule            early-exit criterion: q_head, KL divergence between cycles, or entropy, with a threshold
    self_speculation    the decoding loop of `generate(draft_cycles=...)`

Shape letters: B batch, T tokens, D hidden size, V vocabulary. This file is saved beside the weights: it imports only torch and
transformers.
"""

import copy
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.continuous_batching.cache import PagedAttentionCache

CACHE_POLICIES = ("full", "last")
READ_EVERY_CYCLE = ("kl", "entropy")  # exit criteria that need the logits of every cycle


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in over-allocated buffers: appending a token copies none of the earlier ones, as `DynamicLayer` does."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor | None] = [None, None]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():  # writing in place would break autograd
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        self.keys, self.values = self._write(0, self.keys, key_states, seen), self._write(1, self.values, value_states, seen)
        return self.keys, self.values

    def _write(self, which: int, old: Any, new: torch.Tensor, seen: int) -> torch.Tensor:
        """Append `new` to `old`. `old` is the first `seen` tokens of its buffer, unless other code has replaced it by another tensor."""
        buffer, length = self.buffers[which], seen + new.shape[-2]
        replaced = buffer is not None and seen > 0 and old.data_ptr() != buffer.data_ptr()
        # tensors of inference mode cannot be written to outside of it
        fixed = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if buffer is None or replaced or fixed or buffer.shape[-2] < length or buffer.shape[0] != new.shape[0]:
            buffer = new.new_empty((*new.shape[:-2], length + max(64, length // 4), new.shape[-1]))
            if seen > 0:
                buffer[:, :, :seen] = old
            self.buffers[which] = buffer
        buffer[:, :, seen:length] = new
        return buffer[:, :, :length]


class RecursiveCache(DynamicCache):
    """The KV cache of a recursive model. The order of slots is prelude, coda, loop.

    Args:
        config: Configuration of the model.
        H_cycles, L_cycles: Depth of the cache; the configuration's where None.
        cache_policy: "full", one slot per layer application: decoding equals a forward pass without cache. "last", one slot per layer, as
            in a plain model: only the keys and values of each token's last application are kept.
        halt: Early-exit criterion. "kl" and "entropy" need logits at every cycle, so the codas of early cycles have slots of their own,
            after all others.
        draft_cycles: Depth of the draft in self-speculative decoding, whose coda has slots of its own, after all others.

    Attributes:
        cycles_used: `[B, tokens]`, the cycle at which each token halted, 0 for padding; None before the first pass with early exit.
    """

    cycles_used: torch.Tensor | None = None

    def __init__(
        self,
        config: Any,
        H_cycles: int | None = None,
        L_cycles: int | None = None,
        cache_policy: str = "full",
        halt: str | None = None,
        draft_cycles: int | None = None,
    ):
        super().__init__(config=slotted(config, H_cycles, L_cycles, cache_policy, halt))
        self.draft_cycles = draft_cycles
        if draft_cycles is None:
            self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        else:  # rejected tokens are removed, which a sliding-window layer cannot do
            self.layers = [GrowingLayer() for _ in range(len(self.layers) + draft_slots(config, draft_cycles))]

    def record_cycles(self, used: torch.Tensor | None, H_cycles: int, tokens: tuple[int, int]) -> None:
        """Append `used` `[B, T]` for the last `tokens` (B, T) in the cache; None means a pass without early exit."""
        if used is None and self.cycles_used is None:
            return
        before = self.get_seq_length() - tokens[1]
        device = self.layers[0].keys.device  # type: ignore[union-attr]
        used = torch.full(tokens, H_cycles, device=device) if used is None else used
        known = self.cycles_used
        known = torch.full((tokens[0], before), H_cycles, device=device) if known is None else known
        self.cycles_used = torch.cat([known, used], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.draft_cycles is None:  # views of the removed tokens that a caller has kept are not written over; drafts crop at every step
            for layer in self.layers:
                if isinstance(layer, GrowingLayer):
                    layer.buffers = [None, None]
        if self.cycles_used is not None and tokens_to_remove:
            self.cycles_used = self.cycles_used[:, : -abs(tokens_to_remove)]

    def reset(self) -> None:
        super().reset()
        self.cycles_used = None

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda used: used.index_select(0, beam_idx.to(used.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda used: used.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda used: used[indices])

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.cycles_used is not None:
            self.cycles_used = change(self.cycles_used)


def slotted(config: Any, H_cycles: int | None, L_cycles: int | None, cache_policy: str, halt: str | None = None) -> Any:
    """A copy of the configuration whose caches have the slots for this depth, policy and exit criterion.

    Raises:
        ValueError: Unknown policy.
    """
    if cache_policy not in CACHE_POLICIES:
        raise ValueError(f"cache_policy: expected one of {', '.join(CACHE_POLICIES)}, got {cache_policy!r}")
    if cache_policy == "last":
        return config.at_depth(0)
    other = config.at_depth(H_cycles, L_cycles)
    if halt in READ_EVERY_CYCLE:
        coda = config.block_types[config.prelude_layers + config.L_layers :]
        other.layer_types = other.layer_types + coda * (other.H_cycles - config.first_exit)
        other.num_hidden_layers = len(other.layer_types)
    return other


def rotary_limit(config: Any) -> int | None:
    """Largest number of tokens at which a token's rotary angles depend on its own position alone; None where they always do.

    Beyond it, `longrope` and `dynamic` change the angles of every token in a pass with the longest position in it, so keys in a cache and
    other sequences of a batch no longer match.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return int(config.max_position_embeddings) if rope.get("rope_type") == "dynamic" else None


def draft_applications(config: Any, draft_cycles: int | None, L_cycles: int) -> int:
    """Applications of the loop that a draft and the full model share. A plain pass shares its one only with an adapter's first."""
    return (draft_cycles or 0) * (L_cycles + 1) or int(config.is_adapter)


def draft_slots(config: Any, draft_cycles: int) -> int:
    """Number of slots of a draft alone: those of its coda and, where a plain pass shares no application, of its own."""
    return config.coda_layers + (0 if draft_applications(config, draft_cycles, config.L_cycles) else config.L_layers)


def claim_cache(cache: Cache, config: Any, H_cycles: int, L_cycles: int, cache_policy: str = "full", halt: str | None = None) -> None:
    """Bind a cache to the depth and policy of the first pass that fills it.

    With a coda, it is also bound to exit criteria that need logits at every cycle, which fill further slots.

    Raises:
        ValueError: Unknown policy, too few slots, or a cache bound to other values.
    """
    asked = f"H_cycles={H_cycles}, L_cycles={L_cycles}, cache_policy={cache_policy!r}"
    if halt in READ_EVERY_CYCLE and config.coda_layers > 0 and cache_policy == "full":
        asked += f", halt={halt!r}"
    owner = getattr(cache, "recursive_depth", None)
    if owner == asked:  # bound by an earlier pass, as for every token but the first
        return
    slots = slotted(config, H_cycles, L_cycles, cache_policy, halt).num_hidden_layers
    if cache.layer_class_to_replicate is not None:
        cache.layers += [cache.layer_class_to_replicate() for _ in range(slots - len(cache.layers))]
    if len(cache.layers) < slots:
        raise ValueError(
            f"past_key_values: {asked} needs a cache of {slots} slots, this one has {len(cache.layers)}; "
            f"make it with RecursiveCache(model.config, {asked})"
        )
    if torch.compiler.is_compiling():  # bound by the first pass, which `generate` does not compile
        return
    if owner is not None and cache.get_seq_length() > 0:
        raise ValueError(f"past_key_values: filled at {owner}, called at {asked}; use one cache for each")
    cache.recursive_depth = asked  # type: ignore[attr-defined]


class CacheSlots(Cache):
    """A view of a cache that maps the `layer_idx` of shared layers to the slots of one application."""

    def __init__(self, cache: Cache, offset: int):
        self.cache, self.offset = cache, offset

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.cache.update(key_states, value_states, layer_idx + self.offset, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.cache.get_seq_length(layer_idx + self.offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class ScratchSlots(CacheSlots):
    """As `CacheSlots`, but writes are discarded: a later application of the same pass writes the slots."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.cache.layers[layer_idx + self.offset]
        tokens = key_states.shape[-2]
        if type(layer) in (DynamicLayer, GrowingLayer):
            found = layer.update(key_states, value_states, *args, **kwargs)
            layer.crop(-tokens)
            return found
        if type(layer) is StaticLayer:  # the next write starts at the same position
            found = layer.update(key_states, value_states, *args, **kwargs)
            layer.cumulative_length.sub_(tokens)
            return found
        layer = copy.copy(layer)
        # a static window writes in place
        layer.__dict__.update({name: value.clone() for name, value in vars(layer).items() if isinstance(value, torch.Tensor)})
        return layer.update(key_states, value_states, *args, **kwargs)


class HaltingSlots(CacheSlots):
    """As another view, but halted tokens keep the keys and values of the previous cycle.

    Args:
        slots: The view to write through; None without a cache.
        kept: (step, layer) -> keys and values of these tokens in the previous cycle; replaced by those of this cycle.
        step: Number of the application within its cycle.
        halted: `[B, T]`, or None while no token has halted.
    """

    def __init__(self, slots: CacheSlots | None, kept: dict[tuple[int, int], Any], step: int, halted: torch.Tensor | None):
        self.cache: Any = slots
        self.kept, self.step, self.halted = kept, step, halted

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        pair, place = (key_states, value_states), (self.step, layer_idx)
        if self.halted is not None:
            halted = self.halted[:, None, :, None].to(key_states.device)
            kept = self.kept[place] if place in self.kept else self.kept[0, layer_idx]  # halted before the first cycle: those of step 0
            pair = tuple(torch.where(halted, old, new) for old, new in zip(kept, pair, strict=True))  # type: ignore[assignment]
        self.kept[place] = pair
        return pair if self.cache is None else self.cache.update(*pair, layer_idx, *args, **kwargs)


class PagedCacheSlots(PagedAttentionCache):
    """`CacheSlots` for continuous batching, whose attention functions check for this class."""

    def __init__(self, cache: PagedAttentionCache, offset: int):
        self.cache, self.offset = cache, offset

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        return self.cache.update(key_states=key_states, value_states=value_states, layer_idx=layer_idx + self.offset, kwargs=kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class ShiftedInstances(dict):
    """`CacheSlots` for engines that keep one attention object per slot and look it up by `layer_idx` (vLLM, SGLang)."""

    def __init__(self, instances: Any, offset: int):
        super().__init__()
        self.instances, self.offset = instances, offset

    def __getitem__(self, layer_idx: int) -> Any:
        return self.instances[layer_idx + self.offset]


HALT_CRITERIA = {"q_head": 0.5, "kl": 5e-4, "entropy": 0.1}  # criterion -> default threshold
_READOUT_ELEMENTS = 2**26  # logits in memory at a time while a criterion reads them


class HaltRule:
    """Early-exit rule: when a token halts. Every criterion is causal and depends on that token alone.

    Args:
        criterion: "q_head": the sigmoid of the halting head exceeds the threshold; 0 halts always, 1 never. "kl": the KL divergence in nats
            of the next-token distribution from that of the previous cycle is below the threshold (Huginn, arXiv 2502.05171); infinity
            halts always, at cycle 2, 0 never. "entropy": the entropy of the distribution in nats is below the threshold; infinity halts
            always, 0 never.
        threshold: The default in `HALT_CRITERIA` where None.
        head, vocabulary: Maps states `[N, D]` to logits `[N, V]`, and V; for the criteria that read logits.

    Raises:
        ValueError: Unknown criterion, a threshold that is not a number, or no head for a criterion that needs one.
    """

    def __init__(
        self,
        criterion: str,
        threshold: float | None = None,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        vocabulary: int = 1,
    ):
        if criterion not in HALT_CRITERIA:
            raise ValueError(f"halt: expected one of {', '.join(HALT_CRITERIA)}, got {criterion!r}")
        self.criterion, self.head, self.chunk = criterion, head, max(1, _READOUT_ELEMENTS // vocabulary)
        self.threshold = HALT_CRITERIA[criterion] if threshold is None else float(threshold)
        if math.isnan(self.threshold):
            raise ValueError("halt_threshold: expected a number, got nan")
        self.reads_logits = criterion in READ_EVERY_CYCLE
        if self.reads_logits and head is None:
            raise ValueError(f"halt: {criterion} reads logits, and the base model has no head; call the model with its head")
        self.state: torch.Tensor | None = None  # the last states, and their logits and log-probabilities if computed in one chunk
        self.logits: torch.Tensor | None = None
        self.log_probs: torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any, criterion: str | None, threshold: float | None = None) -> "HaltRule | None":
        """The rule for a model; None, for fixed depth, where the criterion is None. A base model has no head, so only q_head works."""
        if criterion is None:
            return None
        return cls(criterion, threshold, getattr(model, "lm_head", None), model.config.vocab_size)

    def by_head(self, halt_logit: torch.Tensor) -> torch.Tensor:
        """`[B, T]` logits of `q_head` to `[B, T]`, True where the token halts."""
        # a threshold of 0 halts also where the sigmoid underflows to 0
        return (halt_logit.float().sigmoid() > self.threshold) | (self.threshold <= 0)

    def by_readout(self, state: torch.Tensor) -> torch.Tensor:
        """The `[B, T, D]` inputs of the head to `[B, T]`, True where the token halts."""
        rows, before = state.flatten(0, 1), self.state
        known, self.logits, self.log_probs = self.log_probs, None, None
        nats = []
        for first in range(0, len(rows), self.chunk):
            logits = self.head(rows[first : first + self.chunk])  # type: ignore[misc]
            log_probs = logits.float().log_softmax(dim=-1)
            if len(rows) <= self.chunk:
                self.logits, self.log_probs = logits.unflatten(0, state.shape[:2]), log_probs
            if self.criterion == "kl" and before is not None and known is None:
                earlier = self.head(before.flatten(0, 1)[first : first + self.chunk]).float().log_softmax(dim=-1)  # type: ignore[misc]
            else:
                earlier = known if known is not None else log_probs
            nats.append(self._nats(log_probs, earlier, first_cycle=before is None))
        self.state = state
        return (torch.cat(nats) < self.threshold).unflatten(0, state.shape[:2])

    def _nats(self, log_probs: torch.Tensor, earlier: torch.Tensor, first_cycle: bool) -> torch.Tensor:
        if self.criterion == "entropy":
            return -(log_probs.exp() * log_probs).sum(dim=-1)
        if first_cycle:  # there is no previous cycle
            return log_probs.new_full(log_probs.shape[:1], math.inf)
        return (log_probs.exp() * (log_probs - earlier)).sum(dim=-1).clamp(min=0)


@dataclass
class Drafted:
    """States of drafted tokens after prelude and first cycles: e, z_L and z_H, each `[B, T, D]`."""

    e: torch.Tensor
    z_L: torch.Tensor
    z_H: torch.Tensor

    @classmethod
    def join(cls, parts: "list[Drafted]") -> "Drafted":
        """Concatenate along T."""
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("e", "z_L", "z_H")))


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Output of `generate(draft_cycles=...)` with `return_dict_in_generate=True`.

    Args:
        drafted: Number of drafted tokens in unfinished rows.
        accepted: Number of accepted ones: those before the first rejection of their draft.
        undrafted: Number of tokens made by plain steps, while drafts did not pay by the clock, or to compare.
    """

    drafted: int | None = None
    accepted: int | None = None
    undrafted: int | None = None


def self_speculation(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    draft_cycles: int,
    draft_tokens: int,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Self-speculative decoding: draft with the first cycles, verify with all cycles (arXiv 2211.17192).

    The verify step continues from the draft's states after prelude and first cycles. All rows of a batch advance by the same number of
    tokens, that of the row with the earliest rejection. Greedy decoding drafts only while that is faster than plain steps (`draft_turns`);
    sampling always drafts, since a seed would otherwise give other texts from run to run. The signature is that of transformers'
    `custom_generate`.
    """
    depth = model.model.cycles(model_kwargs.get("H_cycles"), model_kwargs.get("L_cycles"))
    _check_draft(draft_cycles, draft_tokens, depth, generation_config, model_kwargs)
    limit, longest = rotary_limit(model.config), stopping_criteria.max_length
    if limit is not None and (longest is None or longest > limit):
        raise ValueError(
            f"draft_cycles: the rotary embedding of this {model.config.model_type} ({model.config.rope_parameters['rope_type']}) changes "
            f"with the length of the text beyond {limit} tokens, so drafts cannot be verified there; expected at most {limit} tokens, "
            f"prompt included, got {longest}; ask for fewer new tokens, or leave draft_cycles out"
        )
    cache = _draft_cache(model, draft_cycles, depth, model_kwargs)
    draft = DraftLength(model.config, draft_cycles, depth, draft_tokens)
    mask = model_kwargs.get("attention_mask")
    reader = _Reader(model.model, cache, depth, None if mask is None or bool(mask.all()) else mask, len(input_ids))
    if input_ids.shape[1] - 1 > cache.get_seq_length():
        reader.read(input_ids[:, cache.get_seq_length() : -1])
    sampler = _Sampler(logits_processor, generation_config.do_sample)
    pad = generation_config._pad_token_tensor
    active = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    drafted = accepted = undrafted = 0
    turns = draft_turns(clocked=not generation_config.do_sample)
    drafting = next(turns)
    while active.any():
        start = time.perf_counter()
        if drafting:
            left = max(1, stopping_criteria.max_length - input_ids.shape[1]) if stopping_criteria.max_length is not None else draft_tokens
            guessed, guesses = reader.draft(input_ids, min(draft.length(), left), sampler, model.lm_head)
            logits = model.lm_head(reader.verify()).float()
            taken, right = sampler.accept(input_ids, guessed, guesses, logits, active)
            count, agreed = guessed.shape[1], right.cumprod(dim=1).sum(dim=1)
            drafted += count * int(active.sum())
            accepted += int(agreed[active].sum())
            kept = min(int(agreed[active].min()) + 1, count)
            draft.learn(kept, right=kept == count and bool(right[active, -1].all()))
        else:
            logits = model.lm_head(reader.plain_step(input_ids))[:, -1].float()
            taken, count, kept = sampler.token(sampler.scores(input_ids, logits)), 1, 1
            undrafted += 1
        for column in range(kept):
            token = taken[:, column] if pad is None else torch.where(active, taken[:, column], pad)
            input_ids = torch.cat([input_ids, token.unsqueeze(1)], dim=1)
            if streamer is not None:
                streamer.put(token.cpu())
            active = active & ~stopping_criteria(input_ids, None)
            if not active.any():
                kept = column + 1
                break
        reader.rollback(count - kept)
        drafting = turns.send((time.perf_counter() - start, kept))
    reader.catch_up()
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return SpeculativeOutput(input_ids, past_key_values=cache, drafted=drafted, accepted=accepted, undrafted=undrafted)  # type: ignore[arg-type]
    return input_ids


def _check_draft(draft_cycles: int, draft_tokens: int, depth: tuple[int, int], config: Any, model_kwargs: dict[str, Any]) -> None:
    if not 0 <= draft_cycles < depth[0]:
        raise ValueError(f"draft_cycles: expected at least 0 and less than H_cycles = {depth[0]}, got {draft_cycles}")
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens: expected at least 1, got {draft_tokens}")
    modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    for reason, met in (
        ("one beam", config.get_generation_mode() in modes),
        ("no halting", model_kwargs.get("halt") is None),
        ("cache_policy 'full'", model_kwargs.get("cache_policy", "full") == "full"),
        ("use_cache", config.use_cache is not False),
        ("the dynamic cache", config.cache_implementation in (None, "dynamic")),
        ("no scores, logits, states or attentions in the output", not any(getattr(config, f"output_{name}") for name in _NOT_KEPT)),
    ):
        if not met:
            raise ValueError(f"draft_cycles: self-speculation works with {reason} only; leave draft_cycles out, or the other")


_NOT_KEPT = ("scores", "logits", "hidden_states", "attentions")


def _draft_cache(model: Any, draft_cycles: int, depth: tuple[int, int], model_kwargs: dict[str, Any]) -> RecursiveCache:
    """The caller's cache, if it was made for drafts of this depth, or a new one."""
    given = model_kwargs.get("past_key_values")
    if given is None or (given.get_seq_length() == 0 and not getattr(given, "_is_user_defined", False)):
        given = RecursiveCache(model.config, *depth, draft_cycles=draft_cycles)
    if getattr(given, "draft_cycles", None) != draft_cycles:
        raise ValueError(
            f"past_key_values: expected a cache for drafts, RecursiveCache(model.config, H_cycles={depth[0]}, L_cycles={depth[1]}, "
            f"draft_cycles={draft_cycles}), got a {type(given).__name__} for draft_cycles={getattr(given, 'draft_cycles', None)}"
        )
    claim_cache(given, model.config, *depth)
    return given


class DraftLength:
    """The number of tokens to draft: the one with the most expected tokens per layer application at the recent acceptance rate.

    A drafted token costs prelude, first cycles and coda. A verify step costs the other cycles and the coda, the same for one token as for
    all drafted tokens: decoding is assumed to be bound by memory bandwidth.
    """

    def __init__(self, config: Any, draft_cycles: int, depth: tuple[int, int], most: int):
        shared = draft_applications(config, draft_cycles, depth[1])
        own = config.coda_layers + max(1, shared) * config.L_layers
        rest = depth[0] * (depth[1] + 1) - shared
        self.drafting, self.verifying = config.prelude_layers + own, rest * config.L_layers + config.coda_layers
        self.most, self.right, self.seen = most, 4.0, 5.0  # acceptance rate of 4/5 at the start

    def length(self) -> int:
        rate = self.right / self.seen
        tokens = [sum(rate**i for i in range(n)) for n in range(1, self.most + 1)]
        speed = [gained / (n * self.drafting + self.verifying) for n, gained in enumerate(tokens, start=1)]
        return 1 + speed.index(max(speed))

    def learn(self, kept: int, right: bool) -> None:
        """Update the rate: of a draft `kept` tokens were kept, the last either `right` or replaced. Older drafts count less."""
        self.right, self.seen = 0.9 * self.right + kept - (not right), 0.9 * self.seen + kept


# Of `draft_turns`: drafting rounds and plain steps that are measured, and tokens that a verdict holds for at first and at most.
_ROUNDS, _STEPS, _HOLDS, _HOLDS_LONGEST = 6, 2, 32, 256


def draft_turns(clocked: bool) -> Generator[bool, tuple[float, int], None]:
    """Whether the next tokens are drafted, decided by the clock: True for a draft and verify round, False for a plain step.

    Each turn is sent back its seconds and number of tokens. Both ways are measured within the text in turns; the faster one is kept for a
    number of turns, which doubles for plain steps while drafts go on losing. Not clocked, all turns draft.
    """
    while not clocked:
        yield True
    rest = _HOLDS
    while True:
        drafts = yield from _seconds_per_token(True, _ROUNDS)
        pays = drafts < (yield from _seconds_per_token(False, _STEPS))
        for _ in range(_HOLDS if pays else rest):
            yield pays
        rest = _HOLDS if pays else min(2 * rest, _HOLDS_LONGEST)


def _seconds_per_token(drafting: bool, turns: int) -> Generator[bool, tuple[float, int], float]:
    yield drafting  # the first turn after a change pays for it
    seconds, tokens = 0.0, 0
    for _ in range(turns):
        spent, kept = yield drafting
        seconds, tokens = seconds + spent, tokens + kept
    return seconds / tokens


class _Reader:
    """The draft and verify steps over the next tokens of a batch, and their shared state."""

    def __init__(self, base: Any, cache: RecursiveCache, depth: tuple[int, int], mask: torch.Tensor | None, rows: int):
        self.base, self.cache, self.depth, self.mask, self.rows = base, cache, depth, mask, rows
        self.pending: list[Drafted] = []
        self.skipped: list[Drafted] = []  # of plain steps, whose keys and values the draft's own slots lack

    def read(self, input_ids: torch.Tensor) -> None:
        """Prefill: fill the cache of draft and full model with known tokens."""
        place = self._place(input_ids, self.cache.get_seq_length())
        _, drafted = self.base.draft(input_ids, *place, self.cache, self.depth)
        self.base.verify(drafted, *place, self.cache, self.depth)

    def draft(self, input_ids: torch.Tensor, count: int, sampler: "_Sampler", head: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Draft the next tokens `[B, count]`. Also returns, for each, the scores `[B, V]` that it was chosen from."""
        self.catch_up()
        self.start, self.pending, ids, scores = self.cache.get_seq_length(), [], input_ids, []
        for _ in range(count):
            fed = ids[:, -1:]
            state, drafted = self.base.draft(fed, *self._place(fed, self.start + len(self.pending)), self.cache, self.depth)
            self.pending.append(drafted)
            scores.append(sampler.scores(ids, head(state)[:, -1].float()))
            ids = torch.cat([ids, sampler.token(scores[-1])], dim=1)
        return ids[:, input_ids.shape[1] :], scores

    def verify(self) -> torch.Tensor:
        """`[B, count, D]` of the full model, for the inputs of the drafted tokens."""
        drafted = Drafted.join(self.pending)
        return self.base.verify(drafted, *self._place(drafted.e, self.start), self.cache, self.depth)

    def plain_step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The next token without a draft: `[B, 1, D]` of the full model, at the cost of a plain step."""
        fed = input_ids[:, -1:]
        place = self._place(fed, self.cache.get_seq_length())
        self.skipped.append(self.base.skip_draft(fed, *place, self.cache, self.depth))
        return self.base.verify(self.skipped[-1], *place, self.cache, self.depth)

    def catch_up(self) -> None:
        """Fill the draft's own slots with the tokens of plain steps, in one pass."""
        if self.skipped:
            drafted = Drafted.join(self.skipped)
            self.base.read_draft(drafted, *self._place(drafted.e, self.cache.get_seq_length() - len(self.skipped)), self.cache, self.depth)
            self.skipped = []

    def rollback(self, tokens: int) -> None:
        if tokens > 0:
            self.cache.crop(-tokens)

    def _place(self, x: torch.Tensor, start: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Mask and positions of tokens that follow `start` others; positions do not count left padding."""
        stop = start + x.shape[1]
        positions = torch.arange(start, stop, device=x.device).unsqueeze(0)
        if self.mask is None:
            return None, positions
        if self.mask.shape[1] < stop:
            self.mask = torch.nn.functional.pad(self.mask, (0, stop - self.mask.shape[1]), value=1)
        padding = (self.mask[:, :stop] == 0).sum(dim=1, keepdim=True)
        return self.mask[:, :stop], (positions - padding).clamp(min=0)


class _Sampler:
    """Chooses the next token from logits, and accepts or rejects drafted tokens."""

    def __init__(self, processors: Any, sample: bool):
        self.processors, self.sample = processors, sample

    def scores(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self.processors(input_ids, logits)

    def token(self, scores: torch.Tensor) -> torch.Tensor:
        """`[B, V]` to `[B, 1]`."""
        return torch.multinomial(scores.softmax(dim=-1), 1) if self.sample else scores.argmax(dim=-1, keepdim=True)

    def accept(
        self, input_ids: torch.Tensor, guessed: torch.Tensor, guesses: list[torch.Tensor], logits: torch.Tensor, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The token at each position, drafted or replaced, and whether the draft was accepted; each `[B, count]`.

        A drafted token is accepted with probability p/q, its probabilities under model and draft, and otherwise replaced by a sample from
        max(0, p - q); the result has distribution p (arXiv 2211.17192, algorithm 1). Finished rows accept everything.
        """
        ids, taken, right = torch.cat([input_ids, guessed], dim=1), [], []
        for column, guess in enumerate(guesses):
            scores = self.scores(ids[:, : input_ids.shape[1] + column], logits[:, column])
            token = guessed[:, column : column + 1]
            if self.sample:
                p, q = scores.softmax(dim=-1), guess.softmax(dim=-1)
                keeps = torch.rand_like(p[:, :1]) * q.gather(1, token) < p.gather(1, token)
                beyond = (p - q).clamp(min=0)
                other = torch.multinomial(torch.where(beyond.sum(dim=-1, keepdim=True) > 0, beyond, p), 1)
            else:
                other = scores.argmax(dim=-1, keepdim=True)
                keeps = other == token
            taken.append(torch.where(keeps, token, other))
            right.append(keeps | ~active.unsqueeze(1))
        return torch.cat(taken, dim=1), torch.cat(right, dim=1)

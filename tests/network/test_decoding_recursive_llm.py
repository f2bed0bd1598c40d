"""Caches, early exit and self-speculative decoding, always with nonzero gains and states: at gain 0 wrong slots go unnoticed."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from recursify import RecursiveLLM
from recursify.network import decoding_recursive_llm
from recursify.network.configuration_recursive_llm import from_donor
from recursify.network.decoding_recursive_llm import DraftLength, GrowingLayer, HaltRule, RecursiveCache, draft_turns
from tests.support.early_exit import CRITERIA, NEVER, earliest, exits, ids, middling, recursive, splitting, tokens_through
from tests.support.tiny import tiny_config

ALWAYS = {"q_head": 0.0, "kl": math.inf, "entropy": math.inf}


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    rows = [torch.nn.functional.pad(ids(n, seed=n), (longest - n, 0)) for n in lengths]
    return torch.stack(rows), torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])


def write(model: PreTrainedModel, input_ids: torch.Tensor, new: int = 8, **kwargs: Any) -> Any:
    """The output of a greedy `generate` of a fixed number of tokens, ignoring end tokens."""
    kwargs = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "min_new_tokens": new, "max_new_tokens": new} | kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(input_ids, return_dict_in_generate=True, **kwargs)


def written(model: PreTrainedModel, input_ids: torch.Tensor, new: int = 8, **kwargs: Any) -> torch.Tensor:
    return write(model, input_ids, new, **kwargs).sequences[:, input_ids.shape[1] :]


def turns_of(*pattern: bool) -> Callable[..., Any]:
    """In the place of `draft_turns`: drafts by a pattern that repeats, whatever the clock says."""

    def turns(clocked: bool) -> Generator[bool, Any, None]:
        while True:
            for drafting in pattern:  # noqa: UP028 - `yield from` would send to the pattern
                yield drafting

    return turns


shape = {
    "prelude_layers": st.integers(0, 2), "coda_layers": st.integers(0, 2), "H_cycles": st.integers(1, 4), "layers": st.integers(5, 6),
    "seed": st.integers(0, 3),
}  # fmt: skip
adapters = st.fixed_dictionaries({**shape, "L_cycles": st.integers(1, 2), "lora_rank": st.just(2), "lora_pairs": st.integers(1, 2)})
shapes = st.one_of(st.fixed_dictionaries({**shape, "L_cycles": st.integers(0, 2)}), adapters)
properties = settings(max_examples=24, deadline=None, derandomize=True)


# --- Properties of random models -------------------------------------------------------------------------------------------------------


@properties
@given(shapes, st.integers(1, 12), st.integers(1, 3))
def test_cached_generation_equals_uncached_generation(shape: dict[str, int], length: int, rows: int) -> None:
    model, x = recursive(**shape), ids(rows, length)
    assert torch.equal(written(model, x), written(model, x, use_cache=False))


@properties
@given(shapes, st.integers(1, 12), st.integers(1, 3), st.integers(1, 6), st.data())
def test_speculative_decoding_equals_plain_decoding(shape: dict[str, int], length: int, rows: int, drafts: int, data: Any) -> None:
    model, x = recursive(**shape), ids(rows, length)
    k = data.draw(st.integers(0, shape["H_cycles"] - 1))
    assert torch.equal(written(model, x, draft_cycles=k, draft_tokens=drafts), written(model, x))


@properties
@given(
    shapes,
    st.lists(st.integers(1, 10), min_size=2, max_size=3).filter(lambda lengths: max(lengths) > 1),
    st.sampled_from(["plain", "last", "draft", *CRITERIA]),
)
def test_batched_generation_equals_single_row_generation(shape: dict[str, int], lengths: list[int], how: str) -> None:
    model, (x, mask) = recursive(**shape), left_padded(*lengths)
    kwargs: dict[str, Any] = {"plain": {}, "last": {"cache_policy": "last"}, "draft": {"draft_cycles": 0}}.get(how, {"halt": how})
    if how in CRITERIA and shape["H_cycles"] > earliest(model, how):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        kwargs["halt_threshold"] = splitting(model, x, how, mask=mask)
        with torch.no_grad():
            assert exits(model(x, attention_mask=mask, position_ids=positions, **kwargs).halt_cycles, mask) > 1
    batch = written(model, x, attention_mask=mask, **kwargs)
    for row, n in enumerate(lengths):
        assert torch.equal(batch[row : row + 1], written(model, ids(1, n, seed=n), **kwargs))


@properties
@given(shapes, st.integers(2, 12), st.sampled_from(CRITERIA), st.floats(0, 1))
def test_prefill_and_incremental_decoding_exit_at_the_same_cycles(
    shape: dict[str, int], length: int, criterion: str, quantile: float
) -> None:
    model = recursive(**shape)
    x = ids(1, length)
    rule = {
        "halt": criterion,
        "halt_threshold": splitting(model, x, criterion, quantile) if shape["H_cycles"] > earliest(model, criterion) else 0.5,
    }
    out = write(model, x, **rule)
    again = model(out.sequences[:, :-1], use_cache=False, **rule)
    assert exits(again.halt_cycles) > 1 or shape["H_cycles"] <= earliest(model, criterion)
    assert torch.equal(out.past_key_values.cycles_used, again.halt_cycles)
    assert torch.equal(again.logits[0, length - 1 :].argmax(-1), out.sequences[0, length:])


# --- Cache policies --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "slots"), [("full", 2 + 2 + 3 * 2 * 2), ("last", 2 + 2 + 2)])
def test_number_of_slots_per_policy(policy: str, slots: int) -> None:
    past = write(recursive(), ids(1, 5), 4, cache_policy=policy).past_key_values
    assert isinstance(past, RecursiveCache)
    assert [layer.keys.shape[-2] for layer in past.layers] == [8] * slots


class LastApplication:
    """Reference for the policy "last" with a plain cache: every application reads a copy, and the last one writes."""

    def __init__(self, model: RecursiveLLM):
        self.base, self.head, self.past = model.model, model.lm_head, DynamicCache(config=model.config.as_physical())

    def read(self, x: torch.Tensor, H_cycles: int | None = None) -> torch.Tensor:
        base, config = self.base, self.base.config
        P, K, seen = config.prelude_layers, config.L_layers, self.past.get_seq_length()
        e = base.embed_tokens(x)
        positions = torch.arange(seen, seen + x.shape[1]).unsqueeze(0)
        masks, rope = base._masks(e, None, self.past, positions), base.rotary_emb(e, positions)
        start, finished = self.past, DynamicCache(config=config.as_physical())

        def run(z: torch.Tensor, first: int, stop: int) -> torch.Tensor:
            past = copy.deepcopy(start)
            for i in range(first, stop):
                mask = masks[config.block_types[i]]
                z = base.layers[i](z, attention_mask=mask, position_ids=positions, past_key_values=past, position_embeddings=rope)
                finished.layers[i] = past.layers[i]
            return z

        e = run(e, 0, P)
        H = config.H_cycles if H_cycles is None else H_cycles
        *_, z_H = base.recursion.steps(e, lambda z, n: run(z, P, P + K), H, config.L_cycles)
        read = base.norm(run(z_H, P + K, config.physical_layers))
        self.past = finished
        return self.head(read)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "smollm3"])
@pytest.mark.parametrize("kind", ["dynamic", "grown", "static"])
@torch.no_grad()
def test_the_policy_last_keeps_the_last_application_of_each_layer(family: str, kind: str) -> None:
    model, x = recursive(family), ids(1, 14)
    past: Any = {
        "dynamic": lambda: RecursiveCache(model.config, cache_policy="last"),
        "grown": DynamicCache,
        "static": lambda: StaticCache(config=model.config.at_depth(0), max_cache_len=20),
    }[kind]()
    slow = LastApplication(model)
    for chunk in x.split([6, 1, 4, 1, 2], dim=1):
        found = model(chunk, past_key_values=past, cache_policy="last").logits
        torch.testing.assert_close(found, slow.read(chunk), rtol=1e-4, atol=1e-4)
    full = model(x).logits
    assert (found - full[:, -2:]).abs().max() > 1e-2  # differs from "full"


@pytest.mark.parametrize(("policy", "halt"), [("full", None), ("full", "q_head"), ("full", "kl"), ("full", "entropy"), ("last", "kl")])
@pytest.mark.parametrize(("H", "L"), [(3, 1), (1, 0), (2, 2), (0, 1)])
def test_each_slot_has_the_sliding_window_of_its_layer(policy: str, halt: str | None, H: int, L: int) -> None:
    full, window = "full_attention", "sliding_attention"
    types = [full, window, window, window, window, full]
    donor = tiny_config("qwen2", num_hidden_layers=6, use_sliding_window=True, sliding_window=6)
    config = from_donor(donor, list(range(6)), prelude_layers=2, L_layers=2, coda_layers=2, H_cycles=3, L_cycles=1)
    config.block_types = types
    config.H_cycles = 3  # recomputes the types of the slots
    prelude, loop, coda = types[:2], types[2:4], types[4:]
    slots = prelude + coda + loop * (max(1, H * (L + 1)) if policy == "full" else 1)
    if policy == "full" and halt in ("kl", "entropy"):
        slots = slots + coda * (H - 1)
    past = RecursiveCache(config, H, L, policy, halt)
    assert [type(layer) for layer in past.layers] == [DynamicSlidingWindowLayer if kind == window else GrowingLayer for kind in slots]
    drafting = RecursiveCache(config, 3, 1, draft_cycles=min(H, 2))
    assert {type(layer) for layer in drafting.layers} == {GrowingLayer}
    assert len(drafting.layers) == 2 + 2 + 2 * 3 * 2 + 2 + (2 if H == 0 else 0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("family", "kind"), [("qwen2", "grown"), ("mistral", "grown"), ("mistral", "static")])
@torch.no_grad()
def test_early_exit_with_policy_last_equals_a_run_to_that_cycle(family: str, kind: str, criterion: str) -> None:
    model, x, used = recursive(family, H_cycles=4), ids(1, 12, seed=3), []
    rule = {"halt": criterion, "halt_threshold": splitting(model, x, criterion), "cache_policy": "last"}
    past: Any = DynamicCache() if kind == "grown" else StaticCache(config=model.config.at_depth(0), max_cache_len=14)
    slow = LastApplication(model)
    for token in x.split(1, dim=1):
        found = model(token, past_key_values=past, **rule)
        used.append(found.halt_cycles)
        torch.testing.assert_close(found.logits, slow.read(token, int(used[-1])), rtol=1e-4, atol=1e-4)
    assert exits(torch.cat(used)) > 1


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_early_exit_with_static_cache_equals_dynamic_cache(criterion: str) -> None:
    model, x = recursive("mistral", H_cycles=4), ids(2, 14)
    rule = {"halt": criterion, "halt_threshold": splitting(model, x[:, :8], criterion)}
    slots = RecursiveCache(model.config, halt=criterion)
    config = model.config.as_physical()
    config.num_hidden_layers = len(slots.layers)
    config.layer_types = ["sliding_attention"] * len(slots.layers)  # as all of this family are
    pasts = [slots, StaticCache(config=config, max_cache_len=16)]
    for chunk in x.split([8, 1, 1, 3, 1], dim=1):
        grown, static = (model(chunk, past_key_values=past, **rule) for past in pasts)
        assert torch.equal(grown.halt_cycles, static.halt_cycles)
        torch.testing.assert_close(grown.logits, static.logits, rtol=1e-4, atol=1e-4)
    assert exits(slots.cycles_used) > 1
    whole = model(x, use_cache=False, **rule)
    assert torch.equal(whole.halt_cycles, slots.cycles_used)


@torch.no_grad()
def test_policy_last_cache_works_with_every_criterion() -> None:
    """No readout has slots of its own, so a cache works with any criterion."""
    model, past = recursive(), RecursiveCache(recursive().config, cache_policy="last")
    for rule in ({}, {"halt": "kl"}, {"halt": "entropy"}, {}):
        model(ids(1, 2), past_key_values=past, cache_policy="last", **rule)
    assert past.get_seq_length() == 8


def test_at_gain_zero_the_policies_agree() -> None:
    model = copy.deepcopy(recursive())
    with torch.no_grad():
        for name, parameter in model.model.recursion.named_parameters():
            if "theta" in name:
                parameter.zero_()
    assert torch.equal(written(model, ids(2, 7), 12, cache_policy="last"), written(model, ids(2, 7), 12))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "last"])
@torch.no_grad()
def test_a_static_cache_of_either_policy_compiles_to_one_graph(policy: str) -> None:
    model = recursive(layers=2, prelude_layers=1, coda_layers=0, H_cycles=2, L_cycles=0)
    slots = model.config.at_depth(None if policy == "full" else 0)
    prompt, x = ids(1, 4), ids(1, 3, seed=5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    pasts = [StaticCache(config=slots, max_cache_len=8) for _ in range(2)]
    for past in pasts:
        model(prompt, past_key_values=past, cache_policy=policy)
    for token in x.split(1, dim=1):
        found, expected = (
            run(token, past_key_values=p, cache_policy=policy).logits for run, p in zip((compiled, model), pasts, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] == torch._dynamo.utils.counters["frames"]["total"]


def test_cache_is_bound_to_one_policy() -> None:
    model = recursive()
    past = RecursiveCache(model.config, cache_policy="full")
    model(ids(1, 4), past_key_values=past)
    with pytest.raises(ValueError, match=r"filled at .*cache_policy='full', called at .*cache_policy='last'; use one cache for each"):
        model(ids(1, 1), past_key_values=past, cache_policy="last")
    with pytest.raises(ValueError, match="cache_policy: expected one of full, last, got 'first'"):
        model(ids(1, 1), use_cache=True, cache_policy="first")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["one", "many", "crop", "reorder", "repeat", "select", "reset"]), min_size=1, max_size=12))
def test_growing_layer_equals_dynamic_layer(steps: list[str]) -> None:
    layers = [GrowingLayer(), DynamicLayer()]
    generator, rows = torch.Generator().manual_seed(0), 2
    for step in ["many", *steps]:
        if step in ("one", "many"):
            new = torch.randn(rows, 2, 1 if step == "one" else 70, 4, generator=generator)
            with torch.no_grad():
                results = [layer.update(new, 2 * new) for layer in layers]
            for mine, theirs in zip(*results, strict=True):
                assert torch.equal(mine, theirs)
        for layer in layers:
            if step == "crop":
                layer.crop(-min(3, layer.get_seq_length()))
            elif step == "reorder":
                layer.reorder_cache(torch.arange(rows).flip(0))
            elif step == "repeat":
                layer.batch_repeat_interleave(2)
            elif step == "select":
                layer.batch_select_indices(torch.arange(rows)[:2])
            elif step == "reset":
                layer.reset()
        rows = (
            2 * rows
            if step == "repeat" and layers[1].get_seq_length()
            else min(rows, 2)
            if step == "select" and layers[1].get_seq_length()
            else rows
        )
        assert layers[0].get_seq_length() == layers[1].get_seq_length()


def test_decoding_does_not_copy_cached_tokens() -> None:
    past = GrowingLayer()
    with torch.no_grad():
        past.update(torch.randn(1, 2, 100, 4), torch.randn(1, 2, 100, 4))
        where = past.keys.data_ptr()
        for _ in range(20):
            past.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
            past.crop(-1)
            past.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    assert past.keys.data_ptr() == where and past.get_seq_length() == 120


def test_a_cache_of_inference_mode_continues_outside_of_it() -> None:
    """As a plain model's does; and the other way round."""
    model, x = recursive(), ids(1, 9)
    with torch.no_grad():
        whole = model(x, use_cache=False).logits
    for first, then in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        past = RecursiveCache(model.config)
        with first():
            model(x[:, :4], past_key_values=past)
        with then():
            model(x[:, 4:7], past_key_values=past)
            logits = model(x[:, 7:], past_key_values=past).logits
        torch.testing.assert_close(logits, whole[:, 7:], rtol=1e-4, atol=1e-4)


def test_tensors_kept_from_a_cache_do_not_change() -> None:
    """Growth in place shows in no tensor that a caller holds, also after tokens were removed and others written."""
    model, x = recursive(), ids(1, 12)
    past = RecursiveCache(model.config)
    with torch.no_grad():
        model(x[:, :6], past_key_values=past)
        held = [(layer.keys, layer.values) for layer in past.layers]
        before = [(keys.clone(), values.clone()) for keys, values in held]
        model(x[:, 6:8], past_key_values=past)
        past.crop(-4)
        model(x[:, 8:], past_key_values=past)
    assert past.get_seq_length() == 8
    assert all(torch.equal(a, b) for one, other in zip(held, before, strict=True) for a, b in zip(one, other, strict=True))


def test_gradients_flow_through_a_cache() -> None:
    model, x = copy.deepcopy(recursive()), ids(1, 6)
    gradients = []
    for use_cache in (True, False):
        model.zero_grad()
        model(x, labels=x, use_cache=use_cache).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


# --- Early exit ------------------------------------------------------------------------------------------------------------------------


def test_q_head_halts_above_its_threshold_and_not_at_it() -> None:
    logits = torch.tensor([[-200.0, -1.0, 0.0, 0.001, 1.0, 200.0]])

    def halts(threshold: float | None) -> list[bool]:
        return HaltRule("q_head", threshold).by_head(logits)[0].tolist()

    assert halts(None) == halts(0.5) == [False, False, False, True, True, True]
    assert halts(0.75) == [False] * 5 + [True]  # of the sigmoid, 0.73 at a logit of 1
    assert halts(0.2) == [False] + [True] * 5
    assert halts(0.0) == [True] * 6 and halts(1.0) == [False] * 6  # also where the sigmoid is rounded to 0 or 1


def identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def test_entropy_halts_below_its_threshold_and_not_at_it() -> None:
    logits = 3 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    nats = torch.distributions.Categorical(logits=logits).entropy()
    ordered = nats.flatten().sort().values
    for threshold in ((ordered[1:] + ordered[:-1]) / 2).tolist():
        assert torch.equal(HaltRule("entropy", threshold, identity).by_readout(logits), nats < threshold)
    certain = torch.tensor([[[0.0, -1e4], [0.0, 0.0]]])  # 0 nats, and log 2
    for threshold, expected in ((0.0, [False, False]), (1e-6, [True, False]), (0.7, [True, True]), (math.inf, [True, True])):
        assert HaltRule("entropy", threshold, identity).by_readout(certain)[0].tolist() == expected


def test_kl_compares_consecutive_cycles_and_halts_below_threshold() -> None:
    cycles = torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    distributions = [torch.distributions.Categorical(logits=logits) for logits in cycles]
    divergence = torch.distributions.kl_divergence
    second, third = divergence(distributions[1], distributions[0]), divergence(distributions[2], distributions[1])
    for other in (divergence(distributions[0], distributions[1]), divergence(distributions[2], distributions[0])):
        assert not torch.allclose(other, second, atol=0.1) and not torch.allclose(other, third, atol=0.1)
    for threshold in (0.0, 0.3, 0.6, 0.9, 1.5, math.inf):
        rule = HaltRule("kl", threshold, identity)
        assert not rule.by_readout(cycles[0]).any(), "there is nothing to compare the first cycle with"
        assert torch.equal(rule.by_readout(cycles[1]), second < threshold)
        assert torch.equal(rule.by_readout(cycles[2]), third < threshold)
    assert 0 < int((second < 0.6).sum()) < 12 and 0 < int((third < 0.6).sum()) < 12


def test_kl_threshold_zero_never_halts_despite_rounding() -> None:
    first = torch.randn(1, 2000, 50, generator=torch.Generator().manual_seed(2))
    second = first + 1e-6
    p, q = second.log_softmax(-1), first.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).min() < 0
    rule = HaltRule("kl", 0.0, identity)
    rule.by_readout(first)
    assert not rule.by_readout(second).any()


@pytest.mark.parametrize("criterion", ["kl", "entropy"])
def test_chunked_criterion_equals_unchunked(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cycles = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(3))
    head = torch.nn.Linear(4, 7)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(4))
        head.bias.zero_()
        whole = HaltRule(criterion, 0.8, head, vocabulary=7)
        expected = [whole.by_readout(states) for states in cycles]
        assert whole.logits is not None and torch.equal(whole.logits, head(cycles[-1]))
        assert all(0 < int(halts.sum()) < 10 for halts in expected[1:])
        for elements in (7 * 10, 7 * 9, 7 * 3, 7, 1):
            monkeypatch.setattr("recursify.network.decoding_recursive_llm._READOUT_ELEMENTS", elements)
            rule = HaltRule(criterion, 0.8, head, vocabulary=7)
            assert all(torch.equal(rule.by_readout(states), halts) for states, halts in zip(cycles, expected, strict=True))
            assert (rule.logits is not None) == (elements == 70)  # logits of several chunks are not kept


def test_default_thresholds() -> None:
    assert {criterion: HaltRule(criterion, head=identity).threshold for criterion in CRITERIA} == {
        "q_head": 0.5, "kl": 5e-4, "entropy": 0.1,
    }  # fmt: skip
    assert [HaltRule(criterion, 0, identity).threshold for criterion in CRITERIA] == [0.0] * 3


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_token_halts_at_first_cycle_past_threshold(criterion: str) -> None:
    """For a single token, without influence of earlier tokens."""
    model, used = recursive(H_cycles=5), set()
    for token in range(1, 6):
        x = torch.tensor([[token]])
        out = model(x, use_cache=False, output_cycle_logits=True)
        p = [logits[0, 0].double().log_softmax(-1) for logits in out.cycle_logits]
        scores = {
            "q_head": [logit.sigmoid().item() for logit in out.halt_logits],
            "entropy": [-(one.exp() * one).sum().item() for one in p],
            "kl": [math.inf] + [(b.exp() * (b - a)).sum().item() for a, b in itertools.pairwise(p)],
        }[criterion]
        ordered = sorted(score for score in scores[:4] if math.isfinite(score))
        for threshold in ((low + high) / 2 for low, high in itertools.pairwise(ordered)):
            past = [score > threshold if criterion == "q_head" else score < threshold for score in scores[:4]]
            first = past.index(True) + 1 if any(past) else 5
            found = model(x, use_cache=False, halt=criterion, halt_threshold=threshold)
            assert found.halt_cycles.item() == first
            torch.testing.assert_close(found.logits, out.cycle_logits[first - 1])
            used.add(first)
    assert len(used) > 1 and (criterion != "kl" or 1 not in used)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_threshold_extremes_match_full_depth_and_first_cycle(family: str, criterion: str) -> None:
    model, (x, mask) = recursive(family), left_padded(5, 12, 9)
    at = earliest(model, criterion)
    for use_cache in (False, True):
        never = model(x, attention_mask=mask, halt=criterion, halt_threshold=NEVER[criterion], use_cache=use_cache)
        always = model(x, attention_mask=mask, halt=criterion, halt_threshold=ALWAYS[criterion], use_cache=use_cache)
        assert torch.equal(never.logits, model(x, attention_mask=mask).logits)
        assert torch.equal(always.logits[mask.bool()], model(x, attention_mask=mask, H_cycles=at).logits[mask.bool()])
        assert torch.equal(never.halt_cycles, 3 * mask) and torch.equal(always.halt_cycles, at * mask)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("cached", [{}, {"cache_policy": "last"}, {"cache_implementation": "static"}])
def test_generation_at_threshold_extremes(criterion: str, cached: dict[str, str]) -> None:
    model, x = recursive(), ids(1, 7)
    never = written(model, x, 12, halt=criterion, halt_threshold=NEVER[criterion], **cached)
    always = written(model, x, 12, halt=criterion, halt_threshold=ALWAYS[criterion], **cached)
    assert torch.equal(never, written(model, x, 12, **cached))
    assert torch.equal(always, written(model, x, 12, H_cycles=earliest(model, criterion), **cached))


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_early_exit_fills_every_cache_slot(criterion: str) -> None:
    model = recursive(coda_layers=1, H_cycles=4)
    past, K, x = RecursiveCache(model.config, halt=criterion), 2 * model.config.L_layers, ids(1, 15, seed=10)
    rule = {"halt": criterion, "halt_threshold": splitting(model, x, criterion)}
    used = []
    for chunk in x.split([8, 1, 1, 1, 1, 1, 1, 1], dim=1):
        used.append(model(chunk, past_key_values=past, **rule).halt_cycles)
    cycles = torch.cat(used, dim=1)
    assert len(set(cycles.flatten().tolist())) > 1
    assert torch.equal(past.cycles_used, cycles)
    assert {layer.keys.shape[-2] for layer in past.layers} == {15}
    for t, halted in enumerate(cycles[0].tolist()):
        for c in range(halted, 4):  # cycles counted from 0: the first that was not computed is `halted`
            for place in range(K):
                deep, last = (past.layers[3 + cycle * K + place] for cycle in (c, halted - 1))
                assert torch.equal(deep.keys[:, :, t], last.keys[:, :, t]) and torch.equal(deep.values[:, :, t], last.values[:, :, t])
        if criterion != "q_head":  # the codas of early cycles follow all other slots
            readouts = [*past.layers[model.config.depth() :], past.layers[2]]
            assert len(readouts) == 4
            for deep in readouts[halted:]:
                assert torch.equal(deep.keys[:, :, t], readouts[halted - 1].keys[:, :, t])


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_early_exit_is_causal(criterion: str) -> None:
    model, x = recursive(), ids(1, 12)
    rule = {"halt": criterion, "halt_threshold": splitting(model, x[:, :8], criterion)}
    changed = x.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 96
    before, after = model(x, **rule), model(changed, **rule)
    assert exits(before.halt_cycles[:, :8]) > 1
    assert torch.equal(before.halt_cycles[:, :8], after.halt_cycles[:, :8])
    torch.testing.assert_close(before.logits[:, :8], after.logits[:, :8], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("criterion", "readouts"), [("q_head", lambda c: 1), ("kl", lambda c: c), ("entropy", lambda c: c)])
def test_no_cycles_are_computed_after_all_tokens_halted(criterion: str, readouts: Any) -> None:
    model, x = recursive(H_cycles=4), ids(1, 6, seed=9)
    P, loop, C = (model.model.layers[i] for i in (0, 2, 4))
    rule = {"halt": criterion, "halt_threshold": middling(model, criterion)}
    past = write(model, x, 1, **rule).past_key_values
    token, used = x[:, 2:3], []
    for _ in range(12):
        with tokens_through(P, loop, C, model.lm_head) as counts, torch.no_grad():
            cycle = model(token, past_key_values=past, **rule).halt_cycles.item()
        reads = readouts(cycle)
        assert counts == [1, 2 * cycle, reads, reads]
        used.append(cycle)
        token = (token * 7 + 3) % 96
    assert len(set(used)) > 1


@torch.no_grad()
def test_batch_stops_cycling_when_all_rows_have_halted() -> None:
    model = recursive(H_cycles=4)
    x, most = ids(6, 9), set()
    for column in x.split(1, dim=1):
        rule = {"halt": "q_head", "halt_threshold": splitting(model, column, "q_head", 0.0)}
        with tokens_through(model.model.layers[2]) as counts:
            used = model(column, **rule).halt_cycles
        assert counts[0] == 2 * used.max() and exits(used) > 1
        most.add(int(used.max()))
    assert min(most) < 4, "somewhere all rows halt before the last cycle"


@torch.no_grad()
def test_cycle_states_of_halted_tokens_are_kept() -> None:
    model, x = recursive(H_cycles=4), ids(1, 10)
    out = model(x, use_cache=False, output_cycle_logits=True, halt="q_head", halt_threshold=splitting(model, x, "q_head"))
    assert exits(out.halt_cycles) > 1
    assert len(out.cycle_logits) == len(out.halt_logits) == 4
    assert torch.equal(out.cycle_logits[-1], out.logits)
    for t, cycle in enumerate(out.halt_cycles[0].tolist()):
        for later in range(cycle, 4):
            torch.testing.assert_close(out.halt_logits[later][0, t], out.halt_logits[cycle - 1][0, t])
    everything = model(x, use_cache=False, output_cycle_logits=True, halt="q_head", halt_threshold=0.0)
    assert len(everything.cycle_logits) == 4 and torch.equal(everything.cycle_logits[0], everything.logits)


@pytest.mark.parametrize("criterion", ["kl", "entropy"])
@torch.no_grad()
def test_logit_chunks_do_not_change_exit_cycles(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = recursive(H_cycles=4), ids(2, 11)
    rule = {"halt": criterion, "halt_threshold": splitting(model, x, criterion)}
    whole = model(x, **rule)
    assert exits(whole.halt_cycles) > 1
    monkeypatch.setattr("recursify.network.decoding_recursive_llm._READOUT_ELEMENTS", 3 * 96)
    pieces = model(x, **rule)
    assert torch.equal(whole.halt_cycles, pieces.halt_cycles)
    torch.testing.assert_close(whole.logits, pieces.logits)


def test_cycles_used_follows_cache_operations() -> None:
    model, x = recursive(), ids(2, 6)
    past = write(model, x, 6, halt="q_head", halt_threshold=splitting(model, x, "q_head")).past_key_values
    used = past.cycles_used
    assert used.shape == (2, 11) and exits(used) > 1
    assert not torch.equal(used[0, :8], used[1, :8]), "rows that are exchanged must differ"
    assert not torch.equal(used[:, :8], used[:, 3:]), "and so must the tokens that are cut from those that stay"
    past.crop(0)
    assert torch.equal(past.cycles_used, used)
    past.crop(-3)
    assert torch.equal(past.cycles_used, used[:, :8])
    past.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(past.cycles_used, used.flip(0)[:, :8])
    past.batch_repeat_interleave(2)
    assert torch.equal(past.cycles_used, used[[1, 1, 0, 0], :8])
    past.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(past.cycles_used, used.flip(0)[:, :8])
    with torch.no_grad():
        model(ids(2, 1), past_key_values=past)  # without early exit: full depth
    assert past.cycles_used[:, -1].tolist() == [3, 3]
    assert torch.equal(past.cycles_used[:, :-1], used.flip(0)[:, :8])
    past.reset()
    assert past.cycles_used is None
    with torch.no_grad():  # at another depth: without early exit, with, without
        for rule in ({}, {"halt": "q_head", "halt_threshold": 0.0}, {}):
            model(ids(2, 2), past_key_values=past, H_cycles=2, **rule)
    assert past.cycles_used.tolist() == [[2, 2, 1, 1, 2, 2]] * 2
    assert write(model, x, 2).past_key_values.cycles_used is None
    assert write(model, x, 6, num_beams=2, halt="q_head", halt_threshold=0.5).past_key_values.cycles_used.shape == (4, 11)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"halt": "luck"}, "halt: expected one of q_head, kl, entropy, got 'luck'"),
        ({"halt": "kl", "halt_threshold": math.nan}, "halt_threshold: expected a number, got nan"),
    ],
)
def test_invalid_early_exit_options_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recursive()(ids(1, 3), **kwargs)


@torch.no_grad()
def test_cache_filled_without_every_cycle_readout_is_refused() -> None:
    model = recursive()
    past = RecursiveCache(model.config, halt="kl")
    model(ids(1, 4), past_key_values=past)
    with pytest.raises(ValueError, match=r"filled at .*cache_policy='full', called at .*cache_policy='full', halt='kl'; use one cache"):
        model(ids(1, 1), past_key_values=past, halt="kl")
    with pytest.raises(ValueError, match=r"needs a cache of 20 slots, this one has 16; make it with RecursiveCache\(.*halt='entropy'\)"):
        model(ids(1, 4), past_key_values=RecursiveCache(model.config), halt="entropy")
    for free in (recursive(coda_layers=0), model):
        rule = "kl" if free is not model else "q_head"
        past = RecursiveCache(free.config)
        model_states = [free(ids(1, 4), past_key_values=past), free(ids(1, 1), past_key_values=past, halt=rule)]
        assert model_states[1].halt_cycles.shape == (1, 1)


def test_base_model_refuses_logit_criteria() -> None:
    model = recursive()
    with pytest.raises(ValueError, match="halt: kl reads logits, and the base model has no head"):
        model.model(ids(1, 3), halt="kl")
    assert model.model(ids(1, 3), halt="q_head").halt_cycles.shape == (1, 3)


# --- Self-speculation ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "smollm3", "olmo2", "phi3"])
@pytest.mark.parametrize("draft_cycles", [0, 1, 2])
def test_speculation_with_left_padding_beyond_the_sliding_window(family: str, draft_cycles: int) -> None:
    model, (x, mask) = recursive(family), left_padded(3, 14, 1)
    plain = written(model, x, 20, attention_mask=mask)
    assert torch.equal(written(model, x, 20, attention_mask=mask, draft_cycles=draft_cycles), plain)


@pytest.mark.parametrize("draft_cycles", [0, 1])
def test_draft_equals_a_run_at_draft_cycles(draft_cycles: int) -> None:
    """A model whose later cycles change nothing accepts every draft."""
    model = copy.deepcopy(recursive())
    with torch.no_grad():
        for name, parameter in model.model.recursion.named_parameters():
            if "theta" in name:
                parameter.zero_()
    out = write(model, ids(1, 5), 16, draft_cycles=draft_cycles, draft_tokens=4)
    assert (out.drafted, out.accepted) == (16, 16)
    shallow = written(recursive(), ids(1, 5), 1, H_cycles=draft_cycles)
    base, past = recursive().model, RecursiveCache(model.config, draft_cycles=draft_cycles)
    with torch.no_grad():
        state, _ = base.draft(ids(1, 5), None, torch.arange(5).unsqueeze(0), past, (3, 1))
        assert torch.equal(recursive().lm_head(state)[:, -1:].argmax(-1), shallow)


def test_verify_reuses_keys_and_values_of_the_draft() -> None:
    model = copy.deepcopy(recursive())  # gains of 0: every draft is accepted
    with torch.no_grad():
        for name, parameter in model.model.recursion.named_parameters():
            if "theta" in name:
                parameter.zero_()
    P, loop, C = (model.model.layers[i] for i in (0, 2, 4))
    with tokens_through(P, loop, C) as plain:
        write(model, ids(1, 5), 13)
    with tokens_through(P, loop, C) as speculative:
        write(model, ids(1, 5), 13, draft_cycles=1, draft_tokens=4)
    fed = 5 + 12
    assert plain == [fed, 6 * fed, fed]
    assert speculative == [fed, 6 * fed, 2 * fed]  # only the coda runs for both draft and full model


def test_eos_limits_streaming_and_stopping_within_a_draft(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = recursive(), ids(1, 6)
    free = written(model, x, 12)[0].tolist()
    end = free[4]
    stop = free.index(end) + 1
    for kwargs in ({"draft_cycles": 1, "draft_tokens": 8}, {"draft_cycles": 0, "draft_tokens": 8}):
        out = write(model, x, 12, min_new_tokens=None, eos_token_id=[end, 95], **kwargs)
        assert out.sequences[0, 6:].tolist() == free[:stop]
        assert out.past_key_values.get_seq_length() == 6 + stop - 1
        assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {6 + stop - 1}
        assert written(model, x, 7, **kwargs)[0].tolist() == free[:7]

    class Fourth(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 6 + 4)

    short = written(model, x, 12, min_new_tokens=None, stopping_criteria=StoppingCriteriaList([Fourth()]), draft_cycles=1)
    assert short[0].tolist() == free[:4]

    class Words:
        def decode(self, tokens: Any, **_: Any) -> str:
            return " ".join(str(int(token)) for token in tokens) + "\n"

    write(model, x, 12, streamer=TextStreamer(Words(), skip_prompt=True), draft_cycles=1)  # type: ignore[arg-type]
    assert capsys.readouterr().out.split() == [str(token) for token in free]


def test_finished_rows_are_padded_and_do_not_slow_the_batch() -> None:
    model, x = recursive(), ids(4, 6)
    free = written(model, x, 14)
    end = int(free[0, 2])
    kwargs: dict[str, Any] = {"min_new_tokens": None, "eos_token_id": end, "pad_token_id": 0}
    assert torch.equal(written(model, x, 14, draft_cycles=1, **kwargs), written(model, x, 14, **kwargs))


def test_logits_processors_see_the_prefix_of_each_drafted_token() -> None:
    model, x = recursive(), ids(2, 6)
    kwargs = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    plain = written(model, x, 12, **kwargs)
    assert torch.equal(written(model, x, 12, draft_cycles=1, **kwargs), plain)
    assert not torch.equal(plain, written(model, x, 12))


@pytest.mark.parametrize("draft_cycles", [0, 1])
def test_speculative_cache_can_be_continued(draft_cycles: int) -> None:
    model, x = recursive(), ids(1, 6)
    first = write(model, x, 7, draft_cycles=draft_cycles)
    with tokens_through(model.model.embed_tokens) as counts:
        more = write(model, first.sequences, 7, past_key_values=first.past_key_values, draft_cycles=draft_cycles, draft_tokens=1)
    assert counts == [7]
    assert torch.equal(more.sequences[:, 6:], written(model, x, 14))


@pytest.mark.parametrize(("rows", "times"), [(1500, 3), (2, 600)])
@pytest.mark.parametrize("warp", [{}, {"temperature": 0.7, "top_k": 3}])
def test_sampled_speculation_has_the_models_distribution(rows: int, times: int, warp: dict[str, Any]) -> None:
    """A chi-square test over all sequences of three tokens from a vocabulary of 4; the draft's distribution fails it."""
    model = recursive(layers=3, prelude_layers=1, coda_layers=1, H_cycles=2, L_cycles=0, vocab_size=4, seed=5)
    prompt = torch.tensor([[1, 2, 3]])
    warp = {"top_k": 0} | warp
    counts = torch.zeros(64, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(times):
            found = written(model, prompt.repeat(rows, 1), 3, do_sample=True, draft_cycles=1, draft_tokens=3, min_new_tokens=None,
                            eos_token_id=None, pad_token_id=0, **warp)  # fmt: skip
            counts += torch.bincount(found @ torch.tensor([16, 4, 1]), minlength=64).double()
    assert chi_square(counts, exact(model, prompt, 2, warp)) < 63 + 5 * math.sqrt(2 * 63)
    assert chi_square(counts, exact(model, prompt, 1, warp)) > 63 + 20 * math.sqrt(2 * 63)


@torch.no_grad()
def exact(model: RecursiveLLM, prompt: torch.Tensor, H_cycles: int, warp: dict[str, Any]) -> torch.Tensor:
    """Probability of each of the 64 sequences of three tokens."""
    texts = torch.tensor(list(itertools.product(range(4), repeat=3)))
    logits = model(torch.cat([prompt.repeat(64, 1), texts], dim=1), H_cycles=H_cycles).logits[:, 2:-1].double() / warp.get(
        "temperature", 1.0
    )
    if warp["top_k"]:
        logits = logits.masked_fill(logits < logits.topk(warp["top_k"]).values[..., -1:], -math.inf)
    return logits.softmax(-1).gather(-1, texts.unsqueeze(-1)).squeeze(-1).prod(dim=1)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square over sequences with nonzero probability; the others must not occur."""
    expected = counts.sum() * probabilities
    can = expected > 0
    if counts[~can].sum() > 0:
        return math.inf
    return (((counts - expected) ** 2)[can] / expected[can]).sum().item()


@torch.no_grad()
def naive_speculation(model: RecursiveLLM, x: torch.Tensor, k: int, most: int, new: int, end: int = -1) -> tuple[torch.Tensor, int, int]:
    """Reference without cache: greedy drafts at `k` cycles, verified by full runs. Returns new tokens, drafted, accepted."""
    length, ids, going = DraftLength(model.config, k, (model.config.H_cycles, model.config.L_cycles), most), x, torch.ones(len(x)).bool()
    drafted = accepted = 0
    while ids.shape[1] < x.shape[1] + new and going.any():
        count = min(length.length(), x.shape[1] + new - ids.shape[1])
        guess = ids
        for _ in range(count):
            guess = torch.cat([guess, model(guess, H_cycles=k).logits[:, -1:].argmax(-1)], dim=1)
        should = model(guess[:, :-1]).logits[:, -count:].argmax(-1)
        agrees = guess[:, -count:] == should
        prefixes = [next((i for i, same in enumerate(row) if not same), count) for row in agrees.tolist()]
        drafted += count * int(going.sum())
        accepted += sum(prefix for prefix, on in zip(prefixes, going, strict=True) if on)
        least = min(prefix for prefix, on in zip(prefixes, going, strict=True) if on)
        length.learn(min(least + 1, count), right=least == count)
        for column in range(min(least + 1, count)):
            ids = torch.cat([ids, torch.where(going, should[:, column], 0).unsqueeze(1)], dim=1)
            going = going & (ids[:, -1] != end)
            if not going.any():
                break
    return ids[:, x.shape[1] :], drafted, accepted


@pytest.mark.parametrize(("k", "rows", "most"), [(0, 1, 5), (1, 1, 16), (2, 3, 4)])
def test_drafted_and_accepted_counts_match_a_reference(k: int, rows: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_recursive_llm, "draft_turns", turns_of(True))
    model = copy.deepcopy(recursive())
    with torch.no_grad():  # small gains: cycles agree often, but not always
        for name, parameter in model.model.recursion.named_parameters():
            if "theta" in name:
                parameter.mul_(0.15)
    x, partial = ids(rows, 5, seed=2), False
    for end in (-1, int(written(model, x, 14)[0, 4])):
        tokens, drafted, accepted = naive_speculation(model, x, k, most, 14, end)
        out = write(model, x, 14, draft_cycles=k, draft_tokens=most, min_new_tokens=None, eos_token_id=end, pad_token_id=0)
        assert torch.equal(out.sequences[:, 5:], tokens)
        assert (out.drafted, out.accepted) == (drafted, accepted)
        partial |= 0 < accepted < drafted
    assert partial, "drafts must be right at times and wrong at times, or this test shows nothing"


@properties
@given(shapes, st.lists(st.integers(1, 8), min_size=1, max_size=3), st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_drafts_may_be_switched_off_and_on_at_any_time(shape: dict[str, int], lengths: list[int], turns: list[bool], data: Any) -> None:
    """The text is that of plain decoding, and every slot ends as long as the text, so that the cache can be continued."""
    model, (x, mask) = recursive(**shape), left_padded(*lengths)
    k = data.draw(st.integers(0, shape["H_cycles"] - 1))
    plain = written(model, x, 16, attention_mask=mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_recursive_llm, "draft_turns", turns_of(*turns))
        out = write(model, x, 9, attention_mask=mask, draft_cycles=k, draft_tokens=4)
        assert all(turns) == (out.undrafted == 0) or turns[0]  # a first draft may make all tokens
        assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {x.shape[1] + 8}
        wider = torch.nn.functional.pad(mask, (0, 9), value=1)
        more = write(model, out.sequences, 7, attention_mask=wider, past_key_values=out.past_key_values, draft_cycles=k, draft_tokens=4)
    assert torch.equal(more.sequences[:, x.shape[1] :], plain)


def test_a_plain_step_between_drafts_costs_no_more_than_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_recursive_llm, "draft_turns", turns_of(False))
    model = recursive()
    P, loop, C = (model.model.layers[i] for i in (0, 2, 4))
    with tokens_through(P, loop, C) as plain:
        write(model, ids(1, 5), 13)
    with tokens_through(P, loop, C) as undrafted:
        out = write(model, ids(1, 5), 13, draft_cycles=1)
    assert (out.drafted, out.undrafted) == (0, 13)
    assert undrafted[:2] == plain[:2]
    assert undrafted[2] == 2 * plain[2]  # the prompt, and all undrafted tokens in one pass at the end


@pytest.mark.parametrize("draft_cycles", [0, 1])
def test_a_draft_after_plain_steps_knows_their_tokens(draft_cycles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gains of 0 the draft is the model: it is accepted whole, unless its coda has missed tokens."""
    monkeypatch.setattr(decoding_recursive_llm, "draft_turns", turns_of(False, False, False, True))
    model = copy.deepcopy(recursive())
    with torch.no_grad():
        for name, parameter in model.model.recursion.named_parameters():
            if "theta" in name:
                parameter.zero_()
    out = write(model, ids(1, 5), 28, draft_cycles=draft_cycles, draft_tokens=4)
    assert out.drafted == out.accepted > 0 and out.undrafted >= 12


def run_turns(drafts: Callable[[int], float], steps: float, count: int) -> list[bool]:
    """The decisions of a clock under which a token takes `drafts(turn)` seconds with drafts (of two tokens), `steps` without."""
    turns = draft_turns(clocked=True)
    found = [next(turns)]
    for turn in range(count):
        seconds = 2 * drafts(turn) if found[-1] else steps
        found.append(turns.send((seconds, 2 if found[-1] else 1)))
    return found


def test_drafts_that_are_slower_are_switched_off_for_longer_and_longer() -> None:
    found = [(drafting, len(list(group))) for drafting, group in itertools.groupby(run_turns(lambda turn: 1.5, 1.0, 700))]
    assert found[:8] == [(True, 7), (False, 3 + 32), (True, 7), (False, 3 + 64), (True, 7), (False, 3 + 128), (True, 7), (False, 3 + 256)]


def test_drafts_that_are_faster_go_on() -> None:
    found = run_turns(lambda turn: 0.5, 1.0, 400)
    assert found.count(False) <= 0.1 * len(found)
    late = run_turns(lambda turn: 0.5 if turn < 100 else 2.0, 1.0, 200)
    assert late[:100].count(False) <= 10 and late[150:].count(False) >= 30


def test_the_first_turn_after_a_change_is_not_counted() -> None:
    """It pays for a compilation, or for the tokens that a draft has to catch up with."""
    assert run_turns(lambda turn: 99.0 if turn == 0 else 0.5, 1.0, 40)[10:30] == [True] * 20


def test_sampled_texts_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10**9, 7))  # every turn takes as long: drafts of one token never pay
    monkeypatch.setattr(decoding_recursive_llm.time, "perf_counter", lambda: float(next(seconds)))
    for sampled in (True, False):
        out = write(recursive(), ids(1, 5), 30, do_sample=sampled, draft_cycles=0, draft_tokens=1)
        assert (out.undrafted > 0) is not sampled


@pytest.mark.parametrize(("P", "C", "H", "L", "k"), [(2, 2, 3, 1, 1), (0, 3, 4, 0, 0), (3, 0, 4, 2, 2), (1, 1, 2, 3, 1)])
def test_draft_length_maximises_tokens_per_layer_application(P: int, C: int, H: int, L: int, k: int) -> None:
    config = recursive(prelude_layers=P, coda_layers=C, H_cycles=H, L_cycles=L, layers=P + C + 2).config
    draft, right, seen, chosen = DraftLength(config, k, (H, L), 7), 4.0, 5.0, set()
    drafting = P + C + 2 * (k * (L + 1) if k else 1)
    verifying = C + 2 * (H - k) * (L + 1)
    history = [(1, False)] * 6 + [(3, False)] * 4 + [(2, True), (5, True), (7, True)] * 6
    for kept, last_right in history:
        # expected tokens of a draft of n: the first always, each further one if all before were accepted
        gained = [sum((right / seen) ** i for i in range(n)) / (n * drafting + verifying) for n in range(1, 8)]
        assert draft.length() == 1 + gained.index(max(gained))
        chosen.add(draft.length())
        draft.learn(kept, right=last_right)
        right, seen = 0.9 * right + (kept if last_right else kept - 1), 0.9 * seen + kept
    assert len(chosen) > 2 and max(chosen) == 7


def test_draft_length_adapts_to_acceptance_rate() -> None:
    lengths = {}
    for right in (True, False):
        draft = DraftLength(recursive().config, 1, (3, 1), 8)
        for _ in range(30):
            draft.learn(3 if right else 1, right=right)
        lengths[right] = draft.length()
    assert lengths == {True: 8, False: 1}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"draft_cycles": 3}, r"draft_cycles: expected at least 0 and less than H_cycles = 3, got 3"),
        ({"draft_cycles": 1, "H_cycles": 1}, r"less than H_cycles = 1, got 1"),
        ({"draft_cycles": -1}, r"got -1"),
        ({"draft_cycles": 1, "draft_tokens": 0}, r"draft_tokens: expected at least 1, got 0"),
        ({"draft_tokens": 4}, r"draft_tokens: expected draft_cycles, too"),
        ({"draft_cycles": 1, "num_beams": 2}, r"works with one beam only"),
        ({"draft_cycles": 1, "halt": "q_head"}, r"works with no halting only"),
        ({"draft_cycles": 1, "cache_policy": "last"}, r"works with cache_policy 'full' only"),
        ({"draft_cycles": 1, "use_cache": False}, r"works with use_cache only"),
        ({"draft_cycles": 1, "cache_implementation": "static"}, r"works with the dynamic cache only"),
        ({"draft_cycles": 1, "output_scores": True}, r"no scores, logits, states or attentions"),
        ({"draft_cycles": 1, "past_key_values": "theirs"}, r"expected a cache for drafts, RecursiveCache\(.*draft_cycles=1\)"),
    ],
)
def test_unsupported_speculation_options_are_refused(kwargs: dict[str, Any], message: str) -> None:
    model = recursive()
    if "past_key_values" in kwargs:
        kwargs = kwargs | {"past_key_values": RecursiveCache(model.config)}
    with pytest.raises(ValueError, match=message):
        write(model, ids(1, 4), 4, **kwargs)


def test_self_speculation_refuses_an_assistant_model() -> None:
    with pytest.raises(ValueError, match="draft_cycles: the model is its own assistant; leave draft_cycles out, or assistant_model"):
        write(recursive(), ids(1, 4), 4, draft_cycles=1, assistant_model=recursive())


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_the_states_of_all_cycles_are_those_of_a_pass_that_halts(criterion: str) -> None:
    """As many as cycles, also where all tokens halted before; the last of them is what the head reads."""
    model, x = recursive(H_cycles=4), ids(2, 9)
    for threshold, some in ((splitting(model, x, criterion), True), (ALWAYS[criterion], False), (NEVER[criterion], False)):
        out = model(x, use_cache=False, halt=criterion, halt_threshold=threshold, output_cycle_logits=True)
        assert (exits(out.halt_cycles) > 1) == some and len(out.cycle_logits) == len(out.halt_logits) == 4
        rule = HaltRule.of(model, criterion, threshold)
        states = model.model(x, use_cache=False, halt_rule=rule, output_cycle_states=True)
        assert len(states.cycle_states) == 4 and torch.equal(states.cycle_states[-1], states.last_hidden_state)
        never = model(x, use_cache=False, halt=criterion, halt_threshold=NEVER[criterion], output_cycle_logits=True)
        for cycle in range(1, 5):
            if (out.halt_cycles >= cycle).all():
                torch.testing.assert_close(out.cycle_logits[cycle - 1], never.cycle_logits[cycle - 1])

"""The network compared with transformers' own models and a slow reference, and used through transformers' APIs.

Every test of caches runs with non-zero gains and large random states: at gain 0 wrong cache slots go unnoticed. Sequences are longer than
the sliding windows (6). `graft` puts the layers of a tiny donor into a recursive model without going through the conversion.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import subprocess
import sys
import textwrap
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    TextStreamer,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.integrations.flex_attention import WrappedFlexAttention, flex_attention

from recursify import RecursiveLLM, RecursiveLLMConfig
from recursify.network.configuration_recursive_llm import from_donor
from recursify.network.modeling_recursive_llm import FAMILIES as MODELS
from recursify.network.modeling_recursive_llm import HaltHead, Recursion
from tests.support.tiny import FAMILIES, make_tiny_tokenizer, tiny_model

LAYERS = 6
DEPTHS = [(H, L) for H in (0, 1, 2, 3) for L in (0, 1, 3)]
# Sliding windows in some layers only, which the shared tiny Qwen2 does not have.
EXTRAS: dict[str, dict[str, Any]] = {"qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_kernel = pytest.mark.parametrize("kernel", ["sdpa", "eager"])
every_injection = pytest.mark.parametrize("injection", ["anchored", "sum_norm"])
every_cache = pytest.mark.parametrize("kind", ["dynamic", "static"])


@cache
def donor_of(family: str) -> PreTrainedModel:
    """Read only, except for its attention kernel."""
    return tiny_model(family, num_hidden_layers=LAYERS, **EXTRAS.get(family, {}))


def select(donor: PreTrainedModel, indices: list[int]) -> dict[str, torch.Tensor]:
    """The donor's weights with only these layers, renumbered."""
    state, out = donor.state_dict(), {}
    for name, tensor in state.items():
        if not name.startswith("model.layers."):
            out[name] = tensor
    for ours, theirs in enumerate(indices):
        prefix = f"model.layers.{theirs}."
        out |= {f"model.layers.{ours}.{name.removeprefix(prefix)}": t for name, t in state.items() if name.startswith(prefix)}
    return {name: tensor.clone() for name, tensor in out.items()}


def stir(model: RecursiveLLM, gains: bool) -> RecursiveLLM:
    """Large random states, a random q_head, and gains of both signs (or none)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        for name, parameter in model.model.recursion.named_parameters():
            parameter.normal_() if gains or "theta" not in name else parameter.zero_()
    return model


def graft(donor: PreTrainedModel, indices: list[int] | None = None, *, gains: bool = True, **shape: Any) -> RecursiveLLM:
    """A recursive model over layers of a donor with random states and gains; by default prelude 2, loop 2, coda 2, H 2, L 1."""
    indices = list(range(LAYERS)) if indices is None else indices
    around = {"prelude_layers": 2, "coda_layers": 2, "H_cycles": 2, "L_cycles": 1} | shape
    config = from_donor(donor.config, indices, L_layers=len(indices) - around["prelude_layers"] - around["coda_layers"], **around)
    model = RecursiveLLM(config)
    missing, unexpected = model.load_state_dict(select(donor, indices), strict=False)
    assert not unexpected and all(name.startswith("model.recursion.") for name in missing)
    return stir(model, gains).eval()


@cache
def recursive_of(family: str, prelude: int = 2, coda: int = 2) -> RecursiveLLM:
    """`graft` with gains, read only."""
    return graft(donor_of(family), prelude_layers=prelude, coda_layers=coda)


@pytest.fixture
def qwen2() -> RecursiveLLM:
    """A Qwen2 that a test may change: prelude 1, loop 2, coda 1."""
    return graft(donor_of("qwen2"), [0, 2, 4, 5], prelude_layers=1, coda_layers=1)


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 320, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    padded = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    return padded, torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])


def greedy(model: PreTrainedModel, input_ids: torch.Tensor, new: int = 8, **kwargs: Any) -> torch.Tensor:
    """The new tokens, a fixed number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(input_ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **kwargs)
    return out[:, input_ids.shape[1] :]


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() == 0.0


# --- Exactness -------------------------------------------------------------------------------------------------------------------------


@every_kernel
@every_family
@torch.no_grad()
def test_gains_of_zero_give_the_donors_logits_at_every_cycle(family: str, kernel: str) -> None:
    donor = donor_of(family)
    model = graft(donor, gains=False)
    donor.set_attn_implementation(kernel)
    model.set_attn_implementation(kernel)
    x = ids(2, 17)
    expected = donor(x).logits
    for H, L in DEPTHS:
        out = model(x, H_cycles=H, L_cycles=L, output_cycle_logits=True)
        assert len(out.cycle_logits) == max(1, H)
        for logits in (*out.cycle_logits, out.logits):
            assert_same(logits, expected)
    donor.set_attn_implementation("sdpa")


@every_family
@torch.no_grad()
def test_compact_plan_equals_transformers_model_of_selected_layers(family: str) -> None:
    indices, donor = [0, 2, 4, 5], donor_of(family)
    config = copy.deepcopy(donor.config)
    config.num_hidden_layers = len(indices)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[i] for i in indices])
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(select(donor, indices))
    model = graft(donor, indices, gains=False, prelude_layers=0, coda_layers=0)
    x = ids(2, 17)
    for H, L in DEPTHS:
        assert_same(model(x, H_cycles=H, L_cycles=L).logits, plain(x).logits)


@every_family
@torch.no_grad()
def test_bfloat16_is_exact_too(family: str) -> None:
    donor = copy.deepcopy(donor_of(family)).to(torch.bfloat16)
    model = graft(donor_of(family), gains=False).to(torch.bfloat16)
    x = ids(2, 17)
    assert_same(model(x, H_cycles=3, L_cycles=1).logits, donor(x).logits)


@torch.no_grad()
def test_sliding_windows_of_donors_are_active() -> None:
    """A distant token does not reach a layer with a sliding window; otherwise the exactness tests would not cover windows."""
    for family in ("qwen2", "mistral", "smollm3"):
        assert "sliding_attention" in recursive_of(family).config.block_types, family


# --- Slow reference --------------------------------------------------------------------------------------------------------------------


def naive_logits(model: RecursiveLLM, x: torch.Tensor, H: int, L: int) -> torch.Tensor:
    """Reference: the recursion of the module docstring over the model's layers, without cache and views, with masks by definition."""
    base, r, config = model.model, model.model.recursion, model.config
    P, K, T = config.prelude_layers, config.L_layers, x.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    seen = {
        "full_attention": distance >= 0,
        "sliding_attention": (distance >= 0) & (distance < (getattr(config, "sliding_window", 0) or 0)),
    }
    e = base.embed_tokens(x)
    rope = base.rotary_emb(e, torch.arange(T)[None])

    def run(z: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        for i in range(start, stop):
            mask = torch.zeros(T, T).masked_fill(~seen[config.block_types[i]], torch.finfo(torch.float32).min)
            z = base.layers[i](z, attention_mask=mask[None, None], position_embeddings=rope)
        return z

    def F(z: torch.Tensor) -> torch.Tensor:
        z = run(z, P, P + K)
        return z if config.injection == "anchored" else z / (z.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def mix(gains: Any, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        A, B = gains.theta_A.tanh(), gains.theta_B.tanh()
        most = torch.maximum(A.abs() + B.abs(), torch.tensor(0.9))
        return e + 0.9 * A / most * (own - e) + 0.9 * B / most * (other - e)

    e = run(e, 0, P)
    z_L, z_H = e + r.L_init, e + r.H_init
    for _ in range(H):
        for _ in range(L):
            z_L = F(mix(r.inject_L, z_L, z_H) if config.injection == "anchored" else z_L + z_H + e)
        z_H = F(mix(r.inject_H, z_H, z_L) if config.injection == "anchored" else z_H + z_L)
    return model.lm_head(base.norm(run(z_H, P + K, len(base.layers))))


@every_injection
@every_family
@torch.no_grad()
def test_model_equals_reference_recursion(family: str, injection: str) -> None:
    model = graft(donor_of(family), injection=injection)
    model.set_attn_implementation("eager")
    x = ids(2, 15)
    for H, L in ((1, 0), (2, 1), (3, 3)):
        torch.testing.assert_close(model(x, H_cycles=H, L_cycles=L).logits, naive_logits(model, x, H, L), atol=2e-4, rtol=1e-4)


@every_injection
@pytest.mark.parametrize("around", [0, 2])
@torch.no_grad()
def test_cycle_logits_equal_those_of_shallower_runs(injection: str, around: int) -> None:
    model = graft(donor_of("qwen2"), injection=injection, prelude_layers=around, coda_layers=around)
    x = ids(2, 15)
    out = model(x, H_cycles=3, L_cycles=1, output_cycle_logits=True)
    halts = out.halt_logits
    assert [h.shape for h in halts] == [x.shape] * 3
    for c in range(3):
        assert_same(out.cycle_logits[c], model(x, H_cycles=c + 1, L_cycles=1).logits)
    assert (halts[0] - halts[1]).abs().max() > 1e-3, "the states of two cycles must differ, or this test shows nothing"
    base = model.model(x, H_cycles=3, L_cycles=1, output_cycle_states=True)
    assert_same(model.lm_head(base.cycle_states[1]), out.cycle_logits[1])
    assert base.cycle_states[-1] is base.last_hidden_state
    assert model(x).cycle_logits is None and model(x).halt_logits is None
    assert model.model(x).cycle_states is None and model.model(x).halt_logits is None


@settings(max_examples=50, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20))
@torch.no_grad()
def test_gain_sum_is_bounded(theta_A: float, theta_B: float) -> None:
    injection = graft(donor_of("qwen2"), [0, 2, 4], prelude_layers=0, coda_layers=0).model.recursion.inject_H
    injection.theta_A.fill_(theta_A)
    injection.theta_B.fill_(theta_B)
    A, B = (gain[0].item() for gain in injection.gains(torch.float32))
    wanted = (math.tanh(theta_A), math.tanh(theta_B))
    whole = sum(map(abs, wanted))
    assert pytest.approx([gain * min(1.0, 0.9 / whole) if whole else 0.0 for gain in wanted], abs=1e-6) == (A, B)
    assert abs(A) + abs(B) <= 0.9 + 1e-6


@torch.no_grad()
def test_states_stay_bounded_over_many_cycles_unlike_a_plain_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(model: RecursiveLLM, cycles: slice) -> float:
        model.model.norm = nn.Identity()  # the states themselves, as there is no coda
        states = model.model(ids(1, 12), H_cycles=64, L_cycles=1, output_cycle_states=True).cycle_states
        return torch.stack(states[cycles]).abs().max().item()

    for scale in (1.0, 8.0):
        model = graft(donor_of("qwen2"), [0, 2, 4], prelude_layers=0, coda_layers=0)
        for name, parameter in model.named_parameters():
            if "layers" in name:
                parameter.mul_(scale)
            elif "theta" in name:
                parameter.fill_(9.0)  # every gain at its bound
        early, late = largest(model, slice(0, 16)), largest(model, slice(48, 64))
        assert late < 2.0 * early, f"still growing with weights x{scale}: {early} -> {late}"

    naive = graft(donor_of("qwen2"), [0, 2, 4], prelude_layers=0, coda_layers=0, injection="sum_norm")
    monkeypatch.setattr(Recursion, "_block_norm", lambda self, z: z)
    early, late = largest(naive, slice(0, 16)), largest(naive, slice(48, 64))
    assert not late < 1e6 * early, "the bare sum was expected to explode; the bound above would then show nothing"


@torch.no_grad()
def test_q_head_ignores_the_norm_of_a_state() -> None:
    head, z = HaltHead(8), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    head.weight.normal_(generator=torch.Generator().manual_seed(1))
    head.bias.fill_(0.7)
    expected = (z / z.square().mean(-1, keepdim=True).sqrt()) @ head.weight[0] + 0.7
    torch.testing.assert_close(head(z), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head(1000 * z), head(z), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_gains_are_computed_in_float32_whatever_the_dtype() -> None:
    injection = graft(donor_of("qwen2"), [0, 2, 4], prelude_layers=0, coda_layers=0).model.recursion.inject_H.to(torch.bfloat16)
    injection.theta_A.fill_(0.3)
    injection.theta_B.fill_(-1.7)
    A, B = injection.gains(torch.float32)
    theta = [value.float().item() for value in (injection.theta_A[0], injection.theta_B[0])]
    wanted = [math.tanh(value) for value in theta]
    whole = sum(map(abs, wanted))
    assert whole > 0.9
    assert [A[0].item(), B[0].item()] == pytest.approx([0.9 * value / whole for value in wanted], abs=1e-6)
    assert injection.gains(torch.bfloat16)[0].dtype == torch.bfloat16


@every_injection
@pytest.mark.parametrize("backprop", ["full", "cycle", "last"])
def test_backprop_modes_truncate_gradients(injection: str, backprop: str) -> None:
    """Gradients against the reference recursion, detached where the mode says."""
    H, L, generator = 3, 2, torch.Generator().manual_seed(0)
    config = graft(donor_of("qwen2"), [0, 2, 4], prelude_layers=0, coda_layers=0, injection=injection).config
    r, W = Recursion(config, ()), torch.randn(32, 32, generator=generator).div(6).requires_grad_()
    e = torch.randn(1, 4, 32, generator=generator, requires_grad=True)
    with torch.no_grad():
        for parameter in r.parameters():
            parameter.normal_(generator=generator).mul_(0.4)
    weights = torch.randn(H, 1, 4, 32, generator=generator)
    inputs = {name: p for name, p in r.named_parameters() if "q_head" not in name} | {"W": W, "e": e}

    def norm(z: torch.Tensor) -> torch.Tensor:
        return z if injection == "anchored" else z / (z.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def mix(which: str, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if injection == "sum_norm":
            return own + other + (e if which == "L" else 0)
        A, B = (inputs[f"inject_{which}.theta_{gain}"].tanh() for gain in "AB")
        most = torch.maximum(A.abs() + B.abs(), torch.tensor(0.9))
        return e + 0.9 * A / most * (own - e) + 0.9 * B / most * (other - e)

    z_L, z_H, expected = e + r.L_init, e + r.H_init, []
    for _ in range(H):
        if backprop != "full" and expected:
            z_L, z_H = z_L.detach(), z_H.detach()
        for _ in range(L):
            z_L = norm((mix("L", z_L, z_H) @ W).tanh())
        z_H = norm((mix("H", z_H, z_L) @ W).tanh())
        expected.append(z_H)
    found, applied = [], []
    for z in r.steps(e, lambda x, n: applied.append(n) or (x @ W).tanh(), H, L, backprop):
        found.append(z)
    assert applied == list(range(H * (L + 1)))
    assert [z.requires_grad for z in found] == [backprop != "last" or cycle == H - 1 for cycle in range(H)]
    sums = []
    for states in (found, expected):
        scored = [(z * w).sum() for z, w, own in zip(states, weights, found, strict=True) if own.requires_grad]
        sums.append(torch.autograd.grad(sum(scored), list(inputs.values()), allow_unused=True))
    for name, mine, theirs in zip(inputs, *sums, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=name)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    if backprop == "cycle":  # each cycle's graph can be freed before the next cycle is computed
        for z in r.steps(e, lambda x, n: (x @ W).tanh(), H, L, backprop):
            z.sum().backward()


# --- Causality, padding, packing -------------------------------------------------------------------------------------------------------


@every_kernel
@every_family
@torch.no_grad()
def test_model_is_causal(family: str, kernel: str) -> None:
    model = recursive_of(family)
    model.set_attn_implementation(kernel)
    x, mask = ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    for attention_mask in (None, mask):
        before = model(x, attention_mask=attention_mask, H_cycles=3).logits
        for t in (6, 15):
            changed = x.clone()
            changed[:, t] = (changed[:, t] + 17) % 300 + 1
            after = model(changed, attention_mask=attention_mask, H_cycles=3).logits
            assert_same(after[0, 5:t], before[0, 5:t])
            assert_same(after[1, :t], before[1, :t])
            assert (after[:, t] - before[:, t]).abs().max() > 1e-3
    model.set_attn_implementation("sdpa")


@every_family
@torch.no_grad()
def test_left_padded_batch_equals_single_rows(family: str) -> None:
    model = recursive_of(family)
    rows = [ids(16, seed=2), ids(9, seed=3), ids(1, seed=4)]
    padded, mask = left_padded(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(padded, attention_mask=mask, position_ids=positions, H_cycles=3).logits
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(logits[-len(row) :], model(row[None], H_cycles=3).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [None, True, False])
@every_kernel
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "smollm3"])
@torch.no_grad()
def test_packed_documents_do_not_attend_to_each_other(family: str, kernel: str, use_cache: bool | None) -> None:
    model = recursive_of(family)
    model.set_attn_implementation(kernel)
    documents = [ids(1, n, seed=n) for n in (9, 1, 4)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    together = model(packed, position_ids=positions, use_cache=use_cache).logits
    apart = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_any_length_and_embeddings_instead_of_ids() -> None:
    model = recursive_of("qwen2")
    x = ids(1, 33)
    full = model(x).logits
    for length in (1, 2, 7, 33):
        torch.testing.assert_close(model(x[:, :length]).logits, full[:, :length], atol=1e-4, rtol=1e-4)
    assert_same(model(inputs_embeds=model.get_input_embeddings()(x)).logits, full)
    for wrong in ({}, {"input_ids": x, "inputs_embeds": model.get_input_embeddings()(x)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**wrong)


@pytest.mark.parametrize("kernel", ["eager", "flex_attention", "flash_attention_2"])
@torch.no_grad()
def test_attention_kernels_agree(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash attention needs its package and a GPU")
        if not torch.cuda.is_available():
            pytest.skip("flash attention needs a GPU")
    model = recursive_of("smollm3")
    padded, mask = left_padded([ids(16, seed=2), ids(9, seed=3)])
    expected = model(padded, attention_mask=mask, H_cycles=3).logits
    model.set_attn_implementation(kernel)
    # transformers compiles flex attention at its first use, which takes most of a minute; torch's own runs uncompiled
    for name, value in (("_is_flex_compiled", True), ("training", False), ("_compiled_flex_attention", staticmethod(flex_attention))):
        monkeypatch.setattr(WrappedFlexAttention, name, value, raising=False)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    found = model(padded, attention_mask=mask, H_cycles=3).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


# --- Caches ----------------------------------------------------------------------------------------------------------------------------


@every_cache
@every_family
def test_cached_generation_equals_uncached_generation(family: str, kind: str) -> None:
    prompts, mask = left_padded([ids(11, seed=2), ids(4, seed=3), ids(1, seed=4)])
    for (prelude, coda), depths in {(2, 2): [(3, 1), (0, 1)], (0, 2): [(2, 3)], (2, 0): [(1, 0)], (0, 0): [(2, 1)]}.items():
        model = recursive_of(family, prelude, coda)
        for H, L in depths:
            depth = {"attention_mask": mask, "H_cycles": H, "L_cycles": L}
            cached = greedy(model, prompts, cache_implementation=kind, disable_compile=True, **depth)
            assert torch.equal(cached, greedy(model, prompts, use_cache=False, **depth)), (prelude, coda, H, L)


@every_injection
@torch.no_grad()
def test_incremental_decoding_equals_forward_without_cache(injection: str) -> None:
    model = graft(donor_of("smollm3"), injection=injection)
    x = ids(2, 14)
    expected = model(x, H_cycles=3).logits
    caches = [
        None,
        DynamicCache(),
        DynamicCache(config=model.config.at_depth(3)),
        StaticCache(config=model.config.at_depth(3), max_cache_len=20),
    ]
    for past in caches:
        out, logits = None, []
        for start, stop in ((0, 8), (8, 9), (9, 12), (12, 14)):
            out = model(x[:, start:stop], past_key_values=past, H_cycles=3, use_cache=True)
            past = out.past_key_values
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_a_cache_has_one_slot_per_application() -> None:
    model = recursive_of("qwen2")
    with torch.no_grad():
        past = model(ids(1, 7), H_cycles=3, L_cycles=1, use_cache=True).past_key_values
    assert len(past.layers) == model.config.depth(3, 1) == 2 + 2 + 2 * 3 * 2
    keys = [layer.keys for layer in past.layers]
    assert all(layer.get_seq_length() == 7 for layer in past.layers)
    assert all((a[..., -3:, :] - b[..., -3:, :]).abs().max() > 0 for i, a in enumerate(keys) for b in keys[:i]), "two slots hold the same"


@torch.no_grad()
def test_no_cache_is_returned_without_use_cache() -> None:
    model = recursive_of("qwen2")
    assert model(ids(1, 5), use_cache=False).past_key_values is None
    assert model(ids(1, 5)).past_key_values is not None  # the configuration's default


@torch.no_grad()
def test_deeper_cache_works_for_a_shallower_call() -> None:
    model = recursive_of("qwen2")
    x, deep = ids(1, 9), DynamicCache(config=recursive_of("qwen2").config.at_depth(4, 3))
    model(x[:, :6], past_key_values=deep, H_cycles=1, L_cycles=0)
    found = model(x[:, 6:], past_key_values=deep, H_cycles=1, L_cycles=0).logits
    torch.testing.assert_close(found, model(x, H_cycles=1, L_cycles=0).logits[:, 6:], atol=1e-4, rtol=1e-4)


@every_cache
@torch.no_grad()
def test_cache_is_bound_to_one_depth(kind: str) -> None:
    model = recursive_of("qwen2")
    config = model.config.at_depth(3, 1)
    past = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
    model(ids(1, 4), past_key_values=past, H_cycles=3, L_cycles=1)
    with pytest.raises(ValueError, match=r"filled at H_cycles=3, L_cycles=1, .* called at H_cycles=2, .*; use one cache for each"):
        model(ids(1, 1), past_key_values=past, H_cycles=2, L_cycles=1)
    past.reset()
    model(ids(1, 4), past_key_values=past, H_cycles=2, L_cycles=1)


@torch.no_grad()
def test_a_cache_with_too_few_slots_is_refused() -> None:
    model = recursive_of("qwen2")
    with pytest.raises(
        ValueError, match=r"needs a cache of 12 slots, this one has 8; make it with RecursiveCache\(model.config, H_cycles=2, .*\)"
    ):
        model(ids(1, 4), past_key_values=DynamicCache(config=model.config.at_depth(1, 1)), H_cycles=2, L_cycles=1)


@pytest.mark.parametrize("kind", ["dynamic", "growing", "static"])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@torch.no_grad()
def test_output_cycle_logits_does_not_change_the_cache(family: str, kind: str) -> None:
    """Without a coda, cached cycle logits equal those of a shallower run; with a coda, they must not change later tokens."""
    for coda in (0, 2):
        model, x, runs = recursive_of(family, 2, coda), ids(2, 13), []
        for look in (False, True):
            past = {
                "dynamic": lambda config: DynamicCache(config=config),
                "growing": lambda config: DynamicCache(),
                "static": lambda config: StaticCache(config=config, max_cache_len=16),
            }[kind](model.config)
            steps = [
                model(x[:, a:b], past_key_values=past, use_cache=True, output_cycle_logits=look) for a, b in ((0, 9), (9, 10), (10, 13))
            ]
            runs.append(torch.cat([step.logits for step in steps], dim=1))
        assert_same(runs[0], runs[1])
        if coda == 0:
            shorter = model(x, H_cycles=1, use_cache=False).logits
            first = torch.cat([step.cycle_logits[0] for step in steps], dim=1)
            torch.testing.assert_close(first, shorter, atol=1e-4, rtol=1e-4)


# --- New parameters --------------------------------------------------------------------------------------------------------------------


def assert_fresh(model: RecursiveLLM, gain: float) -> None:
    r = model.model.recursion
    for tensor in (r.H_init, r.L_init, r.q_head.weight):
        assert tensor.isfinite().all() and tensor.std() > 0.005
    for gains in (r.inject_L, r.inject_H):
        for value in gains.gains(torch.float32):
            torch.testing.assert_close(value, torch.full_like(value, gain))


@pytest.mark.parametrize("gain", [0.0, 0.2])
@every_family
def test_new_parameters_are_initialised_in_every_constructor(family: str, gain: float, tmp_path: Path) -> None:
    donor = donor_of(family)
    config = from_donor(donor.config, list(range(LAYERS)), prelude_layers=2, L_layers=2, coda_layers=2, gain_init=gain)
    assert_fresh(RecursiveLLM(config), gain)
    # a checkpoint with the donor's tensors only
    donor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded, info = type(RecursiveLLM(config)).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all(name.startswith("model.recursion.") for name in info["missing_keys"])
    assert_fresh(loaded, gain)
    assert_same(loaded.eval()(ids(1, 8), H_cycles=0).logits, donor(ids(1, 8)).logits)
    with torch.device("meta"):
        empty = RecursiveLLM(config)
    empty.to_empty(device="cpu").init_weights()
    assert_fresh(empty, gain)


@torch.no_grad()
def test_initial_std_follows_the_configuration() -> None:
    config = from_donor(donor_of("llama").config, [0, 1, 2], prelude_layers=1, L_layers=1, coda_layers=1, state_init_std=0.3, gain_init=0.4)
    config.initializer_range = 0.9
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RecursiveLLM(config)
    r = model.model.recursion
    for tensor, std in ((r.H_init, 0.3), (r.L_init, 0.3), (r.q_head.weight, 0.9), (model.model.layers[1].mlp.up_proj.weight, 0.9)):
        assert 0.7 * std < tensor.std() < 1.4 * std
    assert not torch.equal(r.H_init, r.L_init)
    assert not r.q_head.bias.any()
    for injection in (r.inject_L, r.inject_H):
        for theta in (injection.theta_A, injection.theta_B):
            torch.testing.assert_close(theta, torch.full_like(theta, math.atanh(0.4)))
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)


# --- Training --------------------------------------------------------------------------------------------------------------------------


def gradients(model: RecursiveLLM, x: torch.Tensor, **kwargs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(x, labels=x, **kwargs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "shape", [{}, {"L_cycles": 0}, {"H_cycles": 1, "L_cycles": 0}, {"injection": "sum_norm"}, {"freeze_embeddings": True}]
)
@every_family
def test_exactly_the_trainable_parameters_get_gradients(family: str, shape: dict[str, Any]) -> None:
    model = graft(donor_of(family), **shape).train()
    _, grads = gradients(model, ids(2, 12))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(grads) == trainable
    assert [name for name, grad in grads.items() if not grad.abs().sum() > 0] == []
    frozen = {name for name, _ in model.named_parameters()} - trainable
    expected = {"model.recursion.q_head.weight", "model.recursion.q_head.bias"}
    if shape.get("L_cycles") == 0:
        expected |= {"model.recursion.inject_L.theta_A", "model.recursion.inject_L.theta_B"}
    if "freeze_embeddings" in shape:
        expected.add("model.embed_tokens.weight")
    assert frozen == expected


def test_gains_of_z_H_get_gradients_at_gain_zero() -> None:
    model = graft(donor_of("qwen2"), gains=False).train()
    _, grads = gradients(model, ids(2, 12))
    assert all(grads[f"model.recursion.inject_H.theta_{name}"].abs().sum() > 0 for name in "AB")


def test_a_halting_loss_trains_q_head_alone(qwen2: RecursiveLLM) -> None:
    q_head = qwen2.inner.q_head.requires_grad_(True)
    torch.stack(qwen2(ids(2, 12), output_cycle_logits=True).halt_logits).square().mean().backward()
    assert {name for name, p in qwen2.named_parameters() if p.grad is not None} == {
        f"model.recursion.q_head.{n}" for n in ("weight", "bias")
    }
    assert all(p.grad.abs().sum() > 0 for p in q_head.parameters())


@pytest.mark.parametrize("load", [RecursiveLLM.from_pretrained, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained])
def test_unused_parameters_stay_frozen_after_loading(load: Any, tmp_path: Path) -> None:
    """transformers makes every parameter trainable when it loads one."""
    model = graft(donor_of("qwen2"), [0, 2, 4, 5], prelude_layers=1, coda_layers=1, L_cycles=0, freeze_embeddings=True)
    model.save_pretrained(tmp_path)
    base = load(tmp_path).base_model
    idle = {name for name, p in base.named_parameters() if not p.requires_grad}
    wanted = {"embed_tokens.weight", "recursion.q_head.weight", "recursion.q_head.bias"}
    assert idle == wanted | {"recursion.inject_L.theta_A", "recursion.inject_L.theta_B"}


def test_gradient_checkpointing_gives_equal_results(qwen2: RecursiveLLM) -> None:
    qwen2.train()
    x = ids(2, 12)
    loss, grads = gradients(qwen2, x)
    qwen2.gradient_checkpointing_enable()
    assert qwen2.is_gradient_checkpointing
    for kwargs in ({}, {"use_cache": True}):
        again, checkpointed = gradients(qwen2, x, **kwargs)
        assert again == loss
        assert set(checkpointed) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(checkpointed[name], grad)


@torch.no_grad()
def test_the_loss_is_mean_cross_entropy_in_nats_of_the_next_token(qwen2: RecursiveLLM) -> None:
    x = ids(2, 12)
    labels = x.clone()
    labels[0, :7] = -100
    out = qwen2(x, labels=labels)
    probabilities = out.logits.double().softmax(-1)
    each = [-probabilities[b, t, labels[b, t + 1]].log() for b in range(2) for t in range(11) if labels[b, t + 1] != -100]
    assert len(each) == 5 + 11
    torch.testing.assert_close(out.loss.double(), torch.stack(each).mean(), atol=1e-5, rtol=1e-5)
    summed = qwen2(x, labels=labels, num_items_in_batch=torch.tensor(32)).loss
    torch.testing.assert_close(summed.double(), torch.stack(each).sum() / 32, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_to_keep(qwen2: RecursiveLLM) -> None:
    x = ids(2, 12)
    full = qwen2(x, output_cycle_logits=True)
    for keep, rows in ((1, slice(-1, None)), (5, slice(-5, None)), (torch.tensor([0, 3]), [0, 3])):
        some = qwen2(x, output_cycle_logits=True, logits_to_keep=keep)
        for a, b in zip((some.logits, *some.cycle_logits), (full.logits, *full.cycle_logits), strict=True):
            torch.testing.assert_close(a, b[:, rows])
    of_rows, mask = torch.tensor([[0, 3, 11], [7, 7, 1]]), torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    for keep, pick in ((of_rows, lambda t: torch.stack([t[row, of_rows[row]] for row in range(2)])), (mask, lambda t: t[mask])):
        some = qwen2(x, output_cycle_logits=True, logits_to_keep=keep)
        for a, b in zip((some.logits, *some.cycle_logits), (full.logits, *full.cycle_logits), strict=True):
            torch.testing.assert_close(a, pick(b))
    for rule in ({"halt": "entropy", "halt_threshold": 0.0}, {"halt": "entropy", "halt_threshold": math.inf}, {"halt": "q_head"}):
        torch.testing.assert_close(qwen2(x, logits_to_keep=2, **rule).logits, qwen2(x, **rule).logits[:, -2:])


@torch.no_grad()
def test_hidden_states_and_attentions_count_applications(qwen2: RecursiveLLM) -> None:
    qwen2.set_attn_implementation("eager")
    for H, L in ((2, 1), (3, 0), (0, 0)):
        out = qwen2(ids(1, 6), output_hidden_states=True, output_attentions=True, H_cycles=H, L_cycles=L)
        assert len(out.attentions) == len(out.hidden_states) - 1 == qwen2.config.depth(H, L)
        assert_same(qwen2.lm_head(out.hidden_states[-1]), out.logits)
    values = qwen2(ids(1, 6), return_dict=False)
    assert isinstance(values, tuple) and values[0].shape == (1, 6, qwen2.config.vocab_size)


def test_forward_documents_its_further_arguments(qwen2: RecursiveLLM) -> None:
    """Callers look for `output_attentions` and the like in the annotation of `**kwargs`."""
    for module in (qwen2, qwen2.model):
        (kwargs,) = inspect.signature(module.forward).parameters["kwargs"].annotation.__args__
        assert {"output_attentions", "output_hidden_states", "num_items_in_batch"} <= set(kwargs.__annotations__)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_tied_embeddings_survive_training_saving_and_loading(family: str, tmp_path: Path) -> None:
    model = graft(donor_of(family)).train()
    tied = model.config.tie_word_embeddings
    assert tied == (family == "qwen2")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        gradients(model, ids(2, 12))
        optimizer.step()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for each in (model, again):
        assert (each.lm_head.weight is each.model.embed_tokens.weight) == tied
    assert_same(again.eval()(ids(1, 9)).logits, model.eval()(ids(1, 9)).logits)


# --- Depth per call, per load, per configuration ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_way_to_set_the_depth(qwen2: RecursiveLLM, tmp_path: Path) -> None:
    x = ids(1, 9)
    expected, deep = qwen2(x).logits, qwen2(x, H_cycles=5, L_cycles=2).logits
    assert (expected - deep).abs().max() > 1e-2
    tokens = greedy(qwen2, x, H_cycles=5, L_cycles=2)
    qwen2.save_pretrained(tmp_path)
    for maker in (AutoModelForCausalLM, RecursiveLLM, type(qwen2)):
        loaded = maker.from_pretrained(tmp_path, H_cycles=5, L_cycles=2)
        assert type(loaded) is type(qwen2) and loaded.config.num_hidden_layers == 2 + 2 * 15
        assert_same(loaded(x).logits, deep)
        assert torch.equal(greedy(loaded, x), tokens)
    qwen2.config.H_cycles, qwen2.config.L_cycles = 5, 2
    assert_same(qwen2(x).logits, deep)
    assert torch.equal(greedy(qwen2, x), tokens)
    assert_same(qwen2(x, H_cycles=2, L_cycles=1).logits, expected)
    for wrong in ({"H_cycles": -1}, {"L_cycles": -2}, {"H_cycles": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a whole number of at least 0, got"):
            qwen2(x, use_cache=False, **wrong)


def test_precedence_of_lowered_layers_call_and_configuration(qwen2: RecursiveLLM) -> None:
    cycles, config = qwen2.model.cycles, qwen2.config  # prelude 1, loop 2, coda 1; H 2, L 1
    assert [cycles(), cycles(3), cycles(0), cycles(None, 0), cycles(3, 2)] == [(2, 1), (3, 1), (0, 1), (2, 0), (3, 2)]
    for lowered, call, expected in (
        (config.depth(1), (), (1, 1)), (config.depth(1), (5,), (1, 1)), (config.depth() - 1, (5,), (1, 1)), (config.depth(1), (0,), (1, 1)),
        (config.depth(1), (None, 0), (2, 0)), (config.depth(1), (None, 3), (0, 3)), (5, (), (0, 1)), (1, (), (0, 1)), (0, (), (0, 1)),
    ):  # fmt: skip
        config.num_hidden_layers = lowered
        assert cycles(*call) == expected, (lowered, call)
    config.num_hidden_layers = config.depth() + 4
    assert [cycles(), cycles(1)] == [(2, 1), (1, 1)]


@torch.no_grad()
def test_plain_pass_has_no_early_exit(qwen2: RecursiveLLM) -> None:
    out = qwen2(ids(2, 5), H_cycles=0, halt="q_head", halt_threshold=0.0)
    assert_same(out.logits, qwen2(ids(2, 5), H_cycles=0).logits)
    assert out.halt_cycles.tolist() == [[0] * 5] * 2 and qwen2(ids(2, 5)).halt_cycles is None


@every_cache
def test_generate_at_another_depth_does_not_change_the_configuration(
    qwen2: RecursiveLLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while its cache is created, because another thread may generate at another depth."""
    before, config, seen = qwen2.config.to_dict(), qwen2.config, []
    made = {"dynamic": DynamicCache, "static": StaticCache}[kind]
    monkeypatch.setattr(
        made, "__init__", lambda self, *args, _init=made.__init__, **kw: seen.append(qwen2.config) or _init(self, *args, **kw)
    )
    greedy(qwen2, ids(1, 4), H_cycles=5, cache_implementation=kind, disable_compile=True)
    assert seen and all(each is config for each in seen)
    assert qwen2.config.to_dict() == before and qwen2.model.config is qwen2.config is config


# --- generate --------------------------------------------------------------------------------------------------------------------------


def test_sampling_beams_and_several_sequences(qwen2: RecursiveLLM) -> None:
    x = ids(2, 6)
    for options in ({"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}, {"num_beams": 4, "do_sample": True}):
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            runs.append(qwen2.generate(x, max_new_tokens=6, num_return_sequences=2, use_cache=use_cache, H_cycles=3, **options))
        assert runs[0].shape[0] == 4
        assert torch.equal(*runs), options


def test_generation_from_embeddings_in_chunks_and_continued(qwen2: RecursiveLLM) -> None:
    x, depth = ids(1, 9), {"H_cycles": 3, "L_cycles": 2}
    expected = greedy(qwen2, x, **depth)
    embedded = qwen2.generate(inputs_embeds=qwen2.get_input_embeddings()(x), max_new_tokens=8, min_new_tokens=8, do_sample=False, **depth)
    assert torch.equal(embedded, expected)
    assert torch.equal(greedy(qwen2, x, prefill_chunk_size=4, **depth), expected)
    first = qwen2.generate(x, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, **depth)
    rest = greedy(qwen2, first.sequences, new=5, past_key_values=first.past_key_values, **depth)
    assert torch.equal(rest, expected[:, 3:])


def test_generation_returns_the_states_of_every_application(qwen2: RecursiveLLM) -> None:
    qwen2.set_attn_implementation("eager")
    flags = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True, "output_logits": True}
    out = qwen2.generate(ids(2, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False, H_cycles=3, **flags)
    assert len(out.logits) == len(out.hidden_states) == len(out.attentions) == 3
    assert {len(step) for step in out.attentions} == {qwen2.config.depth(3)}
    assert {len(step) for step in out.hidden_states} == {qwen2.config.depth(3) + 1}
    assert out.attentions[2][0].shape == (2, 4, 1, 7)


def test_streamer_and_stop_strings(qwen2: RecursiveLLM, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tiny_tokenizer()
    x = ids(1, 6, seed=10)
    out = qwen2.generate(x, max_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True), H_cycles=3)
    assert tokenizer.decode(out[0, 6:]).strip() == capsys.readouterr().out.strip()
    text = tokenizer.decode(out[0, 6:9])
    stopped = qwen2.generate(x, max_new_tokens=8, do_sample=False, stop_strings=[text], tokenizer=tokenizer, H_cycles=3)
    assert stopped.shape[1] < out.shape[1] and torch.equal(stopped, out[:, : stopped.shape[1]])


def test_generate_passes_arguments_to_transformers(qwen2: RecursiveLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("transformers.GenerationMixin.generate", lambda self, *args, **kwargs: calls.append(kwargs))
    own, streamer = GenerationConfig(max_new_tokens=3), object()
    qwen2.generate(halt="kl")
    qwen2.generate(halt="kl", generation_config=own)
    qwen2.generate(H_cycles=1, generation_config=own)
    qwen2.generate(draft_cycles=0, streamer=streamer)
    qwen2.generate(draft_cycles=1, draft_tokens=3)
    halting, configured, plain, draft, short = calls
    assert halting["disable_compile"] is True and halting["halt"] == "kl"  # data-dependent depth cannot be compiled
    assert configured["generation_config"].disable_compile is True and configured["generation_config"].max_new_tokens == 3
    assert plain["generation_config"] is own and not own.disable_compile and "disable_compile" not in plain
    assert draft["custom_generate"].keywords == {"draft_cycles": 0, "draft_tokens": 16, "streamer": streamer}
    assert short["custom_generate"].keywords == {"draft_cycles": 1, "draft_tokens": 3, "streamer": None}


def test_a_model_in_a_subfolder(qwen2: RecursiveLLM, tmp_path: Path) -> None:
    qwen2.save_pretrained(tmp_path / "inner")
    assert_same(RecursiveLLM.from_pretrained(tmp_path, subfolder="inner").lm_head.weight, qwen2.lm_head.weight)


def test_assisted_generation_gives_the_same_tokens(qwen2: RecursiveLLM) -> None:
    x = ids(1, 6)
    expected = greedy(qwen2, x, new=12, H_cycles=3)
    assert torch.equal(greedy(qwen2, x, new=12, H_cycles=3, assistant_model=donor_of("qwen2")), expected)
    assert torch.equal(greedy(qwen2, x, new=12, H_cycles=3, assistant_model=recursive_of("qwen2")), expected)
    assert torch.equal(greedy(qwen2, x, new=12, H_cycles=3, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("call", [{}, {"H_cycles": 4}])
def test_assistant_early_exit_is_shallower_and_gives_the_same_tokens(qwen2: RecursiveLLM, call: dict[str, int]) -> None:
    x, depths = ids(1, 6), []
    expected = greedy(qwen2, x, new=10, **call)
    inner = qwen2.model.cycles
    qwen2.model.cycles = lambda *args: depths.append(inner(*args)) or depths[-1]  # type: ignore[method-assign]
    found = greedy(qwen2, x, new=10, assistant_early_exit=qwen2.config.depth(1, 1), **call)
    assert torch.equal(found, expected)
    assert set(depths) == {(1, 1), (call.get("H_cycles", 2), 1)}
    assert qwen2.config.num_hidden_layers == qwen2.config.depth()


@pytest.mark.parametrize("kernel", ["paged|sdpa", "paged|eager"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_continuous_batching_gives_the_same_tokens(family: str, kernel: str) -> None:
    model = graft(donor_of(family), [0, 2, 4, 5], prelude_layers=1, coda_layers=1)
    prompts = [ids(5, seed=1), ids(9, seed=2)]
    expected = [greedy(model, prompt[None], new=6)[0].tolist() for prompt in prompts]
    model.set_attn_implementation(kernel)
    settings = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32, use_async_batching=False)
    out = model.generate_batch([prompt.tolist() for prompt in prompts], generation_config=settings, continuous_batching_config=small)
    assert [result.generated_tokens for result in out.values()] == expected


def test_attention_instances_are_found_per_slot(qwen2: RecursiveLLM) -> None:
    """vLLM and SGLang pass `attention_instances` and look them up by `module.layer_idx`."""
    looked_up: list[int] = []

    class Engine(dict):
        def __getitem__(self, slot: int) -> str:
            looked_up.append(slot)
            return "instance"

    for layer in qwen2.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: kwargs["attention_instances"][module.layer_idx] and None, with_kwargs=True
        )
    with torch.no_grad():
        qwen2(ids(1, 5), attention_instances=Engine(), use_cache=False)
    P, C, K = 1, 1, 2
    loop = [P + C + n * K + j for n in range(4) for j in range(K)]
    assert looked_up == [0, *loop, 1]


# --- Saving, loading, changing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sharded_saving_dtypes_and_device_maps(qwen2: RecursiveLLM, tmp_path: Path) -> None:
    x = ids(1, 9)
    qwen2.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for options in ({}, {"device_map": "cpu"}, {"dtype": "float32"}):
        assert_same(RecursiveLLM.from_pretrained(tmp_path, **options)(x).logits, qwen2(x).logits)
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        half = RecursiveLLM.from_pretrained(tmp_path, **options)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(x).logits.dtype == torch.bfloat16
    config = RecursiveLLMConfig.from_pretrained(tmp_path)
    assert_same(RecursiveLLM.from_pretrained(tmp_path, config=config)(x).logits, qwen2(x).logits)
    assert_same(AutoModel.from_pretrained(tmp_path)(x).last_hidden_state, qwen2.model(x).last_hidden_state)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@torch.no_grad()
def test_resizing_the_vocabulary(family: str) -> None:
    model = graft(donor_of(family))
    x = ids(1, 9)
    before = model(x).logits
    model.resize_token_embeddings(400)
    after = model(x).logits
    assert after.shape[-1] == model.config.vocab_size == 400
    assert_same(after[..., :384], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "qwen2")


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_lora_on_all_linear_layers_and_back(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = graft(donor_of(family))
    x = ids(2, 12)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.split("base_model.model.")[1].rsplit(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    assert all(name.startswith("model.layers.") for name in adapted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=x, H_cycles=3).logits
        assert (trained - base(x, H_cycles=3).logits).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=x, H_cycles=3).logits, trained)
        assert torch.equal(greedy(again, x[:1], H_cycles=3), greedy(again, x[:1], H_cycles=3, use_cache=False))
        merged = again.merge_and_unload()
        assert isinstance(merged, RecursiveLLM)
        torch.testing.assert_close(merged(x, H_cycles=3).logits, trained, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_compiled_forward_and_static_decoding(qwen2: RecursiveLLM) -> None:
    torch._dynamo.reset()
    x = ids(2, 9)
    compiled = torch.compile(qwen2, backend="eager", fullgraph=True)
    for depth in ({}, {"H_cycles": 1}, {"H_cycles": 3, "L_cycles": 0}):
        torch.testing.assert_close(compiled(x, use_cache=False, **depth).logits, qwen2(x, **depth).logits, atol=1e-4, rtol=1e-4)
    past = StaticCache(config=qwen2.config, max_cache_len=12)
    first = qwen2(x, past_key_values=past)
    step = compiled(x[:, :1], past_key_values=past, position_ids=torch.tensor([[9]]))
    expected = qwen2(torch.cat([x, x[:, :1]], dim=1), use_cache=False).logits
    torch.testing.assert_close(torch.cat([first.logits, step.logits], dim=1), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


# --- The guides' names -----------------------------------------------------------------------------------------------------------------


def test_the_guides_names_are_the_same_parameters(qwen2: RecursiveLLM) -> None:
    inner, base = qwen2.inner, qwen2.model
    parts = ((inner.prelude, base.layers[:1]), (inner.L_level, base.layers[1:3]), (inner.coda, base.layers[3:]))
    for view, layers in parts:
        assert len(view.layers) == len(layers)
        for ours, theirs in zip(view.layers, layers, strict=True):
            for guides, name in {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}.items():
                assert getattr(ours.self_attn, guides) is getattr(theirs.self_attn, name)
                assert getattr(ours.self_attn, guides).bias is getattr(theirs.self_attn, name).bias
            for guides, name in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
                assert getattr(ours.mlp, guides).weight is getattr(theirs.mlp, name).weight
            assert ours.input_layernorm is theirs.input_layernorm
    assert {id(p) for p in inner.L_level.parameters()} == {id(p) for p in base.layers[1:3].parameters()}
    assert inner.embed_tokens is base.embed_tokens and inner.lm_head is qwen2.lm_head and inner.norm is base.norm
    for name in ("H_init", "L_init", "q_head"):
        assert getattr(inner, name) is getattr(base.recursion, name)
    with torch.no_grad():
        inner.L_level.layers[0].self_attn.wq.weight.zero_()
        inner.L_level.layers[0].mlp.w1 = nn.Linear(32, 64, bias=False)
        inner.H_init = nn.Parameter(torch.ones(32))
        inner.L_level.layers[0].self_attn.scaling = 0.25  # what the guides have no name for
    assert base.layers[1].self_attn.scaling == 0.25
    assert not base.layers[1].self_attn.q_proj.weight.any()
    assert base.layers[1].mlp.gate_proj is inner.L_level.layers[0].mlp.w1
    assert base.recursion.H_init.sum() == 32 and "model.recursion.H_init" in qwen2.state_dict()
    for wrong in ("no_such_part", "wq"):
        with pytest.raises(AttributeError, match=wrong):
            getattr(inner, wrong)


def test_views_run_and_print(qwen2: RecursiveLLM) -> None:
    mlp, x = qwen2.inner.L_level.layers[0].mlp, torch.randn(1, 3, 32)
    assert_same(mlp(x), qwen2.model.layers[1].mlp(x))
    assert repr(mlp).startswith("SwiGLU(")


def test_fused_projections_have_no_guide_names() -> None:
    layer = recursive_of("phi3").inner.L_level.layers[0]
    with pytest.raises(AttributeError, match=r"has no wq: its projections are fused; it has .*qkv_proj"):
        layer.self_attn.wq  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no w1: its projections are fused; it has gate_up_proj"):
        layer.mlp.w1  # noqa: B018
    assert layer.mlp.w2 is recursive_of("phi3").model.layers[2].mlp.down_proj


GUIDE = {"batch_size": 8, "seq_len": 64, "vocab_size": 384, "H_cycles": 3, "L_cycles": 2, "L_layers": 4, "hidden_size": 32,
         "expansion": 4.0, "num_heads": 4, "pos_encodings": "rope", "freeze_embeddings": False}  # fmt: skip


def test_the_technical_guides_dictionary() -> None:
    model = RecursiveLLM(GUIDE)
    assert isinstance(model, RecursiveLLM) and type(model).__name__ == "RecursiveQwen2ForCausalLM"
    assert model(ids(2, 5)).logits.shape == (2, 5, 384)
    assert len(model.inner.L_level.layers) == 4 and model.config.intermediate_size == 128
    assert model.config.num_attention_heads == model.config.num_key_value_heads == 4


def test_the_technical_guides_dictionary_with_a_donor(donor_folder: Path) -> None:
    donor = AutoModelForCausalLM.from_pretrained(donor_folder)
    with pytest.warns(UserWarning, match="copies attention and feed-forward but no layer norms"):
        model = RecursiveLLM(GUIDE | {"pretrained_model_name": str(donor_folder), "expansion": 1.0})
    assert model.config.intermediate_size == donor.config.intermediate_size  # the donor's configuration takes precedence
    assert (model.config.H_cycles, model.config.L_cycles, model.config.L_layers) == (3, 2, 4)
    assert_same(model.inner.embed_tokens.weight, donor.model.embed_tokens.weight)
    assert_same(model.inner.norm.weight, donor.model.norm.weight)
    assert_same(model.inner.lm_head.weight, donor.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- Without recursify installed ------------ -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_folder_loads_where_recursify_is_not_installed(qwen2: RecursiveLLM, tmp_path: Path) -> None:
    folder, x = tmp_path / "model", ids(1, 9)
    qwen2.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == {f"{name}_recursive_llm.py" for name in ("configuration", "modeling", "decoding")}
    torch.save({"x": x, "logits": qwen2(x, H_cycles=3).logits, "tokens": greedy(qwen2, x, H_cycles=3)}, tmp_path / "expected.pt")
    script = """
        import sys
        sys.modules["recursify"] = None  # importing it fails
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        folder, expected = "model", torch.load("expected.pt")
        torch.set_num_threads(1)
        trust = {"trust_remote_code": True}
        config = AutoConfig.from_pretrained(folder, **trust)
        assert config.num_hidden_layers == 2 + 2 * 4, config
        model = AutoModelForCausalLM.from_pretrained(folder, **trust)
        x = expected["x"]
        with torch.no_grad():
            assert torch.equal(model(x, H_cycles=3).logits, expected["logits"])
            base = AutoModel.from_pretrained(folder, H_cycles=3, **trust)
            assert torch.equal(model.lm_head(base(x).last_hidden_state), expected["logits"])
        for how in ({}, {"draft_cycles": 1}, {"halt": "kl", "halt_threshold": 0.0}):
            new = model.generate(x, H_cycles=3, max_new_tokens=8, min_new_tokens=8, do_sample=False, **how)[:, x.shape[1]:]
            assert torch.equal(new, expected["tokens"]), how
        model.save_pretrained("again")
        again = AutoModelForCausalLM.from_pretrained("again", **trust)
        assert torch.equal(again(x, H_cycles=3).logits, expected["logits"])
        print("loaded", type(model).__module__.split(".")[0])
    """
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "loaded transformers_modules"


def test_auto_classes_know_every_family() -> None:
    for family in FAMILIES:
        model = recursive_of(family)
        assert type(AutoConfig.for_model(f"recursive_{family}")) is type(model.config)
        assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
        assert type(AutoModel.from_config(model.config)) is type(model.model)
        assert isinstance(model, RecursiveLLM)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_every_class_of_a_family_says_what_it_is(family: str) -> None:
    """In the form of transformers' own documentation."""
    documented = {
        MODELS[family]: "The donor's layers, looped, with its language modeling head.\n\nThis model inherits from [`PreTrainedModel`]",
        MODELS[family].base_class: "The donor's layers, looped, without a head.\n\nThis model inherits from [`PreTrainedModel`]",
        MODELS[family].config_class: "Configuration of a recursive model of this family: that of the donor, and the shape of the loop.",
    }
    for found, text in documented.items():
        assert str(found.__doc__).strip().startswith(text)
    described = str(MODELS[family].config_class.__doc__)
    assert all(f"{name} (" in described for name in ("hidden_size", "prelude_layers", "H_cycles", "gain_init", "injection"))


def test_the_halting_head_reads_directions_down_to_the_length_that_donors_norms_read() -> None:
    """x / sqrt(mean(x^2) + 1e-6): a state of nearly no length is no direction, in whatever type it comes."""
    torch.manual_seed(0)
    head = HaltHead(8)
    nn.init.normal_(head.weight)
    z = torch.randn(3, 8)
    for scale in (1e3, 1.0, 1e-3, 1e-5):
        x = z * scale
        expected = (x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()) @ head.weight[0] + head.bias
        torch.testing.assert_close(head(x), expected)

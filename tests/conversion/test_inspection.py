"""Inspection: sums of parts, the cost formula, and the printed layers."""

from __future__ import annotations

import json

import pytest
import torch

from recursify.conversion.inspection import inspect, parameters_by_part
from recursify.conversion.layer_selection import make_plan
from recursify.network.configuration_recursive_llm import from_donor
from recursify.network.modeling_recursive_llm import FAMILIES as CLASSES
from recursify.network.plan import ConversionPlan, conversion_record
from tests.support.tiny import FAMILIES, tiny_config

PLANS = [
    make_plan("a/donor", 8, L_layers=3),
    make_plan("a/donor", 8, L_layers=2, keep_donor=True),
    make_plan("a/donor", 8, L_layers=2, prelude_layers=2, coda_layers=1),
]


def config_of(family: str, plan: ConversionPlan, **recursion: object) -> object:
    shape = {"prelude_layers": len(plan.prelude), "L_layers": len(plan.loop), "coda_layers": len(plan.coda)}
    shape |= {"conversion": conversion_record(plan), **recursion}
    return from_donor(tiny_config(family, num_hidden_layers=8), plan.indices, **shape)


@pytest.mark.parametrize("plan", PLANS, ids=["compact", "keep_donor", "between"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_built_model(family: str, plan: ConversionPlan) -> None:
    for injection in ("anchored", "sum_norm"):
        config = config_of(family, plan, injection=injection)
        parts, model = parameters_by_part(config), CLASSES[config.model_type](config)
        assert sum(parts.values()) == sum(p.numel() for p in model.parameters()) == inspect(config).total_parameters
        one = sum(p.numel() for p in model.model.layers[0].parameters())
        assert [parts[name] / one for name in ("prelude", "L_level", "coda")] == [len(plan.prelude), len(plan.loop), len(plan.coda)]
        assert parts["recursion"] == sum(p.numel() for p in model.model.recursion.parameters()) > 0
        assert (parts["lm_head"] == 0) == config.tie_word_embeddings == (family in ("qwen2", "qwen3", "smollm3"))


@pytest.mark.parametrize("plan", PLANS)
def test_cost_in_layer_applications(plan: ConversionPlan) -> None:
    found = inspect(config_of("qwen2", plan, H_cycles=7, L_cycles=2))
    assert list(found.applications) == [0, 1, 2, 3, 4, 5, 7] and found.donor_applications == 8
    for H, cost in found.applications.items():
        assert cost == len(plan.prelude) + len(plan.coda) + len(plan.loop) * max(1, H * 3)
    assert list(inspect(config_of("qwen2", plan), depths=[9]).applications) == [9]


@pytest.mark.parametrize("plan", PLANS)
def test_render_shows_every_layer_part_and_depth(plan: ConversionPlan) -> None:
    found = inspect(config_of("qwen2", plan, H_cycles=3))
    lines = found.render().splitlines()
    for layer in range(8):
        assert f"  layer {layer:>3}  ->  {plan.place(layer)}" in lines
    assert f"donor a/donor (8 layers), selection {plan.layer_selection}" in lines
    for part, count in {**found.parameters, "total": found.total_parameters}.items():
        assert any(line.split() == [part, f"{count:,}"] for line in lines)
    (marked,) = [line for line in lines if "<- this checkpoint" in line]
    assert marked.split()[:3] == ["3", str(found.applications[3]), f"{found.applications[3] / 8:.2f}"]
    assert lines[-1].split()[:3] == ["donor", "8", "1.00"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("plan", PLANS)
def test_cache_size_matches_the_estimate(family: str, plan: ConversionPlan) -> None:
    config = config_of(family, plan, H_cycles=3)
    found, model = inspect(config), CLASSES[config.model_type](config).to(torch.bfloat16).eval()
    for policy, by_depth in found.to_dict()["cache_bytes_per_token"].items():
        for H in (0, 2, 3):
            past = model(torch.ones(1, 7, dtype=torch.long), use_cache=True, H_cycles=H, cache_policy=policy).past_key_values
            assert sum(tensor.nbytes for layer in past.layers for tensor in (layer.keys, layer.values)) == 7 * by_depth[str(H)]
    (marked,) = [line.split() for line in found.render().splitlines() if "<- this checkpoint" in line]
    sizes = found.to_dict()["cache_bytes_per_token"]
    assert marked[3:5] == [f"{sizes[policy]['3'] / 1e3:,.1f}" for policy in ("full", "last")]


def test_printed_figures_by_hand() -> None:
    plan = PLANS[2]  # 2 + 2 + 1 of 8 layers
    config = config_of("qwen2", plan, H_cycles=2, L_cycles=4, injection="sum_norm")
    found = inspect(config, depths=[0, 2, 9])
    head, shape, *rest = found.render().splitlines()
    assert head == "recursive_qwen2: hidden_size=32, vocab_size=384, injection=sum_norm"
    assert shape == "  H_cycles=2, L_cycles=4, L_layers=2"
    slot = 2 * 2 * 8 * 2  # keys and values, 2 heads of 8, two bytes each
    assert found.slot_bytes == slot
    assert [line.split() for line in rest[-4:]] == [
        ["0", "5", f"{5 / 8:.2f}", f"{5 * slot / 1000:.1f}", f"{5 * slot / 1000:.1f}"],
        ["2", "23", f"{23 / 8:.2f}", f"{23 * slot / 1000:.1f}", f"{5 * slot / 1000:.1f}", "<-", "this", "checkpoint"],
        ["9", "93", f"{93 / 8:.2f}", f"{93 * slot / 1000:.1f}", f"{5 * slot / 1000:.1f}"],
        ["donor", "8", "1.00", f"{8 * slot / 1000:.1f}"],
    ]
    data = found.to_dict()
    assert data["donor_layer_applications_per_token"] == 8 and data["layer_applications_per_token"] == {"0": 5, "2": 23, "9": 93}
    assert (data["config"]["H_cycles"], data["config"]["model_type"], data["config"]["hidden_size"]) == (2, "recursive_qwen2", 32)


def test_a_model_without_a_plan() -> None:
    found = inspect(config_of("llama", PLANS[0], conversion=None))
    assert "donor" not in found.render().replace("x donor", "") and found.donor_applications is None
    assert found.to_dict()["plan"] is None


def test_json() -> None:
    found = inspect(config_of("qwen3", PLANS[2]))
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["parameters"]["total"] == found.total_parameters
    assert data["layer_applications_per_token"]["3"] == found.applications[3]
    assert ConversionPlan.from_dict(data["plan"]) == PLANS[2]


def test_a_large_model_costs_no_memory() -> None:
    """Counted on the meta device: this model would take 60 GB."""
    config = from_donor(
        tiny_config("llama", hidden_size=8192, intermediate_size=28_672, num_hidden_layers=16), list(range(16)), L_layers=16
    )
    assert parameters_by_part(config)["L_level"] > 1e10

"""Tensor names of donor, recursive model and guides, and the mapping between them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from recursify.checkpoints.guide_names import from_guides, guide_name, guide_names, to_guides
from recursify.conversion.layer_selection import make_plan
from recursify.conversion.mapping import copy_attention_weights, copy_mlp_weights, match_tensors
from recursify.errors import UserError
from recursify.network.configuration_recursive_llm import from_donor
from recursify.network.modeling_recursive_llm import FAMILIES as CLASSES
from recursify.network.modeling_recursive_llm import RecursiveLLM
from tests.support.tiny import FAMILIES, tiny_config, tiny_model

LAYERS = 8
PLAN = make_plan("a/donor", LAYERS, L_layers=3, prelude_layers=2, coda_layers=1)  # loop 2, 4, 6; dropped 3, 5


@cache
def recursive(family: str) -> RecursiveLLM:
    """A random recursive model of the family: 2 prelude layers, 3 looped, 1 coda layer."""
    config = from_donor(tiny_config(family, num_hidden_layers=LAYERS), PLAN.indices, prelude_layers=2, L_layers=3, coda_layers=1)
    return CLASSES[config.model_type](config)


@cache
def donor_names(family: str) -> tuple[str, ...]:
    """As in the donor's file: a tied head is not stored."""
    model = tiny_model(family, num_hidden_layers=LAYERS)
    return tuple(name for name in model.state_dict() if not (model.config.tie_word_embeddings and name == "lm_head.weight"))


def our_names(family: str) -> list[str]:
    model = recursive(family)
    return [name for name in model.state_dict() if not (model.config.tie_word_embeddings and name == "lm_head.weight")]


def settled(family: str, donor: Any = None, ours: Any = None) -> Any:
    tied = bool(recursive(family).config.tie_word_embeddings)
    return match_tensors(donor_names(family) if donor is None else donor, our_names(family) if ours is None else ours, PLAN, tied)


def resolve(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root


@pytest.mark.parametrize(
    ("ours", "guides"),
    [
        ("model.embed_tokens.weight", "inner.embed_tokens.weight"),
        ("lm_head.weight", "inner.lm_head.weight"),
        ("model.norm.weight", "inner.norm.weight"),
        ("model.recursion.H_init", "inner.H_init"),
        ("model.recursion.L_init", "inner.L_init"),
        ("model.recursion.q_head.weight", "inner.q_head.weight"),
        ("model.recursion.inject_L.theta_A", "inner.inject_L.theta_A"),
        ("model.layers.1.self_attn.q_proj.weight", "inner.prelude.layers.1.self_attn.wq.weight"),
        ("model.layers.2.self_attn.k_proj.bias", "inner.L_level.layers.0.self_attn.wk.bias"),
        ("model.layers.4.self_attn.v_proj.weight", "inner.L_level.layers.2.self_attn.wv.weight"),
        ("model.layers.4.self_attn.o_proj.weight", "inner.L_level.layers.2.self_attn.wo.weight"),
        ("model.layers.3.mlp.gate_proj.weight", "inner.L_level.layers.1.mlp.w1.weight"),
        ("model.layers.3.mlp.down_proj.weight", "inner.L_level.layers.1.mlp.w2.weight"),
        ("model.layers.5.mlp.up_proj.weight", "inner.coda.layers.0.mlp.w3.weight"),
        ("model.layers.5.input_layernorm.weight", "inner.coda.layers.0.input_layernorm.weight"),
        ("model.layers.2.self_attn.q_norm.weight", "inner.L_level.layers.0.self_attn.q_norm.weight"),
        ("model.layers.2.self_attn.qkv_proj.weight", "inner.L_level.layers.0.self_attn.qkv_proj.weight"),
    ],
)
def test_the_guides_names(ours: str, guides: str) -> None:
    assert guide_name(ours, recursive("qwen2").config) == guides


@pytest.mark.parametrize("family", FAMILIES)
def test_one_to_one_and_back(family: str) -> None:
    model = recursive(family)
    state = model.state_dict()
    table = guide_names(state, model.config)
    assert len(set(table.values())) == len(state) and all(name.startswith("inner.") for name in table.values())
    guides = to_guides(state, model.config)
    back = from_guides(guides, state, model.config, "file.pt")
    assert back.keys() == state.keys() and all(back[name] is state[name] for name in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guides_names_are_attributes_of_the_same_tensors(family: str) -> None:
    model = recursive(family)
    own = dict(model.named_parameters(remove_duplicate=False))
    for ours, guides in guide_names(own, model.config).items():
        assert resolve(model, guides) is own[ours], guides


def test_names_missing_or_left_over_are_named() -> None:
    model = recursive("qwen2")
    guides = to_guides(model.state_dict(), model.config)
    guides["inner.extra"] = guides.pop("inner.norm.weight")
    with pytest.raises(UserError, match=r"file.pt: model_state_dict .*: 1 missing \(inner.norm.weight\); 1 left over \(inner.extra\)"):
        from_guides(guides, model.state_dict(), model.config, "file.pt")
    with pytest.raises(UserError, match=r"83 missing \(inner.H_init, inner.L_init, .*, \.\.\.\)$"):
        from_guides({}, model.state_dict(), model.config, "file.pt")


def test_at_most_six_names_are_listed() -> None:
    model = recursive("qwen2")
    guides = to_guides(model.state_dict(), model.config)
    for lost, end in ((6, r"\w"), (7, r"\.\.\.")):
        kept = dict(list(guides.items())[lost:])
        with pytest.raises(
            UserError, match=rf": {lost} missing \((inner[\w.]+, ){{5}}inner[\w.]+({', ...' if lost > 6 else ''})\)$"
        ) as raised:
            from_guides(kept, model.state_dict(), model.config, "file.pt")
        assert raised.match(end + r"\)$")
    with pytest.raises(UserError, match=r"does not match its config: 1 left over \(inner.extra\)$"):
        from_guides({**guides, "inner.extra": guides["inner.norm.weight"]}, model.state_dict(), model.config, "file.pt")
    kept = {name: tensor for name, tensor in guides.items() if name != "inner.norm.weight"}
    with pytest.raises(UserError, match=r"does not match its config: 1 missing \(inner.norm.weight\)$"):
        from_guides(kept, model.state_dict(), model.config, "file.pt")


def test_a_head_that_is_not_tied_is_copied() -> None:
    assert settled("llama").copied["lm_head.weight"] == "lm_head.weight"
    with pytest.raises(UserError, match=r"1 left over \(lm_head.weight\)"):  # the model has no such tensor, and the config does not tie it
        match_tensors([*donor_names("qwen2"), "lm_head.weight"], our_names("qwen2"), PLAN, tied=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_mapped(family: str) -> None:
    mapping = settled(family)
    assert set(mapping.copied.values()) | set(mapping.dropped) == set(donor_names(family))
    assert not set(mapping.copied.values()) & set(mapping.dropped)
    assert sorted([*mapping.copied, *mapping.fresh]) == sorted(our_names(family))
    for ours, donor in mapping.copied.items():
        if ours.startswith("model.layers."):
            (_, _, here, *rest), (_, _, there, *same) = ours.split("."), donor.split(".")
            assert rest == same and PLAN.indices[int(here)] == int(there)
        else:
            assert ours == donor
    assert {name.split(".")[2] for name in mapping.dropped} == {"3", "5"}
    assert set(mapping.dropped.values()) == {"layer 3 is not in the plan", "layer 5 is not in the plan"}
    assert all(name.startswith("model.recursion.") for name in mapping.fresh)
    assert set(mapping.fresh.values()) == {"the donor has no recursion"}


def test_redundant_donor_tensors_are_dropped_with_a_reason() -> None:
    mapping = settled(
        "qwen2", [*donor_names("qwen2"), "lm_head.weight", "model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    )
    assert mapping.dropped["lm_head.weight"] == "tied: the head is the embedding matrix"
    assert mapping.dropped["model.layers.0.self_attn.rotary_emb.inv_freq"] == "computed from the configuration"
    assert mapping.dropped["model.rotary_emb.inv_freq"] == "computed from the configuration"


@pytest.mark.parametrize(
    "extra",
    ["score.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.experts.0.w1.weight",
     "model.layers.8.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight", "model.embed_positions.weight"],
)  # fmt: skip
def test_unmapped_donor_tensor_is_named(extra: str) -> None:
    with pytest.raises(UserError, match=rf"conversion of a/donor: unmapped tensors: 1 left over \({extra}\)"):
        settled("qwen2", [*donor_names("qwen2"), extra])


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.4.self_attn.k_proj.bias"])
def test_unfilled_tensor_is_named(lost: str) -> None:
    ours = lost.replace("layers.4", "layers.3")  # donor layer 4 is layer 3 of the model
    with pytest.raises(UserError, match=rf"unmapped tensors: 1 missing \({ours}\)"):
        settled("qwen2", [name for name in donor_names("qwen2") if name != lost])


def test_an_untied_head_must_be_there() -> None:
    with pytest.raises(UserError, match=r"1 missing \(lm_head.weight\)"):
        settled("llama", [name for name in donor_names("llama") if name != "lm_head.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guides_step_4(family: str) -> None:
    """Biases and q/k norms included, through the guide's own attributes."""
    donor = tiny_model(family, seed=3, num_hidden_layers=LAYERS)
    config = from_donor(donor.config, PLAN.indices, prelude_layers=2, L_layers=3, coda_layers=1)
    model = CLASSES[config.model_type](config)
    for ours, theirs in enumerate(PLAN.loop):
        copy_attention_weights(donor.model.layers[theirs].self_attn, model.inner.L_level.layers[ours].self_attn)
        copy_mlp_weights(donor.model.layers[theirs].mlp, model.inner.L_level.layers[ours].mlp)
        for part in ("self_attn", "mlp"):
            there, here = (getattr(layer, part).state_dict() for layer in (donor.model.layers[theirs], model.model.layers[2 + ours]))
            assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)
    names = {name for name in model.model.layers[2].self_attn.state_dict()}
    assert family != "qwen2" or {"q_proj.bias", "k_proj.bias", "v_proj.bias"} <= names
    assert family != "qwen3" or {"q_norm.weight", "k_norm.weight"} <= names


def test_copied_weights_share_no_memory() -> None:
    donor, model = tiny_model("qwen2", num_hidden_layers=LAYERS), recursive("qwen2")
    copy_mlp_weights(donor.model.layers[0].mlp, model.inner.L_level.layers[0].mlp)
    before = donor.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        model.inner.L_level.layers[0].mlp.w3.weight.zero_()
    assert torch.equal(donor.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("qwen2", {"num_key_value_heads": 4}, "k_proj.weight"),
        ("llama", {"attention_bias": True}, "q_proj.bias"),
        ("qwen3", {}, "q_norm.weight"),
    ],
)
def test_mismatch_is_refused_and_nothing_is_copied(family: str, changes: dict[str, Any], named: str) -> None:
    other = tiny_model(family, seed=5, num_hidden_layers=2, **changes)
    target = recursive("llama" if family != "qwen2" else "qwen2").inner.L_level.layers[0]
    before = {name: tensor.clone() for name, tensor in target.self_attn.module.state_dict().items()}
    with pytest.raises(
        UserError, match=rf"Attention -> \w+Attention: .*{named}.* do not match in name or shape; .* donor's own configuration"
    ):
        copy_attention_weights(other.model.layers[0].self_attn, target.self_attn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.self_attn.module.state_dict().items())


def test_a_wider_feed_forward_is_refused() -> None:
    other = tiny_model("qwen2", num_hidden_layers=2, intermediate_size=96)
    with pytest.raises(UserError, match=r"Qwen2MLP -> Qwen2MLP: gate_proj.weight, up_proj.weight, down_proj.weight do not match"):
        copy_mlp_weights(other.model.layers[0].mlp, recursive("qwen2").inner.L_level.layers[0].mlp)

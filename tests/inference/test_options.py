"""Decoding options: invalid ones are refused, valid ones become arguments of the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify.conversion.convert import convert
from recursify.errors import UserError
from recursify.inference.options import DecodingOptions, Sampling
from recursify.serving.answering import Service
from recursify.serving.settings import ServeSettings
from recursify.training.settings import FitSettings
from recursify.utils.models import evaluating, is_recursive
from tests.support.tiny import make_tiny_tokenizer, tiny_model


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    return convert(str(donor_folder), L_layers=2, H_cycles=3, L_cycles=1, gain=0.3)


@pytest.fixture(scope="module")
def donor() -> Any:
    return tiny_model("qwen2", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"H_cycles": -1}, "--H_cycles: expected at least 0 (0 is one plain pass), got -1"),
        ({"cache_policy": "half"}, "--cache_policy: expected one of full, last, got 'half'"),
        ({"halt": "never"}, "--halt: expected one of none, q_head, kl, entropy, got 'never'"),
        ({"halt_threshold": 0.5}, "--halt_threshold: expected --halt q_head, kl or entropy with it, got 0.5 and no --halt"),
        ({"halt": "q_head", "halt_threshold": 1.1}, "expected 0 (always) to 1 (never) for --halt q_head, got 1.1"),
        ({"halt": "kl", "halt_threshold": -0.1}, "expected 0 (never) or more (inf is always) for --halt kl, got -0.1"),
        ({"halt": "entropy", "halt_threshold": math.nan}, "for --halt entropy, got nan"),
        ({"draft_tokens": 0}, "--draft_tokens: expected at least 1, got 0"),
        ({"draft_tokens": 4}, "--draft_tokens: expected --draft_cycles with it, got 4 and no --draft_cycles"),
        ({"draft_cycles": -1}, "--draft_cycles: expected at least 0 (0 is one plain pass), got -1"),
        ({"halt": "kl", "static_cache": True}, "--static_cache: expected --halt none with it, got --halt kl"),
        ({"draft_cycles": 1, "static_cache": True}, "--draft_cycles: drafts take tokens back, which a static cache cannot"),
        ({"draft_cycles": 1, "halt": "kl"}, "--draft_cycles: expected --halt none with it, got --halt kl; leave out one of the two"),
        ({"draft_cycles": 1, "cache_policy": "last"}, "--draft_cycles: expected --cache_policy full with it, got --cache_policy last"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        DecodingOptions(**options).validate()
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"halt": "kl", "halt_threshold": math.inf},
        {"halt": "kl", "halt_threshold": 0},
        {"halt": "entropy", "halt_threshold": 1.5},
        {"halt": "q_head", "halt_threshold": 0},
        {"halt": "q_head", "halt_threshold": 1},
        {"halt": "q_head"},
        {"H_cycles": 0},
        {"H_cycles": 0, "cache_policy": "last"},
        {"draft_cycles": 0, "draft_tokens": 1},
    ],
)
def test_valid_options_pass(options: dict[str, Any]) -> None:
    DecodingOptions(**options).validate()


@pytest.mark.parametrize(
    ("options", "device", "uses"),
    [
        ({"max_new_tokens": 256}, "cuda", True), ({"max_new_tokens": 255}, "cuda", False), ({"max_new_tokens": 256}, "cpu", False),
        ({"max_new_tokens": 256, "halt": "kl"}, "cuda", False), ({"max_new_tokens": 256, "draft_cycles": 0}, "cuda", False),
        ({"max_new_tokens": 9, "static_cache": True}, "cpu", True), ({"max_new_tokens": 999, "static_cache": False}, "cuda", False),
    ],
)  # fmt: skip
def test_a_static_cache_is_used_where_it_pays_or_is_asked_for(options: dict[str, Any], device: str, uses: bool) -> None:
    assert Sampling(**options).uses_static_cache(torch.device(device)) is uses


def test_only_explicit_options_reach_generate(model: Any) -> None:
    assert DecodingOptions().generate_kwargs(model) == DecodingOptions(draft_tokens=7).generate_kwargs(model) == {}
    assert DecodingOptions(H_cycles=2, cache_policy="last", halt="kl", halt_threshold=0.1).generate_kwargs(model) == {
        "H_cycles": 2, "cache_policy": "last", "halt": "kl", "halt_threshold": 0.1,
    }  # fmt: skip
    assert DecodingOptions(draft_cycles=0).generate_kwargs(model) == {"draft_cycles": 0, "draft_tokens": 16}
    assert DecodingOptions(draft_cycles=1, draft_tokens=7).generate_kwargs(model) == {"draft_cycles": 1, "draft_tokens": 7}
    assert DecodingOptions(H_cycles=0).generate_kwargs(model) == {"H_cycles": 0}
    assert DecodingOptions(halt="kl", halt_threshold=0.0).generate_kwargs(model) == {"halt": "kl", "halt_threshold": 0.0}


@pytest.mark.parametrize("name_and_value", [("H_cycles", 2), ("cache_policy", "last"), ("halt", "kl"), ("draft_cycles", 1)])
def test_plain_model_takes_no_depth_options(donor: Any, name_and_value: tuple[str, Any]) -> None:
    name, value = name_and_value
    assert DecodingOptions().generate_kwargs(donor) == {}
    with pytest.raises(
        UserError, match=f"--{name}: expected a recursive model, got a Qwen2ForCausalLM, which has no cycles; leave --{name}"
    ):
        DecodingOptions(**{name: value}).generate_kwargs(donor)


def test_draft_cycles_must_be_below_H_cycles(model: Any) -> None:
    assert DecodingOptions(draft_cycles=2).generate_kwargs(model)["draft_cycles"] == 2
    assert DecodingOptions(draft_cycles=3, H_cycles=4).generate_kwargs(model)["draft_cycles"] == 3
    for options, cycles in (
        (DecodingOptions(draft_cycles=3), 3),
        (DecodingOptions(draft_cycles=1, H_cycles=1), 1),
        (DecodingOptions(draft_cycles=0, H_cycles=0), 0),
    ):
        with pytest.raises(UserError, match=f"--draft_cycles: expected fewer than the {cycles} cycles of the run"):
            options.generate_kwargs(model)


def test_a_plain_pass_cannot_halt(model: Any) -> None:
    with pytest.raises(UserError, match="--halt: expected a run of at least 1 cycle, got --halt kl with 0 cycles"):
        DecodingOptions(halt="kl", H_cycles=0).generate_kwargs(model)


def test_untrained_q_head_cannot_halt(model: Any) -> None:
    bias = model.base_model.recursion.q_head.bias
    with pytest.raises(UserError, match="--halting_weight") as error:
        DecodingOptions(halt="q_head").generate_kwargs(model)
    assert "--halt kl" in str(error.value)
    with torch.no_grad():
        bias.fill_(0.01)
    try:
        assert DecodingOptions(halt="q_head").generate_kwargs(model) == {"halt": "q_head"}
    finally:
        with torch.no_grad():
            bias.zero_()


def test_runs_that_can_share_a_cache_are_equal_when_settled(model: Any, donor: Any) -> None:
    assert DecodingOptions().resolved(model) == DecodingOptions(H_cycles=3).resolved(model) != DecodingOptions(H_cycles=2).resolved(model)
    assert DecodingOptions().resolved(donor) == DecodingOptions()
    assert (
        DecodingOptions(H_cycles=0).resolved(model).H_cycles == 0
        and DecodingOptions(H_cycles=0).cycles(model) == 0
        and DecodingOptions().cycles(model) == 3
    )
    asked = {"cache_policy": "last", "halt": "kl", "halt_threshold": 0.2, "draft_cycles": 1, "draft_tokens": 3}
    assert DecodingOptions(**asked).resolved(model) == DecodingOptions(H_cycles=3, **asked)
    assert type(Sampling(halt="kl", temperature=0.3).resolved(model)) is DecodingOptions
    assert Sampling(halt="kl", temperature=0.3).resolved(model) == DecodingOptions(H_cycles=3, halt="kl")


def test_which_models_are_recursive(model: Any, donor: Any) -> None:
    assert is_recursive(model) and not is_recursive(donor)


def test_training_mode_is_restored(donor: Any) -> None:
    donor.train()
    try:
        with pytest.raises(KeyError), evaluating(donor):
            assert not donor.training
            raise KeyError
        assert donor.training
        donor.eval()
        with evaluating(donor):
            assert not donor.training
        assert not donor.training
    finally:
        donor.eval()


def test_more_cycles_than_any_pass_has_are_refused(model: Any) -> None:
    with pytest.raises(
        UserError, match=r"--H_cycles 99999999: .*expected at most 100,000 layer applications in a pass, got .*; choose fewer"
    ):
        DecodingOptions(H_cycles=99_999_999).generate_kwargs(model)
    with pytest.raises(UserError, match=r"--cycle_choices 99999999: .*at most 100,000"):
        FitSettings(dataset_name="x", seq_len=8, cycle_choices=(1, 99_999_999)).validate_model(model.config)
    with pytest.raises(UserError, match=r"--depths 99999999: .*at most 100,000"):
        Service(model, make_tiny_tokenizer(), "x", ServeSettings(checkpoint="x", depths=(99_999_999,)))

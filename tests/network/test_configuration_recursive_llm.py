"""The configuration: derived fields, validation, and round trips through files."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, DynamicCache

from recursify import RecursiveLLMConfig
from recursify.network.configuration_recursive_llm import CONFIGS, FIELDS, applications, from_donor, from_guide
from tests.support.tiny import FAMILIES, tiny_config

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def small(**fields: Any) -> Any:
    return RecursiveLLMConfig(**SMALL, **fields)


@pytest.mark.parametrize(("H", "L", "times"), [(0, 0, 1), (0, 3, 1), (1, 0, 1), (1, 3, 4), (3, 0, 3), (3, 3, 12)])
def test_virtual_depth(H: int, L: int, times: int) -> None:
    config = small(prelude_layers=2, L_layers=3, coda_layers=1, H_cycles=H, L_cycles=L)
    assert applications(H, L) == times
    assert config.num_hidden_layers == config.depth() == len(config.layer_types) == 3 + 3 * times
    assert config.physical_layers == 6
    assert config.depth(2, 1) == config.at_depth(2, 1).num_hidden_layers == 3 + 3 * 4
    assert len(DynamicCache(config=config).layers) == config.num_hidden_layers


def test_layer_types_follow_the_slots() -> None:
    """Slots run prelude, coda, loop, so a deeper configuration only adds at the end."""
    full, window = "full_attention", "sliding_attention"
    config = small(prelude_layers=1, L_layers=2, coda_layers=1, H_cycles=2, L_cycles=1, block_types=[full, full, window, window],
                   use_sliding_window=True, sliding_window=8)  # fmt: skip
    assert config.layer_types == [full, window] + [full, window] * 4
    assert config.at_depth(5, 3).layer_types[:10] == config.layer_types


def test_defaults_are_those_of_the_documentation() -> None:
    documented = re.findall(r"^(\w+) \(`.*?`, \*optional\*(?:, defaults to `?(.*?)`?)?\):", FIELDS, re.MULTILINE)
    defaults = {name: getattr(RecursiveLLMConfig, name) for name, _ in documented}
    assert len(documented) == 16
    assert {name: value.strip('"') or None for name, value in documented} == {
        name: None if default is None else str(default) for name, default in defaults.items()
    }


def test_boundary_values_are_accepted() -> None:
    config = small(prelude_layers=0, L_layers=1, coda_layers=0, H_cycles=0, L_cycles=0, gain_init=0.45)
    assert config.num_hidden_layers == config.depth() == 1
    config.gain_init = 0.0
    config.L_layers = 1  # no change
    deep = small(prelude_layers=1, L_layers=2, coda_layers=3, H_cycles=2, L_cycles=1)
    assert [deep.depth(), deep.depth(0), deep.depth(3), deep.depth(None, 0), deep.depth(0, 0)] == [12, 6, 16, 8, 6]
    for H, L in ((None, None), (0, None), (None, 0), (3, 2)):
        other = deep.at_depth(H, L)
        assert (other.H_cycles, other.L_cycles) == (2 if H is None else H, 1 if L is None else L)
        assert other.num_hidden_layers == len(other.layer_types) == deep.depth(H, L)


def test_sliding_window_family_without_layer_types_uses_windows_everywhere() -> None:
    full, window = "full_attention", "sliding_attention"
    for given, kind in ((8, window), (None, full)):
        config = RecursiveLLMConfig(model_type="recursive_mistral", **SMALL, sliding_window=given)
        assert config.block_types == [kind] * 4 and set(config.layer_types) == {kind}
    mixed = RecursiveLLMConfig(model_type="recursive_mistral", **SMALL, sliding_window=8, block_types=[window, full, window, window])
    assert mixed.block_types == [window, full, window, window] and mixed.as_physical().layer_types == mixed.block_types


def test_changing_cycles_recomputes_derived_fields() -> None:
    config = small(H_cycles=3, L_cycles=3)
    config.H_cycles = 5
    assert config.num_hidden_layers == len(config.layer_types) == 4 * 5 * 4
    config.L_cycles = 0
    assert config.num_hidden_layers == len(config.layer_types) == 4 * 5


def test_at_depth_does_not_change_the_original() -> None:
    config = small()
    before = config.to_dict()
    assert config.at_depth(7).H_cycles == 7
    physical = config.as_physical()
    assert physical.num_hidden_layers == len(physical.layer_types) == 4
    assert config.to_dict() == before
    assert copy.deepcopy(config).to_dict() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"L_layers": 0}, "L_layers: expected a whole number of at least 1, got 0"),
        ({"L_layers": -1}, "L_layers: expected a whole number of at least 1, got -1"),
        ({"prelude_layers": -1}, "prelude_layers: expected a whole number of at least 0, got -1"),
        ({"coda_layers": 1.0}, "coda_layers: expected a whole number of at least 0, got 1.0"),
        ({"H_cycles": -1}, "H_cycles: expected a whole number of at least 0, got -1"),
        ({"H_cycles": True}, "H_cycles: expected a whole number of at least 0, got True"),
        ({"L_cycles": "3"}, "L_cycles: expected a whole number of at least 0, got '3'"),
        ({"injection": "concat"}, "injection: expected one of anchored, sum_norm, got 'concat'"),
        ({"gain_init": 0.5}, "gain: expected 0 <= gain <= 0.45"),
        ({"gain_init": -0.1}, "gain: expected 0 <= gain <= 0.45"),
        ({"gain_init": float("nan")}, "gain: expected 0 <= gain <= 0.45"),
        ({"block_types": ["full_attention"] * 3}, "block_types: expected one entry for each of the 4 layers of the plan, got 3"),
        ({"block_types": ["foo"] * 4}, "block_types: expected full_attention or sliding_attention for each layer, got foo"),
        ({"block_types": ["sliding_attention"] * 4}, "block_types: sliding_attention needs a sliding_window, got None; give one"),
        ({"model_type": "recursive_gpt2"}, "model_type: expected one of recursive_qwen2, .*, got 'recursive_gpt2'"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_assignments_are_validated() -> None:
    config = small(H_cycles=2)
    for name, value in (("H_cycles", -1), ("injection", "concat"), ("gain_init", 1.0)):
        with pytest.raises(ValueError, match=r"expected"):
            setattr(config, name, value)
    with pytest.raises(ValueError, match=r"L_layers: the layers of a configuration are fixed, expected 4, got 2"):
        config.L_layers = 2
    assert (config.H_cycles, config.injection, config.gain_init, config.L_layers) == (2, "anchored", 0.0, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_recomputes_derived_fields(family: str, tmp_path: Path) -> None:
    donor = tiny_config(family)
    config = from_donor(donor, [0, 1, 3, 5], prelude_layers=1, L_layers=2, coda_layers=1, H_cycles=2, L_cycles=1, gain_init=0.1)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    assert "_made" not in written and written["model_type"] == f"recursive_{family}"
    for load in (RecursiveLLMConfig.from_pretrained, AutoConfig.from_pretrained):
        assert load(tmp_path).to_diff_dict() == config.to_diff_dict()
    file.write_text(json.dumps(written | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "H_cycles": 5}))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.num_hidden_layers == len(again.layer_types) == 2 + 2 * 5 * 2
    assert again.block_types == config.block_types
    assert AutoConfig.from_pretrained(tmp_path, H_cycles=1).num_hidden_layers == 2 + 2 * 1 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_base_config_class_returns_the_family(family: str) -> None:
    config = RecursiveLLMConfig(model_type=f"recursive_{family}", **SMALL)
    assert type(config) is CONFIGS[f"recursive_{family}"] and isinstance(config, RecursiveLLMConfig)
    assert type(RecursiveLLMConfig()).model_type == "recursive_qwen2"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_donors_fields_are_kept(family: str) -> None:
    donor = tiny_config(family)
    config = from_donor(donor, [0, 3, 6, 7], L_layers=4)
    ours, theirs = config.to_dict(), donor.to_dict()
    derived = {"num_hidden_layers", "layer_types", "no_rope_layers", "model_type", "architectures", "transformers_version"}
    assert {name: ours[name] for name in set(theirs) - derived} == {name: value for name, value in theirs.items() if name not in derived}
    for theirs_name, ours_name in (("layer_types", "block_types"), ("no_rope_layers", "no_rope_layers")):
        if theirs.get(theirs_name) is not None:
            assert ours[ours_name] == [theirs[theirs_name][i] for i in (0, 3, 6, 7)]


def test_the_guides_dictionary() -> None:
    guide = {"batch_size": 8, "seq_len": 64, "vocab_size": 384, "H_cycles": 3, "L_layers": 4, "hidden_size": 32, "expansion": 4.0,
             "num_heads": 4, "pos_encodings": "rope"}  # fmt: skip
    config = from_guide(guide)
    assert (config.intermediate_size, config.num_key_value_heads, config.max_position_embeddings) == (128, 4, 64)
    assert from_guide(guide | {"num_key_value_heads": 2, "intermediate_size": 96}).intermediate_size == 96
    assert from_guide(guide | {"model_type": "recursive_llama"}).model_type == "recursive_llama"
    with pytest.raises(ValueError, match="unknown key H_cycle, colour; known are"):
        from_guide(guide | {"H_cycle": 3, "colour": "red"})
    with pytest.raises(ValueError, match=r"pos_encodings: expected 'rope'.*, got 'learned'"):
        from_guide(guide | {"pos_encodings": "learned"})
    with pytest.raises(ValueError, match="without pretrained_model_name the dictionary needs vocab_size, num_heads"):
        from_guide({"hidden_size": 32, "H_cycles": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expansion": 0}, "^expansion: expected a number above 0 .*, got 0"),
        ({"expansion": -1.5}, "^expansion: expected a number above 0 .*, got -1.5"),
        ({"num_heads": 0}, "^num_heads: expected a whole number of at least 1, got 0"),
        ({"num_heads": "4"}, "^num_heads: expected a whole number of at least 1, got '4'"),
        ({"vocab_size": 0}, "^vocab_size: expected a whole number of at least 1, got 0"),
        ({"seq_len": 0}, "^seq_len: expected a whole number of at least 1, got 0"),
        ({"hidden_size": 33}, "^hidden_size: expected a multiple of num_heads = 4, got 33"),
        ({"hidden_size": True}, "^hidden_size: expected a whole number of at least 1, got True"),
        ({"num_key_value_heads": 0}, "^num_key_value_heads: expected a whole number of at least 1, got 0"),
        ({"expansion": True}, "^expansion: expected a number above 0 .*, got True"),
        ({"expansion": float("inf")}, "^expansion: expected a number above 0 .*, got inf"),
    ],
)
def test_guide_errors_use_the_guides_names(fields: dict[str, Any], message: str) -> None:
    guide = {"seq_len": 64, "vocab_size": 384, "hidden_size": 32, "expansion": 4.0, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        from_guide(guide | fields)


def test_the_guides_dictionary_with_a_donor_takes_its_layers_by_stride(donor_folder: Path) -> None:
    config = from_guide({"pretrained_model_name": str(donor_folder), "L_layers": 4, "hidden_size": 9999, "freeze_embeddings": True})
    donor = AutoConfig.from_pretrained(donor_folder)
    assert config.hidden_size == donor.hidden_size and config.tie_word_embeddings == donor.tie_word_embeddings
    assert config.freeze_embeddings and config.block_types == [donor.layer_types[i] for i in (0, 6, 12, 18)]


def test_the_guides_stride_is_rounded_down(tmp_path: Path) -> None:
    """24 layers, of which 10 and later have a window: 0, 4, 9, 14 and 19 are int(i * 24 / 5)."""
    tiny_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=10).save_pretrained(tmp_path)
    config = from_guide({"pretrained_model_name": str(tmp_path), "L_layers": 5, "H_cycles": 1})
    assert config.block_types == ["full_attention"] * 3 + ["sliding_attention"] * 2
    assert (config.L_layers, config.H_cycles, config.L_cycles) == (5, 1, 3)
    assert from_guide({"pretrained_model_name": str(tmp_path)}).L_layers == 4


def test_other_guide_widths_are_accepted() -> None:
    guide = {"vocab_size": 64, "hidden_size": 33, "num_heads": 4, "head_dim": 8, "expansion": 1.4, "seq_len": 1,
             "model_type": "recursive_qwen3"}  # fmt: skip
    config = from_guide(guide)
    assert (config.intermediate_size, config.max_position_embeddings, config.head_dim) == (46, 1, 8)
    assert from_guide({"vocab_size": 1, "hidden_size": 32, "num_attention_heads": 4}).num_key_value_heads == 4


def test_a_file_that_names_no_type_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_type: expected one of recursive_qwen2, .*, got ''"):
        RecursiveLLMConfig.from_pretrained(tmp_path)

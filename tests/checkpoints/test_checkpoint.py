"""Checkpoints: both forms round trip, files are validated, no code in them is run, and saving is atomic."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from recursify import ConversionPlan, RecursiveLLM, convert
from recursify.checkpoints import checkpoint
from recursify.checkpoints.guide_names import guide_names
from recursify.checkpoints.model_card import LOSS_PICTURE, PLAN_PICTURE
from recursify.errors import UserError
from recursify.network.configuration_recursive_llm import from_donor
from recursify.network.modeling_recursive_llm import FAMILIES as CLASSES
from recursify.utils.atomic import write_atomic
from tests.support.tiny import FAMILIES, make_tiny_tokenizer, tiny_donor, tiny_model

FORMS = ["model.pt", "model"]
PLAN = ConversionPlan("a/donor", 8, (0, 1), (3, 4, 5), (7,), "middle")
NOTES = {"donor": "a/donor", "seq_len": 64, "training": {"steps": 3, "loss": 2.5}}


def make_model(family: str = "qwen2", dtype: torch.dtype = torch.float32, **fields: Any) -> RecursiveLLM:
    """A random recursive model with nonzero gains and states, so that every tensor matters."""
    donor = tiny_model(family, num_hidden_layers=8)
    shape = {"prelude_layers": 2, "L_layers": 3, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1, "gain_init": 0.2, **fields}
    config = from_donor(donor.config, PLAN.indices, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLASSES[config.model_type](config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(eos_token_id=[0, 5], pad_token_id=0, do_sample=True, top_k=7)
    return model.to(dtype).eval() if dtype == torch.float32 else checkpoint.build(config, _as(model, dtype), "test")


def _as(model: RecursiveLLM, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tied = bool(model.config.tie_word_embeddings)
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def logits(model: Any, **depth: int) -> torch.Tensor:
    ids = torch.randint(384, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False, **depth).logits


@pytest.fixture(scope="module")
def model() -> RecursiveLLM:
    return make_model()


@pytest.fixture
def saved(model: RecursiveLLM, tmp_path: Path) -> Path:
    """Both forms, `model.pt` and `model`, in a folder of their own."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for form in FORMS:
        checkpoint.save(folder / form, model, make_tiny_tokenizer(), PLAN, NOTES)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change parts of a .pt file; a part set to None is removed."""
    content = torch.load(path, weights_only=True)
    content = {**content, **changes}
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def edit_config(path: Path, **changes: Any) -> None:
    """Change fields of the configuration in either form."""
    if path.is_dir():
        fields = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**fields, **changes}))
    else:
        edit(path, config={**torch.load(path, weights_only=True)["config"], **changes})


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form: str, model: RecursiveLLM, saved: Path) -> None:
    found = checkpoint.load(saved / form)
    assert type(found.model) is type(model) and not found.model.training
    assert found.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.model.state_dict().items())
    for depth in ({}, {"H_cycles": 3}, {"H_cycles": 0}):
        assert torch.equal(logits(found.model, **depth), logits(model, **depth))
    assert (found.plan, found.notes) == (PLAN, NOTES)
    kept = found.model.generation_config
    assert (kept.eos_token_id, kept.do_sample, kept.top_k) == ([0, 5], True, 7)
    assert found.tokenizer("the old ship")["input_ids"] == make_tiny_tokenizer()("the old ship")["input_ids"]
    assert found.model.config.to_diff_dict().items() >= {"H_cycles": 2, "L_cycles": 1, "gain_init": 0.2}.items()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_dtype_and_its_tie(family: str, form: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(family, dtype)
        checkpoint.save(tmp_path / form, model, None)
        found = checkpoint.load(tmp_path / form).model
        assert {parameter.dtype for parameter in found.parameters()} == {dtype} and found.config.dtype == dtype
        assert torch.equal(logits(found), logits(model))
        tied = found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
        assert tied == bool(model.config.tie_word_embeddings) == (family in ("qwen2", "qwen3", "smollm3"))


@pytest.mark.parametrize("form", FORMS)
def test_frozen_parameters_stay_frozen_after_loading(form: str, tmp_path: Path) -> None:
    model = make_model(L_cycles=0, freeze_embeddings=True)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"model.embed_tokens.weight", "model.recursion.q_head.weight", "model.recursion.inject_L.theta_A"} <= frozen
    checkpoint.save(tmp_path / form, model, None)
    found = checkpoint.load(tmp_path / form).model
    assert {name for name, parameter in found.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("form", FORMS)
def test_stored_in_another_dtype(form: str, model: RecursiveLLM, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / form, model, None, dtype=torch.bfloat16)
    assert model.dtype == torch.float32 and model.config.dtype != torch.bfloat16
    found = checkpoint.load(tmp_path / form).model
    assert found.dtype == found.config.dtype == torch.bfloat16
    assert torch.equal(found.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))


def test_the_file_holds_tensors_under_the_guides_names_and_json(model: RecursiveLLM, saved: Path) -> None:
    content = torch.load(saved / "model.pt", weights_only=True)
    assert list(content) == ["format", "config", "plan", "notes", "generation_config", "model_state_dict"]
    json.dumps({name: value for name, value in content.items() if name != "model_state_dict"})
    assert (content["config"]["H_cycles"], content["config"]["model_type"]) == (2, "recursive_qwen2")
    state = content["model_state_dict"]
    assert state.keys() == set(guide_names(model.state_dict(), model.config).values())
    for name, tensor in state.items():
        here: Any = model
        for part in name.split("."):
            here = here[int(part)] if part.isdigit() else getattr(here, part)
        assert torch.equal(here, tensor), name
    assert state["inner.lm_head.weight"].data_ptr() == state["inner.embed_tokens.weight"].data_ptr()


def test_the_file_is_as_large_as_its_tensors(saved: Path, model: RecursiveLLM) -> None:
    """Also when they were read from a larger file, or a tied head could have been written twice."""
    again = checkpoint.load(saved / "model.pt").model
    checkpoint.save(saved / "again.pt", again, None)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    assert stored < (saved / "again.pt").stat().st_size < stored + 300 * len(model.state_dict()) + 20_000


@pytest.mark.parametrize("form", FORMS)
def test_edited_H_cycles_in_a_file_takes_effect(form: str, model: RecursiveLLM, saved: Path) -> None:
    edit_config(saved / form, H_cycles=5)
    found = checkpoint.load(saved / form).model
    assert found.config.H_cycles == 5 and found.config.num_hidden_layers == 3 + 3 * 5 * 2
    assert torch.equal(logits(found), logits(model, H_cycles=5))
    assert checkpoint.load(saved / form, H_cycles=1, L_cycles=0).model.config.num_hidden_layers == 3 + 3


@pytest.mark.parametrize("form", FORMS)
def test_wrong_derived_fields_are_recomputed(form: str, model: RecursiveLLM, saved: Path) -> None:
    edit_config(saved / form, num_hidden_layers=99, layer_types=["sliding_attention"] * 2)
    found = checkpoint.load(saved / form).model
    assert found.config.num_hidden_layers == len(found.config.layer_types) == 3 + 3 * 4
    assert set(found.config.layer_types) == {"full_attention"}
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"H_cycles": -1}, "H_cycles: expected a whole number of at least 0, got -1"),
        ({"H_cycles": "5"}, "H_cycles: expected a whole number of at least 0, got '5'"),
        ({"injection": "concat"}, "injection: expected one of anchored, sum_norm, got 'concat'"),
        ({"H_cycle": 5}, "unknown field H_cycle in its config; did you mean H_cycles?"),
        ({"L_layer": 5}, "unknown field L_layer in its config; did you mean L_layers?"),
        ({"freeze_embedding": True}, "unknown field freeze_embedding in its config; did you mean freeze_embeddings?"),
        ({"model_type": "qwen2"}, r"not a recursive model \(model_type 'qwen2'\); convert it first"),
        ({"model_type": None}, r"not a recursive model \(model_type None\)"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"L_layers": 2}, "block_types: expected one entry for each of the 5 layers of the plan, got 6"),
        ({"L_layers": 2, "block_types": None}, "(missing or left over|left over|does not match)"),
        ({"coda_layers": 2, "block_types": None}, "missing"),
        (
            {"hidden_size": 64},
            r"shape mismatch between .*embed_tokens.weight \(expected \[384, 64\], got \[384, 32\]\).* more; .* restore it",
        ),
        ({"vocab_size": 400}, r"shape mismatch between .*embed_tokens.weight \(expected \[400, 32\], got \[384, 32\]\).* restore it"),
        ({"num_attention_heads": 8, "head_dim": 8}, r"shape mismatch between .*q_proj.weight \(expected \[64, 32\], got \[32, 32\]\)"),
        ({"dtype": "bogus"}, "its config is damaged: .*bogus.*; copy it again or make it again with convert"),
        ({"num_attention_heads": 0}, "its config is damaged: ZeroDivisionError: .*; copy it again"),
        ({"hidden_act": "zzz"}, "its config is damaged: KeyError: 'zzz'; copy it again"),
        ({"pad_token_id": 10**6}, "its config is damaged: .*Padding_idx must be within num_embeddings; copy it again"),
        ({"H_cycles": 10**9}, "its config is damaged: .*expected at most 100,000 layer applications .*, got 6,000,000,003; "),
        ({"H_cycles": 10**30}, "its config is damaged: .*expected at most 100,000 layer applications"),
        (
            {"L_layers": 10**12, "block_types": None},
            "its config is damaged: L_layers: expected a whole number of 1 to 10,000, got 1000000000000",
        ),
        ({"is_encoder_decoder": True}, "its config is damaged: is_encoder_decoder: expected false, got True"),
        ({"physical_layers": 6}, "its config is damaged: .*physical_layers.* no setter"),
        ({"block_types": ["foo"] * 6}, "its config is damaged: block_types: expected full_attention or sliding_attention .*, got foo"),
        (
            {"block_types": ["sliding_attention"] * 6, "sliding_window": None},
            "its config is damaged: block_types: sliding_attention needs a sliding_window, got None; give one",
        ),
    ],
)
def test_invalid_config_is_refused(form: str, changes: dict[str, Any], message: str, saved: Path) -> None:
    edit_config(saved / form, **changes)
    with pytest.raises(UserError, match=rf"{saved / form}.*{message}"):
        checkpoint.load(saved / form)


@pytest.mark.parametrize("form", FORMS)
def test_overrides_are_checked_like_the_file(form: str, saved: Path) -> None:
    with pytest.raises(UserError, match=r"H_cycles: expected a whole number of at least 0, got -2"):
        checkpoint.load(saved / form, H_cycles=-2)
    with pytest.raises(UserError, match=r"unknown field H_cycle in its config; did you mean H_cycles"):
        checkpoint.load(saved / form, H_cycle=2)


@pytest.mark.parametrize("form", FORMS)
def test_extra_fields_of_donors_are_not_misspellings(form: str, saved: Path) -> None:
    edit_config(saved / form, max_window_layers=28, use_mrope=False, layers=3, n_layers=4, num_layers=5, _name_or_path="x")
    assert checkpoint.load(saved / form).model.config.use_mrope is False


def test_code_in_a_pickle_is_not_run(saved: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": checkpoint.FORMAT, "config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt: not a checkpoint of recursify: a pickle with objects other than .* could run code"):
        checkpoint.load(tmp_path / "evil.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "config": Evil()}))
    torch.save({"config": Evil()}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("bare.pt", "legacy.pt"):
        with pytest.raises(UserError, match=f"{name}: truncated, or not a .pt file at all"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_foreign_files_are_refused(saved: Path, tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state.pt: .* expected format 'recursify/1', got a dict of layer.weight; make one with convert"):
        checkpoint.load(tmp_path / "state.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list.pt: .* expected format 'recursify/1', got a list"):
        checkpoint.load(tmp_path / "list.pt")
    edit(saved / "model.pt", format="recursify/9")
    with pytest.raises(UserError, match=r"expected format 'recursify/1', got 'recursify/9'"):
        checkpoint.load(saved / "model.pt")
    (tmp_path / "text.pt").write_text("no model at all\n" * 100)
    (tmp_path / "empty.pt").touch()
    shutil.make_archive(str(tmp_path / "archive"), "zip", saved / "model_tokenizer")
    (tmp_path / "archive.zip").rename(tmp_path / "archive.pt")
    for name in ("text.pt", "empty.pt", "archive.pt"):
        with pytest.raises(UserError, match=f"{name}: truncated, "):
            checkpoint.load(tmp_path / name)


def test_truncated_and_corrupt_files(saved: Path) -> None:
    path = saved / "model.pt"
    whole = path.read_bytes()
    for keep in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"model.pt: truncated, "):
            checkpoint.load(path)
    start = whole.index(b"data.pkl") + 80
    path.write_bytes(whole[:start] + b"\xff" * 400 + whole[start + 400 :])
    with pytest.raises(UserError, match=r"model.pt: (truncated, |not a checkpoint)"):
        checkpoint.load(path)


@pytest.mark.parametrize("part", ["config", "plan", "notes", "generation_config", "model_state_dict"])
def test_a_file_with_a_part_missing_or_wrong(part: str, saved: Path) -> None:
    content = torch.load(saved / "model.pt", weights_only=True)
    message = r"model.pt: (a part of this checkpoint is missing or damaged|not a recursive model|model_state_dict does not match)"
    for broken in ({name: value for name, value in content.items() if name != part}, {**content, part: 7}):
        torch.save(broken, saved / "model.pt")
        with pytest.raises(UserError, match=message):
            checkpoint.load(saved / "model.pt")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{"temperature": "hot"}, {"max_new_tokens": [1]}, {"max_length": {}}, {"watermarking_config": 3}])
def test_a_damaged_generation_config(form: str, changes: dict[str, Any], saved: Path) -> None:
    if form == "model":
        (saved / form / "generation_config.json").write_text(json.dumps(changes))
    else:
        edit(saved / form, generation_config=changes)
    with pytest.raises(UserError, match=rf"{saved / form}.*: its generation config is damaged: .+; mend or delete it"):
        checkpoint.load(saved / form)


def test_names_that_are_no_text_and_tensors_that_are_no_weights(saved: Path) -> None:
    state = torch.load(saved / "model.pt", weights_only=True)["model_state_dict"]
    first = next(iter(state))
    for name in (3, None):
        edit(saved / "model.pt", model_state_dict={**state, name: state[first]})
        with pytest.raises(UserError, match="damaged .*model_state_dict must hold tensors by name"):
            checkpoint.load(saved / "model.pt")
    for dtype in (torch.bool, torch.int64, torch.complex64):
        edit(saved / "model.pt", model_state_dict={**state, first: state[first].to(dtype)})
        with pytest.raises(
            UserError, match=rf"model.pt: expected weights of float32, .*got {dtype} in model.embed_tokens.weight; make it again"
        ):
            checkpoint.load(saved / "model.pt")
    edit(saved / "model.pt", model_state_dict={})
    with pytest.raises(UserError, match="does not match its config: .* missing"):
        checkpoint.load(saved / "model.pt")


def test_no_flipped_byte_of_a_pickle_is_a_traceback(saved: Path) -> None:
    """torch's reader of pickles raises whatever error it meets: of `struct`, of indices, of types."""
    path = saved / "model.pt"
    whole = path.read_bytes()
    start = whole.index(b"data.pkl") + 64
    for at in range(start, start + 700, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            checkpoint.load(path)


def test_missing_and_unexpected_tensors_are_named(saved: Path) -> None:
    state = torch.load(saved / "model.pt", weights_only=True)["model_state_dict"]
    lost = {name: tensor for name, tensor in state.items() if name != "inner.coda.layers.0.mlp.w2.weight"}
    edit(saved / "model.pt", model_state_dict={**lost, "inner.L_level.layers.9.mlp.w2.weight": torch.zeros(2)})
    message = r"1 missing \(inner.coda.layers.0.mlp.w2.weight\); 1 left over \(inner.L_level.layers.9.mlp.w2.weight\)"
    with pytest.raises(UserError, match=rf"model.pt: model_state_dict does not match its config: {message}"):
        checkpoint.load(saved / "model.pt")

    tensors = load_file(saved / "model" / "model.safetensors")
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.recursion.H_init"}
    save_file({**lost, "model.extra": torch.zeros(2)}, saved / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model: tensors missing or left over: model.extra, model.recursion.H_init; the weights do not match"
    ):
        checkpoint.load(saved / "model")


def test_paths_without_a_checkpoint_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.pt: no such checkpoint; expected a .pt file or a folder that convert or train wrote"):
        checkpoint.load(tmp_path / "missing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: a folder without config.json"):
        checkpoint.load(tmp_path / "empty")
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=2)
    with pytest.raises(UserError, match=r"donor: not a recursive model \(model_type 'qwen2'\); convert it first"):
        checkpoint.load(tmp_path / "donor")
    weights = saved / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(
        UserError, match=r"model: its weights are missing, truncated or corrupt \(.+\); copy it again or make it again with convert"
    ):
        checkpoint.load(saved / "model")
    weights.unlink()
    with pytest.raises(UserError, match=r"model: its weights are missing"):
        checkpoint.load(saved / "model")
    torch.save({}, saved / "model" / "pytorch_model.bin")  # a pickle is not read instead
    with pytest.raises(UserError, match=r"model: its weights are missing"):
        checkpoint.load(saved / "model")


@pytest.mark.parametrize("content", ["{", '{"plan": 3, "notes": {}}', '{"plan": null}'])
def test_damaged_record_in_a_folder_of_0_1_0_is_refused(content: str, saved: Path) -> None:
    edit_config(saved / "model", conversion=None)
    (saved / "model" / checkpoint.RECORD).write_text(content)
    with pytest.raises(UserError, match=rf"{checkpoint.RECORD}: "):
        checkpoint.load(saved / "model")
    (saved / "model" / checkpoint.RECORD).unlink()
    found = checkpoint.load(saved / "model")
    assert found.plan is None and found.notes == {}


@pytest.mark.parametrize("record", [{"plan": {}}, {"donor": "a/donor", "plan": 3}, {"donor": "a/donor", "plan": {"loop": [1]}}, "text"])
def test_damaged_conversion_record_is_refused(record: Any, saved: Path) -> None:
    edit_config(saved / "model", conversion=record)
    with pytest.raises(UserError, match="model: its config is damaged: conversion: expected .*donor and plan"):
        checkpoint.load(saved / "model")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {"donor_layers": [8]},
        {"donor_layers": 10**12},
        {"donor_layers": -1},
        {"loop": 3},
        {"loop": ["a"]},
        {"coda": [True]},
        {"layer_selection": 3},
    ],
)
def test_a_plan_of_other_types_is_refused(form: str, changes: dict[str, Any], saved: Path) -> None:
    if form == "model":
        plan = json.loads((saved / form / "config.json").read_text())["conversion"]["plan"]
        edit_config(saved / form, conversion={"donor": "a/donor", "plan": {**plan, **changes}})
    else:
        edit(saved / form, plan={**torch.load(saved / form, weights_only=True)["plan"], **changes})
    with pytest.raises(UserError, match=rf"{saved / form}: .*damaged.*{next(iter(changes))}: expected "):
        checkpoint.load(saved / form)


def test_plain_save_pretrained_keeps_plan_and_donor(tmp_path: Path) -> None:
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=4)
    model = convert(str(tmp_path / "donor"), L_layers=2, keep_donor=True)
    model.save_pretrained(tmp_path / "saved")
    found = checkpoint.load(tmp_path / "saved")
    assert found.plan == ConversionPlan(str(tmp_path / "donor"), 4, (0,), (1, 2), (3,), "middle")
    assert found.notes == {name: str(tmp_path / "donor") for name in ("donor", "donor_folder")}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    assert checkpoint.load(tmp_path / "again").plan == found.plan


@pytest.mark.parametrize("form", FORMS)
def test_each_form_stores_the_record_once(form: str, saved: Path, model: RecursiveLLM, tmp_path: Path) -> None:
    """`plan` and `notes` of a .pt file, `conversion` in the config.json of a folder; a later save of the loaded model writes the same."""
    assert model.config.conversion is None  # saving a record does not change the model in memory
    found = checkpoint.load(saved / form)
    checkpoint.save(tmp_path / form, found.model, None)
    for place in (saved, tmp_path):
        if form == "model":
            fields = json.loads((place / form / "config.json").read_text())
            assert fields["conversion"] == {**NOTES, "plan": {name: value for name, value in PLAN.to_dict().items() if name != "donor"}}
            assert not (place / form / checkpoint.RECORD).exists()
        else:
            content = torch.load(place / form, weights_only=True)
            assert (content["plan"], content["notes"]) == (PLAN.to_dict(), NOTES) and "conversion" not in content["config"]


def test_tokenizers(model: RecursiveLLM, saved: Path, tmp_path: Path) -> None:
    assert checkpoint.tokenizer_folder("runs/x.pt") == Path("runs/x_tokenizer")
    assert checkpoint.tokenizer_folder("runs/x.y") == Path("runs/x.y")
    checkpoint.save(tmp_path / "bare.pt", model, None)
    found = checkpoint.load(tmp_path / "bare.pt")
    assert found.tokenizer is None
    with pytest.raises(UserError, match=r"bare.pt: no tokenizer in .*bare_tokenizer; name one with --tokenizer_path"):
        checkpoint.require_tokenizer(found, tmp_path / "bare.pt")
    found = checkpoint.load(tmp_path / "bare.pt", tokenizer_path=str(saved / "model_tokenizer"))
    assert checkpoint.require_tokenizer(found, "bare.pt").eos_token_id == 0


def other_tokenizer() -> Any:
    """A tokenizer with other ids for the same text."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["lobster"])
    return tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_tokenizer_path_overrides_the_checkpoints_tokenizer(form: str, model: RecursiveLLM, saved: Path, tmp_path: Path) -> None:
    other_tokenizer().save_pretrained(tmp_path / "other")
    own, named = checkpoint.load(saved / form), checkpoint.load(saved / form, tokenizer_path=str(tmp_path / "other"))
    assert len(named.tokenizer) == len(own.tokenizer) + 1
    assert checkpoint.require_tokenizer(own, "x") is own.tokenizer
    checkpoint.save(tmp_path / form, model, None, PLAN, NOTES)
    bare = checkpoint.load(tmp_path / form)
    assert (bare.tokenizer, bare.plan, bare.notes) == (None, PLAN, NOTES)


@pytest.mark.parametrize("form", FORMS)
def test_embedding_model_has_no_head(form: str, model: RecursiveLLM, saved: Path) -> None:
    checkpoint.require_head(checkpoint.load(saved / form), "x")
    checkpoint.save(saved / form, model, None, None, {"approach": "embedding"})
    with pytest.raises(UserError, match=r"x: was trained in embedding space"):
        checkpoint.require_head(checkpoint.load(saved / form), "x")


@pytest.mark.parametrize("form", FORMS)
def test_local_paths_are_not_saved(form: str, saved: Path, tmp_path: Path) -> None:
    found = checkpoint.load(saved / form)
    found.model.config._name_or_path = str(saved)
    checkpoint.save(tmp_path / form, found.model, None, dtype=torch.float16)
    if form == "model":
        fields = json.loads((tmp_path / "model" / "config.json").read_text())
    else:
        fields = torch.load(tmp_path / "model.pt", weights_only=True)["config"]
    assert str(saved) not in json.dumps(fields) and "_name_or_path" not in fields
    assert (fields["dtype"], fields["architectures"]) == ("float16", ["RecursiveQwen2ForCausalLM"])


def test_architecture_is_saved_for_a_new_model(model: RecursiveLLM, saved: Path) -> None:
    assert not make_model().config.architectures
    checkpoint.save(saved / "fresh.pt", make_model(), None)
    assert torch.load(saved / "fresh.pt", weights_only=True)["config"]["architectures"] == ["RecursiveQwen2ForCausalLM"]


def test_a_tied_head_is_stored_once_in_another_dtype_too(saved: Path, model: RecursiveLLM) -> None:
    checkpoint.save(saved / "half.pt", model, None, dtype=torch.bfloat16)
    state = torch.load(saved / "half.pt", weights_only=True)["model_state_dict"]
    assert state["inner.lm_head.weight"].data_ptr() == state["inner.embed_tokens.weight"].data_ptr()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_only_recursion_parameters_may_be_missing(model: RecursiveLLM) -> None:
    state = _as(model, torch.float32)
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("model.recursion.")}
    built = checkpoint.build(model.config, bare, "place")
    assert not built.training and torch.equal(logits(built, H_cycles=0), logits(model, H_cycles=0))
    assert checkpoint.build(model.config, bare, "place", torch.bfloat16).dtype == torch.bfloat16
    assert checkpoint.build(model.config, _as(model, torch.float16), "place").dtype == torch.float16
    for lost in ("model.norm.weight", "model.layers.3.self_attn.k_proj.bias"):
        with pytest.raises(UserError, match=f"place: tensors missing or left over: {lost}; the weights do not match their config"):
            checkpoint.build(model.config, {name: tensor for name, tensor in bare.items() if name != lost}, "place")
    with pytest.raises(UserError, match="place: tensors missing or left over: model.recursion.extra; the weights"):
        checkpoint.build(model.config, {**state, "model.recursion.extra": torch.zeros(1)}, "place")


@pytest.mark.parametrize(("wrong", "more"), [(1, ""), (3, ""), (4, " and 1 more"), (5, " and 2 more")])
def test_shape_mismatches_are_named_up_to_three(wrong: int, more: str, model: RecursiveLLM) -> None:
    state = _as(model, torch.float32)
    state |= {f"model.layers.{i}.input_layernorm.weight": torch.zeros(7) for i in range(wrong)}
    named = r"model\.layers\.\d\.input_layernorm\.weight \(expected \[32\], got \[7\]\)"
    with pytest.raises(UserError, match=rf"place: shape mismatch [\w ]+: {', '.join([named] * min(3, wrong))}{more}; one of the two"):
        checkpoint.build(model.config, state, "place")


def test_transformers_verbosity_is_restored(saved: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        for level, bars in ((transformers_logging.INFO, True), (transformers_logging.WARNING, False)):
            transformers_logging.set_verbosity(level)
            (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
            with checkpoint.quiet():
                assert transformers_logging.get_verbosity() == transformers_logging.ERROR
                assert not transformers_logging.is_progress_bar_enabled()
            assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, bars)
            with pytest.raises(KeyError), checkpoint.quiet():
                raise KeyError
            assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, bars)
    finally:
        transformers_logging.set_verbosity(before[0])
        (transformers_logging.enable_progress_bar if before[1] else transformers_logging.disable_progress_bar)()


# --- Writing ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_overwriting_replaces_the_old_checkpoint(form: str, model: RecursiveLLM, saved: Path) -> None:
    before = set(listing(saved))
    held = checkpoint.load(saved / form).model  # reads the old file while it is replaced
    expected = logits(held)
    other = make_model(H_cycles=4)
    checkpoint.save(saved / form, other, make_tiny_tokenizer(), None, {"second": True})
    found = checkpoint.load(saved / form)
    assert (found.model.config.H_cycles, found.plan, found.notes) == (4, None, {"second": True})
    assert set(listing(saved)) == before
    assert torch.equal(logits(held), expected)
    checkpoint.save(saved / form, found.model, None)  # and to the file that it was read from
    assert torch.equal(logits(checkpoint.load(saved / form).model), logits(other))


def test_foreign_files_in_a_folder_are_kept(model: RecursiveLLM, saved: Path) -> None:
    folder = saved / "model"
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of an older save")
    checkpoint.save(folder, model, make_tiny_tokenizer(), None)
    assert (folder / ".git" / "HEAD").read_text() == "ref" and (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    checkpoint.load(folder)


def test_only_tokenizer_files_are_replaced_beside_a_pt_file(model: RecursiveLLM, saved: Path) -> None:
    folder = saved / "model_tokenizer"
    for name in ("notes.json", "README.md", "script.py", "chat_template.jinja"):
        (folder / name).write_text("mine")
    checkpoint.save(saved / "model.pt", model, make_tiny_tokenizer(), None)
    assert all((folder / name).read_text() == "mine" for name in ("notes.json", "README.md", "script.py"))
    assert not (folder / "chat_template.jinja").exists()  # of an older tokenizer, would be read with the new one
    assert checkpoint.load(saved / "model.pt").tokenizer("the old ship")["input_ids"]


def test_files_of_an_older_tokenizer_are_removed(model: RecursiveLLM, saved: Path) -> None:
    folder = saved / "model_tokenizer"
    stale = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")
    written = {path.name for path in folder.iterdir()}
    for name in stale:
        (folder / name).write_text("stale")
    (folder / "tokenizer.json").write_text("stale")
    (folder / "tokenizer_config.json").write_text("stale")
    checkpoint.save(saved / "model.pt", model, other_tokenizer())
    assert {path.name for path in folder.iterdir()} == written >= {"tokenizer.json", "tokenizer_config.json"}
    assert len(checkpoint.load(saved / "model.pt").tokenizer) == len(other_tokenizer()) > len(make_tiny_tokenizer())


def test_files_of_an_older_save_are_removed(model: RecursiveLLM, saved: Path) -> None:
    folder = saved / "model"
    ours = ("old.json", "old.py", "old.md", "old.jinja", "old.safetensors", PLAN_PICTURE, LOSS_PICTURE)
    others = ("photo.svg", "data.bin", "old.txt", "results.json/one.json")
    (folder / "results.json").mkdir()
    for name in (*ours, *others):
        (folder / name).write_text("of somebody")
    checkpoint.save(folder, model, other_tokenizer(), None, {"second": True})
    assert not [name for name in ours if (folder / name).exists() and (folder / name).read_text() == "of somebody"]
    assert not [name for name in ours if name.startswith("old") and (folder / name).exists()]
    assert [(folder / name).read_text() for name in others] == ["of somebody"] * len(others)
    assert len(checkpoint.load(folder).tokenizer) == len(other_tokenizer())
    assert sorted(path.name for path in saved.iterdir()) == ["model", "model.pt", "model_tokenizer"]


def test_new_files_override_foreign_files_of_the_same_name(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        for name in ("config.json", "merges.txt"):
            (folder / name).write_text("new")

    (tmp_path / "out").mkdir()
    for name in ("config.json", "merges.txt", "own.txt"):
        (tmp_path / "out" / name).write_text("old")
    write_atomic({tmp_path / "out": write}, {tmp_path / "out": checkpoint.is_replaced})
    assert listing(tmp_path / "out") == {"config.json": b"new", "merges.txt": b"new", "own.txt": b"old"}


@pytest.mark.parametrize("form", FORMS)
def test_failed_approval_changes_nothing(form: str, model: RecursiveLLM, saved: Path) -> None:
    """It is called when everything is written and nothing is renamed."""
    before, beside = listing(saved), saved / "state.pt"
    seen: list[bool] = []

    def refuse() -> None:
        (aside,) = saved.glob(".recursify-*")
        seen.append((aside / form).exists() and (aside / "state.pt").read_text() == "state" and not beside.exists())
        seen.append({name: content for name, content in listing(saved).items() if not name.startswith(".recursify")} == before)
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        checkpoint.save(
            saved / form, make_model(H_cycles=4), other_tokenizer(), beside={beside: lambda path: path.write_text("state")}, approve=refuse
        )
    assert seen == [True, True] and listing(saved) == before
    assert sorted(path.name for path in saved.iterdir()) == ["model", "model.pt", "model_tokenizer"]


@pytest.mark.parametrize("form", FORMS)
def test_beside_files_are_renamed_last_after_fsync(form: str, model: RecursiveLLM, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, synced = list[str](), set[int]()
    moves, fsync = {name: getattr(Path, name) for name in ("rename", "replace")}, os.fsync

    def renamed(self: Path, target: Path, move: str) -> Path:
        if ".recursify-" not in str(target):
            moved.append(Path(target).name)
            files = [self] if self.is_file() else [*self.rglob("*")]
            assert {self.stat().st_ino, *(file.stat().st_ino for file in files)} <= synced, "renamed before it was on the disk"
        return moves[move](self, target)

    def noted(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    for move in moves:
        monkeypatch.setattr(Path, move, partialmethod(renamed, move=move))
    monkeypatch.setattr(os, "fsync", noted)
    (saved / "state.pt").write_text("old")
    checkpoint.save(
        saved / form, make_model(H_cycles=4), other_tokenizer(), beside={saved / "state.pt": lambda path: path.write_text("new")}
    )
    assert moved == (["model_tokenizer", "model.pt", "state.pt"] if form == "model.pt" else ["model", "state.pt"])
    assert saved.stat().st_ino in synced and (saved / "state.pt").read_text() == "new"
    checkpoint.load(saved / form)


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_write_is_cleared_away_by_the_next(form: str, model: RecursiveLLM, saved: Path) -> None:
    before = {path.name for path in saved.iterdir()}
    if not (pid := os.fork()):
        try:
            checkpoint.save(saved / form, model, other_tokenizer(), approve=lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (left,) = {path.name for path in saved.iterdir()} - before
    assert left.startswith(".recursify-") and (saved / left / form).exists()
    checkpoint.save(saved / form, model, other_tokenizer())
    assert {path.name for path in saved.iterdir()} == before


def test_identical_folder_is_not_replaced(model: RecursiveLLM, saved: Path) -> None:
    folder = saved / "model_tokenizer"
    before = folder.stat().st_ino
    (folder / "notes.txt").write_text("mine")
    checkpoint.save(saved / "model.pt", model, make_tiny_tokenizer())
    assert folder.stat().st_ino == before and (folder / "notes.txt").read_text() == "mine"
    file = folder / "tokenizer.json"
    was, size = file.read_text(), file.stat().st_size
    file.write_text(was.replace("lob", "bol"))
    assert file.read_text() != was and file.stat().st_size == size  # contents are compared, not sizes
    checkpoint.save(saved / "model.pt", model, make_tiny_tokenizer())
    assert file.read_text() == was and (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        *[(OSError(code, "x"), "the disk is full") for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)],
        (OSError(errno.EIO, "x"), "Input/output error"),
        (RuntimeError("while it was written: (os error 28)"), "the disk is full"),
        (RuntimeError("while it was written: (os error 13)"), "Permission denied"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk is full"),
        (RuntimeError("something else"), None),
        (ValueError("something else"), None),
    ],
)
def test_reasons_of_write_errors(
    error: Exception, message: str | None, model: RecursiveLLM, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    before = listing(saved)
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(type(error) if message is None else UserError, match=message or "something else"):
        checkpoint.save(saved / "model.pt", model, other_tokenizer())

    def broken_while_closing(*args: Any, **kwargs: Any) -> None:
        try:
            raise error
        finally:
            raise RuntimeError("while closing")

    monkeypatch.setattr(torch, "save", broken_while_closing)
    hidden = message is None or "container" in str(error)  # the message of torch's writer is only matched in the last error
    with pytest.raises(RuntimeError if hidden else UserError, match="while closing" if hidden else message):
        checkpoint.save(saved / "model.pt", model, other_tokenizer())
    assert listing(saved) == before
    assert sorted(path.name for path in saved.iterdir()) == ["model", "model.pt", "model_tokenizer"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [500, 64_000])
def test_a_full_disk_changes_nothing(form: str, limit: int, model: RecursiveLLM, saved: Path) -> None:
    """A file size limit simulates a full disk: 500 bytes stop the tokenizer, 64,000 the weights."""
    before = listing(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            UserError, match=rf"{form}: could not be written: the disk is full \(\d+ MB free in .*saved\); nothing was changed"
        ):
            checkpoint.save(saved / form, model, make_tiny_tokenizer(), None, {"second": True})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(saved) == before
    assert sorted(path.name for path in saved.iterdir()) == ["model", "model.pt", "model_tokenizer"]


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupt_while_writing_changes_nothing(form: str, model: RecursiveLLM, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(saved)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    monkeypatch.setattr(type(model), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved / form, model, make_tiny_tokenizer())
    assert listing(saved) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_rename_that_fails_changes_nothing(form: str, model: RecursiveLLM, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, moves = listing(saved), {name: getattr(Path, name) for name in ("rename", "replace")}

    def stubborn(self: Path, target: Path, move: str) -> Path:
        if target == saved / form and self.name == form:
            raise PermissionError(13, "Permission denied")
        return moves[move](self, target)

    for move in moves:
        monkeypatch.setattr(Path, move, partialmethod(stubborn, move=move))
    with pytest.raises(UserError, match=r"could not be written: Permission denied"):
        checkpoint.save(saved / form, model, None)
    assert listing(saved) == before


def test_invalid_output_paths_are_refused(model: RecursiveLLM, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "taken_tokenizer").write_text("mine")
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=2)
    before = listing(tmp_path)
    for path, message in {
        "missing/x.pt": r"missing/x.pt: the folder .*/missing does not exist; make it first \(mkdir -p .*/missing\)",
        "missing/x": "the folder .*/missing does not exist",
        "file/x.pt": "the folder .*/file does not exist",
        "folder.pt": "folder.pt: is a folder; expected the name of a .pt file",
        "file": "file: is a file; expected a new folder, or a name that ends in .pt",
        "taken.pt": "taken_tokenizer: is a file, where the tokenizer of taken.pt goes; move it away, or choose another output path",
        "full": "full: is a folder with other things in it; expected a new or empty one, or one that holds a recursive model",
        "donor": "donor: is a folder with other things in it",
        "": "is the folder you are in, or one above it",
        ".": "is the folder you are in, or one above it",
        "full/..": "is the folder you are in, or one above it",
        "..": "is the folder you are in, or one above it",
        "x" * 300 + ".pt": "cannot write in .*name too long",
        "/proc/x.pt": "/proc/x.pt: cannot write in /proc",
    }.items():
        for call in (checkpoint.check_writable, lambda path: checkpoint.save(path, model, None)):
            with pytest.raises(UserError, match=f"(?s){message}"):
                call(path)
    assert listing(tmp_path) == before
    (tmp_path / "new").mkdir()
    for path in ("new", "new.pt", "saved/model", saved / "model.pt"):
        checkpoint.check_writable(path)
    assert listing(tmp_path) == before


def test_the_folder_form_is_what_the_hub_expects(model: RecursiveLLM, saved: Path, tmp_path: Path) -> None:
    names = {path.name for path in (saved / "model").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert {"modeling_recursive_llm.py", "configuration_recursive_llm.py"} <= names
    fields = json.loads((saved / "model" / "config.json").read_text())
    assert fields["conversion"]["donor"] == "a/donor"
    assert fields["architectures"] == ["RecursiveQwen2ForCausalLM"] and fields["auto_map"].keys() >= {
        "AutoConfig",
        "AutoModelForCausalLM",
        "AutoModel",
    }
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved / "model")), logits(model))
    assert AutoTokenizer.from_pretrained(saved / "model").eos_token_id == 0
    card = (saved / "model" / "README.md").read_text()
    assert card.startswith("---\n") and "base_model: a/donor\n" in card and "| L_level | 3, 4, 5 |" in card
    checkpoint.save(tmp_path / "here", model, None, ConversionPlan(str(tmp_path), 8, (), (0,), (), "first"))
    assert "base_model" not in (tmp_path / "here" / "README.md").read_text()


def test_the_folder_form_loads_where_recursify_is_not_installed(saved: Path, model: RecursiveLLM, tmp_path: Path) -> None:
    torch.save(logits(model), tmp_path / "expected")
    script = f"""
import sys
sys.modules["recursify"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(saved / "model")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert tokenizer("the old ship")["input_ids"]
ids = torch.randint(384, (2, 11), generator=torch.Generator().manual_seed(0))
torch.set_num_threads({torch.get_num_threads()})
with torch.no_grad():
    assert torch.equal(model(ids, use_cache=False).logits, torch.load({str(tmp_path / "expected")!r}))
print(type(model).__module__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("transformers_modules")


def test_whatever_a_donors_generation_config_holds_is_read_back(tmp_path: Path) -> None:
    """Such as a watermark, which is an object of transformers in memory: a `.pt` file holds JSON types only."""
    donor = tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=4)
    fields = {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 3.0}, "eos_token_id": [0, 3], "sequence_bias": [[[5], 1.5]]}
    (tmp_path / "donor" / "generation_config.json").write_text(json.dumps(fields))
    model = convert(str(tmp_path / "donor"), L_layers=2)
    for form in ("m.pt", "m"):
        checkpoint.save(tmp_path / form, model, None)
        found = checkpoint.load(tmp_path / form).model.generation_config
        assert found.watermarking_config.bias == 3.0 and found.eos_token_id == [0, 3]
    assert donor is not None

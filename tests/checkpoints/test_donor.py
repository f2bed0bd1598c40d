"""Donors: opening, refusal by feature before a tensor is read, and reading tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from recursify.checkpoints import donor as donor_module
from recursify.checkpoints import tokenizer as tokenizer_module
from recursify.checkpoints.donor import donor_tokenizer, open_donor
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.conversion.convert import convert
from recursify.conversion.convert import run as run_convert
from recursify.conversion.settings import ConvertSettings
from recursify.errors import UserError
from tests.support.hub_stand_in import HubStandIn
from tests.support.tiny import END_OF_TEXT, FAMILIES, make_tiny_tokenizer, tiny_config, tiny_donor, tiny_model

SUPPORTED = r"Supported: qwen2, qwen3, llama, mistral, smollm3, olmo2, phi3 \(Qwen2.5 is qwen2\)"


def write_config(folder: Path, **fields: Any) -> str:
    """A donor folder whose weights cannot be read: a folder in place of the file."""
    (folder / "model.safetensors").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def shard(donor: Path, folder: Path, **files: str) -> Path:
    """`donor` again, with the tensors whose name starts with a key of `files` in a shard of their own."""
    folder.mkdir()
    for file in donor.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(donor / "model.safetensors").items():
        file = next((file for prefix, file in files.items() if name.startswith(f"model.layers.{prefix[1:]}.")), "rest.safetensors")
        shards.setdefault(file, {})[name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    where = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 of 8 layers. Read only."""
    folder = tmp_path_factory.mktemp("eight")
    tiny_donor("qwen2", folder, num_hidden_layers=8)
    return folder


@pytest.fixture
def broken(eight: Path, tmp_path: Path) -> Path:
    """A copy of `eight` for a test to break."""
    return Path(shutil.copytree(eight, tmp_path / "broken"))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "gemma2", "gpt2", "gemma", "cohere", "gpt_oss", "deepseek_v3"])
def test_models_with_unsupported_features_are_refused(model_type: str, tmp_path: Path) -> None:
    feature = {
        "qwen2_moe": r"mixture of experts \(config.json: num_experts = 60\)",
        "qwen3_moe": r"mixture of experts \(config.json: num_local_experts = 128\)",
        "mixtral": r"mixture of experts \(config.json: num_local_experts = 8\)",
        "gpt_oss": r"mixture of experts \(config.json: num_local_experts = 128\)",
        "deepseek_v3": r"mixture of experts \(config.json: n_routed_experts = 256\)",
        "gemma2": r"soft-capping \(config.json: \w+_logit_softcapping = [35]0.0\)",
        "cohere": r"a multiplier in its own forward \(config.json: logit_scale = 0.0625\)",
    }.get(model_type, rf"this model type is not supported \(config.json: model_type = '{model_type}'\)")
    folder = write_config(tmp_path / "donor", **AutoConfig.for_model(model_type).to_dict())
    with pytest.raises(UserError, match=rf"{folder}: .*{feature}.*{SUPPORTED}"):
        open_donor(folder)


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r'quantised weights \(config.json: quantization_config = \{"quant_met',
        ),
        (
            {"model_type": "granite", "embedding_multiplier": 12.0},
            r"a multiplier in its own forward \(config.json: embedding_multiplier = 12",
        ),
        ({"model_type": "granite", "residual_multiplier": 0.22}, r"residual_multiplier = 0.22"),
        ({"model_type": "granite", "logits_scaling": 8.0}, r"logits_scaling = 8.0"),
        ({"num_experts": 8}, r"mixture of experts \(config.json: num_experts = 8\)"),
        ({"final_logit_softcapping": 30.0}, r"soft-capping \(config.json: final_logit_softcapping = 30.0\)"),
        ({"model_type": "recursive_qwen2"}, r"it is a recursive model already \(config.json: model_type = 'recursive_qwen2'\)"),
        ({"model_type": None}, r"this model type is not supported \(config.json: model_type = None\)"),
    ],
)
def test_features_are_refused_by_field_before_any_tensor_is_read(fields: dict[str, Any], feature: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "donor", **{"model_type": "qwen2", **fields})
    with pytest.raises(UserError, match=rf"{feature}.*{SUPPORTED}"):
        open_donor(folder)


REFUSED = {
    "quantization_config": "quantised weights",
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "mixture of experts"),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), "a multiplier in its own forward"),
    **dict.fromkeys(("logits_scaling", "logit_scale", "scale_emb"), "a multiplier in its own forward"),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), "soft-capping"),
    "per_layer_config": "layers of different shapes",
    "num_kv_shared_layers": "keys and values shared between layers",
}


@pytest.mark.parametrize("field", REFUSED)
def test_each_unsupported_feature_is_refused(field: str, tmp_path: Path) -> None:
    for number, value in enumerate(({"a": 1}, [1], 2, 0.5, True)):
        folder = write_config(tmp_path / f"on{number}", model_type="qwen2", **{field: value})
        with pytest.raises(UserError, match=rf"has {REFUSED[field]} \(config.json: {field} = .*, which is not carried over\. {SUPPORTED}"):
            open_donor(folder)


@pytest.mark.parametrize("value", [{}, [], 0, 0.0, False, None])
def test_disabled_features_are_accepted(value: Any, tmp_path: Path) -> None:
    config = tiny_config("qwen2", num_hidden_layers=2).to_dict()
    read_by_transformers = ("quantization_config", "per_layer_config")
    folder = write_config(tmp_path / "off", **config | {field: value for field in REFUSED if field not in read_by_transformers})
    assert open_donor(folder).config.num_hidden_layers == 2


def test_a_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    long = {"quant_method": "gptq", "modules": ["x" * 40, "y" * 40]}
    folder = write_config(tmp_path / "donor", model_type="qwen2", quantization_config=long)
    with pytest.raises(UserError, match=rf"quantization_config = {re.escape(json.dumps(long)[:57])}\.\.\.\)"):
        open_donor(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_opening_changes_nothing_in_the_configuration(family: str, tmp_path: Path) -> None:
    fields = tiny_config(family, num_hidden_layers=2).to_dict()
    for number, dtype in enumerate((None, "bfloat16")):
        folder = write_config(tmp_path / f"donor{number}", **fields | {"dtype": dtype})
        found, expected = open_donor(folder).config, AutoConfig.from_pretrained(folder)
        assert vars(found) == vars(expected) and found.model_type == family


def test_disabled_feature_is_accepted(broken: Path) -> None:
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({**fields, "num_experts": 0, "quantization_config": None, "final_logit_softcapping": None})
    )
    assert open_donor(str(broken)).config.num_hidden_layers == 8


def test_recursive_checkpoint_is_refused_as_donor(eight: Path, tmp_path: Path) -> None:
    run_convert(ConvertSettings(qwen_model=str(eight), output_path=str(tmp_path / "ours")), say=lambda _: None)
    with pytest.raises(UserError, match=r"it is a recursive model already"):
        open_donor(str(tmp_path / "ours"))


@pytest.mark.parametrize("fields", [{"temperature": "hot"}, {"top_k": []}])
def test_a_damaged_generation_config(fields: dict[str, Any], broken: Path) -> None:
    (broken / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"generation_config.json: its generation config is damaged: .+; mend or delete it"):
        open_donor(str(broken)).generation_config()


@pytest.mark.parametrize("family", FAMILIES)
def test_opening_reads_config_json_only(family: str, tmp_path: Path) -> None:
    config = tiny_model(family, num_hidden_layers=2).config
    donor = open_donor(write_config(tmp_path / "donor", **config.to_dict()))
    assert donor.config.to_dict() == config.to_dict() | {"_name_or_path": donor.config._name_or_path} or donor.config.model_type == family


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: is not JSON"),
        ("", "config.json: is not JSON"),
        ("\xff", "config.json: is not JSON"),
        ('{"a": ' + "[" * 200_000, "config.json: is not JSON .*nested"),
        ("[1, 2]", r"config.json: expected a JSON object, got \[1, 2\]"),
        ('{"hidden_size": 32}', "model_type = None"),
        (
            '{"model_type": "qwen2", "num_hidden_layers": "x"}',
            "config.json is not a valid qwen2 configuration: .*num_hidden_layers.*expected int",
        ),
        ('{"model_type": "qwen2", "hidden_size": null}', "config.json is not a valid qwen2 configuration: .*hidden_size"),
    ],
)
def test_a_damaged_config(content: str, message: str, broken: Path) -> None:
    (broken / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=message):
        open_donor(str(broken))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "zzz"}, "KeyError: 'zzz'"),
        ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, ".*bogus"),
        ({"rope_parameters": {"rope_type": "bogus"}}, ".*"),
        ({"num_attention_heads": 0}, "ZeroDivisionError: .*"),
        ({"dtype": "bogus"}, ".*bogus"),
        ({"layer_types": ["chunked_attention"] * 8}, "block_types: expected full_attention or sliding_attention .*, got chunked"),
    ],
)
def test_config_that_cannot_be_built_is_refused(fields: dict[str, Any], reason: str, broken: Path) -> None:
    (broken / "config.json").write_text(json.dumps({**json.loads((broken / "config.json").read_text()), **fields}))
    with pytest.raises(UserError, match=rf"broken: config.json is not a valid qwen2 configuration: {reason}.*; download or copy it again"):
        open_donor(str(broken))


def test_a_donor_tensor_of_another_shape_is_named(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(7)}, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"broken: shape mismatch .*: model.norm.weight \(expected \[32\], got \[7\]\); one of the two"):
        convert(str(broken))


def test_paths_without_a_donor_are_refused(eight: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"/missing': no such folder, and no hub id, .*; expected a folder with config.json and \*.safetensors, or a hub id"
    ):
        open_donor(str(tmp_path / "missing"))
    for name in ("./missing/donor", "~/donor", "", "a/b/c", "donor"):
        with pytest.raises(UserError, match=r"no such folder"):
            open_donor(name)
    with pytest.raises(UserError, match=r"config.json: expected a hub id or a folder with config.json and \*.safetensors, got a file"):
        open_donor(str(eight / "config.json"))
    with pytest.raises(UserError, match=r"a folder without config.json \(it holds nothing\)"):
        open_donor(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"a folder without config.json \(it holds model.safetensors\); name the folder that has it"):
        open_donor(str(tmp_path))


def test_weights_as_pickles_and_no_weights(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"no model.safetensors and no model.safetensors.index.json; expected a donor with its weights as safete"
    ):
        convert(str(broken))
    torch.save(tensors, broken / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r'has pytorch_model.bin only, a pickle .* Convert it once: .*from_pretrained\(".*"\).save_pretrained'
    ):
        convert(str(broken))


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_weights(keep: int, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"broken/model.safetensors: truncated or corrupt safetensors \(.+\); download or copy it again"):
        convert(str(broken))
    with pytest.raises(UserError, match=r"broken: transformers cannot load it \(.+\)"):
        open_donor(str(broken)).load()


def test_corrupt_weights(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 988097824\n")
    with pytest.raises(UserError, match=r"truncated or corrupt safetensors"):
        convert(str(broken))


def test_weights_of_another_shape_than_the_config_says(broken: Path) -> None:
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**fields, "intermediate_size": 96}))
    with pytest.raises(UserError, match=r"broken: .*mismatch .*mlp.down_proj.weight \(expected \[32, 96\], got \[32, 64\]\)"):
        convert(str(broken))


def test_more_layers_in_the_file_than_the_config_says(broken: Path) -> None:
    fields = json.loads((broken / "config.json").read_text())
    del fields["layer_types"]
    (broken / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 6}))
    with pytest.raises(UserError, match=r"unmapped tensors: 24 left over \(model.layers.6"):
        convert(str(broken))


def test_undeclared_eight_bit_tensors_are_refused(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"quantised weights \(model.layers.0.mlp.up_proj.weight is torch.float8_e4m3fn\)"):
        convert(str(broken))


def test_donor_with_non_finite_weights_is_refused(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"its layers \[0, 3, 5, 7\] give logits that are not finite"):
        convert(str(broken))


def test_tensors_are_read_unchanged(eight: Path) -> None:
    donor, tensors = open_donor(str(eight)), load_file(eight / "model.safetensors")
    assert sorted(donor.tensor_names) == sorted(tensors) and "lm_head.weight" not in tensors
    assert all(torch.equal(donor.read(name), tensor) for name, tensor in tensors.items())
    assert donor.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_read_whole_and_in_pieces(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"one": torch.randn(3, 7, dtype=dtype), "two": torch.randn(40, dtype=dtype), "three": torch.randn(1, dtype=dtype)}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen2", num_hidden_layers=2).to_dict() | {"dtype": None}))
    save_file(tensors, tmp_path / "model.safetensors")
    donor = open_donor(str(tmp_path))
    assert donor.dtype == dtype
    for size in (8, 40, 56, 2**22):
        monkeypatch.setattr(donor_module, "_PIECE", size)
        for name, tensor in tensors.items():
            assert torch.equal(donor.read(name), tensor)
            pieces = [piece.clone() for piece in donor.pieces(name)]  # each piece reuses the memory of the previous one
            assert torch.equal(torch.cat(pieces), tensor.flatten()) and max(piece.nbytes for piece in pieces) <= size
            assert size > 56 or name != "two" or len(pieces) > 1


def test_writing_to_a_read_tensor_does_not_change_the_file(broken: Path) -> None:
    before = (broken / "model.safetensors").read_bytes()
    model = convert(str(broken))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert (broken / "model.safetensors").read_bytes() == before


def test_dtype_is_what_transformers_would_load(broken: Path) -> None:
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**fields, "dtype": "bfloat16"}))
    donor = open_donor(str(broken))
    assert donor.dtype == donor.load().dtype == convert(str(broken)).dtype == torch.bfloat16
    del fields["dtype"]
    save_file({name: t.to(torch.float16) for name, t in load_file(broken / "model.safetensors").items()}, broken / "model.safetensors")
    (broken / "config.json").write_text(json.dumps(fields))
    donor = open_donor(str(broken))
    assert donor.dtype == donor.load().dtype == convert(str(broken)).dtype == torch.float16


def test_shards_without_a_wanted_tensor_are_never_opened(eight: Path, tmp_path: Path) -> None:
    folder = shard(eight, tmp_path / "sharded", L1="one.safetensors", L2="two.safetensors", L3="three.safetensors")
    (folder / "one.safetensors").unlink()
    (folder / "two.safetensors").write_bytes(b"not safetensors")
    model = convert(str(folder), L_layers=4)  # 0, 3, 5, 7
    assert all(
        torch.equal(a, b) for a, b in zip(model.model.layers.parameters(), convert(str(eight)).model.layers.parameters(), strict=True)
    )
    with pytest.raises(UserError, match=r"sharded: one.safetensors is not there; download or copy the donor again"):
        convert(str(folder), layer_selection="stride", L_layers=8)
    with pytest.raises(UserError, match=r"sharded/two.safetensors: truncated or corrupt safetensors"):
        convert(str(folder), L_layers=1, layer_selection="first", coda_layers=6)  # 0 and 2 to 7


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": {}}'])
def test_a_damaged_index(content: str, eight: Path, tmp_path: Path) -> None:
    folder = shard(eight, tmp_path / "sharded")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model.safetensors.index.json: (is not JSON|expected )"):
        convert(str(folder))


def test_wrong_index_is_refused(eight: Path, tmp_path: Path) -> None:
    folder = shard(eight, tmp_path / "sharded", L0="zero.safetensors")
    save_file({"other": torch.zeros(1)}, folder / "zero.safetensors")
    with pytest.raises(UserError, match=r"zero.safetensors: truncated or corrupt safetensors .*does not contain"):
        convert(str(folder))


def test_from_the_hub_only_needed_shards_are_fetched(eight: Path, tmp_path: Path, hub: HubStandIn) -> None:
    hub.add_model("someone/donor", shard(eight, tmp_path / "sharded", L1="one.safetensors", L2="two.safetensors", L3="three.safetensors"))
    open_donor("someone/donor")
    assert hub.opened("someone/donor") == ["config.json"]
    model = convert("someone/donor", L_layers=4)
    fetched = [file for file in hub.opened("someone/donor") if "safetensors" in file]
    assert sorted(fetched) == ["model.safetensors.index.json", "rest.safetensors", "three.safetensors"]
    assert torch.equal(model.lm_head.weight, convert(str(eight)).lm_head.weight)


def test_refused_hub_donor_downloads_config_only(tmp_path: Path, hub: HubStandIn) -> None:
    tiny_donor("qwen2", tmp_path, num_hidden_layers=2)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_experts": 4}))
    hub.add_model("someone/moe", tmp_path)
    with pytest.raises(UserError, match=r"someone/moe: has mixture of experts"):
        convert("someone/moe")
    assert hub.opened("someone/moe") == ["config.json"]


def test_from_the_hub_pickles_are_not_fetched(eight: Path, tmp_path: Path, hub: HubStandIn) -> None:
    shutil.copy(eight / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add_model("someone/pickled", tmp_path)
    with pytest.raises(UserError, match=r"someone/pickled: has pytorch_model.bin only"):
        convert("someone/pickled")
    assert hub.opened("someone/pickled") == ["config.json"]


def test_missing_hub_repository_and_unreachable_hub(eight: Path, hub: HubStandIn) -> None:
    with pytest.raises(UserError, match=r"no/such: no such folder, and the hub has no config.json for it or cannot be reached"):
        open_donor("no/such")
    with pytest.raises(UserError, match=r"no/such: tokenizer.json cannot be fetched from the hub .*--tokenizer_path"):
        load_tokenizer("no/such")
    hub.add_model("someone/soon-down", eight)
    donor = open_donor("someone/soon-down")
    hub.down = True
    with pytest.raises(
        UserError, match=r"someone/soon-down: model.safetensors cannot be fetched from the hub .*; check the id and the network"
    ):
        _ = donor.tensor_names
    with pytest.raises(UserError, match=r"someone/never-seen: no such folder, and the hub .* cannot be reached"):
        open_donor("someone/never-seen")


def test_cached_donor_works_offline(eight: Path, hub: HubStandIn) -> None:
    hub.add_model("someone/cached", eight)
    open_donor("someone/cached").load()
    hub.down = True
    assert convert("someone/cached").config.vocab_size == 384


def test_tokenizers(eight: Path, broken: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(eight))("the old ship")["input_ids"] == make_tiny_tokenizer()("the old ship")["input_ids"]
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"broken: its tokenizer cannot be loaded \(.+\); name a folder that has one with --tokenizer_path"):
        load_tokenizer(str(broken))
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unheard of"}}')
    with pytest.raises(UserError, match=r"broken: its tokenizer cannot be loaded"):
        load_tokenizer(str(broken))
    # from config.json alone, transformers would make a tokenizer of one entry without a warning
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"broken: tokenizer.json is not there; .* --tokenizer_path"):
        load_tokenizer(str(broken))
    with pytest.raises(UserError, match=r"no such folder, .*; expected a folder with a tokenizer"):
        load_tokenizer(str(tmp_path / "missing"))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model"])
def test_vocabulary_files(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(tokenizer_module.AutoTokenizer, "from_pretrained", lambda name, **hub: read.append(name) or make_tiny_tokenizer())
    with pytest.raises(UserError, match=r"tokenizer.json is not there; .*--tokenizer_path"):
        load_tokenizer(str(tmp_path))
    (tmp_path / file).write_text("of its own kind")
    assert load_tokenizer(str(tmp_path)).eos_token == END_OF_TEXT and read == [str(tmp_path)]


def test_load_passes_arguments(eight: Path) -> None:
    donor = open_donor(str(eight))
    assert (donor.load().dtype, donor.load(dtype=torch.bfloat16).dtype) == (torch.float32, torch.bfloat16)


def test_generation_config_defaults_to_the_model_config(broken: Path) -> None:
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(fields | {"eos_token_id": 7, "pad_token_id": 3}))
    (broken / "generation_config.json").unlink()
    found = open_donor(str(broken)).generation_config()
    assert (found.eos_token_id, found.pad_token_id) == (7, 3)


def test_weights_as_several_pickles(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has pytorch_model.bin.index.json only, a pickle"):
        convert(str(broken))


def test_single_weights_file_takes_precedence_over_an_index(eight: Path, tmp_path: Path) -> None:
    folder = shard(eight, tmp_path / "both")
    (folder / "model.safetensors.index.json").write_text("{")
    shutil.copy(eight / "model.safetensors", folder)
    assert sorted(open_donor(str(folder)).tensor_names) == sorted(open_donor(str(eight)).tensor_names)


def test_generation_config(broken: Path) -> None:
    GenerationConfig(eos_token_id=[0, 5], do_sample=True, top_p=0.7).save_pretrained(broken)
    found = open_donor(str(broken)).generation_config()
    assert (found.eos_token_id, found.do_sample, found.top_p) == ([0, 5], True, 0.7)
    (broken / "generation_config.json").unlink()
    assert open_donor(str(broken)).generation_config().eos_token_id == 0
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json: is not JSON"):
        open_donor(str(broken)).generation_config()


def test_flash_attention_that_is_not_installed_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As people's config.json has it from the machine that trained the model."""
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash attention is installed here")
    plain = tiny_donor("qwen2", tmp_path, num_hidden_layers=4)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"attn_implementation": "flash_attention_2"}))
    with caplog.at_level("WARNING"):
        donor = open_donor(str(tmp_path))
        model = donor.load()
    assert "names flash_attention_2, which is not installed here; using sdpa" in caplog.text
    ids = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(convert(str(tmp_path), keep_donor=True, L_layers=2)(ids).logits, plain(ids).logits)


def test_a_sentencepiece_model_alone_names_the_missing_package(tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("sentencepiece") is not None:
        pytest.skip("sentencepiece is installed here")
    tiny_donor("llama", tmp_path, num_hidden_layers=2)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05junk")
    with pytest.raises(UserError, match=r"it has tokenizer.model alone, which needs a package .*: pip install sentencepiece"):
        donor_tokenizer(open_donor(str(tmp_path)))

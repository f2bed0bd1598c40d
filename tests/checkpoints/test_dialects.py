"""Exports say what the donor's own files said, in the fields that transformers 4 reads; `make compat` reads them with transformers 4."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recursify.checkpoints.dialects import changed_fields, with_old_names, write_tokenizer
from recursify.checkpoints.donor import open_donor
from recursify.conversion import convert
from recursify.conversion.settings import ConvertSettings
from recursify.hub import export

from ..support.old_donors import CONFIGS, TOKENIZER, fields_of, old_donor
from ..support.tokenizers import with_template

# Fields that a donor's file and its export may differ in: the writer's version.
WRITER = {"transformers_version"}


def exported(name: str, folder: Path, pt: bool = False) -> torch.nn.Module:
    model = old_donor(name, folder / "donor")
    place = str(folder / ("recursive.pt" if pt else "recursive"))
    convert.run(
        ConvertSettings(
            qwen_model=str(folder / "donor"), output_path=place, keep_donor=True, L_layers=2, H_cycles=2, L_cycles=1, seq_len=64
        ),
        say=lambda _: None,
    )
    export.run(export.ExportSettings(checkpoint=place, out=str(folder / "export"), donor=True), say=lambda _: None)
    return model


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def says(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Fields of `wanted` that `found` lacks or contradicts; an object may have more keys."""
    differ = {}
    for name, value in wanted.items():
        inside = isinstance(value, dict) and isinstance(found.get(name), dict)
        if name not in found or (says(found[name], value) if inside else found[name] != value):
            differ[name] = found.get(name, "missing")
    return differ


@pytest.mark.parametrize("name", CONFIGS)
def test_export_says_what_the_donors_files_said(name: str, tmp_path: Path) -> None:
    exported(name, tmp_path)
    wanted = {field: value for field, value in fields_of(name).items() if field not in WRITER}
    assert says(read(tmp_path / "export" / "config.json"), wanted) == {}
    assert says(read(tmp_path / "export" / "tokenizer_config.json"), TOKENIZER) == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_recursive_folder_has_the_old_rotary_fields(name: str, tmp_path: Path) -> None:
    exported(name, tmp_path)
    wanted = {field: value for field, value in fields_of(name).items() if field in ("rope_theta", "torch_dtype")}
    assert says(read(tmp_path / "recursive" / "config.json"), wanted) == {}


def test_configurations_of_recursive_folders_are_read_without_their_code(tmp_path: Path) -> None:
    """In a process without recursify and without a prompt to trust code: as transformers reads them for a tokenizer."""
    for name in CONFIGS:
        exported(name, tmp_path / name)
    look = "import sys; from transformers import PreTrainedConfig as P; [print(P.from_pretrained(f) and f) for f in sys.argv[1:]]"
    folders = [str(tmp_path / name / "recursive") for name in CONFIGS]
    done = subprocess.run([sys.executable, "-c", look, *folders], capture_output=True, text=True)
    assert done.stdout.split() == folders, done.stderr[-800:]


@pytest.mark.parametrize("name", CONFIGS)
def test_export_computes_what_the_donor_computes(name: str, tmp_path: Path) -> None:
    model, ids = exported(name, tmp_path, pt=True), torch.randint(2, 300, (1, 200))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "default"}])
def test_both_dialects_are_read_alike(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(rope_parameters={"rope_theta": 12345.0, **scaling})
    both = with_old_names(config.to_dict())
    old = {name: value for name, value in both.items() if name not in ("rope_parameters", "dtype")}
    for fields in (both, old):
        read = LlamaConfig.from_dict(dict(fields)).rope_parameters
        assert says(read, config.rope_parameters) == {}


def test_only_fields_that_reading_changes_are_recorded(tmp_path: Path) -> None:
    old_donor("qwen2", tmp_path)
    donor = open_donor(str(tmp_path))
    assert donor.origin["donor_fields"] == changed_fields(donor.fields, donor.config) == {"sliding_window": 131072}
    old_donor("llama3", tmp_path)
    assert "donor_fields" not in open_donor(str(tmp_path)).origin


def test_rotary_parameters_per_layer_type_have_no_old_form() -> None:
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}}
    assert with_old_names(nested) == nested


def test_tokenizer_has_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    tokenizer = with_template()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>", "<|b|>"]})
    write_tokenizer(tokenizer, tmp_path)
    fields = read(tmp_path / "tokenizer_config.json")
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast" and fields["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    assert fields["chat_template"] == tokenizer.chat_template and not {"is_local", "extra_special_tokens"} & set(fields)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.extra_special_tokens == ["<|a|>", "<|b|>"] and again.chat_template == tokenizer.chat_template
    assert again("a <|b|> c").input_ids == tokenizer("a <|b|> c").input_ids

"""Weights kept on the CPU or on disk by accelerate, as `device_map` does it: every parameter is brought when a module is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from recursify.conversion.convert import convert
from tests.support.tiny import tiny_donor

CPU = torch.device("cpu")
LAYERS = 5
WHOLE = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
# Weights of the layers with an even number, and of what is named, are on disk.
SPLIT = WHOLE | {f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(LAYERS)}
PLACES: dict[str, Any] = {
    "loop on disk": SPLIT | {"model.recursion": "cpu"},
    "recursion on disk": SPLIT | {"model.recursion": "disk"},
    "auto": "auto",
}  # fmt: skip


@pytest.fixture(scope="module", params=["anchored", "sum_norm"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp(request.param)
    tiny_donor("qwen2", where / "donor", num_hidden_layers=LAYERS)
    gains: Any = {"gain": 0.3} if request.param == "anchored" else {}
    convert(str(where / "donor"), L_layers=2, keep_donor=True, injection=request.param, **gains).save_pretrained(where / "model")
    return where / "model"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def check(model: Any, whole: Any) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    for options in (
        {}, {"H_cycles": 0}, {"H_cycles": 5}, {"halt": "q_head", "halt_threshold": 0.5}, {"halt": "kl", "halt_threshold": 0.01},
        {"cache_policy": "last"},
    ):  # fmt: skip
        assert torch.equal(model(ids, **options).logits, whole(ids, **options).logits), options
    assert torch.equal(model(ids, labels=ids).loss, whole(ids, labels=ids).loss)
    for options in ({}, {"draft_cycles": 1}, {"halt": "entropy", "halt_threshold": 1.0}):
        texts = [each.generate(ids[:1], max_new_tokens=6, do_sample=False, **options).tolist() for each in (model, whole)]
        assert texts[0] == texts[1], options


@pytest.mark.parametrize("place", PLACES)
def test_device_map(folder: Path, place: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_memory": {"cpu": "50KB"}} if place == "auto" else {}
    model = load(folder, device_map=PLACES[place], offload_folder=tmp_path, **options)
    assert any(parameter.is_meta for parameter in model.parameters())  # some are indeed elsewhere
    check(model, load(folder))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload_of_all_weights(folder: Path, where: str, tmp_path: Path) -> None:
    model = load(folder)
    model = cpu_offload(model, execution_device=CPU) if where == "cpu" else disk_offload(model, tmp_path, execution_device=CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    check(model, load(folder))


def test_the_recursion_is_never_split(folder: Path) -> None:
    """Its own parameters are read by a call of it: they cannot be on other devices than it."""
    assert {"Recursion", "Qwen2DecoderLayer"} <= set(load(folder)._no_split_modules)

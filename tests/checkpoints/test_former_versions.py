"""Checkpoints that version 0.1.0 wrote load with the same plan and give the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recursify import ConversionPlan
from recursify.checkpoints import checkpoint
from recursify.checkpoints.loading import load_model

SAVED = Path(__file__).resolve().parents[1] / "support" / "saved_by_0.1.0"
FORMS = ("model.pt", "folder")


def same_logits_as_then(model: Any) -> None:
    then = load_file(SAVED / "logits.safetensors")
    ids = then.pop("ids")
    depths = {int(name.removeprefix("H_cycles ")): logits for name, logits in then.items()}
    assert sorted(depths) == [0, 1, 2, 3] and not torch.allclose(depths[1], depths[2], atol=1e-2)  # the cycles matter
    with torch.no_grad():
        for H, logits in depths.items():
            torch.testing.assert_close(model(ids, H_cycles=H).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_former_checkpoint_gives_the_same_logits_and_plan(form: str) -> None:
    found = checkpoint.load(SAVED / form)
    same_logits_as_then(found.model)
    assert found.plan == ConversionPlan("someone/tiny-qwen2", 4, (0,), (1, 2), (3,), "middle")
    assert found.notes == {"donor": "someone/tiny-qwen2", "version": "0.1.0"}
    assert found.tokenizer is not None and found.tokenizer.decode(found.tokenizer("The old lobster").input_ids) == "The old lobster"


def test_a_former_folder_loads_through_the_auto_class() -> None:
    same_logits_as_then(AutoModelForCausalLM.from_pretrained(SAVED / "folder"))


@pytest.mark.parametrize("form", FORMS)
def test_load_model_opens_former_checkpoints(form: str) -> None:
    model, tokenizer = load_model(SAVED / form)
    same_logits_as_then(model)
    assert len(tokenizer) > 250

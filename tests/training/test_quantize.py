"""--load_in_4bit: the adapter of a donor whose frozen weights are quantised."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify.checkpoints import checkpoint
from recursify.errors import UserError
from recursify.training import RecursiveTrainer, fit, quantize, train
from recursify.training.cost import estimate
from tests.support.adapters import blocks, donor_and_adapter, settings
from tests.support.tiny import make_tiny_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_adapter_learns_beside_4_bit_weights_and_keeps_its_donor(tmp_path: Path, family: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    donor, model = donor_and_adapter(tmp_path / "donor", family)
    ids = torch.randint(0, 300, (1, 7))
    result = fit(model, make_tiny_tokenizer(), blocks(8), blocks(2), settings(max_steps=30, log_every=5, load_in_4bit=True), console=False)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    kinds = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.model.layers.named_parameters() if "proj" in name}
    assert set(kinds.values()) == {torch.uint8} or kinds == {"weight": torch.uint8, "bias": torch.float32}
    with torch.no_grad():
        quantised = model(ids, H_cycles=0).logits
        assert not torch.equal(quantised, donor(ids).logits)
        assert not torch.equal(model(ids, H_cycles=1).logits, quantised)  # the updates act
    checkpoint.save(tmp_path / "adapter", model, make_tiny_tokenizer())
    loaded = checkpoint.load(tmp_path / "adapter").model
    with torch.no_grad():
        assert torch.equal(loaded(ids, H_cycles=0).logits, donor(ids).logits)
    for name, tensor in model.model.recursion.state_dict().items():
        assert torch.equal(tensor, loaded.model.recursion.state_dict()[name]), name


def test_products_are_near_those_of_the_donor(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    _, model = donor_and_adapter(tmp_path / "donor")
    packed = copy.deepcopy(model)
    quantize.quantize_layers(packed, CPU, torch.float32)
    others, count = dict(packed.named_modules()), 0
    for name, linear in model.named_modules():
        if type(linear) is torch.nn.Linear:
            x = torch.randn(100, linear.in_features)
            with torch.no_grad():
                error = (linear(x) - others[name](x)).std() / linear(x).std()
            assert error == 0 if name == "lm_head" else 0.02 < error < 0.4, name
            count += 1
    assert count == 5 * 7 + 1


def test_gradient_checkpointing_and_bfloat16(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    _, model = donor_and_adapter(tmp_path / "donor")

    def losses(**changes: Any) -> list[float]:
        given = settings(load_in_4bit=True, log_every=1, **changes)
        result = fit(copy.deepcopy(model), make_tiny_tokenizer(), blocks(4), None, given, console=False)
        return [entry["loss"] for entry in result.history if "loss" in entry]

    plain = losses()
    assert len(plain) == 3
    assert losses(gradient_checkpointing=True) == pytest.approx(plain, abs=1e-5)
    assert losses(bf16=True) == pytest.approx(plain, abs=0.05)


def test_resumes_in_memory(tmp_path: Path) -> None:
    """The trained parameters are loaded alone: the donor's are quantised."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    _, model = donor_and_adapter(tmp_path / "donor")

    def trainer(**changes: Any) -> RecursiveTrainer:
        given = settings(load_in_4bit=True, output_dir=str(tmp_path / "out"), max_steps=4, log_every=1, **changes)
        return RecursiveTrainer(copy.deepcopy(model), given, blocks(8), None, make_tiny_tokenizer(), console=False)

    whole = trainer(save_every=2)
    whole.train()
    resumed = trainer()
    resumed.train(tmp_path / "out" / "checkpoint_step_2.pt")
    for name, tensor in whole.model.model.model.recursion.state_dict().items():
        assert torch.equal(tensor, resumed.model.model.model.recursion.state_dict()[name]), name


def test_dry_run_counts_4_bit_weights(tmp_path: Path) -> None:
    _, model = donor_and_adapter(tmp_path / "donor")
    whole, packed = (estimate(model.config, settings(load_in_4bit=flag), 1).memory["weights"] for flag in (False, True))
    in_layers = sum(p.numel() for name, p in model.model.layers.named_parameters() if name.endswith("proj.weight"))
    assert whole - packed == pytest.approx(in_layers * (4 - 0.5159), rel=1e-3)


def test_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--load_in_4bit: expected a device of cpu or cuda, got mps; leave it out"):
        quantize.check_4bit(settings(load_in_4bit=True), torch.device("mps"))
    with pytest.raises(UserError, match=r"--load_in_4bit: expected no --fsdp: 4-bit weights are not sharded"):
        quantize.check_4bit(settings(load_in_4bit=True, fsdp=True), CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--load_in_4bit: expected bitsandbytes to be installed .*; pip install bitsandbytes, or leave"):
        train(settings(load_in_4bit=True, adapter=True, checkpoint="none.pt", output_dir=str(tmp_path / "out")))
    quantize.check_4bit(settings(), CPU)
    with pytest.raises(UserError, match="--load_in_4bit: quantised weights cannot be trained, only frozen; add --adapter, or leave it out"):
        settings(load_in_4bit=True).validate_adapter(None)

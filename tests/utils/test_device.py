"""Choosing a device."""

from __future__ import annotations

import pytest
import torch

from recursify.errors import UserError
from recursify.utils import device
from recursify.utils.device import check_seed, choose_device
from tests.support.tiny import tiny_model


def test_cpu_is_always_available() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device().type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:1", ""])
def test_unavailable_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--device: expected cpu.*, which this machine has; got"):
        choose_device(name)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_invalid_seed_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"--seed: .*{seed}"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [None, 0, 2**32 - 1])
def test_valid_seeds_are_accepted(seed: int | None) -> None:
    check_seed(seed)


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_auto_takes_the_faster_type_and_says_so(
    faster: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "product_seconds", lambda dtype, *shape: 1.0 if dtype is faster else 2.0)
    with caplog.at_level("INFO"):
        model = device.placed(tiny_model("qwen2", num_hidden_layers=1).bfloat16(), torch.device("cpu"))
    assert model.dtype == faster and ("Running in float32" in caplog.text) == (faster is torch.float32)


def test_a_named_type_is_taken_and_float32_is_never_left() -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    assert device.placed(model, torch.device("cpu")).dtype == torch.float32
    assert device.placed(model, torch.device("cpu"), "bfloat16").dtype == torch.bfloat16


def test_the_probe_takes_milliseconds_and_a_type() -> None:
    assert 0 < device.product_seconds(torch.float32, 1, 64, 64) < 1
    assert device.fast_dtype(torch.bfloat16, torch.device("cpu")) in (torch.bfloat16, torch.float32)

"""Choosing a device."""

from __future__ import annotations

import pytest

from recursify.errors import UserError
from recursify.utils.device import check_seed, choose_device


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

"""Choosing a device."""

from __future__ import annotations

import pytest

from recursify.device import choose_device
from recursify.errors import UserError


def test_the_cpu_is_always_there() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device().type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:1", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=r"--device: .*cpu \(1\)"):
        choose_device(name)

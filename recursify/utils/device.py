"""Choose the device, and check the seed."""

from __future__ import annotations

import torch

from ..errors import UserError


def choose_device(name: str | None = None) -> torch.device:
    """The device of a name; for None cuda if available, else mps, else cpu.

    Raises:
        UserError: This machine has no such device.
    """
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = [kind for kind, count in counts.items() if count]
    try:
        device = torch.device(there[0] if name is None else name)
    except RuntimeError:  # not the name of a device
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        found = ", ".join(kind if counts[kind] == 1 else f"{kind}:0 to {kind}:{counts[kind] - 1}" for kind in there)
        hint = "; a GPU is called cuda" if str(name).startswith("gpu") else ""
        raise UserError(f"--device: expected {found}, which this machine has; got {name!r}{hint}")
    return device


def check_seed(seed: int | None) -> None:
    """Raise a UserError for a seed that torch, numpy or Python does not accept; None is no seed."""
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"--seed: expected 0 to {2**32 - 1}, got {seed}")

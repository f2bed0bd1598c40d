"""Choose the device, and check the seed."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
_PROBED = (1024, 4096)  # shape of the matrix, about that of a layer of a small model


def choose_device(name: str | None = None) -> torch.device:
    """The device of a name; for None cuda if available, else mps, else cpu.

    Raises:
        UserError: This machine has no such device.
    """
    import torch  # here, as below: flags are read without it

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


def placed(model: Any, device: torch.device, dtype: str = "auto") -> Any:
    """The model on a device in a type of `ModelDtype`; what `auto` changes is logged."""
    import torch

    stored = model.dtype
    chosen = fast_dtype(stored, device) if dtype == "auto" else getattr(torch, dtype)
    if chosen != stored and dtype == "auto":
        logger.info("Running in %s, which is faster here than the stored %s (--dtype sets another)", _name(chosen), _name(stored))
    return model.to(device=device, dtype=chosen)


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The stored type, or float32 where that is faster: a product of one vector and a matrix, as decoding is made of, is timed on a CPU."""
    import torch

    if stored == torch.float32 or device.type not in ("cpu", "cuda"):
        return stored
    if device.type == "cuda":
        return torch.float32 if stored == torch.bfloat16 and not torch.cuda.is_bf16_supported() else stored
    return stored if product_seconds(stored, 1, *_PROBED) <= product_seconds(torch.float32, 1, *_PROBED) else torch.float32


def product_seconds(dtype: torch.dtype, rows: int, inner: int, columns: int, rounds: int = 7) -> float:
    """Seconds of the product of two matrices on the CPU: the best of some rounds, after one that warms up."""
    import torch

    left, right, times = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype), []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        _ = left @ right
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Peak throughput of the machine, measured: the roofline that a row is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .case import Bench, Check, Table, case
from .measure import seconds

GIGA = 1e9
LITTLE = 0.4
AGE = 30.0  # seconds
A_MOMENT = 0.05


@dataclass(frozen=True)
class Ceilings:
    """Of one device and type.

    Args:
        flops: Floating-point operations per second of a large matrix product.
        bytes: Bytes per second, read and written, of a large copy.
    """

    flops: float
    bytes: float

    def limit(self, took: float, flops: float, moved: float) -> str:
        """What limits a row that took `seconds`: the higher of two lower bounds, and how much of the time each of them explains. "neither"
        where both together explain little: then it is launches, Python, and matrices too small to reach a ceiling.

        Args:
            flops: Operations that the work needs at least.
            moved: Bytes that it reads or writes at least.
        """
        by = {"arithmetic": flops / self.flops / took, "memory": moved / self.bytes / took}
        name = max(by, key=lambda one: by[one]) if sum(by.values()) >= LITTLE else "neither"
        return f"{name}: arithmetic {by['arithmetic']:.0%}, memory {by['memory']:.0%}"


_seen: dict[tuple[torch.device, torch.dtype], tuple[float, Ceilings]] = {}


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best that this run has seen so far: a ceiling is the peak, not the average. A shared machine has slow minutes, so it is
    measured again after half a minute."""
    when, best = _seen.get((device, dtype), (float("-inf"), Ceilings(0.0, 0.0)))
    if time.monotonic() - when > AGE:
        now = _look(device, dtype)
        best = Ceilings(max(best.flops, now.flops), max(best.bytes, now.bytes))
        _seen[device, dtype] = time.monotonic(), best
    return best


def _look(device: torch.device, dtype: torch.dtype) -> Ceilings:
    on_gpu = device.type == "cuda"
    most, copied = (8192, 2**30) if on_gpu else (2048, 2**28)
    a, b, out, size = _product(device, dtype, most)
    source = torch.randint(100, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    tries = 20 if on_gpu else 5
    product = min(seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(tries))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(tries))
    return Ceilings(flops=2 * size**3 / product, bytes=2 * copied / copy)


def _product(device: torch.device, dtype: torch.dtype, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Two square matrices, their output, and their side: as large as can be multiplied in a moment. A processor without
    bfloat16 of its own takes some thousand times as long for it as one that has it."""
    size = 256
    while True:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        if size >= most or seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) > A_MOMENT:  # type: ignore[misc]
            return a, b, out, size
        size *= 2


@case("ceilings", "What the machine can do at most")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """Matrix products of 2,048 (GPU: 8,192) on a side, smaller ones where these take more than a moment, and copies of 256 MB (GPU: 1 GB),
    bytes read and written counted; the best of some tries. The column "limit" of other tables is computed from these, looked for again in
    their own run, every half minute.
    """
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        found = ceilings(bench.device, dtype)
        rows.append({"type": str(dtype).removeprefix("torch."), "GFLOP/s": found.flops / GIGA, "copy, GB/s": found.bytes / GIGA})
    yield Table("Ceilings", rows)
    yield Check("share of its ceiling that a matrix product of another size reaches", _other_size(bench), least=0.5, must=False)


def _other_size(bench: Bench) -> float:
    """A ceiling that only one size reaches would say little."""
    size, device = (4096 if bench.on_gpu else 1024), bench.device
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    took = statistics.median(seconds(lambda: a @ b, device) for _ in range(5))
    return 2 * size**3 / took / ceilings(device, torch.float32).flops

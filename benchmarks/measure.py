"""Time of calls that alternate, and peak memory of one.

Units: seconds, bytes. A ratio is a spread of the ratios of pairs: median, least, most.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from typing import Any

import psutil
import torch

from .record import spread

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, synchronised with the device."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, round by round; in a round all sides take their turn. The first `warm` rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm + rounds):
        for name, work in sides.items():
            took = seconds(work, device)
            if turn >= warm:
                times[name].append(took)
    return times


def ratio(of: Sequence[float], over: Sequence[float], by: float = 1.0) -> dict[str, Any]:
    """Of pairs, divided by `by`."""
    return spread(a / b / by for a, b in zip(of, over, strict=True))


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns in a process that does nothing before or after, so that a peak is its own."""
    with ProcessPoolExecutor(1, mp_context=processes()) as pool:
        return pool.submit(work, *args).result()


def processes() -> ForkServerContext:
    """Starts processes that have imported the libraries already: once, for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "recursify.training.fitting", "recursify.conversion.convert"])
    return context


def held(device: torch.device) -> int:
    """On a GPU the allocator's bytes, else what the process has resident, libraries included."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def give_back_when_freed() -> None:
    """Blocks of a megabyte or more leave the process when they are freed, so that a peak is that of live tensors; where the C library is
    another one, nothing changes."""
    if sys.platform != "win32" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')}   {text}", file=sys.stderr, flush=True)

"""Where the time goes: a profile of a training step and of a token, by kind of operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from recursify.network.decoding_recursive_llm import RecursiveCache
from recursify.training.loss_module import LossModule, Supervision
from recursify.training.optimizers import build_optimizer

from .case import Bench, Check, Table, case
from .measure import say, seconds
from .models import HALF_B, TOY, build, recursive_config, tokens
from .training import CYCLE, MAIN, Batch, Way, settings_of

# Kind -> parts of the names of operations and kernels; the first kind that fits counts.
KINDS: dict[str, tuple[str, ...]] = {
    "optimizer and clipping": ("adamw", "_foreach", "multi_tensor", "clip_grad", "linalg_vector_norm"),
    "attention": ("scaled_dot_product", "flash", "fmha", "attention"),
    "matrix products": ("mm", "linear", "gemm", "matmul", "cutlass", "nvjet", "mkldnn", "bmm", "dot"),
    "loss": ("softmax", "cross_entropy", "nll_loss", "logsumexp", "gather", "scatter", "amax"),
    "copies and casts": ("copy", "clone", "cat", "contiguous", "fill", "zero", "memcpy", "memset", "to_copy"),
    "embedding": ("embedding", "index"),
}
POINTWISE = "norms, activations, mixes: element by element"


def kind_of(name: str) -> str:
    low = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in low for part in parts)), POINTWISE)


def by_kind(work: Callable[[], Any], device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of time by kind of operation, and the slowest operations. The work is warmed up."""
    work()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        under = seconds(work, device)
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    operations = []
    for event in found.key_averages():
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if own > 0:
            spent[kind_of(event.key)] += own
            calls[kind_of(event.key)] += event.count
            operations.append((own, event.key))
    busy = sum(spent.values())
    rows = [{"kind": kind, "share": spent[kind] / under, "calls": calls[kind]} for kind in sorted(spent, key=lambda k: -spent[k])]
    rest = "the GPU waits" if on_gpu else "between operations: Python"
    rows.append({"kind": rest, "share": max(0.0, 1 - busy / under), "calls": None})
    rows.append({"kind": f"in all: {under:.3g} s under the profiler", "share": None, "calls": sum(calls.values())})
    return rows, [f"{name} {own / under:.0%}" for own, name in sorted(operations, reverse=True)[:8]]


def training_step(way: Way, batch: Batch, bench: Bench) -> Callable[[], Any]:
    """A step as `fit` makes it, without its loader and log."""
    model = build(recursive_config(bench.pick(TOY, HALF_B, HALF_B).config(), **way.loop), bench.device).train()
    settings = settings_of(way, batch, bench.device, 1)
    loss_module, optimizer = LossModule(model, Supervision.of(settings)), build_optimizer(model, settings)
    ids = tokens(model.config, batch.rows, batch.length, bench.device)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.on_gpu):
            loss = loss_module(ids, ids)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def a_token(bench: Bench) -> Callable[[], Any]:
    model = build(recursive_config(bench.pick(TOY, HALF_B, HALF_B).config()), bench.device, bench.dtype).eval()
    prompt, cache = tokens(model.config, 1, 64, bench.device), RecursiveCache(model.config)

    @torch.no_grad()
    def step() -> None:
        model(prompt[:, :1], past_key_values=cache, use_cache=True)

    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return step


@case("profile", "Where the time goes", asked=True)
def measure(bench: Bench) -> Iterator[Table | Check]:
    """One step under torch.profiler, after one to warm up, without loader and log: the time of each operation itself, on the CPU or on the
    GPU, by kind of operation, as a share of the time of the step. The profiler costs time of its own, which is in "between operations".
    """
    batch = bench.pick(Batch(2, 32), Batch(1, 128), Batch(8, 1024))
    works: dict[str, Callable[[], Callable[[], Any]]] = {}
    for way in (MAIN, CYCLE):
        works[f"a training step, {batch}, {way.name}"] = partial(training_step, way, batch, bench)
    works["a token at context 64"] = partial(a_token, bench)
    for name, make in works.items():
        say(f"profile: {name}")
        rows, most = by_kind(make(), bench.device)
        yield Table(name, rows, f"Most: {', '.join(most)}.")

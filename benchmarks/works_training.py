"""Whether training does on a GPU what the tests hold it to on a CPU: small checks of the model that ships; and memory in a real shape."""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from recursify.checkpoints.checkpoint import load
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.training import TrainSettings, fit
from recursify.training.cost import estimate
from recursify.training.saving import Saver

from .case import Bench, Check, Table, case
from .models import HALF_B, SHIPPED, TOY, recursive_config
from .named_checks import Named, Skip, outcomes
from .synchronisations import ARRIVED, Steps, counted
from .training import CHECKPOINTED, CYCLE, EVERY, FULL, KEEP, MAIN, Batch, Way, settings_of, weigh_step
from .works import shipped

GB = 1e9
FEW = 2  # steps at either end of a run, whose losses are compared
FALL = 0.05  # nats
MEMORY_BOUND = 0.15
NOISE = 10.0  # a resumed run may differ by so many times as much as two uninterrupted ones do


def steps_of(bench: Bench) -> int:
    return int(bench.pick(2 * FEW, None, 24))


def settings(bench: Bench, **flags: Any) -> TrainSettings:
    common: dict[str, Any] = {
        "checkpoint": "", "seq_len": 32, "batch_size": 4, "max_steps": steps_of(bench), "lr": 1e-3, "warmup_steps": 2, "start_gain": 0.2,
        "log_every": 1, "generate_every": 0, "save_every": 0, "bf16": bench.on_gpu, "device": bench.device.type,
    }  # fmt: skip
    return TrainSettings(**common | flags)


def blocks(vocabulary: int, count: int = 8) -> list[dict[str, list[int]]]:
    """Few, so that a few steps learn them by heart."""
    return Batch(8, 32).blocks(vocabulary, count)


def train(
    bench: Bench, flags: dict[str, Any], callbacks: tuple[TrainerCallback, ...] = (), dtype: torch.dtype = torch.float32, count: int = 8
) -> list[float]:
    """The losses of a run over so many blocks, step by step."""
    model, rows = shipped(bench, dtype=dtype), blocks(4096, count)
    found = fit(model, load_tokenizer(SHIPPED), rows, rows[:2], settings(bench, **flags), console=False, callbacks=callbacks)
    return [entry["loss"] for entry in found.history if "loss" in entry]


def falls(bench: Bench, **flags: Any) -> str:
    return fallen(train(bench, flags))


def supervised(bench: Bench, **flags: Any) -> str:
    return falls(bench, **EVERY, **flags)


def fallen(losses: list[float]) -> str:
    first, last = statistics.mean(losses[:FEW]), statistics.mean(losses[-FEW:])
    assert len(losses) >= 2 * FEW and all(map(math.isfinite, losses)), f"expected {2 * FEW} finite losses or more, got {losses}"
    assert last < first - FALL, f"expected a fall of more than {FALL} nats, got {first:.3f} to {last:.3f}"
    return f"from {first:.3f} to {last:.3f} nats in {len(losses)} steps"


def eight_bit(bench: Bench) -> str:
    if importlib.util.find_spec("torchao") is None:
        raise Skip("torchao is not installed")
    if not bench.on_gpu:
        # its step is compiled, which takes a CPU a quarter of a minute for each shape; what is tried here is all around that
        torch.compiler.set_stance("force_eager")
    try:
        return falls(bench, optimizer="adamw_8bit")
    finally:
        torch.compiler.set_stance("default")


class Types(TrainerCallback):
    """The types of weights, gradients' sums and optimizer states after a step."""

    def __init__(self) -> None:
        self.seen: dict[str, set[torch.dtype]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        states = [value for one in optimizer.state.values() for name, value in one.items() if name in ("exp_avg", "exp_avg_sq")]
        self.seen = {"weights": {p.dtype for p in trained}, "moments": {value.dtype for value in states}}


def masters(bench: Bench) -> str:
    """Of a model that was bfloat16 when it was given."""
    types = Types()
    losses = train(bench, {}, (types,), torch.bfloat16)
    assert types.seen == {"weights": {torch.float32}, "moments": {torch.float32}}, types.seen
    return f"weights and moments are float32; {fallen(losses)}"


def resume(bench: Bench) -> str:
    """In float32. What a GPU adds in any order makes two runs differ, so two that are not interrupted say how much is allowed."""
    tokenizer, rows = load_tokenizer(SHIPPED), blocks(4096)

    def run(folder: Path, steps: int, point: Path | None = None) -> dict[str, torch.Tensor]:
        model: Any = shipped(bench) if point is None else load(point).model
        own = settings(bench, max_steps=8, bf16=False, save_every=4, output_dir=str(folder), **EVERY)
        stop = (StopAt(steps),)
        saver = Saver(folder, tokenizer, torch.float32, None, {}, 2)
        fit(model, tokenizer, rows, rows[:2], own, saver=saver, resume_from=point, console=False, callbacks=stop)
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}

    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("first", "second", "broken")]
        for place in places:
            place.mkdir()
        whole, again = run(places[0], 8), run(places[1], 8)
        halfway = run(places[2], 4)
        resumed = run(places[2], 8, places[2] / "checkpoint_step_4.pt")
    noise, off, moved = (_distance(a, whole) for a in (again, resumed, halfway))
    assert moved > 100 * noise, f"two uninterrupted runs differ by {noise:.2g}, and the second half of one is {moved:.2g}: nothing is told"
    assert off <= NOISE * noise + 1e-9, f"weights differ by {off:.2g}, those of two uninterrupted runs by {noise:.2g}"
    return f"weights differ by {off:.1g}, two uninterrupted runs by {noise:.1g}; the resumed half moved them by {moved:.1g}"


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all weights over the norm of all: a single weight whose gradient is next to nothing says little."""
    apart, whole = (sum(float(x.double().square().sum()) for x in values) for values in ([a[n] - b[n] for n in b], b.values()))
    return math.sqrt(apart / whole)


class StopAt(TrainerCallback):
    """Ends a run after a step, as if it had been stopped."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def waits(bench: Bench) -> str:
    """Steps that are not logged: the host is ahead of the device, and nothing makes it wait."""
    flags = {**EVERY, "backprop": "cycle", "ema_decay": 0.9, "log_every": 10**6, "max_steps": 6}
    with counted(bench.device) as found:
        steps = Steps(found)
        train(bench, flags, (steps,), count=6 * 4)
    expected = Counter() if bench.on_gpu else Counter([ARRIVED])
    assert all(each == expected for each in steps.between()), f"the host waits: {dict(sum(steps.between(), Counter()))}"
    return f"in none of {len(steps.between())} steps"


def memory(bench: Bench, way: Way, batch: Batch) -> str:
    """The allocator's peak of a step beside the estimate of `--dry_run`."""
    shape = bench.pick(TOY, None, HALF_B)
    found = weigh_step(way, shape, batch, bench.device)["peak, GB"]
    expected = estimate(recursive_config(shape.config(), **way.loop), settings_of(way, batch, bench.device, 1), 1).memory_total / GB
    said = f"{found:.2f} GB, estimated {expected:.2f}"
    if not bench.on_gpu:
        raise Skip(f"{said}; a CPU's peak is that of the process, libraries included")
    assert abs(found / expected - 1) <= MEMORY_BOUND, f"{said}: more than {MEMORY_BOUND:.0%} apart"
    return said


LOSSES: Named = {
    "backprop full": partial(supervised, backprop="full"),
    "backprop cycle": partial(supervised, backprop="cycle"),
    "backprop last": partial(falls, backprop="last"),
    "gradient checkpointing": partial(supervised, gradient_checkpointing=True),
    "compile": partial(supervised, compile=True),
    "no step waits for the device": waits,
    "muon": partial(falls, optimizer="muon"),
    "adamw_8bit": eight_bit,
    "master weights are float32": masters,
    "resume equals uninterrupted": resume,
}


def memories(bench: Bench) -> Named:
    small, large = bench.pick((Batch(2, 32), Batch(2, 32)), None, (Batch(4, 128), Batch(8, 1024)))
    points = [(MAIN, small), (KEEP, small), (CYCLE, large), (FULL, large), (CHECKPOINTED, large)][: bench.pick(2, None, 5)]
    return {f"memory: {way.name}, {batch}": partial(memory, way=way, batch=batch) for way, batch in points}


@case("works_training", "Whether it works: training", sizes=("cuda",))
def measure(bench: Bench) -> Iterator[Table | Check]:
    """Short runs of the donor that ships, made recursive, over a few random blocks, in bfloat16 autocast but for the one that is
    resumed. Losses must be finite and fall. Memory: a step of Qwen2-0.5B, compact or with its donor kept, beside the estimate of
    `--dry_run`, which may be 15 % off.
    """
    yield from outcomes("Training", LOSSES, bench)
    yield from outcomes("Memory", memories(bench), bench)

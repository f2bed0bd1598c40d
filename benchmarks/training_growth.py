"""How the cost of a training step grows with everything that it depends on, beside what arithmetic says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from recursify.network.size import parameters_by_part
from recursify.training.cost import step_flops
from recursify.training.loss_module import LossModule, Supervision

from .case import Bench, Check, Table, case
from .ceilings import ceilings
from .measure import alternate, say
from .models import HALF_B, TOY, Shape, build, recursive_config, tokens

AIM = 0.15


@dataclass(frozen=True)
class Point:
    """One training step. The names are those of the table."""

    H: int
    L: int
    L_layers: int
    T: int
    V: int
    batch: int
    every_cycle: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.T

    @property
    def scored(self) -> int:
        return self.H if self.every_cycle else 1


class Step:
    """A model at a point, and the forward and backward pass of its training: all cycles in one graph; no optimizer."""

    def __init__(self, point: Point, shape: Shape, device: torch.device):
        self.point, self.device, self.bf16 = point, device, device.type == "cuda"
        donor = shape.config(layers=point.L_layers, vocabulary=point.V)
        self.config = recursive_config(donor, L_layers=point.L_layers, H_cycles=point.H, L_cycles=point.L)
        model = build(self.config, device).train()
        self.loss_module = LossModule(model, Supervision(every_cycle=point.every_cycle, backprop="full"))
        self.ids = tokens(self.config, point.batch, point.T, device)

    def run(self) -> None:
        self.loss_module.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss_module(self.ids, self.ids)["loss"]
        loss.backward()

    @property
    def flops(self) -> float:
        return step_flops(self.config, self.point.tokens, self.point.T, supervised=self.point.scored)

    @property
    def moved(self) -> float:
        """Bytes: weights read on the way forward and back, gradients written."""
        return 3 * 4 * sum(parameters_by_part(self.config).values())


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """b of cost = a * value ** b, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(v) for v in values], [math.log(c) for c in costs]).slope


def series(base: Point, variable: str, factors: Sequence[int]) -> list[Point]:
    return [replace(base, **{variable: asdict(base)[variable] * factor}) for factor in factors]


def grow(name: str, variable: str, points: list[Point], shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """A row: the points of one variable, in turn."""
    say(f"training_growth: {name}")
    steps = {str(asdict(point)[variable]): Step(point, shape, device) for point in points}
    sides: dict[str, Callable[[], None]] = {value: step.run for value, step in steps.items()}
    # on a CPU a first round is no slower than noise, which the median of three takes care of
    times = alternate(sides, rounds, device, warm=2 if device.type == "cuda" else 0)
    took = [statistics.median(times[value]) for value in steps]
    values, flops = [float(value) for value in steps], [step.flops for step in steps.values()]
    measured, predicted = exponent(values, took), exponent(values, flops)
    top, last = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32), list(steps.values())[-1]
    return {
        "variable": name,
        "points": ", ".join(f"{int(value):,}" for value in steps),
        "exponent, measured": measured,
        "exponent, of FLOPs": predicted,
        "difference": measured - predicted,
        "least, seconds": took[0],
        "most, seconds": took[-1],
        "limit": top.limit(took[-1], last.flops, last.moved),
    }


@case("training_growth", "How the cost of a training step grows")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """A forward and backward pass of training, back through all cycles, without an optimizer, of a compact model in the widths of
    Qwen2-0.5B. From one base every variable grows by itself; the points of a variable take turns, and of each the median of the rounds
    counts. An exponent b is that of cost = a * variable ** b, by least squares of the logarithms; beside it the same of the FLOPs that
    the cost estimate counts at these points. It is below 1 where only a part of the cost grows: what the head costs stays as layers are
    added, and L grows while a cycle has L + 1 applications. What FLOPs do not count is the same for any number of tokens: gradients that
    are set to zero, written and added, of every word above all, which is why a CPU has V grow at a larger T. The limit is that of the
    largest point."""
    device, shape = bench.device, bench.pick(TOY, HALF_B, HALF_B)
    base = bench.pick(
        Point(H=1, L=1, L_layers=1, T=16, V=512, batch=1),
        Point(H=1, L=1, L_layers=1, T=128, V=8_192, batch=1),
        Point(H=2, L=1, L_layers=2, T=1_024, V=16_384, batch=8),
    )
    factors: tuple[int, ...] = (1, 2, 4)
    rounds = bench.pick(1, 3, 5)
    long = replace(base, T=bench.pick(4, 4, 1) * base.T)
    wanted = [(name, name, base, factors) for name in ("H", "L", "L_layers", "T", "batch")]
    wanted += [("H, last cycle scored", "H", replace(base, every_cycle=False), factors), (f"V, at T {long.T:,}", "V", long, (*factors, 8))]
    rows = [grow(name, variable, series(of, variable, by), shape, device, rounds) for name, variable, of, by in wanted]
    fixed = ", ".join(f"{name} {value:,}" for name, value in asdict(base).items() if name != "every_cycle")
    yield Table("Growth of a training step", rows, f"Base: {fixed}. Every cycle is scored but where the row says otherwise.")
    for row in rows:
        yield Check(f"exponent of {row['variable']}, measured less predicted, either way", abs(row["difference"]), most=AIM, must=False)

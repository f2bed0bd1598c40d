"""What the next-token loss costs at a real vocabulary, in memory and in time, beside other implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recursify.network.losses import CHUNK_ELEMENTS, next_token_loss
from recursify.training.trainer import peak_memory

from .case import Bench, Check, Table, case
from .ceilings import GIGA, ceilings
from .measure import alone, alternate, forget_peak, give_back_when_freed, held, ratio, say
from .models import HALF_B, TOY
from .record import spread

MEMORY_BOUND, TIME_AIM = 1 / 8, 1.1
# In millionths: rounding alone, of logits in the type, averaged over hundreds of tokens.
AGREEMENT = {"float32": 10, "bfloat16": 1_000}
OURS, PLAIN = "recursify", "plain"


@dataclass(frozen=True)
class Problem:
    """The loss of a batch of tokens.

    Args:
        hidden, vocabulary: Of the head.
        dtype: "float32", or "bfloat16" for autocast over weights and states in float32.
    """

    hidden: int
    vocabulary: int
    tokens: int
    device: str
    dtype: str

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def flops(self) -> float:
        """Of the three products that forward and backward cannot do without."""
        return 3 * 2 * self.tokens * self.hidden * self.vocabulary

    @property
    def moved(self) -> float:
        """Bytes: the weight read on the way forward and back, and its gradient written."""
        return 3 * 4 * self.hidden * self.vocabulary


class Inputs:
    """A head, states to read and labels, and one step of any way to the loss of them."""

    def __init__(self, problem: Problem):
        torch.manual_seed(0)
        self.device, self.bf16, tokens = torch.device(problem.device), problem.bf16, problem.tokens
        self.head = nn.Linear(problem.hidden, problem.vocabulary, bias=False, device=self.device)
        self.state = torch.randn(1, tokens + 1, problem.hidden, device=self.device).requires_grad_()
        self.labels = torch.randint(problem.vocabulary, (1, tokens + 1), device=self.device)

    @property
    def targets(self) -> Tensor:
        return self.labels[0, 1:]

    def operands(self) -> tuple[Tensor, Tensor]:
        """States `[N, D]` and weight `[V, D]`, in the type that autocast would make of them, for what autocast does not know."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return self.state[0, :-1].to(dtype), self.head.weight.to(dtype)

    def step(self, way: str) -> float:
        """Forward and backward; the loss."""
        self.head.weight.grad = self.state.grad = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = WAYS[way](self)
        loss.backward()
        return loss.item()


def _ours(on: Inputs) -> Tensor:
    return next_token_loss([on.state], on.labels, on.head, [1.0])[0]


def _plain(on: Inputs) -> Tensor:
    return F.cross_entropy(on.head(on.state[0, :-1]).float(), on.targets)


def _torch(on: Inputs) -> Tensor:
    """In chunks of our size: those that it picks itself are so small for such a vocabulary that it takes ten times as long."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ELEMENTS // on.head.out_features)  # type: ignore[attr-defined, unused-ignore]
    return F.linear_cross_entropy(*on.operands(), on.targets, options=options)  # type: ignore[attr-defined, unused-ignore]


def _liger(on: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(on.state[0, :-1], on.head.weight, on.targets)  # knows autocast


def _cut(on: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(*on.operands(), on.targets)


WAYS: dict[str, Callable[[Inputs], Tensor]] = {
    OURS: _ours,
    PLAIN: _plain,
    "torch's linear_cross_entropy": _torch,
    "liger-kernel": _liger,
    "cut-cross-entropy": _cut,
}
KERNELS = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}  # and their modules


def ways_here(device: torch.device) -> tuple[list[str], list[str]]:
    """Implementations that work on the device, and why others do not."""
    here, missing = [], []
    for way in WAYS:
        reason = _reason_against(way, device)
        if reason is None:
            here.append(way)
        else:
            missing.append(f"{way}: {reason}")
    return here, missing


def _reason_against(way: str, device: torch.device) -> str | None:
    if way in KERNELS and importlib.util.find_spec(KERNELS[way]) is None:
        return "not installed"
    if way in KERNELS and device.type != "cuda":
        return "for GPUs only"
    if WAYS[way] is _torch and not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    try:
        Inputs(Problem(64, 512, 64, device.type, "bfloat16")).step(way)
    except Exception as error:  # whatever another library does not like about this machine
        return f"fails here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return None


def weigh(way: str, problem: Problem) -> dict[str, float]:
    """Bytes of one step above those that were held before it, and of these what is left as gradients; and the loss."""
    give_back_when_freed()
    inputs = Inputs(problem)
    Inputs(replace(problem, vocabulary=512, tokens=8)).step(PLAIN)  # one-time allocations of libraries are not counted
    before = held(inputs.device)
    forget_peak(inputs.device)
    loss = inputs.step(way)
    return {"above": peak_memory(inputs.device) - before, "left": held(inputs.device) - before, "loss": loss}


def weigh_all(ways: list[str], problem: Problem) -> dict[str, dict[str, float]]:
    found = {}
    for way in ways:
        say(f"loss: memory of {way}, {problem.tokens} tokens, {problem.dtype}")
        found[way] = alone(weigh, way, problem)
    return found


def memory_rows(problem: Problem, found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "type": problem.dtype,
            "tokens": problem.tokens,
            "way": way,
            "above before, GB": one["above"] / GIGA,
            "of it left as gradients, GB": one["left"] / GIGA,
            "of it temporary, GB": temporary(one) / GIGA,
            "temporary over plain": temporary(one) / temporary(found[PLAIN]),
            "loss, nats": f"{one['loss']:.5f}",
        }
        for way, one in found.items()
    ]


def temporary(found: dict[str, float]) -> float:
    return found["above"] - found["left"]


def time_all(ways: list[str], problem: Problem, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each way."""
    say(f"loss: time, {problem.tokens} tokens, {problem.dtype}")
    inputs = Inputs(problem)

    def of(way: str) -> Callable[[], float]:
        return lambda: inputs.step(way)

    # large blocks are fresh to a CPU every time, so there is nothing to warm up
    return alternate({way: of(way) for way in ways}, rounds, inputs.device, warm=1 if inputs.device.type == "cuda" else 0)


def time_rows(problem: Problem, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    top = ceilings(torch.device(problem.device), torch.bfloat16 if problem.bf16 else torch.float32)
    return [
        {
            "type": problem.dtype,
            "tokens": problem.tokens,
            "way": way,
            "seconds": spread(took),
            "over plain": ratio(took, times[PLAIN]),
            "limit": top.limit(spread(took)["median"], problem.flops, problem.moved),
        }
        for way, took in times.items()
    ]


@case("loss", "The next-token loss")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """Forward and backward from the states to the loss, of random states and a random head. Plain is all logits at once, in float32, and
    cross entropy; bfloat16 is autocast over float32 states and weights; torch's own is given chunks of our size. Memory: each way alone in
    a process; the most that was held during the step, above what was held before it. The gradients of states and head, which every way
    leaves behind, are in it; the bound is on the rest. Time: all ways take turns in one process; a ratio is of pairs. The limit of a row
    is three matrix products, or reading the weight twice and writing its gradient."""
    device, shape = bench.device, bench.pick(TOY, HALF_B, HALF_B)
    vocabulary = bench.pick(32_768, shape.vocabulary, shape.vocabulary)
    ways, missing = ways_here(device)
    few = [way for way in ways if way in (OURS, PLAIN)] if bench.size == "cpu" else ways  # a CPU takes a tenth of a minute for a step

    def problem(dtype: str, tokens: int) -> Problem:
        return Problem(shape.hidden, vocabulary, tokens, device.type, dtype)

    weighed, timed, rounds = bench.pick(
        ({"float32": 512}, {"float32": 64, "bfloat16": 64}, 1),
        ({"float32": 1_792}, {"float32": 512, "bfloat16": 512}, 3),
        ({"bfloat16": 8_192}, {"bfloat16": 8_192}, 10),
    )
    head = f"D {shape.hidden}, V {vocabulary:,}"
    note = f"Not measured: {'; '.join(missing)}." if missing else ""
    memory = {dtype: weigh_all(few, problem(dtype, tokens)) for dtype, tokens in weighed.items()}
    rows = [row for dtype, found in memory.items() for row in memory_rows(problem(dtype, weighed[dtype]), found)]
    yield Table(f"Memory of the loss, {head}", rows, note)
    for dtype, found in memory.items():
        yield from memory_checks(dtype, found, trains_in=bench.pick("float32", "float32", "bfloat16"))
    times = {dtype: time_all(ways if dtype == "float32" else few, problem(dtype, tokens), rounds) for dtype, tokens in timed.items()}
    rows = [row for dtype, took in times.items() for row in time_rows(problem(dtype, timed[dtype]), took)]
    yield Table(f"Time of the loss, {head}", rows, note)
    for dtype, took in times.items():
        yield Check(f"time of the loss, {OURS} over {PLAIN}, {dtype}", ratio(took[OURS], took[PLAIN])["median"], most=TIME_AIM, must=False)


def memory_checks(dtype: str, found: dict[str, dict[str, float]], trains_in: str) -> Iterator[Check]:
    ours, plain = found[OURS], found[PLAIN]
    share = temporary(ours) / temporary(plain)
    yield Check(f"temporary memory of the loss, {OURS} over {PLAIN}, {dtype}", share, most=MEMORY_BOUND, must=dtype == trains_in)
    apart = abs(ours["loss"] - plain["loss"]) / plain["loss"] * 1e6
    yield Check(f"the loss, difference between {OURS} and {PLAIN} in millionths of it, {dtype}", apart, most=AGREEMENT[dtype])

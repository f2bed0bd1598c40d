"""Early exit measured on a text: compute saved, loss added, and the threshold for a given compute budget.

    applications     what a token cost that halted at some cycle
    measure          loss, cycles and layer applications of a text at one threshold
    calibrate        the threshold that spends a budget

The text is read in one pass per window, in which every token halts as it would in writing: what is measured here is what `generate` does.
Compute is counted in layer applications. Reading out for `kl` and `entropy` after every cycle takes the coda once more each, which counts,
and the head once more each, which does not: in a small model with a wide vocabulary that is no small part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..network.decoding_recursive_llm import HaltRule
from ..network.losses import read_out
from ..utils.models import evaluating

_STEPS = 24  # steps of the bisection
_CLOSE = 0.002  # tolerance of the compute share
# Search range: logits of q_head, or logarithms of nats; at its ends a criterion halts always or never.
_RANGES = {"q_head": (-16.0, 16.0), "kl": (-20.0, 5.0), "entropy": (-20.0, 5.0)}


@dataclass(frozen=True)
class HaltingMeasure:
    """Loss and compute of a text at one threshold.

    Args:
        threshold: None is full depth.
        loss: Nats per token.
        cycles: Cycle -> number of tokens that halted there.
        share: Layer applications as a fraction of those at full depth.
    """

    criterion: str
    threshold: float | None
    loss: float
    cycles: dict[int, int]
    share: float


@dataclass(frozen=True)
class Calibration:
    """A threshold and its measurement on the calibration text.

    Args:
        budget: The target share; `chosen.share` is at most this.
        full: The calibration text at full depth.
    """

    budget: float
    chosen: HaltingMeasure
    full: HaltingMeasure

    @property
    def threshold(self) -> float:
        assert self.chosen.threshold is not None
        return self.chosen.threshold

    def render(self) -> str:
        """One line for the log."""
        tokens = sum(self.full.cycles.values())
        return (
            f"--halt_threshold {self.threshold:.6g}: {self.chosen.share:.0%} of the layer applications, loss {self.chosen.loss:.4f} "
            f"against {self.full.loss:.4f} at full depth, on {tokens:,} tokens of the calibration text"
        )


def applications(config: Any, cycles: Iterable[int], criterion: str) -> list[int]:
    """Layer applications per token, given the cycle that it halted at: of an adapter from 0 on; else 0 is padding, which costs nothing.

    Args:
        config: The model's configuration.
        criterion: One of `HALT_CRITERIA`.
    """
    first = config.first_exit

    def cost(cycle: int) -> int:
        readouts = 1 if criterion == "q_head" else cycle + 1 - first
        loop = config.L_layers * max(1, cycle * (config.L_cycles + 1))
        return config.prelude_layers + loop + readouts * config.coda_layers if cycle >= first else 0

    return [cost(cycle) for cycle in cycles]


@torch.no_grad()
def measure(
    model: Any, blocks: torch.Tensor, criterion: str, threshold: float | None = None, H_cycles: int | None = None
) -> HaltingMeasure:
    """Measure `[blocks, tokens]` ids with early exit.

    Args:
        threshold: None does not halt.
        H_cycles: Maximum number of cycles; None is the model's own.
    """
    H = model.config.H_cycles if H_cycles is None else H_cycles
    losses, used = [], []
    with evaluating(model):
        for block in blocks:
            ids = block.unsqueeze(0).to(model.device)
            rule = HaltRule.of(model, None if threshold is None else criterion, threshold)
            outputs = model.model(ids, H_cycles=H, use_cache=False, halt_rule=rule)
            nats, _ = read_out(model.lm_head, outputs.last_hidden_state, ids, torch.ones_like(ids[:, 1:], dtype=torch.bool))
            losses.append(nats.cpu())
            used.append(torch.full(ids.shape, H) if rule is None else outputs.halt_cycles.cpu())
    cycles = torch.cat(used, dim=1).flatten()
    spread = {cycle: int((cycles == cycle).sum()) for cycle in range(model.config.first_exit, H + 1)}
    plain = len(cycles) * model.config.depth(H)
    cost = plain if threshold is None else sum(applications(model.config, cycles.tolist(), criterion))
    return HaltingMeasure(criterion, threshold, torch.cat(losses).mean().item(), spread, cost / plain)


def calibrate(model: Any, blocks: torch.Tensor, criterion: str, budget: float, H_cycles: int | None = None) -> Calibration:
    """The threshold whose compute on a calibration text is closest to the budget without exceeding it.

    Args:
        blocks: `[blocks, tokens]` ids of representative text.
        criterion: One of `HALT_CRITERIA`.
        budget: Layer applications as a fraction of those at full depth, in (0, 1].
        H_cycles: Maximum number of cycles; None is the model's own.

    Raises:
        UserError: Even the earliest possible exit of every token exceeds the budget.
    """
    full = measure(model, blocks, criterion, None, H_cycles)

    def at(x: float) -> HaltingMeasure:
        return measure(model, blocks, criterion, _threshold(criterion, x), H_cycles)

    cheapest, costliest = _RANGES[criterion] if criterion == "q_head" else _RANGES[criterion][::-1]
    best, never = at(cheapest), at(costliest)
    if best.share > budget:
        raise UserError(
            f"--compute_budget: expected at least {best.share:.2f}, the compute at the earliest possible exit by {criterion}, got {budget}"
        )
    if never.share <= budget:
        return Calibration(budget, never, full)
    for _ in range(_STEPS):
        if budget - best.share < _CLOSE:
            break
        found = at((cheapest + costliest) / 2)
        if found.share <= budget:  # more tokens halt than necessary
            cheapest, best = (cheapest + costliest) / 2, found
        else:
            costliest = (cheapest + costliest) / 2
    return Calibration(budget, best, full)


def _threshold(criterion: str, x: float) -> float:
    """The threshold at a point of the search range; its ends mean always and never."""
    low, high = _RANGES[criterion]
    if criterion == "q_head":
        return 0.0 if x <= low else 1.0 if x >= high else 1 / (1 + math.exp(-x))
    return 0.0 if x <= low else math.inf if x >= high else math.exp(x)

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

_STEPS = 24  # halvings of the range in which a threshold is looked for
_CLOSE = 0.002  # share of the compute that two thresholds may differ in and still be as good as the same
# Logits of q_head, and logarithms of nats: beyond these a criterion halts always or never.
_RANGES = {"q_head": (-16.0, 16.0), "kl": (-20.0, 5.0), "entropy": (-20.0, 5.0)}


@dataclass(frozen=True)
class HaltingMeasure:
    """A text at one threshold.

    Args:
        threshold: None is full depth.
        loss: Nats per token.
        cycles: Cycle -> how many tokens halted there.
        share: Layer applications over those at full depth without halting.
    """

    criterion: str
    threshold: float | None
    loss: float
    cycles: dict[int, int]
    share: float


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it does on the text that it was found on.

    Args:
        budget: The share that was asked for; `chosen.share` is at most that.
        full: The same text at full depth.
    """

    budget: float
    chosen: HaltingMeasure
    full: HaltingMeasure

    @property
    def threshold(self) -> float:
        assert self.chosen.threshold is not None
        return self.chosen.threshold

    def render(self) -> str:
        """In a line."""
        tokens = sum(self.full.cycles.values())
        return (
            f"--halt_threshold {self.threshold:.6g}: {self.chosen.share:.0%} of the layer applications, loss {self.chosen.loss:.4f} "
            f"against {self.full.loss:.4f} at full depth, on {tokens:,} tokens of the calibration text"
        )


def applications(config: Any, cycles: Iterable[int], criterion: str) -> list[int]:
    """Layer applications that each token cost, given the cycle that it halted at; 0 for padding, which is given as cycle 0.

    Args:
        config: The model's; its L_cycles count.
        criterion: One of `HALT_CRITERIA`.
    """
    of_cycle, around = config.L_layers * (config.L_cycles + 1), config.prelude_layers
    readouts = (lambda cycle: 1) if criterion == "q_head" else (lambda cycle: cycle)
    return [around + cycle * of_cycle + readouts(cycle) * config.coda_layers if cycle else 0 for cycle in cycles]


@torch.no_grad()
def measure(
    model: Any, blocks: torch.Tensor, criterion: str, threshold: float | None = None, H_cycles: int | None = None
) -> HaltingMeasure:
    """Read `[blocks, tokens]` ids with tokens halting.

    Args:
        threshold: None does not halt.
        H_cycles: Cycles at most; the model's own where None.
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
    spread = {cycle: int((cycles == cycle).sum()) for cycle in range(1, H + 1)}
    plain = len(cycles) * model.config.depth(H)
    cost = plain if threshold is None else sum(applications(model.config, cycles.tolist(), criterion))
    return HaltingMeasure(criterion, threshold, torch.cat(losses).mean().item(), spread, cost / plain)


def calibrate(model: Any, blocks: torch.Tensor, criterion: str, budget: float, H_cycles: int | None = None) -> Calibration:
    """The threshold that spends at most a share of the compute on a text, and no less than it must.

    Args:
        blocks: `[blocks, tokens]` ids of text like that to be written.
        criterion: One of `HALT_CRITERIA`.
        budget: Layer applications over those at full depth, above 0 and at most 1.
        H_cycles: Cycles at most; the model's own where None.

    Raises:
        UserError: A budget that even halting every token as early as can be exceeds.
    """
    full = measure(model, blocks, criterion, None, H_cycles)

    def at(x: float) -> HaltingMeasure:
        return measure(model, blocks, criterion, _threshold(criterion, x), H_cycles)

    cheap, dear = _RANGES[criterion] if criterion == "q_head" else _RANGES[criterion][::-1]
    best, never = at(cheap), at(dear)
    if best.share > budget:
        raise UserError(
            f"--compute_budget: expected at least {best.share:.2f}, the compute at the earliest possible exit by {criterion}, got {budget}"
        )
    if never.share <= budget:
        return Calibration(budget, never, full)
    for _ in range(_STEPS):
        if budget - best.share < _CLOSE:
            break
        found = at((cheap + dear) / 2)
        if found.share <= budget:  # more tokens halt than must
            cheap, best = (cheap + dear) / 2, found
        else:
            dear = (cheap + dear) / 2
    return Calibration(budget, best, full)


def _threshold(criterion: str, x: float) -> float:
    """A point of the range as a threshold; its ends are always and never."""
    low, high = _RANGES[criterion]
    if criterion == "q_head":
        return 0.0 if x <= low else 1.0 if x >= high else 1 / (1 + math.exp(-x))
    return 0.0 if x <= low else math.inf if x >= high else math.exp(x)

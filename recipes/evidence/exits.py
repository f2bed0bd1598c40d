"""Every exit of a model: what each cycle mends and spoils, token by token, and early exit beside fixed depths that cost as much.

Compute is in layer applications per token, those of readouts included (`inference/early_exit.applications`). Thresholds are set on other
text than they are measured on. What a fixed depth of the same compute would give lies on the line between the two nearest depths: that
is what choosing between them at random, sequence by sequence, gives.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from recursify.errors import UserError
from recursify.evaluation.text_loss import states_at
from recursify.inference.early_exit import applications, calibrate
from recursify.network.decoding_recursive_llm import HaltRule
from recursify.network.losses import read_out
from recursify.utils.models import evaluating

BUDGETS = (0.4, 0.6, 0.8)  # of the layer applications of the deepest run
CRITERIA = ("q_head", "kl", "entropy")
CHANGED = 0.05  # nats; a token whose loss changes by less is left as it was
BATCH = 50


@torch.no_grad()
def every_exit(
    model: Any, ids: Tensor, targets: Tensor, places: Tensor, held_out: Tensor, deepest: int, criteria: tuple[str, ...] = CRITERIA
) -> list[dict[str, Any]]:
    """Rows for fixed depths 1 to `deepest`, then for early exit at each budget.

    Args:
        ids, targets: `[B, T]`; the token at t is scored on the target at t + 1.
        places: `[B, T - 1]`, True where a token is scored.
        held_out: `[B, T]` ids that thresholds are set on.
        criteria: A model whose q_head was not trained has two.
    """
    with evaluating(model):
        found = _fixed(model, ids, targets, places, deepest)
        curve = [(row["applications"], row["right"], row["loss"]) for row in found]
        for criterion in criteria:
            for budget in BUDGETS:
                try:
                    threshold = calibrate(model, held_out, criterion, budget, deepest).threshold
                except UserError:  # not even the earliest exit is that cheap
                    continue
                row = _halted(model, ids, targets, places, criterion, threshold, deepest)
                right, loss = (between(curve, row["applications"], figure) for figure in (1, 2))
                found.append({"exit": criterion, "budget": budget, **row, "fixed_right": round(right, 4), "fixed_loss": round(loss, 4)})
    return found


def _fixed(model: Any, ids: Tensor, targets: Tensor, places: Tensor, deepest: int) -> list[dict[str, Any]]:
    nats, right = _read(model, ids, targets, places, range(1, deepest + 1))
    found = []
    for cycle in range(1, deepest + 1):
        before, now = max(0, cycle - 2), cycle - 1  # the first cycle is compared with itself
        change = nats[now] - nats[before]
        found.append(
            {
                "exit": "fixed", "cycles": cycle, "applications": model.config.depth(cycle),
                "right": _share(right[now]), "loss": round(nats[now].mean().item(), 4),
                "mended": _share(right[now] * (1 - right[before])), "spoiled": _share(right[before] * (1 - right[now])),
                "better": _share(change < -CHANGED), "worse": _share(change > CHANGED),
            }
        )  # fmt: skip
    return found


def _halted(model: Any, ids: Tensor, targets: Tensor, places: Tensor, criterion: str, threshold: float, deepest: int) -> dict[str, Any]:
    nats, right, used = [], [], []
    for first in range(0, len(ids), BATCH):
        part = slice(first, first + BATCH)
        output = model.model(ids[part], H_cycles=deepest, use_cache=False, halt_rule=HaltRule.of(model, criterion, threshold))
        read = read_out(model.lm_head, output.last_hidden_state, targets[part], places[part])
        nats.append(read[0])
        right.append(read[1])
        used.append(output.halt_cycles[:, :-1][places[part]])
    cycles = torch.cat(used)
    cost = torch.tensor(applications(model.config, cycles.tolist(), criterion)).float().mean().item()
    return {
        "threshold": float(f"{threshold:.4g}"), "applications": round(cost, 2), "right": _share(torch.cat(right)),
        "loss": round(torch.cat(nats).mean().item(), 4), "thinks": _share(cycles > 1),
        "at": {str(cycle): _share(cycles == cycle) for cycle in range(model.config.first_exit, deepest + 1)},
    }  # fmt: skip


def _read(model: Any, ids: Tensor, targets: Tensor, places: Tensor, depths: range) -> tuple[Tensor, Tensor]:
    """Nats, and 1 where the likeliest token is right: each `[depths, scored tokens]`."""
    found = []
    for first in range(0, len(ids), BATCH):
        part = slice(first, first + BATCH)
        states = states_at(model, ids[part], depths)
        read = [read_out(model.lm_head, state, targets[part], places[part]) for state in states]
        found.append(torch.stack([torch.stack([nats, right.to(nats.dtype)]) for nats, right in read], dim=1))
    nats, right = torch.cat(found, dim=2)
    return nats, right


def between(curve: list[tuple[float, float, float]], cost: float, figure: int) -> float:
    """On the line between the two depths whose cost is nearest; beyond the ends, that of the end.

    Args:
        curve: Points, the cheapest first; the cost of each is its first figure.
        figure: Which figure of the points.
    """
    behind = bisect_left([point[0] for point in curve], cost)
    if behind in (0, len(curve)):
        return curve[min(behind, len(curve) - 1)][figure]
    low, high = curve[behind - 1], curve[behind]
    return low[figure] + (high[figure] - low[figure]) * (cost - low[0]) / (high[0] - low[0])


def _share(flags: Tensor) -> float:
    return round(flags.float().mean().item(), 4)

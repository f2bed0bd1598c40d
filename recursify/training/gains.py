"""Where the gains of a loop start: as large as costs next to nothing.

At gain 0 the model is the donor exactly, but only two of the four gains get a gradient and the rest of the loop learns nothing; at a large
gain the donor is broken before training begins. So the start is chosen on held-out text: the largest gain of a few whose cost at the
trained depth is at most MAX_COST. Floor 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..network.modeling_recursive_llm import AnchoredInjection

CANDIDATES = (0.45, 0.2, 0.1, 0.05)  # from the largest that there is
MAX_COST = 0.02  # nats per token of the last cycle, over the plain pass
CALIBRATION_TOKENS = 8192  # fewer gave costs that differed by 0.04 nats from one text to the next


def injections(model: Any) -> list[AnchoredInjection]:
    """Those that have gains; none with the bare sum."""
    return [module for module in model.model.recursion.children() if isinstance(module, AnchoredInjection)]


def all_zero(model: Any) -> bool:
    """Whether the model has gains, and all are 0: as it was converted, and never trained."""
    return bool(injections(model)) and not any(p.any() for module in injections(model) for p in module.parameters())


@torch.no_grad()
def set_gains(model: Any, gain: float) -> None:
    """One gain for all channels."""
    for module in injections(model):
        for theta in module.parameters():
            theta.fill_(math.atanh(gain))


def calibrate(model: Any, loss: Callable[[], float], candidates: Sequence[float] = CANDIDATES) -> tuple[float, list[tuple[float, float]]]:
    """Set the largest of the candidates that costs at most MAX_COST, else the smallest.

    Args:
        loss: The model's loss at its trained depth on some held-out text, as it is then.
        candidates: From the largest.

    Returns:
        The gain, and the sweep: (gain, cost over gain 0) of all that were tried.
    """
    set_gains(model, 0.0)
    exact, sweep = loss(), []
    for gain in candidates:
        set_gains(model, gain)
        sweep.append((gain, loss() - exact))
        if sweep[-1][1] <= MAX_COST:
            break
    return sweep[-1][0], sweep

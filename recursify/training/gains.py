"""Initial gains of the loop: a sweep on validation text.

At gain 0 the model is the donor exactly, but only two of the four gains get a gradient and the rest of the loop learns nothing; at a large
gain the donor is broken before training begins. So the start is chosen on held-out text: the largest gain of a few whose cost at the
trained depth is at most MAX_COST.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..network.losses import counted
from ..network.modeling_recursive_llm import AnchoredInjection
from ..utils.models import is_recursive
from .loss_module import LossModule
from .parallel import announce
from .settings import DonorSettings, RunSettings

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


def start_gains(
    loss_module: LossModule, blocks: Any, collate: Callable[[Any], dict[str, Tensor]], settings: RunSettings, device: torch.device
) -> None:
    """The gains that the loop starts from (see `gains`): those of the settings, else the swept ones where the model's own are all 0."""
    model = loss_module.model
    if not is_recursive(model):
        return
    if settings.start_gain is not None:
        set_gains(model, settings.start_gain)
        return
    if not all_zero(model):
        return
    if isinstance(settings, DonorSettings) and settings.starts_fresh:  # a loop that knows nothing yet has nothing to lose
        set_gains(model, CANDIDATES[0])
        return
    model.to(device).eval()
    rows = [blocks[i] for i in range(min(max(1, CALIBRATION_TOKENS // settings.seq_len), len(blocks)))]
    batches = [collate(rows[i : i + settings.batch_size]) for i in range(0, len(rows), settings.batch_size)]
    scorer = LossModule(model, objective=loss_module.objective)
    gain, sweep = calibrate(model, lambda: _mean_loss(scorer, batches, device))
    (gain,) = broadcast_object_list([gain])  # of the first rank: others may round another way
    set_gains(model, gain)
    tried = ", ".join(f"{g:g} costs {cost:+.4f}" for g, cost in sweep)
    why = f"the largest that costs at most {MAX_COST:g}" if sweep[-1][1] <= MAX_COST else f"the smallest; all cost more than {MAX_COST:g}"
    announce(f"The loop starts from gain {gain:g}, {why}: {tried} (--start_gain names another)")


@torch.no_grad()
def _mean_loss(scorer: LossModule, batches: Sequence[dict[str, Tensor]], device: torch.device) -> float:
    """The mean loss of the cycle that is read out."""
    tokens = sum(int(counted(batch["labels"])) for batch in batches)
    parts = [scorer(**{name: value.to(device) for name, value in batch.items()}, num_items_in_batch=tokens) for batch in batches]
    return float(sum(part["loss"] for part in parts))

"""Initial gains of the loop: a sweep on validation text.

At gain 0 the model equals the donor, but only two of the four gains get a gradient and the rest of the loop is not trained; a large gain
damages the donor before training begins. So the initial gain is chosen on held-out text: the largest of a few candidates that raises the
loss at the trained depth by at most MAX_COST.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from ..network.losses import counted
from ..network.modeling_recursive_llm import AnchoredInjection
from ..utils.models import is_recursive
from .loss_module import LossModule
from .parallel import announce
from .settings import DonorSettings, RunSettings

CANDIDATES = (0.45, 0.2, 0.1, 0.05)  # descending; the first is the largest possible gain
MAX_COST = 0.02  # increase of the loss of the last cycle over gain 0, in nats per token
CALIBRATION_TOKENS = 8192  # with fewer, the cost varied by 0.04 nats between texts


def injections(model: Any) -> list[AnchoredInjection]:
    """The injections with gains; none with `sum_norm`."""
    return [module for module in model.model.recursion.children() if isinstance(module, AnchoredInjection)]


def all_zero(model: Any) -> bool:
    """Whether the model has gains, and all are 0: converted, and not yet trained."""
    return bool(injections(model)) and not any(p.any() for module in injections(model) for p in module.parameters())


@torch.no_grad()
def set_gains(model: Any, gain: float) -> None:
    """Set the same gain for all channels."""
    for module in injections(model):
        for theta in module.parameters():
            theta.fill_(math.atanh(gain))


def calibrate(model: Any, loss: Callable[[], float], candidates: Sequence[float] = CANDIDATES) -> tuple[float, list[tuple[float, float]]]:
    """Set the largest candidate that costs at most MAX_COST, else the smallest.

    Args:
        loss: Computes the current loss of the model at its trained depth on held-out text.
        candidates: In descending order.

    Returns:
        The gain, and the sweep: (gain, increase of the loss over gain 0) of all candidates tried.
    """
    set_gains(model, 0.0)
    baseline, sweep = loss(), []
    for gain in candidates:
        set_gains(model, gain)
        sweep.append((gain, loss() - baseline))
        if sweep[-1][1] <= MAX_COST:
            break
    return sweep[-1][0], sweep


def start_gains(
    loss_module: LossModule, blocks: Any, collate: Callable[[Any], dict[str, Tensor]], settings: RunSettings, device: torch.device
) -> None:
    """Set the initial gains: those of the settings; else, if all gains of the model are 0, those of the sweep."""
    model = loss_module.model
    if not is_recursive(model):
        return
    if settings.start_gain is not None:
        set_gains(model, settings.start_gain)
        return
    if not all_zero(model):
        return
    if isinstance(settings, DonorSettings) and settings.starts_fresh:  # a randomly initialised loop has nothing to preserve
        set_gains(model, CANDIDATES[0])
        return
    model.to(device).eval()
    rows = [blocks[i] for i in range(min(max(1, CALIBRATION_TOKENS // settings.seq_len), len(blocks)))]
    batches = [collate(rows[i : i + settings.batch_size]) for i in range(0, len(rows), settings.batch_size)]
    scorer = LossModule(model, objective=loss_module.objective)
    runs = 1 + len(CANDIDATES)
    announce(f"Choosing the initial gain: up to {runs} passes over {len(rows)} validation sequences (--start_gain skips this)")
    passes = runs * len(batches)
    with tqdm(total=passes, desc="Initial gain", disable=not PartialState().is_main_process or None, leave=False, file=sys.stderr) as bar:
        gain, sweep = calibrate(model, lambda: _mean_loss(scorer, batches, device, bar))
    (gain,) = broadcast_object_list([gain])  # from the first rank: rounding may differ between ranks
    set_gains(model, gain)
    tried = ", ".join(f"{g:g}: {cost:+.4f}" for g, cost in sweep)
    why = f"the largest whose validation loss is at most {MAX_COST:g} above that of gain 0, at which the loop hardly learns"
    if sweep[-1][1] > MAX_COST:
        why = f"the smallest: all are more than {MAX_COST:g} above the loss at gain 0, as expected of a compact model"
    announce(f"Initial gain {gain:g}, {why} ({tried}); --start_gain sets another")


@torch.no_grad()
def _mean_loss(scorer: LossModule, batches: Sequence[dict[str, Tensor]], device: torch.device, bar: Any = None) -> float:
    """The mean loss at H_cycles, per token."""
    tokens, total = sum(int(counted(batch["labels"])) for batch in batches), 0.0
    for batch in batches:
        total += float(scorer(**{name: value.to(device) for name, value in batch.items()}, num_items_in_batch=tokens)["loss"])
        if bar is not None:
            bar.update()
    return total

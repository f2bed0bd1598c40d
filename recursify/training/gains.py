"""The start gain, the value that all gains start from: a sweep on validation text.

At gain 0 the model equals the donor, but only two of the four gains get a gradient and the rest of the loop is not trained; a large gain
damages the donor before training begins. So the start gain is chosen on held-out text: the largest of a few candidates that raises the
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
CERTAIN_TOKENS, CERTAIN_COST = 1024, 0.2  # a guess: ten times MAX_COST is beyond what texts differ by


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


def sweep_length(model: Any, blocks: Any, settings: RunSettings) -> int:
    """Number of held-out sequences that `start_gains` measures candidates on; 0 if it will not."""
    if not is_recursive(model) or settings.start_gain is not None or not all_zero(model) or _starts_fresh(settings):
        return 0
    return min(max(1, CALIBRATION_TOKENS // settings.seq_len), len(blocks))


def _starts_fresh(settings: RunSettings) -> bool:
    return isinstance(settings, DonorSettings) and settings.starts_fresh


def start_gains(
    loss_module: LossModule, blocks: Any, collate: Callable[[Any], dict[str, Tensor]], settings: RunSettings, device: torch.device
) -> None:
    """Set the start gain: that of the settings; else, if all gains of the model are 0, that of the sweep."""
    model, count = loss_module.model, sweep_length(loss_module.model, blocks, settings)
    if is_recursive(model) and settings.start_gain is not None:
        set_gains(model, settings.start_gain)
    elif is_recursive(model) and all_zero(model) and _starts_fresh(settings):  # a randomly initialised loop has nothing to preserve
        set_gains(model, CANDIDATES[0])
    if not count:
        return
    model.to(device).eval()
    rows = [blocks[i] for i in range(count)]
    batches = [collate(rows[i : i + settings.batch_size]) for i in range(0, count, settings.batch_size)]
    runs = 1 + len(CANDIDATES)
    announce(f"Choosing the start gain: up to {runs} passes over {count} validation sequences (--start_gain skips this)")
    passes = runs * len(batches)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=bool(settings.bf16)),
        tqdm(total=passes, desc="Start gain", disable=not PartialState().is_main_process or None, leave=False, file=sys.stderr) as bar,
    ):
        gain, sweep = calibrate(model, HeldOutLoss(LossModule(model, objective=loss_module.objective), batches, device, bar.update))
    (gain,) = broadcast_object_list([gain])  # from the first rank: rounding may differ between ranks
    set_gains(model, gain)
    tried = ", ".join(f"{g:g}: {cost:+.4f}" for g, cost in sweep)
    why = f"the largest that raises the validation loss by at most {MAX_COST:g} nats"
    if sweep[-1][1] > MAX_COST:
        why = f"the smallest: all raise the validation loss by more than {MAX_COST:g} nats, as expected of a compact model"
    hint = "with a larger one the loop learns more: --start_gain sets it" if gain < CANDIDATES[0] else "--start_gain sets another"
    announce(f"Start gain {gain:g}, {why} (tried: {tried}); {hint}")


class HeldOutLoss:
    """The mean loss at H_cycles, in nats per token, of the model as it is when called.

    The first call measures the baseline on all batches. A later one stops after `CERTAIN_TOKENS` once the loss is above the baseline by
    more than `CERTAIN_COST`: such a candidate is out, whatever the rest of the text says.
    """

    def __init__(self, scorer: LossModule, batches: Sequence[dict[str, Tensor]], device: torch.device, update: Callable[[], Any]):
        self.scorer, self.batches, self.device, self.update = scorer, batches, device, update
        self.baseline: list[float] | None = None  # summed loss of each batch

    @torch.no_grad()
    def __call__(self) -> float:
        sums: list[float] = []
        tokens, before = 0, self.baseline
        for batch in self.batches:
            inputs = {name: value.to(self.device) for name, value in batch.items()}
            sums.append(float(self.scorer(**inputs, num_items_in_batch=1)["loss"]))
            tokens += int(counted(batch["labels"]))
            self.update()
            if before is not None and tokens >= CERTAIN_TOKENS:
                cost = (sum(sums) - sum(before[: len(sums)])) / tokens
                if cost > CERTAIN_COST:
                    return sum(before) / self._tokens() + cost
        self.baseline = before or sums
        return sum(sums) / max(1, tokens)

    def _tokens(self) -> int:
        return sum(int(counted(batch["labels"])) for batch in self.batches)

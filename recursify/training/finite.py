"""The end of a run at a gradient that is not finite: the weights are not updated, and the batches of the step are kept.

The host does not wait for the device to find out. Fused AdamW skips the step by itself, by a flag on the device, as under a gradient
scaler; the host reads the norm a step later, or before anything of the step is logged, validated or saved. The other optimizers cannot
skip a step, so there the host waits for every norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from ..errors import UserError
from ..utils.atomic import write_atomic


@dataclass(frozen=True)
class Step:
    """An optimizer step that is made, or about to be.

    Args:
        number: From 1.
        depth: Its cycles; None for a model without cycles.
        batches: Its micro-batches.
        cycle_losses: `[cycles]`, of the last micro-batch.
    """

    number: int
    depth: int | None
    batches: list[dict[str, Any]]
    cycle_losses: Tensor | None


class GradientCheck:
    """Raises a UserError for the first step whose gradient norm is not finite.

    Args:
        folder: For the batches of that step; None does not keep them.
        rank: Of this process.
    """

    def __init__(self, folder: Path | None, rank: int):
        self.folder, self.rank = folder, rank
        self.pending: tuple[Step, HostCopy] | None = None

    def watch(self, step: Step, norm: Any, optimizer: Any) -> None:
        """Call before the optimizer updates the weights; settles the step before.

        Args:
            norm: Of the step's gradients.
        """
        self.settle()
        norm = torch.as_tensor(norm)  # a number from DeepSpeed
        self.pending = step, HostCopy(norm)
        if not _skips_if_not_finite(optimizer, norm):
            self.settle()

    def settle(self) -> None:
        """Read the norm that has not been read yet, if there is one; call before anything of its step is used.

        Raises:
            UserError: It is not finite.
        """
        if self.pending is None:
            return
        (step, copy), self.pending = self.pending, None
        if not math.isfinite(norm := copy.read()):
            raise self._error(step, norm)

    def _error(self, step: Step, norm: float) -> UserError:
        losses = [] if step.cycle_losses is None else step.cycle_losses.tolist()
        first = next((f"; the loss of cycle {i} is {loss}" for i, loss in enumerate(losses, start=1) if not math.isfinite(loss)), "")
        where = self._keep(step, losses)
        return UserError(
            f"step {step.number}: expected a finite gradient norm, got {norm}{first}. The weights were not updated{where}. Continue from "
            "the last checkpoint with --resume and a lower --lr or --max_grad_norm, or without --bf16"
        )

    def _keep(self, step: Step, losses: list[float]) -> str:
        """Save the batches; returns where."""
        if self.folder is None:
            return ""
        file = self.folder / f"nan_step_{step.number}_rank_{self.rank}.pt"
        batches = [{name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)} for batch in step.batches]
        content = {"step": step.number, "H_cycles": step.depth, "batches": batches, "cycle_losses": losses}
        try:
            write_atomic({file: lambda target: torch.save(content, target)})
        except UserError as error:
            return f"; the batches of the step could not be saved ({error})"
        return f"; the batches of the step are in {file}"


class HostCopy:
    """A number of a device, which is copied to the host while both go on."""

    def __init__(self, value: Tensor):
        self.value = value.detach().to("cpu", non_blocking=value.is_cuda)
        self.arrived = torch.cuda.Event() if value.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> float:
        """The number; waits until it has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.value)


def _skips_if_not_finite(optimizer: Any, norm: Tensor) -> bool:
    """Have the optimizer leave weights and states as they are where the norm is not finite; False if it cannot."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's
    if type(inner) is not AdamW or norm.device.type not in ("cpu", "cuda"):
        return False
    inner.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
    return True

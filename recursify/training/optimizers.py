"""Parameter groups, learning-rate schedules, optimizers, and the moving average of the weights.

    parameter_groups        which weights have which rate and decay
    learning_rate_factor    the schedules; warmup_of says how long the warm-up is
    build_optimizer         adamw, muon or adamw_8bit; MuonAdamW is the second of them
    EMA                     an exponential moving average of the weights, and a way to try it on

Units: steps are optimizer steps, learning rates are per step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import UserError
from ..utils.models import is_recursive
from .settings import RunSettings

ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def parameter_groups(model: Any, settings: RunSettings) -> list[dict[str, Any]]:
    """Trainable parameters in three groups: matrices (with weight decay), norms and biases, and the recursion's own parameters. Any group
    may be empty."""
    own = {id(p) for p in model.model.recursion.parameters()} if is_recursive(model) else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    donors = [p for p in trained if id(p) not in own]
    return [
        {"params": [p for p in donors if p.ndim > 1], "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [p for p in donors if p.ndim <= 1], "lr": settings.lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in own], "lr": settings.gain_learning_rate, "weight_decay": 0.0},
    ]


def learning_rate_factor(schedule: str, step: int, warmup: int, total: int, decay_share: float) -> float:
    """Factor on the learning rate in optimizer step `step` (from 0).

    Every schedule rises to 1 at the end of the warm-up and would reach 0 one step after the last; no step has a rate of 0.

    Args:
        schedule: linear decays linearly after the warm-up; cosine along half a cosine; wsd (warm-up, stable, decay) stays at 1
            and decays linearly over the last part of the run.
        warmup: Warm-up steps, fewer than `total`.
        total: Steps of the run.
        decay_share: That last part as a fraction of the run, at most everything after the warm-up. Only for wsd.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left, after_warmup = max(0, total - step), total - warmup
    if schedule == "linear":
        return left / after_warmup
    if schedule == "cosine":
        return math.sin(math.pi / 2 * left / after_warmup) ** 2  # (1 + cos) / 2 without the cancellation near its end
    assert schedule == "wsd", schedule
    return min(1.0, left / max(1.0, min(decay_share * total, after_warmup)))


def warmup_of(settings: RunSettings, total: int) -> int:
    """Warm-up steps: those of the settings, or a tenth of the run if they would exceed half of it."""
    return settings.warmup_steps if settings.warmup_steps <= total // 2 else total // 10


def build_optimizer(model: Any, settings: RunSettings) -> Optimizer:
    """Build the optimizer of the settings over `parameter_groups`.

    The first group has the rate `lr`, which is the one in the logs.

    Raises:
        UserError: adamw_8bit without torchao.
    """
    groups = parameter_groups(model, settings)
    if settings.optimizer == "muon":
        return MuonAdamW(*_split(groups, _ends(model)))
    if settings.optimizer == "adamw_8bit":
        return adamw_8bit()(groups, **ADAMW)
    return AdamW(groups, **ADAMW, fused=True)


def _ends(model: Any) -> set[int]:
    """Ids of the embedding and head parameters, whose rows are entries of a table rather than a linear map."""
    modules = [*(m for m in model.modules() if isinstance(m, nn.Embedding)), model.get_output_embeddings()]
    return {id(p) for module in modules for p in module.parameters()}


def _split(groups: list[dict[str, Any]], ends: set[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for Muon and for AdamW: Muon gets the donor's matrices except embeddings and head; 3-D stacks of matrices go to AdamW."""
    matrices, *others = groups
    inside = [p for p in matrices["params"] if p.ndim == 2 and id(p) not in ends]
    taken = {id(p) for p in inside}
    rest = [p for p in matrices["params"] if id(p) not in taken]
    return [matrices | {"params": inside}], [matrices | {"params": rest}, *others]


class MuonAdamW(Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal before each step. Its
    steps are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate and one decay serve both.

    Groups and state live here, where schedulers, checkpoints and accelerate expect them; the two torch optimizers inside
    compute the steps, each over the groups whose `method` names it.

    Args:
        matrices: Groups for Muon, of matrices only.
        others: Groups for AdamW.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]):
        self.methods: dict[str, Optimizer] = {
            "muon": Muon(matrices, adjust_lr_fn="match_rms_adamw"),
            "adamw": AdamW(others, **ADAMW, fused=True),
        }
        super().__init__([group | {"method": name} for name, method in self.methods.items() for group in method.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both optimizers. Returns the value of `closure`, which recomputes the loss, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, method in self.methods.items():
            # At every step: load_state_dict replaces the group and state objects.
            method.param_groups = [group for group in self.param_groups if group["method"] == name]
            method.state = self.state
            method.step()
        return loss


def adamw_8bit() -> type[Optimizer]:
    """torchao's AdamW, which keeps its two moments in 8 bits each where a parameter has 4,096 elements or more.

    It compiles its step for every parameter shape: the first step is slow and needs a C++ compiler on a CPU. Its learning rates
    are tensors.

    Raises:
        UserError: torchao is not installed, or older than 0.11.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"--optimizer adamw_8bit: expected torchao, 0.11 or later, to be installed ({error}); pip install torchao, or choose "
            "--optimizer adamw"
        ) from error
    warnings.filterwarnings("ignore", "OptimState8bit does not implement _stable_hash_for_caching", UserWarning)
    return AdamW8bit


class EMA:
    """Exponential moving average of the trained weights: average = d * average + (1 - d) * weights after every step.

    After n updates d is min(decay, (1 + n) / (10 + n)), so that the initial weights fade in short runs: while d
    grows, n updates leave 1 / C(n + 9, 9) of them, 1e-7 after 20. It reaches `decay` after about 9 / (1 - decay) updates.

    Args:
        parameters: The model's parameters on their final device, sharded if they will be. Frozen ones are ignored.
        decay: In (0, 1); the average spans about 1 / (1 - decay) steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.averages = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.decay, self.updates = decay, 0

    def update(self) -> None:
        """Update the average with the current weights; call after every optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.averages, [p.detach().float() for p in self.parameters], self.updates)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the model has the averaged weights; its own are restored bit for bit. No training inside.

        Needs the memory of one more copy of the weights, as much as the gradients of a step. Under FSDP2 a unit that is unsharded at
        entry or exit goes on with its current weights: `reshard` it first.
        """
        own = [p.detach().clone() for p in self.parameters]
        try:
            self._fill(self.averages)
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """`updates` so far, and the `averages` in the order of the parameters (references, as in optimizers)."""
        return {"updates": self.updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: The number of averages is not the number of parameters.
        """
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
        self.updates = state["updates"]

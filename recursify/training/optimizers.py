"""Parameter groups, learning-rate schedules, optimizers, and the moving average of the weights.

    parameter_groups        learning rate and weight decay of each parameter
    learning_rate_factor    the schedules; warmup_of gives the length of the warm-up
    build_optimizer         adamw, muon (MuonAdamW) or adamw_8bit
    EMA                     an exponential moving average of the weights, which can be swapped in

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
    """The trainable parameters in three groups: matrices, with weight decay; norms, biases and low-rank updates; gains, initial states and
    halting head. Groups may be empty."""
    recursion = model.model.recursion if is_recursive(model) else None
    updates = {id(p) for p in recursion.lora.parameters()} if recursion is not None and recursion.is_adapter else set()
    own = set() if recursion is None else {id(p) for p in recursion.parameters()} - updates
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in own]
    matrices = [p for p in others if p.ndim > 1 and id(p) not in updates]
    kept = {id(p) for p in matrices}
    return [
        {"params": matrices, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": [p for p in others if id(p) not in kept], "lr": settings.lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in own], "lr": settings.gain_learning_rate, "weight_decay": 0.0},
    ]


def learning_rate_factor(schedule: str, step: int, warmup: int, total: int, decay_share: float) -> float:
    """Factor of the learning rate in optimizer step `step`, from 0.

    Every schedule rises linearly to 1 at the end of the warm-up and reaches 0 after the last step; no step has a rate of 0.

    Args:
        schedule: linear decays linearly after the warm-up; cosine along half a cosine; wsd (warm-up, stable, decay) stays at 1 and decays
            linearly at the end of the run.
        warmup: Warm-up steps, fewer than `total`.
        total: Steps of the run.
        decay_share: Share of the run, 0 to 1, in which wsd decays; at most all steps after the warm-up.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left, after_warmup = max(0, total - step), total - warmup
    if schedule == "linear":
        return left / after_warmup
    if schedule == "cosine":
        return math.sin(math.pi / 2 * left / after_warmup) ** 2  # (1 + cos) / 2 without cancellation near 0
    assert schedule == "wsd", schedule
    return min(1.0, left / max(1.0, min(decay_share * total, after_warmup)))


def warmup_of(settings: RunSettings, total: int) -> int:
    """The warm-up in optimizer steps: warmup_steps, or a tenth of the run if they are more than half of it."""
    return settings.warmup_steps if settings.warmup_steps <= total // 2 else total // 10


def build_optimizer(model: Any, settings: RunSettings) -> Optimizer:
    """The optimizer of the settings, over `parameter_groups`.

    Its first group has the rate `lr`, which is the one in the logs.

    Raises:
        UserError: adamw_8bit without torchao.
    """
    groups = parameter_groups(model, settings)
    if settings.optimizer == "muon":
        return MuonAdamW(*_split_for_muon(groups, _embedding_parameters(model)))
    if settings.optimizer == "adamw_8bit":
        return adamw_8bit()(groups, **ADAMW)
    return AdamW(groups, **ADAMW, fused=True)


def _embedding_parameters(model: Any) -> set[int]:
    """Ids of the parameters of embeddings and head, whose rows belong to tokens: Muon is for linear maps."""
    modules = [*(m for m in model.modules() if isinstance(m, nn.Embedding)), model.get_output_embeddings()]
    return {id(p) for module in modules for p in module.parameters()}


def _split_for_muon(groups: list[dict[str, Any]], embeddings: set[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups for Muon and those for AdamW. Muon gets the donor's 2-D matrices, except embeddings and head."""
    matrices, *others = groups
    muon = [p for p in matrices["params"] if p.ndim == 2 and id(p) not in embeddings]
    taken = {id(p) for p in muon}
    rest = [p for p in matrices["params"] if id(p) not in taken]
    return [matrices | {"params": muon}], [matrices | {"params": rest}, *others]


class MuonAdamW(Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix before each step. Its
    updates are scaled to the RMS of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that both use the same learning rate and weight decay.

    Groups and state are attributes of this optimizer, where schedulers, checkpoints and accelerate expect them; the two inner optimizers
    of torch compute the steps, each over the groups with its name as `method`.

    Args:
        matrices: Groups for Muon, matrices only.
        others: Groups for AdamW.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]):
        self.methods: dict[str, Optimizer] = {
            "muon": Muon(matrices, adjust_lr_fn="match_rms_adamw"),
            "adamw": AdamW(others, **ADAMW, fused=True),
        }
        super().__init__([group | {"method": name} for name, method in self.methods.items() for group in method.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both optimizers. `closure` recomputes the loss; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, method in self.methods.items():
            # At each step, because load_state_dict replaces groups and state.
            method.param_groups = [group for group in self.param_groups if group["method"] == name]
            method.state = self.state
            method.step()
        return loss


def adamw_8bit() -> type[Optimizer]:
    """torchao's AdamW with 8-bit moments for parameters of 4,096 elements or more.

    It compiles the update of every parameter shape: the first step takes longer, and on a CPU needs a C++ compiler. Its learning rates
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
    """An exponential moving average of the trainable weights: average = d * average + (1 - d) * weights after every step.

    After n updates d is min(decay, (1 + n) / (10 + n)), so that the average of a short run is not dominated by the initial weights: while
    d grows, n updates leave 1 / C(n + 9, 9) of them, a ten-millionth after 20. It reaches `decay` after about 9 / (1 - decay) updates.

    Args:
        parameters: Those of the model, on their final device and already sharded. Frozen parameters are skipped.
        decay: Between 0 and 1, exclusive; the average covers about the last 1 / (1 - decay) steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.averages = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.decay, self.updates = decay, 0

    def update(self) -> None:
        """Add the current weights to the average; call after every optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.averages, [p.detach().float() for p in self.parameters], self.updates)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Replaces the weights of the model by their averages, and restores them exactly on exit. Do not train inside.

        Needs memory for one more copy of the weights, as much as the gradients of a step. Under FSDP2, a unit that is unsharded on entry
        or exit keeps using its old weights: `reshard` it first.
        """
        own = [p.detach().clone() for p in self.parameters]
        try:
            self._set_weights(self.averages)
            yield
        finally:
            self._set_weights(own)

    @torch.no_grad()
    def _set_weights(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """`updates` so far, and the `averages` in the order of the parameters; not copied, as for optimizers."""
        return {"updates": self.updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from a `state_dict`.

        Raises:
            ValueError: The number of averages differs from the number of parameters.
        """
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
        self.updates = state["updates"]

"""Baselines: other ways to loop a donor's layers in place of ours; small, and faithful in what is looped and how the state is updated.

    naive      the layers again and again, z = F(z)
    concat     z = F(W [z; e]) from a random state, as retrofitting-recurrence has it (arXiv 2511.07384)
    gate       z = a * F(z) + (1 - a) * z with a selective gate, as LoopUS has it (arXiv 2605.11011)

`bare sum` needs no class: it is `injection="sum_norm"` of the library. Each takes the place of `model.model.recursion`, so that plan,
coda, data, objective, optimizer and evaluation equal those of all other rows; only the recursion differs. A cycle is as many
applications of the block as one of ours, and all of them can be read out after every cycle.

Left out of the originals, and so not evaluated here: Poisson-drawn depths and truncated backpropagation of the
first, the halting head and the optimizer step after every loop of the second.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.evidence.anchors import ANCHORS
from recursify.network.modeling_recursive_llm import Recursion


class OneState(Recursion):
    """A loop over `z_H` alone: H_cycles * (L_cycles + 1) applications of the block, read out after each L_cycles + 1."""

    def __init__(self, config: Any):
        super().__init__(config, ())
        self.anchored = False
        for name in ("inject_L", "inject_H"):
            delattr(self, name)

    def start(self, e: Tensor) -> tuple[Tensor, Tensor]:
        return e, e

    def update(self, z: Tensor, e: Tensor, block: Any, n: int) -> Tensor:
        raise NotImplementedError

    def _advance_one(self, e: Tensor, z_L: Tensor, z_H: Tensor, block: Any, n: int, L_cycles: int, gains: Any) -> tuple[Tensor, Tensor]:
        return z_L, self.update(z_H, e, block, n)


class Naive(OneState):
    """No anchor, no new parameters."""

    def update(self, z: Tensor, e: Tensor, block: Any, n: int) -> Tensor:
        return block(z, n)


class Concat(OneState):
    """A linear adapter on state and prelude, at random as in the original, from a state that is drawn anew for every pass."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        nn.init.trunc_normal_(self.adapter.weight, std=math.sqrt(2 / (5 * config.hidden_size)))

    def start(self, e: Tensor) -> tuple[Tensor, Tensor]:
        z = nn.init.trunc_normal_(torch.empty_like(e, dtype=torch.float32), std=math.sqrt(2 / 5)).to(e.dtype)
        return e, z

    def update(self, z: Tensor, e: Tensor, block: Any, n: int) -> Tensor:
        return block(self.adapter(torch.cat([z, e], dim=-1)), n)


class Gate(OneState):
    """a = exp(-softplus(low-rank map of the change) * exp(A_log)), per token and channel; starts as in the original."""

    RANK_SHARE, STEPS = 16, (1e-3, 1e-1)

    def __init__(self, config: Any):
        super().__init__(config)
        D = config.hidden_size
        rank = math.ceil(D / self.RANK_SHARE)
        self.down, self.up = nn.Linear(D, rank, bias=False), nn.Linear(rank, D)
        self.A_log = nn.Parameter(torch.arange(1, D + 1).float().log())
        nn.init.uniform_(self.up.weight, -(rank**-0.5), rank**-0.5)
        low, high = map(math.log, self.STEPS)
        with torch.no_grad():
            self.up.bias.copy_(torch.empty(D).uniform_(low, high).exp().expm1().log())  # softplus of it is log-uniform in STEPS

    def update(self, z: Tensor, e: Tensor, block: Any, n: int) -> Tensor:
        new = block(z, n)
        step = F.softplus(self.up(self.down(new - z)).float())
        kept = torch.exp(-step * self.A_log.exp()).to(new.dtype)
        return kept * new + (1 - kept) * z


RIVALS: dict[str, type[OneState]] = {"naive": Naive, "concat": Concat, "gate": Gate}


def replace_loop(model: Any, rival: str) -> Any:
    """The model with the recursion of a baseline, or with another anchor, in place of its own; layers and plan stay."""
    own = model.model.recursion
    other = (RIVALS | ANCHORS)[rival](model.config)
    other.q_head = own.q_head
    model.model.recursion = other.to(next(own.parameters()).dtype)
    return model

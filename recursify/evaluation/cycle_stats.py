"""Statistics of the cycles on a text: loss reduction, predictions corrected and broken, movement of the state, exit cycles.

    sums_of_cycles    what a batch of windows says about the cycles, as sums over the scored tokens of each window
    sums_of_halting   the same for a pass in which tokens halt
    summarise         these sums over all windows, as the figures of a report

Sums are `[rows, windows]` in float64, so several processes can divide the windows, and the figures do not depend on how. A guess
is the token with the largest logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..inference.early_exit import applications
from ..network.decoding_recursive_llm import HALT_CRITERIA, HaltRule
from ..network.losses import read_out
from ..utils.tables import table
from .statistics import mean_and_error

Sums = dict[str, Tensor]  # name -> [rows, windows]
LEGEND = (
    "  corrected: the top-1 prediction was wrong and became right; broken: right,",
    "  became wrong; state moved: the distance between the two states that the head",
    "  reads, relative to the norm of the first",
)


@dataclass(frozen=True)
class Step:
    """The change from one cycle to a later one; shares of scored tokens, loss in nats per token.

    Args:
        loss_reduction: Loss before minus loss after.
        loss_reduction_error: Standard error of that difference, paired by window.
        corrected: Share of tokens whose top-1 prediction was wrong before and is right after.
        broken: Share of tokens whose top-1 prediction was right before and is wrong after.
        distance: Mean of ||z_after - z_before|| / ||z_before|| over final hidden states that predict a scored token; None if the cycles are
            not adjacent.
    """

    before: int
    after: int
    loss_reduction: float
    loss_reduction_error: float | None
    corrected: float
    broken: float
    distance: float | None

    def cells(self, mark: str = "") -> tuple[str, ...]:
        """Cells of a table row."""
        error = "-" if self.loss_reduction_error is None else f"{self.loss_reduction_error:.4f}"
        moved = "" if self.distance is None else f"{self.distance:.4f}"
        cycles, reduction = f"{self.before} -> {self.after}", f"{self.loss_reduction:+.4f}"
        return cycles, reduction, error, f"{self.corrected:.2%}", f"{self.broken:.2%}", moved, mark


@dataclass(frozen=True)
class Halting:
    """Results on a text with early exit.

    Args:
        threshold: As used; the criterion's default if none was given.
        H_cycles: Maximum number of cycles.
        loss, standard_error: Nats per scored token.
        extra_loss, extra_loss_error: Loss minus that of full depth, and the standard error of that difference.
        cycles: Cycle -> share of scored predictions that halted there.
        layer_applications: Mean per token.
        share: Layer applications as a fraction of full depth.
    """

    criterion: str
    threshold: float
    H_cycles: int
    loss: float
    standard_error: float | None
    extra_loss: float
    extra_loss_error: float | None
    cycles: dict[int, float]
    layer_applications: float
    share: float

    def lines(self) -> list[str]:
        error = "" if self.extra_loss_error is None else f" +- {self.extra_loss_error:.4f}"
        spread = "   ".join(f"{cycle}: {share:.1%}" for cycle, share in self.cycles.items())
        return [
            f"halting by {self.criterion}, threshold {self.threshold:g}, after at most {self.H_cycles} cycles:",
            f"  loss {self.loss:.4f} ({self.extra_loss:+.4f}{error} against no halting), {self.layer_applications:.1f} layer applications "
            f"per token ({self.share:.0%})",
            f"  tokens by the cycle that they halted at   {spread}",
        ]


@dataclass(frozen=True)
class CycleStats:
    """Statistics of the cycles of a recursive model on a text, from one pass at the largest cycle count.

    Args:
        H_cycles: The largest cycle count.
        losses: Loss of each cycle in nats per token.
        right: Top-1 accuracy of each cycle.
        loss_reduction, loss_reduction_error: Loss at cycle 1 minus that at the last, and the standard error of that difference.
        corrected, broken: From cycle 1 to the last.
        steps: From each cycle to the next.
    """

    H_cycles: int
    losses: list[float]
    right: list[float]
    loss_reduction: float
    loss_reduction_error: float | None
    corrected: float
    broken: float
    steps: list[Step]
    halting: Halting | None = None

    def to_dict(self) -> dict[str, Any]:
        halting = None if self.halting is None else vars(self.halting)
        return {**vars(self), "steps": [vars(step) for step in self.steps], "halting": halting}

    def lines(self, legend: bool = True) -> list[str]:
        """Lines for the terminal; none for a single cycle without halting.

        Args:
            legend: Whether the columns are explained here.
        """
        found: list[str] = []
        if self.steps:
            whole = Step(1, self.H_cycles, self.loss_reduction, self.loss_reduction_error, self.corrected, self.broken, None)
            several = len(self.steps) > 1
            rows = [*(step.cells() for step in self.steps), *([whole.cells("<- all cycles")] if several else [])]
            found = [
                "what the cycles do, in nats per token and shares of the scored tokens:",
                *table(("cycles", "loss reduction", "+-", "corrected", "broken", "state moved", ""), rows),
                *(LEGEND if legend else ()),
            ]
        if self.halting is not None:
            found += ["", *self.halting.lines()] if found else self.halting.lines()
        return found


def scored_places(ids: Tensor, scored: Tensor) -> Tensor:
    """`[B, T - 1]`, True at the places that predict one of the last `scored` `[B]` tokens of their window."""
    behind = torch.arange(ids.shape[1] - 1, 0, -1, device=ids.device)  # tokens after each position
    return behind <= scored.to(ids.device)[:, None]


def per_window(values: Tensor, places: Tensor) -> Tensor:
    """Sum `[rows, N]` values of the N positions over each window: `[rows, B]`, in float64 on the CPU."""
    numbers = places.nonzero()[:, 0].cpu()
    sums = torch.zeros(len(values), len(places), dtype=torch.float64)
    return sums.index_add_(1, numbers, values.cpu().double())


def sums_of_cycles(head: Any, states: Sequence[Tensor], ids: Tensor, places: Tensor) -> Sums:
    """Sums over the scored tokens of each window of a batch, from the `[B, T, D]` final hidden states of cycles 1 to H.

    Returns:
        nats, right: `[H, B]`; corrected, broken, distance: `[H - 1, B]`, from each cycle to the next; first_to_last: `[2, B]`, corrected
        and broken.
    """
    read = [read_out(head, state, ids, places) for state in states]
    right = torch.stack([row for _, row in read])
    moved = [_relative(new[:, :-1][places], old[:, :-1][places]) for old, new in pairwise(states)]
    first, last = right[0], right[-1]
    rows = {
        "nats": torch.stack([row for row, _ in read]),
        "right": right,
        "corrected": (1 - right[:-1]) * right[1:],
        "broken": right[:-1] * (1 - right[1:]),
        "distance": torch.stack(moved) if moved else right[:0],
        "first_to_last": torch.stack([(1 - first) * last, first * (1 - last)]),
    }
    return {name: per_window(values, places) for name, values in rows.items()}


def _relative(new: Tensor, old: Tensor) -> Tensor:
    return (new.float() - old.float()).norm(dim=-1) / old.float().norm(dim=-1).clamp(min=1e-12)


@torch.no_grad()
def sums_of_halting(model: Any, ids: Tensor, places: Tensor, criterion: str, threshold: float | None, H_cycles: int) -> Sums:
    """Sums of a pass with early exit.

    Returns:
        halted_nats, applications: `[1, B]`; halted_at: `[cycles, B]`, number of tokens that halted at each cycle that they can halt at.
    """
    rule = HaltRule.of(model, criterion, threshold)
    outputs = model.model(ids, H_cycles=H_cycles, use_cache=False, halt_rule=rule)
    nats, _ = read_out(model.lm_head, outputs.last_hidden_state, ids, places)
    used = outputs.halt_cycles[:, :-1][places].cpu()
    cost = torch.tensor(applications(model.config, used.tolist(), criterion))
    at = torch.stack([used == cycle for cycle in range(model.config.first_exit, H_cycles + 1)])
    rows = {"halted_nats": nats[None], "applications": cost[None], "halted_at": at}
    return {name: per_window(values, places) for name, values in rows.items()}


def summarise(sums: Sums, tokens: Tensor, per_piece: int, halting: Halting | None = None) -> CycleStats:
    """Statistics over all windows.

    Args:
        sums: As from `sums_of_cycles`, of all windows.
        tokens: `[windows]` numbers of scored tokens.
        per_piece: Windows per independent piece, see `mean_and_error`.
    """
    nats, H = sums["nats"], len(sums["nats"])

    def share(row: Tensor) -> float:
        return mean_and_error(row, tokens)[0]

    steps = [
        Step(c + 1, c + 2, *mean_and_error(nats[c] - nats[c + 1], tokens, per_piece), share(sums["corrected"][c]), share(sums["broken"][c]),
             share(sums["distance"][c]))
        for c in range(H - 1)
    ]  # fmt: skip
    reduction, error = mean_and_error(nats[0] - nats[-1], tokens, per_piece)
    corrected, broken = (share(row) for row in sums["first_to_last"])
    losses, right = [share(row) for row in nats], [share(row) for row in sums["right"]]
    return CycleStats(H, losses, right, reduction, error if H > 1 else None, corrected, broken, steps, halting)


def summarise_halting(
    sums: Sums, tokens: Tensor, per_piece: int, config: Any, criterion: str, threshold: float | None, H_cycles: int
) -> Halting:
    """Statistics over all windows; `sums` has those of `sums_of_cycles`, at `H_cycles` or deeper, and of `sums_of_halting`."""
    nats, cost = sums["halted_nats"][0], mean_and_error(sums["applications"][0], tokens)[0]
    rule_threshold = HALT_CRITERIA[criterion] if threshold is None else threshold
    spread = {cycle: mean_and_error(row, tokens)[0] for cycle, row in enumerate(sums["halted_at"], start=config.first_exit)}
    return Halting(
        criterion, rule_threshold, H_cycles, *mean_and_error(nats, tokens, per_piece),
        *mean_and_error(nats - sums["nats"][H_cycles - 1], tokens, per_piece), spread, cost, cost / config.depth(H_cycles),
    )  # fmt: skip

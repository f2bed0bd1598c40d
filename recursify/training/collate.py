"""Rows of token ids collated into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.blocks import separate
from ..data.question_rows import STEP_COLUMNS
from ..network.losses import IGNORED


class Collate:
    """Rows of equal length as one batch. Labels are those of the rows, else the input ids, unshifted. Rows with position ids, which begin
    anew at every document, have a block-diagonal mask in any case.

    Args:
        eos_token_id: Token that ends a document, for a block-diagonal mask; None lets tokens attend across documents.
        cycles: Cycles that get labels of their own, `cycle_labels` `[B, cycles, T]`; 0 where all have the same.
        steps_per_cycle: Of these, cycle c (from 1) has the labels that are known after c * steps_per_cycle steps.
    """

    def __init__(self, eos_token_id: int | None, cycles: int = 0, steps_per_cycle: int = 1):
        self.eos_token_id, self.cycles, self.steps_per_cycle = eos_token_id, cycles, steps_per_cycle

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = _stacked(rows, "input_ids")
        labels = _stacked(rows, "labels") if "labels" in rows[0] else ids
        own = {"cycle_labels": self._cycle_labels(rows, ids.shape[1])} if self.cycles and STEP_COLUMNS[0] in rows[0] else {}
        if "position_ids" in rows[0]:
            position_ids = _stacked(rows, "position_ids")
            starts = position_ids == 0
        elif self.eos_token_id is not None:
            position_ids, starts = separate(ids, self.eos_token_id)
        else:
            return {"input_ids": ids, "labels": labels, **own}
        masked = {name: each.masked_fill(starts[:, None], IGNORED) for name, each in own.items()}
        return {"input_ids": ids, "labels": labels.masked_fill(starts, IGNORED), "position_ids": position_ids, **masked}

    def _cycle_labels(self, rows: Sequence[dict[str, Any]], length: int) -> Tensor:
        """`[B, cycles, T]`: what is known at each place by the end of each cycle."""
        found = np.full((len(rows), self.cycles, length), IGNORED)
        for labels, row in zip(found, rows, strict=True):
            for place, count, label in zip(*(row[name] for name in STEP_COLUMNS), strict=True):
                labels[-(-count // self.steps_per_cycle) - 1 :, place] = label
        return torch.from_numpy(found)


def _stacked(rows: Sequence[dict[str, Any]], column: str) -> Tensor:
    return torch.stack([torch.as_tensor(row[column], dtype=torch.long) for row in rows])

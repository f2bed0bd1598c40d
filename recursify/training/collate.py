"""Rows of token ids collated into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.blocks import separate
from ..network.losses import IGNORED


class Collate:
    """Rows of equal length as one batch. Labels are those of the rows, else the input ids, unshifted. Rows with position ids, which begin
    anew at every document, have a block-diagonal mask in any case.

    Args:
        eos_token_id: Token that ends a document, for a block-diagonal mask; None lets tokens attend across documents.
    """

    def __init__(self, eos_token_id: int | None):
        self.eos_token_id = eos_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = _stacked(rows, "input_ids")
        labels = _stacked(rows, "labels") if "labels" in rows[0] else ids
        if "position_ids" in rows[0]:
            position_ids = _stacked(rows, "position_ids")
            starts = position_ids == 0
        elif self.eos_token_id is not None:
            position_ids, starts = separate(ids, self.eos_token_id)
        else:
            return {"input_ids": ids, "labels": labels}
        return {"input_ids": ids, "labels": labels.masked_fill(starts, IGNORED), "position_ids": position_ids}


def _stacked(rows: Sequence[dict[str, Any]], column: str) -> Tensor:
    return torch.stack([torch.as_tensor(row[column], dtype=torch.long) for row in rows])

"""A passage token by token: its text, and the loss after every cycle.

read_passage(model, tokenizer, ids, deepest)    the text that each token stands for, the loss of each after every cycle, and with early exit
                                                the cycle at which the model left off to predict it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..inference.options import DecodingOptions
from ..inference.streaming import TextPieces
from ..network.losses import read_out
from ..utils.models import evaluating
from .text_loss import states_at


@dataclass(frozen=True)
class Passage:
    """A passage with per-token losses.

    Args:
        tokens: The text of each token, empty if it only begins a character; joined, they are the text.
        nats: One row per cycle, first cycle first: the loss of every token but the first. A plain donor and a run without cycles have one
            row.
        exits: With early exit, the cycle after which each token but the first was predicted; None without.
    """

    tokens: tuple[str, ...]
    nats: tuple[tuple[float, ...], ...]
    exits: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def read_passage(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, deepest: int, halting: DecodingOptions | None = None
) -> Passage:
    """Per-token losses of a model on at least two consecutive tokens.

    Args:
        ids: `[T]`.
        deepest: Cycles of the run, for a `RecursiveLLM`; without a cache, cycle c of it equals a run of c cycles.
        halting: Of a run with early exit, whose exits are recorded.
    """
    batch = ids[None].to(model.device)
    places = torch.ones_like(batch[:, 1:], dtype=torch.bool)
    with evaluating(model), torch.no_grad():
        states = states_at(model, batch, range(1, deepest + 1) or [0])
        losses = [read_out(model.get_output_embeddings(), state, batch, places)[0] for state in states]
        exits = None
        if halting is not None:
            found = model.model(batch, H_cycles=halting.cycles(model), use_cache=False, halt_rule=halting.rule(model))
            exits = tuple(found.halt_cycles[0, :-1].tolist())
    return Passage(tuple(text_pieces(tokenizer, ids.tolist())), tuple(tuple(row.tolist()) for row in losses), exits)


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds; a character of several tokens belongs to its last one. Special tokens are kept."""
    found: list[str] = []
    out: list[str] = []
    pieces = TextPieces(tokenizer, out.append, special=True)
    pieces.put(torch.tensor([], dtype=torch.long))
    for number, token in enumerate(ids, start=1):
        pieces.put(torch.tensor([token]))
        if number == len(ids):
            pieces.end()
        found.append("".join(out))
        out.clear()
    return found

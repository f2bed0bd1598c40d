"""Loss on text at every depth, of a recursive model at several cycle counts or of a plain donor.

    measure(model, blocks, (1, 2, 3))                     loss at each cycle count, on rows of token ids
    window_losses(model, blocks, (1, 2, 3))               the same, window by window
    text = open_text(source, tokenizer, seq_len=128)      a text in windows that may overlap
    report, paired = measure_text(model, text, depths)    losses, bits per byte and what each cycle does; and what a comparison needs

Losses are in nats per token over windows of `seq_len` tokens (windows.py says which, and which tokens are scored); bits per byte are the
same nats, in bits, over the bytes of text that the scored tokens stand for, so that models with other tokenizers can be compared. Standard
errors take windows as independent, and where windows overlap, as many of them together as score about `seq_len` tokens. One pass at the
deepest count yields all shallower ones, since without a cache cycle c of a deeper run equals a run at depth c; and what the cycles do
(cycle_stats.py). Several processes share the batches of `measure_text` (utils/distributed.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.settings import TextSource
from ..inference.options import DecodingOptions
from ..network.losses import perplexity, perplexity_text, read_out
from ..network.modeling_recursive_llm import RecursiveLLM
from ..utils.distributed import map_jobs, one_process_first
from ..utils.models import evaluating
from ..utils.tables import table
from .cycle_stats import CycleStats, Sums, per_window, scored_places, summarise_halting, sums_of_cycles, sums_of_halting
from .cycle_stats import summarise as summarise_cycles
from .statistics import mean_and_error, standard_error
from .token_bytes import stream_bytes
from .windows import Rows, Windows

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DepthLoss:
    """Loss at one depth.

    Args:
        H_cycles: None for a plain donor.
        loss: Nats per token.
        standard_error: Of the loss, over windows; None for a single window.
        layer_applications: Per token.
        bits_per_byte: Over the text of the scored tokens; None if unknown.
    """

    H_cycles: int | None
    loss: float
    standard_error: float | None
    layer_applications: int
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "perplexity": self.perplexity}


# Blocks of token ids


def window_losses(model: PreTrainedModel, blocks: Rows, cycles: Sequence[int] = (), *, batch_size: int = 8) -> torch.Tensor:
    """Mean loss of every window at every depth, `[depths, windows]`, in nats per token.

    Args:
        model: A `RecursiveLLM`, or any causal language model of transformers, which has one depth.
        blocks: Rows of equal length, at least 2.
        cycles: Cycle counts, for a `RecursiveLLM` only; empty is its configuration's.
    """
    depths, windows = _depths(model, cycles), Windows(blocks)
    found: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for first in range(0, len(windows), batch_size):
            ids, places = _batch(model, windows, first, batch_size)
            found.append(_nats(model, states_at(model, ids, depths), ids, places) / (ids.shape[1] - 1))
    return torch.cat(found, dim=1)


def measure(model: PreTrainedModel, blocks: Rows, cycles: Sequence[int] = (), *, batch_size: int = 8) -> list[DepthLoss]:
    """Loss of a model on blocks of token ids, one entry per cycle count in the order given; arguments as `window_losses`."""
    return summarise(model, window_losses(model, blocks, cycles, batch_size=batch_size), cycles)


def summarise(model: PreTrainedModel, losses: torch.Tensor, cycles: Sequence[int] = ()) -> list[DepthLoss]:
    """Means and standard errors of `window_losses` for the same model and cycles."""
    depths = _depths(model, cycles)
    errors = [standard_error(row) for row in losses]
    cost = [_cost(model, H) for H in depths]
    return [DepthLoss(*row) for row in zip(depths, losses.mean(1).tolist(), errors, cost, strict=True)]


def states_at(model: Any, ids: torch.Tensor, depths: Sequence[int | None]) -> list[torch.Tensor]:
    """Final hidden states at each depth, each `[B, T, D]`; a plain model has the single depth None."""
    if not isinstance(model, RecursiveLLM):
        return [model.get_decoder()(ids, use_cache=False).last_hidden_state]
    deepest = max(H for H in depths if H is not None)
    cycles = model.model(ids, H_cycles=deepest, output_cycle_states=True, use_cache=False).cycle_states if deepest else ()
    plain = model.model(ids, H_cycles=0, use_cache=False).last_hidden_state if 0 in depths else None
    return [cycles[H - 1] if H else plain for H in depths]  # type: ignore[misc]  # plain is set if 0 was requested


def _depths(model: Any, cycles: Sequence[int]) -> list[int | None]:
    return list(cycles or [model.config.H_cycles]) if isinstance(model, RecursiveLLM) else [None]


def _cost(model: Any, H_cycles: int | None) -> int:
    return model.config.num_hidden_layers if H_cycles is None else model.config.depth(H_cycles)


def _batch(model: Any, windows: Windows, first: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """`[B, T]` ids of a batch of windows on the model's device, and the `[B, T - 1]` positions whose next tokens are scored."""
    behind = min(first + batch_size, len(windows))
    ids = windows.ids(first, behind).to(model.device)
    return ids, scored_places(ids, windows.scored(first, behind))


def _nats(model: Any, states: Sequence[Tensor], ids: Tensor, places: Tensor) -> Tensor:
    """`[states, B]`: the summed loss of each window."""
    return per_window(torch.stack([read_out(model.get_output_embeddings(), state, ids, places)[0] for state in states]), places)


# A text


@dataclass(frozen=True)
class Text:
    """A tokenized text.

    Args:
        name: Name of the dataset.
        documents: Table with a column `text`.
        windows: Windows over the concatenated documents.
        part: What of the dataset these documents are, in words.
    """

    name: str
    documents: Dataset
    tokenizer: PreTrainedTokenizerBase
    windows: Windows
    part: str = "validation split"

    @cached_property
    def tokens(self) -> Tensor:
        """`[windows]` scored tokens of each."""
        return self.windows.scored(0, len(self.windows))

    @cached_property
    def bytes_scored(self) -> float:
        return self.windows.bytes_scored(stream_bytes(self.documents, self.tokenizer, self.windows.tokens_read))

    def key(self) -> str:
        """A hash of the windows and their tokens."""
        windows = self.windows
        found = hashlib.sha256(f"{windows.seq_len} {windows.step} {len(windows)}".encode())
        for number in range(math.ceil(windows.tokens_read / windows.seq_len)):
            found.update(np.asarray(windows.blocks[number]["input_ids"], np.int64).tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class TextReport:
    """Results on a text.

    Args:
        windows: Number of windows.
        stride: Tokens between the starts of consecutive windows.
        scored_tokens, scored_bytes: Number of scored tokens, and the bytes of their text.
        part: What of the text was measured, in words.
        telemetry: Statistics of the cycles; None for a plain donor, and if no cycle was requested.
    """

    dataset: str
    windows: int
    seq_len: int
    rows: list[DepthLoss]
    stride: int
    scored_tokens: int
    scored_bytes: int
    part: str = "validation split"
    telemetry: CycleStats | None = None

    def to_dict(self) -> dict[str, Any]:
        telemetry = None if self.telemetry is None else self.telemetry.to_dict()
        return {**vars(self), "rows": [row.to_dict() for row in self.rows], "telemetry": telemetry}

    def lines(self, own: int | None, legend: bool = True) -> list[str]:
        """Lines for the terminal.

        Args:
            own: The checkpoint's own cycle count, which is marked.
            legend: Whether the statistics of the cycles are explained.
        """
        overlap = "" if self.stride == self.seq_len else f", {self.stride} tokens apart"
        lines = [
            f"{self.dataset}, {self.part}: {self.windows} windows of {self.seq_len} tokens{overlap}",
            f"scored: {self.scored_tokens:,} tokens, {self.scored_bytes:,} bytes of text",
            "",
        ]
        rows = []
        for row in self.rows:
            name = "plain" if row.H_cycles is None else str(row.H_cycles)
            error = "-" if row.standard_error is None else f"{row.standard_error:.4f}"
            bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
            mark = "<- its own" if row.H_cycles is not None and row.H_cycles == own else ""
            rows.append((name, f"{row.loss:.4f}", error, perplexity_text(row.loss), bits, row.layer_applications, mark))
        lines += table(("H_cycles", "loss (nats)", "+-", "perplexity", "bits/byte", "layer applications", ""), rows)
        cycles = [] if self.telemetry is None else self.telemetry.lines(legend)
        return [*lines, *([""] if cycles else []), *cycles]


@dataclass(frozen=True)
class PairedText:
    """Per-window losses, to compare two models.

    Args:
        nats: `[depths, windows]` summed losses.
        tokens: `[windows]` numbers of scored tokens.
        per_piece: Windows per independent piece, see `mean_and_error`.
        key: Equal for models measured on the same windows.
        scored_bytes: Bytes of all scored tokens, to compare models that were not.
    """

    nats: Tensor
    tokens: Tensor
    per_piece: int
    key: str
    scored_bytes: float


def open_text(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    stride: int | None = None,
    max_windows: int | None = None,
    split: str | None = None,
) -> Text:
    """A text in windows: the part of it that `measured_documents` chooses.

    Raises:
        UserError: Unusable text.
    """
    from ..data.documents import measured_documents  # here: the losses of a model on blocks need no library for datasets
    from ..data.loading import tokenize

    with one_process_first():
        documents, part = measured_documents(source, split)
        blocks = tokenize(documents, tokenizer, seq_len)
    return Text(source.dataset_name, documents, tokenizer, Windows(blocks, stride, max_windows), part)


def measure_text(
    model: Any, text: Text, depths: Sequence[int | None], halting: DecodingOptions | None = None, *, batch_size: int = 8
) -> tuple[TextReport, PairedText]:
    """Loss of a model on a text at every depth, and the statistics of its cycles.

    Args:
        depths: Cycle counts; `[None]` for a plain donor.
        halting: A run with early exit, at most as deep as the largest depth; None for none.
    """
    windows, tokens = text.windows, text.tokens
    with evaluating(model), torch.no_grad():
        parts = map_jobs(
            range(0, len(windows), batch_size), lambda first: _read(model, *_batch(model, windows, first, batch_size), depths, halting)
        )
    sums = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    rows = [_row(model, H, nats, text) for H, nats in zip(depths, sums["asked"], strict=True)]
    telemetry = None
    if "nats" in sums:
        early_exit = None
        if halting is not None:
            early_exit = summarise_halting(sums, tokens, windows.per_piece, model.config, *_rule(model, halting))
        telemetry = summarise_cycles(sums, tokens, windows.per_piece, early_exit)
    report = TextReport(
        text.name, len(windows), windows.seq_len, rows, windows.step, int(tokens.sum()), round(text.bytes_scored), text.part, telemetry
    )  # fmt: skip
    return report, PairedText(sums["asked"], tokens, windows.per_piece, text.key(), text.bytes_scored)


def _rule(model: Any, halting: DecodingOptions) -> tuple[str, float | None, int]:
    """Criterion, threshold and maximum number of cycles."""
    return halting.halt, halting.halt_threshold, halting.cycles(model)


def _row(model: Any, H_cycles: int | None, nats: Tensor, text: Text) -> DepthLoss:
    bits = nats.sum().item() / math.log(2) / text.bytes_scored if text.bytes_scored else None
    return DepthLoss(H_cycles, *mean_and_error(nats, text.tokens, text.windows.per_piece), _cost(model, H_cycles), bits)


def _read(model: Any, ids: Tensor, places: Tensor, depths: Sequence[int | None], halting: DecodingOptions | None) -> Sums:
    """All sums of every window of a batch, `[rows, B]` each: `asked`, the summed loss at every depth, and for a recursive model
    `sums_of_cycles` of all cycles up to the largest and `sums_of_halting`."""
    deepest = max((H for H in depths if H is not None), default=0)
    if deepest == 0:
        return {"asked": _nats(model, states_at(model, ids, depths), ids, places)}
    plain = states_at(model, ids, [0]) if 0 in depths else []
    sums = sums_of_cycles(model.lm_head, states_at(model, ids, range(1, deepest + 1)), ids, places)
    by_depth = torch.cat([_nats(model, plain, ids, places), sums["nats"]]) if plain else sums["nats"]
    first = 0 if plain else 1
    sums["asked"] = by_depth[[H - first for H in depths if H is not None]]
    return sums if halting is None else sums | sums_of_halting(model, ids, places, *_rule(model, halting))

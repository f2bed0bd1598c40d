"""How good is a model at every depth? Loss on text, for a recursive checkpoint at several cycle counts or for a plain donor.

Losses are in nats per token over windows of `seq_len` tokens (windows.py says which, and which tokens are scored); bits per byte are the
same nats, in bits, over the bytes of text that the scored tokens stand for, so that models with other tokenizers can be compared. Standard
errors take windows as independent, and where windows overlap, as many of them together as score about `seq_len` tokens. One pass at the
deepest count yields all shallower ones, since without a cache cycle c of a deeper run equals a run at depth c; and what the cycles do
(telemetry.py).

Under `torchrun --nproc_per_node N` every process holds the model and reads every N-th batch of windows. The batches are those of one
process and are summed in their order, so the figures are those of one process, too. Floor 2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, distributed
from transformers import PreTrainedModel

from . import checkpoint
from .configuration_recursive_llm import CONFIGS
from .data import DataSettings, load_documents, one_process_first, tokenize
from .device import choose_device
from .donor import load_tokenizer, open_donor, read_json
from .effort import Effort, Halt, evaluating
from .errors import UserError
from .modeling_recursive_llm import RecursiveLLM
from .objective import perplexity
from .telemetry import (
    Sums,
    Telemetry,
    per_window,
    read_out,
    scored_places,
    summarise_halting,
    sums_of_cycles,
    sums_of_halting,
)
from .telemetry import summarise as summarise_cycles
from .windows import Windows, mean_and_error, stream_bytes


@dataclass(kw_only=True)
class EvaluateSettings:
    """Measure a checkpoint, or a plain donor, on text at several cycle counts."""

    checkpoint: str
    """A recursive checkpoint (a .pt file or a folder), or a plain donor (folder or hub id) for comparison."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer, when the checkpoint has none."""
    dataset_name: str = "wikitext"
    """The text: wikitext, another hub data set, or a local file (.txt, .jsonl, .parquet) or folder. Its validation split is measured."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set."""
    text_column: str = "text"
    """Column that holds the text."""
    cycles: tuple[int, ...] = ()
    """Cycle counts to measure, e.g. --cycles 0 1 3 5. Default: 1 to twice the checkpoint's own."""
    seq_len: int = 128
    """Tokens per window."""
    stride: int | None = None
    """Tokens from one window to the next. Default: seq_len, windows side by side, each of which scores all its tokens but the first. With
    less, windows overlap and every token is scored once, with at least seq_len - stride tokens before it, at seq_len/stride the cost."""
    batch_size: int = 8
    """Windows per pass."""
    max_windows: int | None = None
    """Measure only the first so many windows."""
    halt: Halt = "none"
    """Measure a run in which tokens halt, too: its loss, its layer applications, and the cycles that tokens halt at. It has at most
    the checkpoint's own cycles, or the largest of --cycles."""
    halt_threshold: float | None = None
    """When a token halts, as in recursify generate; the criterion's own threshold where not given."""
    device: str | None = None
    """cpu, cuda, mps; the best there is where not given."""
    json: bool = False
    """Print the result as one JSON object on stdout; everything else goes to stderr."""


@dataclass(frozen=True)
class DepthLoss:
    """Loss at one depth.

    Args:
        H_cycles: None for a plain donor.
        loss: Nats per token.
        standard_error: Of the loss, over windows; None for a single one.
        layer_applications: Cost of one token.
        bits_per_byte: Of the text of the scored tokens; None where it is not known.
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


def window_losses(model: PreTrainedModel, blocks: Dataset, cycles: Sequence[int] = (), *, batch_size: int = 8) -> torch.Tensor:
    """Mean loss of every window at every depth, `[depths, windows]`, in nats per token.

    Args:
        model: A `RecursiveLLM`, or any causal language model of transformers, which has one depth.
        blocks: Rows with `input_ids` of equal length of at least 2.
        cycles: Cycle counts, for a `RecursiveLLM` only; its configuration's where empty.
    """
    depths, windows = _depths(model, cycles), Windows(blocks)
    found: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for first in range(0, len(windows), batch_size):
            ids, places = _batch(model, windows, first, batch_size)
            found.append(_nats(model, _states(model, ids, depths), ids, places) / (ids.shape[1] - 1))
    return torch.cat(found, dim=1)


def measure(model: PreTrainedModel, blocks: Dataset, cycles: Sequence[int] = (), *, batch_size: int = 8) -> list[DepthLoss]:
    """Loss of a model on blocks of token ids, one entry per cycle count in the order given; arguments as `window_losses`."""
    return summarise(model, window_losses(model, blocks, cycles, batch_size=batch_size), cycles)


def summarise(model: PreTrainedModel, losses: torch.Tensor, cycles: Sequence[int] = ()) -> list[DepthLoss]:
    """Means and standard errors of what `window_losses` returned for the same model and cycles."""
    depths = _depths(model, cycles)
    errors = [standard_error(row) for row in losses]
    cost = [_cost(model, H) for H in depths]
    return [DepthLoss(*row) for row in zip(depths, losses.mean(1).tolist(), errors, cost, strict=True)]


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of `[windows]` values; None for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def _depths(model: Any, cycles: Sequence[int]) -> list[int | None]:
    return list(cycles or [model.config.H_cycles]) if isinstance(model, RecursiveLLM) else [None]


def _cost(model: Any, H_cycles: int | None) -> int:
    return model.config.num_hidden_layers if H_cycles is None else model.config.depth(H_cycles)


def _batch(model: Any, windows: Windows, first: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """`[B, T]` ids of some windows on the model's device, and the `[B, T - 1]` places whose next tokens are scored."""
    behind = min(first + batch_size, len(windows))
    ids = windows.ids(first, behind).to(model.device)
    return ids, scored_places(ids, windows.scored(first, behind))


def _nats(model: Any, states: Sequence[Tensor], ids: Tensor, places: Tensor) -> Tensor:
    """`[states, B]`: the summed loss of each window."""
    return per_window(torch.stack([read_out(model.get_output_embeddings(), state, ids, places)[0] for state in states]), places)


def _states(model: Any, ids: torch.Tensor, depths: Sequence[int | None]) -> list[torch.Tensor]:
    """What the head reads at each depth, each `[B, T, D]`."""
    if depths == [None]:
        return [model.get_decoder()(ids, use_cache=False).last_hidden_state]
    deepest = max(H for H in depths if H is not None)
    cycles = model.model(ids, H_cycles=deepest, output_cycle_states=True, use_cache=False).cycle_states if deepest else ()
    plain = model.model(ids, H_cycles=0, use_cache=False).last_hidden_state if 0 in depths else None
    return [cycles[H - 1] if H else plain for H in depths]  # type: ignore[misc]  # plain is there where 0 was asked for


@dataclass(frozen=True)
class EvaluateReport:
    """The result of the command.

    Args:
        windows: How many were read.
        stride: Tokens from one to the next.
        scored_tokens, scored_bytes: What the losses are means over, and the bytes of text that it stands for.
        telemetry: What the cycles do; None for a plain donor, and where no cycle was asked for.
    """

    checkpoint: str
    dataset: str
    windows: int
    seq_len: int
    trained_cycles: int | None
    rows: list[DepthLoss]
    stride: int
    scored_tokens: int
    scored_bytes: int
    telemetry: Telemetry | None = None

    def to_dict(self) -> dict[str, Any]:
        telemetry = None if self.telemetry is None else self.telemetry.to_dict()
        return {**vars(self), "rows": [row.to_dict() for row in self.rows], "telemetry": telemetry}

    def render(self) -> str:
        overlap = "" if self.stride == self.seq_len else f", {self.stride} tokens apart"
        lines = [
            f"{self.checkpoint} on {self.dataset}: {self.windows} windows of {self.seq_len} tokens{overlap}",
            f"scored: {self.scored_tokens:,} tokens, {self.scored_bytes:,} bytes of text",
            "",
            f"{'H_cycles':>8}  {'loss (nats)':>11}  {'+-':>7}  {'perplexity':>10}  {'bits/byte':>9}  {'layer applications':>18}",
        ]
        for row in self.rows:
            name = "donor" if row.H_cycles is None else str(row.H_cycles)
            error = "-" if row.standard_error is None else f"{row.standard_error:.4f}"
            bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
            mark = "  <- the checkpoint's own" if row.H_cycles is not None and row.H_cycles == self.trained_cycles else ""
            figures = f"{row.loss:>11.4f}  {error:>7}  {row.perplexity:>10.2f}  {bits:>9}  {row.layer_applications:>18}"
            lines += [f"{name:>8}  {figures}{mark}"]
        told = [] if self.telemetry is None else self.telemetry.lines()
        return "\n".join([*lines, *([""] if told else []), *told])


def check(settings: EvaluateSettings) -> None:
    """What can be said of the settings before anything is loaded.

    Raises:
        UserError: A value out of range.
    """
    if settings.seq_len < 2 or settings.batch_size < 1:
        raise UserError(f"--seq_len must be at least 2 and --batch_size at least 1, got {settings.seq_len} and {settings.batch_size}")
    if settings.stride is not None and not 1 <= settings.stride <= settings.seq_len:
        raise UserError(f"--stride: expected 1 to the {settings.seq_len} tokens of a window (--seq_len), got {settings.stride}")
    if settings.max_windows is not None and settings.max_windows < 1:
        raise UserError(f"--max_windows: expected at least 1, got {settings.max_windows}")
    Effort(halt=settings.halt, halt_threshold=settings.halt_threshold).check()
    if any(H < 0 for H in settings.cycles):
        raise UserError(f"--cycles: expected whole numbers of at least 0, got {list(settings.cycles)}")


def run(settings: EvaluateSettings) -> EvaluateReport:
    """What `recursify evaluate` does.

    Raises:
        UserError: Bad input.
    """
    check(settings)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=choose_device(settings.device).type == "cpu")  # several processes find each other here
    model, tokenizer = load_any(settings.checkpoint, settings.tokenizer_path)
    return evaluate(model, tokenizer, settings)


def evaluate(model: Any, tokenizer: Any, settings: EvaluateSettings) -> EvaluateReport:
    """Measure a model in memory on the text that the settings name; it is left on the device of the settings.

    Where `torch.distributed` has several processes, all of them must call this; each reads its share and returns the whole report.

    Raises:
        UserError: Text that cannot be used, windows longer than the model has positions, or halting that the model cannot do.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.seq_len > positions:
        raise UserError(f"--seq_len: expected at most {positions}, the positions that the model has, got {settings.seq_len}")
    own = model.config.H_cycles if isinstance(model, RecursiveLLM) else None
    cycles = settings.cycles or tuple(range(1, 2 * own + 1) if own else () if own is None else (0,))
    depths, halting = _depths(model, cycles), _halting(model, settings)
    source = DataSettings(
        dataset_name=settings.dataset_name, dataset_config_name=settings.dataset_config_name, text_column=settings.text_column
    )
    with one_process_first():
        documents = load_documents(source).validation
        blocks = tokenize(documents, tokenizer, settings.seq_len)
    windows = Windows(blocks, settings.stride, settings.max_windows)
    model.to(choose_device(settings.device))
    sums, tokens = _read(model, windows, depths, halting, settings.batch_size), windows.scored(0, len(windows))
    size = windows.bytes_scored(stream_bytes(documents, tokenizer, windows.tokens_read))
    rows = [_row(model, H, nats, tokens, windows.per_piece, size) for H, nats in zip(depths, sums["asked"], strict=True)]
    telemetry = None
    if "nats" in sums:
        told = None if halting is None else summarise_halting(sums, tokens, windows.per_piece, model.config, *halting)
        telemetry = summarise_cycles(sums, tokens, windows.per_piece, told)
    return EvaluateReport(
        settings.checkpoint, settings.dataset_name, len(windows), settings.seq_len, own, rows, windows.step, int(tokens.sum()), round(size),
        telemetry,
    )  # fmt: skip


def _halting(model: Any, settings: EvaluateSettings) -> tuple[str, float | None, int] | None:
    """Criterion, threshold and cycles at most of the run in which tokens halt; None where none was asked for."""
    if settings.halt == "none":
        return None
    effort = Effort(H_cycles=max(settings.cycles, default=None), halt=settings.halt, halt_threshold=settings.halt_threshold)
    effort.arguments(model)  # refuses what the model cannot do
    return settings.halt, settings.halt_threshold, effort.cycles(model)


def _row(model: Any, H_cycles: int | None, nats: Tensor, tokens: Tensor, per_piece: int, size: float) -> DepthLoss:
    bits = nats.sum().item() / math.log(2) / size if size else None
    return DepthLoss(H_cycles, *mean_and_error(nats, tokens, per_piece), _cost(model, H_cycles), bits)


def _read(
    model: Any, windows: Windows, depths: Sequence[int | None], halting: tuple[str, float | None, int] | None, batch_size: int
) -> Sums:
    """All that is to be known of every window, `[rows, windows]` each: `asked`, the summed loss at every depth, and for a recursive model
    what `sums_of_cycles` gives of all cycles up to the deepest, and `sums_of_halting`."""
    rank, count = (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)
    mine: list[Sums] = []
    with evaluating(model), torch.no_grad():
        for first in range(rank * batch_size, len(windows), count * batch_size):
            ids, places = _batch(model, windows, first, batch_size)
            mine.append(_read_batch(model, ids, places, depths, halting))
    parts: list[list[Sums]] = [mine]
    if _several():
        parts = [[] for _ in range(count)]
        distributed.all_gather_object(parts, mine)
    ordered = [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]
    return {name: torch.cat([sums[name] for sums in ordered], dim=1) for name in ordered[0]}


def _read_batch(
    model: Any, ids: Tensor, places: Tensor, depths: Sequence[int | None], halting: tuple[str, float | None, int] | None
) -> Sums:
    deepest = max((H for H in depths if H is not None), default=0)
    if deepest == 0:
        return {"asked": _nats(model, _states(model, ids, depths), ids, places)}
    plain = _states(model, ids, [0]) if 0 in depths else []
    sums = sums_of_cycles(model.lm_head, _states(model, ids, range(1, deepest + 1)), ids, places)
    by_depth = torch.cat([_nats(model, plain, ids, places), sums["nats"]]) if plain else sums["nats"]
    first = 0 if plain else 1
    sums["asked"] = by_depth[[H - first for H in depths if H is not None]]
    return sums if halting is None else sums | sums_of_halting(model, ids, places, *halting)


def is_first() -> bool:
    """Whether this is the only process, or the first of several: the one that speaks."""
    return not _several() or distributed.get_rank() == 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def load_any(path: str, tokenizer_path: str | None = None) -> tuple[Any, Any]:
    """A recursive checkpoint or a plain donor, with its tokenizer.

    Raises:
        UserError: Neither, no tokenizer, or a model without a head to measure.
    """
    config = Path(path) / "config.json"
    if Path(path).is_file() or checkpoint.is_file_form(path) or (config.is_file() and read_json(config).get("model_type") in CONFIGS):
        found = checkpoint.load(path, tokenizer_path=tokenizer_path)
        checkpoint.need_head(found, path)
        return found.model, checkpoint.need_tokenizer(found, path)
    return open_donor(path).load(), load_tokenizer(tokenizer_path or path)

"""How good is a model at every depth? Loss on text, for a recursive checkpoint at several cycle counts or for a plain donor.

Losses are in nats per token over disjoint windows of `seq_len` tokens; the first token of a window has no context and does not count. The
standard error is that of the mean over windows, which are taken as independent. One pass at the deepest count yields all shallower ones,
since without a cache cycle c of a deeper run equals a run at depth c. Floor 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel

from . import checkpoint
from .configuration_recursive_llm import CONFIGS
from .data import DataSettings, load_documents, tokenize
from .device import choose_device
from .donor import load_tokenizer, open_donor, read_json
from .errors import UserError
from .modeling_recursive_llm import RecursiveLLM
from .objective import perplexity


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
    batch_size: int = 8
    """Windows per pass."""
    max_windows: int | None = None
    """Measure only the first so many windows."""
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
        standard_error: Of the mean over windows; None for a single window.
        layer_applications: Cost of one token.
    """

    H_cycles: int | None
    loss: float
    standard_error: float | None
    layer_applications: int

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
    depths = _depths(model, cycles)
    was_training = model.training
    model.eval()
    batches: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in blocks.select_columns("input_ids").with_format("torch").iter(batch_size):
            ids = batch["input_ids"].to(model.device)
            states = _states(model, ids, depths)
            batches.append(torch.stack([_losses_of(model.get_output_embeddings(), state, ids) for state in states]))
    model.train(was_training)
    return torch.cat(batches, dim=1).double()


def measure(model: PreTrainedModel, blocks: Dataset, cycles: Sequence[int] = (), *, batch_size: int = 8) -> list[DepthLoss]:
    """Loss of a model on blocks of token ids, one entry per cycle count in the order given; arguments as `window_losses`."""
    return summarise(model, window_losses(model, blocks, cycles, batch_size=batch_size), cycles)


def summarise(model: PreTrainedModel, losses: torch.Tensor, cycles: Sequence[int] = ()) -> list[DepthLoss]:
    """Means and standard errors of what `window_losses` returned for the same model and cycles."""
    depths = _depths(model, cycles)
    errors = [standard_error(row) for row in losses]
    cost = [model.config.num_hidden_layers if H is None else model.config.depth(H) for H in depths]
    return [DepthLoss(*row) for row in zip(depths, losses.mean(1).tolist(), errors, cost, strict=True)]


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of `[windows]` values; None for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def _depths(model: Any, cycles: Sequence[int]) -> list[int | None]:
    return list(cycles or [model.config.H_cycles]) if isinstance(model, RecursiveLLM) else [None]


def _states(model: Any, ids: torch.Tensor, depths: Sequence[int | None]) -> list[torch.Tensor]:
    """What the head reads at each depth, each `[B, T, D]`."""
    if depths == [None]:
        return [model.get_decoder()(ids, use_cache=False).last_hidden_state]
    deepest = max(H for H in depths if H is not None)
    cycles = model.model(ids, H_cycles=deepest, output_cycle_states=True, use_cache=False).cycle_states if deepest else ()
    plain = model.model(ids, H_cycles=0, use_cache=False).last_hidden_state if 0 in depths else None
    return [cycles[H - 1] if H else plain for H in depths]  # type: ignore[misc]  # plain is there where 0 was asked for


def _losses_of(head: Any, state: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of each window, `[B]`; one window's logits at a time, since the vocabulary is wide."""
    return torch.stack([F.cross_entropy(head(z[:-1]).float(), row[1:]) for z, row in zip(state, ids, strict=True)]).cpu()


@dataclass(frozen=True)
class EvaluateReport:
    """The result of the command."""

    checkpoint: str
    dataset: str
    windows: int
    seq_len: int
    trained_cycles: int | None
    rows: list[DepthLoss]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}

    def render(self) -> str:
        lines = [f"{self.checkpoint} on {self.dataset}: {self.windows} windows of {self.seq_len} tokens", ""]
        lines += [f"{'H_cycles':>8}  {'loss (nats)':>11}  {'+-':>7}  {'perplexity':>10}  {'layer applications':>18}"]
        for row in self.rows:
            name = "donor" if row.H_cycles is None else str(row.H_cycles)
            error = "-" if row.standard_error is None else f"{row.standard_error:.4f}"
            mark = "  <- the checkpoint's own" if row.H_cycles is not None and row.H_cycles == self.trained_cycles else ""
            lines += [f"{name:>8}  {row.loss:>11.4f}  {error:>7}  {row.perplexity:>10.2f}  {row.layer_applications:>18}{mark}"]
        return "\n".join(lines)


def check(settings: EvaluateSettings) -> None:
    """What can be said of the settings before anything is loaded.

    Raises:
        UserError: A value out of range.
    """
    if settings.seq_len < 2 or settings.batch_size < 1:
        raise UserError(f"--seq_len must be at least 2 and --batch_size at least 1, got {settings.seq_len} and {settings.batch_size}")
    if any(H < 0 for H in settings.cycles):
        raise UserError(f"--cycles: expected whole numbers of at least 0, got {list(settings.cycles)}")


def run(settings: EvaluateSettings) -> EvaluateReport:
    """What `recursify evaluate` does.

    Raises:
        UserError: Bad input.
    """
    check(settings)
    model, tokenizer = load_any(settings.checkpoint, settings.tokenizer_path)
    return evaluate(model, tokenizer, settings)


def evaluate(model: Any, tokenizer: Any, settings: EvaluateSettings) -> EvaluateReport:
    """Measure a model in memory on the text that the settings name; it is left on the device of the settings.

    Raises:
        UserError: Text that cannot be used, or windows longer than the model has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.seq_len > positions:
        raise UserError(f"--seq_len: expected at most {positions}, the positions that the model has, got {settings.seq_len}")
    own = model.config.H_cycles if isinstance(model, RecursiveLLM) else None
    cycles = settings.cycles or tuple(range(1, 2 * own + 1) if own else () if own is None else (0,))
    source = DataSettings(
        dataset_name=settings.dataset_name, dataset_config_name=settings.dataset_config_name, text_column=settings.text_column
    )
    blocks = tokenize(load_documents(source).validation, tokenizer, settings.seq_len)
    if settings.max_windows is not None:
        blocks = blocks.select(range(min(settings.max_windows, len(blocks))))
    model.to(choose_device(settings.device))
    rows = measure(model, blocks, cycles, batch_size=settings.batch_size)
    return EvaluateReport(settings.checkpoint, settings.dataset_name, len(blocks), settings.seq_len, own, rows)


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

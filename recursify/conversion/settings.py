"""Flags of a conversion, of a probe, and of the look at a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..checkpoints.settings import ModelSource, Revision, TokenizerSource
from ..errors import UserError
from ..utils.options import DeviceOptions, JsonOutput, Options, check_page

Say = Callable[[str], None]

LARGEST_GAIN = 0.9  # of a state in its own update: the network's GAIN_SUM, whose import would load transformers before a flag is read
_LEAST = {"seq_len": 2, "max_windows": 1, "batch_size": 1, "H_cycles": 1, "L_cycles": 0}  # of a probe


@dataclass(kw_only=True)
class LoopSettings(Options):
    """Loop: its shape, for every command that converts a donor."""

    L_layers: int = 4
    """Layers in the looped block."""
    H_cycles: int = 3
    """Cycles. Logits are available after each."""
    L_cycles: int = 3
    """Updates of the scratch state z_L per cycle, before the one of z_H, which is read out. The block is applied
    H_cycles * (L_cycles + 1) times."""


@dataclass(kw_only=True)
class ConvertSettings(LoopSettings, TokenizerSource, Revision, JsonOutput):
    """Turn a pretrained language model into a recursive one."""

    qwen_model: str = "Qwen/Qwen2-0.5B"
    """The donor: a hub id, or a folder with config.json and safetensors. Qwen2, Qwen2.5, Qwen3, Llama, Mistral, SmolLM3, OLMo2 or Phi3."""
    seq_len: int | None = None
    """Longest sequence that you plan to use: only checked against the donor's number of positions, and recorded; training has a --seq_len
    of its own. Default: 512, or the donor's positions if those are fewer."""
    layer_selection: Literal["uniform", "first", "last", "middle", "stride", "auto"] | None = None
    """Which donor layers are looped; auto probes every start and keeps all layers. Default: uniform, or middle with --keep_donor."""
    calibration_file: str | None = None
    """Text file that --layer_selection auto measures on."""
    freeze_embeddings: bool = False
    """Keep the embeddings (and a head tied to them) out of training."""
    keep_donor: bool = False
    """Keep every donor layer; those before and after the block run once. Exact at conversion."""
    prelude_layers: int = 0
    """Donor layers kept before the loop."""
    coda_layers: int = 0
    """Donor layers kept after the loop."""
    gain: float = 0.0
    """Start value of the gains (the weights of the states in the input of the loop), 0 to 0.45. At 0 every cycle equals the plain pass."""
    injection: Literal["anchored", "sum_norm"] = "anchored"
    """How states and embedding are mixed: anchored, or sum_norm (TRM's plain sum with a norm; not exact at conversion)."""
    dry_run: bool = False
    """Print plan, parameters and cost, and stop. Reads config.json only."""
    output_path: str = "qwen_recursive_init.pt"
    """Where to write: a .pt file (with its tokenizer folder beside it), or a new folder in Hugging Face layout."""

    def validate(self) -> None:
        """Check what needs no donor.

        Raises:
            UserError: Flags that contradict each other.
        """
        if self.injection != "anchored" and self.gain:
            raise UserError(f"--gain: the loop of --injection {self.injection} has no gains, got {self.gain}; leave out one of the two")
        if self.layer_selection != "auto":
            return
        if self.prelude_layers or self.coda_layers:
            raise UserError("--layer_selection auto: it chooses prelude and coda itself; leave --prelude_layers and --coda_layers out")
        if self.calibration_file is None:
            raise UserError("--layer_selection auto: needs --calibration_file, a text file like what the model is for")


@dataclass(kw_only=True)
class ProbeSettings(TokenizerSource, Revision, DeviceOptions, JsonOutput):
    """Measure what looping each block of a donor's layers costs before any training."""

    checkpoint: str
    """The donor: a plain model, as a folder or hub id."""
    text: str
    """A UTF-8 text file like what the model is for, on whose beginning the losses are measured."""
    lengths: tuple[int, ...] = ()
    """Layers of the blocks, e.g. 2,4,8. Default: a twelfth, a sixth and a quarter of the donor's."""
    gains: tuple[float, ...] = (0.1, 0.45, 0.9)
    """Gains of the loop, 0 to 0.9: the weight of a state in its own update. That of the other state is the same, as with recursify
    convert --gain, or what is left of 0.9, the largest sum of the two. At 0 a loop changes nothing."""
    H_cycles: int = 3
    """Cycles; the loss after the last of them is measured."""
    L_cycles: int = 1
    """Updates of the scratch state z_L per cycle, before the one of z_H. Every block is applied H_cycles * (L_cycles + 1) times."""
    seq_len: int = 128
    """Tokens per window of the text."""
    max_windows: int = 8
    """Windows of the text that are measured."""
    batch_size: int = 8
    """Windows per forward pass."""
    report: str | None = None
    """Write a self-contained HTML page with a heat map to this file, e.g. report.html."""

    def validate(self) -> None:
        """Check what needs no donor.

        Raises:
            UserError: A value out of range.
        """
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name}: expected at least {least}, got {getattr(self, name)}")
        if any(length < 1 for length in self.lengths):
            raise UserError(f"--lengths: expected numbers of layers of at least 1, got {min(self.lengths)}")
        if not self.gains or any(not 0 <= gain <= LARGEST_GAIN for gain in self.gains):
            given = ", ".join(f"{gain:g}" for gain in self.gains) or "none"
            raise UserError(f"--gains: expected numbers from 0 to {LARGEST_GAIN}, got {given}")
        if self.report is not None:
            check_page(Path(self.report))


@dataclass(kw_only=True)
class InspectSettings(JsonOutput, ModelSource):
    """Show plan, parameters and cost per token at several cycle counts; of a plain model, parameters and cost."""

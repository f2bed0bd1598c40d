"""What it costs to loop a block of a donor's layers before any training, measured on text.

    LoopedBlocks   a donor whose blocks can be run twice, one after another
    probe          layer_selection auto: the block whose looping changes the donor's predictions least
    measure        every block of some lengths at some gains, as a ProbeReport: `recursify probe`

A block is run twice; the second input lies between the first input e and the first output F(e): e + g (F(e) - e), with the gain g. At 0 the
block repeats itself, and the model is its donor; at 1 the layers are run twice in a row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.donor import Donor, donor_tokenizer, open_donor
from ..data.calibration import calibration_windows
from ..errors import UserError
from ..network.losses import token_losses
from ..network.plan import ConversionPlan
from ..utils.device import choose_device
from ..utils.tables import table
from .build import build_model, recursive_config
from .layer_selection import candidates
from .settings import ConvertSettings, ProbeSettings, Say

CPU = torch.device("cpu")
_PROBE_TOKENS = 128
_PROBE_WINDOWS = 8
_PROBE_GAIN = 0.5


class LoopedBlocks:
    """A donor with all of its layers, of which any contiguous block can be run twice.

    Args:
        plans: From `candidates`, of any lengths.
        settings: Their injection, cycles and gain do not matter.
    """

    def __init__(self, donor: Donor, plans: Sequence[ConversionPlan], settings: ConvertSettings, device: torch.device = CPU):
        self.donor, self.settings = donor, ConvertSettings(**{**vars(settings), "H_cycles": 2, "L_cycles": 0, "injection": "anchored"})
        dtype = None if device.type == "cuda" else torch.float32  # of a few passes alone; many CPUs are slow in bfloat16
        self.model: Any = build_model(donor, plans[0], recursive_config(donor, plans[0], self.settings), dtype)[0].eval().to(device)
        self._configs: dict[ConversionPlan, Any] = {}

    @torch.no_grad()
    def plain(self, ids: Tensor) -> Tensor:
        """Inputs of the head, `[B, T, D]`: the donor's own."""
        state: Tensor = self.model.model(ids, H_cycles=0, use_cache=False).last_hidden_state
        return state

    @torch.no_grad()
    def looped(self, ids: Tensor, plan: ConversionPlan, gains: Sequence[float]) -> list[Tensor]:
        """The same with the loop of the plan run twice, at each gain. What is before the second run is computed once."""
        base = self.model.model
        if plan not in self._configs:  # the model has all layers; only the place of the loop differs
            self._configs[plan] = recursive_config(self.donor, plan, self.settings)
            self._configs[plan]._attn_implementation = self.model.config._attn_implementation
        base.config = self._configs[plan]
        try:
            e, block, read = base.begin_pass(ids)
            first = block(e, 0)
            return [read(block(e + gain * (first - e), 1)) for gain in gains]
        finally:
            base.config = self.model.config


def probe(donor: Donor, plans: Sequence[ConversionPlan], settings: ConvertSettings, say: Say) -> ConversionPlan:
    """The plan whose looped block changes the donor least.

    For every start of the block, the donor runs with the block applied twice; the second input is half-way between the block's first input
    and output (gain 0.5). The start with the lowest KL divergence from the donor's own next-token distribution is chosen.
    """
    tokenizer = donor_tokenizer(donor, settings.tokenizer_path)
    ids = calibration_windows(settings.calibration_file or "", tokenizer, _PROBE_TOKENS, _PROBE_WINDOWS)
    say(f"auto: probing {len(plans)} starts with {len(plans) + 1} passes of the whole donor over {ids.numel()} tokens")
    blocks = LoopedBlocks(donor, plans, settings)
    reference, costs = blocks.plain(ids), []
    for plan in plans:
        costs.append(_kl(blocks.model.lm_head, reference, *blocks.looped(ids, plan, [_PROBE_GAIN])))
        say(f"  loop {plan.loop[0]:>3}..{plan.loop[-1]:<3} KL {costs[-1]:.4f} nats")
    return plans[costs.index(min(costs))]


@torch.no_grad()
def _kl(head: Any, reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference || other) in nats per token, one window at a time to bound the memory of the logits."""
    total = 0.0
    for p, q in zip(reference, other, strict=True):
        log_p, log_q = (head(x).float().log_softmax(-1) for x in (p, q))
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total / len(reference)


# recursify probe


@dataclass(frozen=True)
class ProbedBlock:
    """A block of the donor's layers.

    Args:
        first, last: Its layers, from 0, both included.
        increase: Gain -> loss with the block run twice, less the donor's, in nats per token.
        divergence: KL divergence of the next token from the donor's at gain 0.5, in nats: what `--layer_selection auto` goes by.
    """

    first: int
    last: int
    increase: dict[float, float]
    divergence: float

    @property
    def length(self) -> int:
        return self.last - self.first + 1

    @property
    def mean(self) -> float:
        """Over the gains."""
        return sum(self.increase.values()) / len(self.increase)


@dataclass(frozen=True)
class ProbeReport:
    """What looping costs before training, by block.

    Args:
        layers: Of the donor.
        loss: Of the donor, in nats per token.
        tokens: That the losses are means over.
    """

    donor: str
    layers: int
    loss: float
    tokens: int
    gains: tuple[float, ...]
    blocks: tuple[ProbedBlock, ...]

    @property
    def lengths(self) -> list[int]:
        return sorted({block.length for block in self.blocks})

    def cheapest(self, length: int) -> ProbedBlock:
        """The block of that length with the lowest loss, as a mean over the gains."""
        return min((block for block in self.blocks if block.length == length), key=lambda block: block.mean)

    def auto(self, length: int) -> ProbedBlock:
        """The block that `--layer_selection auto` chooses on this text."""
        return min((block for block in self.blocks if block.length == length), key=lambda block: block.divergence)

    def command(self, block: ProbedBlock) -> str:
        """The conversion that loops a block."""
        place = f" --prelude_layers {block.first}" if block.first else f" --coda_layers {self.layers - block.length}"
        place = place if block.length < self.layers else ""
        return f"recursify convert --qwen_model {self.donor} --keep_donor{place} --L_layers {block.length}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        best = [
            {"length": n, "cheapest": self.cheapest(n).first, "auto": self.auto(n).first, "command": self.command(self.cheapest(n))}
            for n in self.lengths
        ]
        blocks = [asdict(block) | {"increase": {f"{gain:g}": value for gain, value in block.increase.items()}} for block in self.blocks]
        return {
            "donor": self.donor, "layers": self.layers, "loss": self.loss, "tokens": self.tokens, "gains": list(self.gains),
            "blocks": blocks, "best": best,
        }  # fmt: skip

    def render(self) -> str:
        """The same as text."""
        lines = [f"{self.donor}: {self.loss:.4f} nats per token on {self.tokens:,} tokens; nats more with a block run twice, by gain"]
        for length in self.lengths:
            cheapest, auto = self.cheapest(length), self.auto(length)
            rows = [
                (
                    f"{block.first}..{block.last}", *(f"{block.increase[gain]:+.4f}" for gain in self.gains), f"{block.divergence:.4f}",
                    ", ".join(word for word, other in (("cheapest", cheapest), ("auto", auto)) if other is block),
                )
                for block in self.blocks
                if block.length == length
            ]  # fmt: skip
            heads = ("layers", *(f"gain {gain:g}" for gain in self.gains), f"KL at {_PROBE_GAIN:g}", "")
            lines += ["", f"{length} {'layer' if length == 1 else 'layers'}", *table(heads, rows)]
        lines += ["", "Cheapest of each length, as a mean over the gains:", *(f"  {self.command(self.cheapest(n))}" for n in self.lengths)]
        return "\n".join(lines)


def run(settings: ProbeSettings) -> ProbeReport:
    """Probe the donor that the settings name.

    Raises:
        UserError: An unusable donor or text, or a length that the donor does not have.
    """
    donor = open_donor(settings.checkpoint, revision=settings.revision)
    tokenizer = donor_tokenizer(donor, settings.tokenizer_path)
    ids = calibration_windows(settings.text, tokenizer, settings.seq_len, settings.max_windows, least=2, flag="--text")
    return measure(donor, ids, settings)


def measure(donor: Donor, ids: Tensor, settings: ProbeSettings) -> ProbeReport:
    """Every block of the lengths at the gains of the settings.

    Args:
        ids: `[windows, T]`.
    """
    layers = donor.config.num_hidden_layers
    lengths = settings.lengths or tuple(sorted({max(1, layers // 12), max(1, layers // 6), max(1, layers // 4)}))
    if wrong := [length for length in lengths if length > layers]:
        raise UserError(f"--lengths: expected at most {layers}, the layers of {donor.name}, got {wrong[0]}")
    plans = [plan for length in lengths for plan in candidates(donor.name, layers, length)]
    device = choose_device(settings.device)
    blocks = LoopedBlocks(donor, plans, ConvertSettings(qwen_model=donor.name), device)
    batches = ids.to(device).split(settings.batch_size)
    plain = [blocks.plain(batch) for batch in batches]
    loss = _loss(blocks, batches, plain)
    gains, found = tuple(sorted(set(settings.gains))), []
    for plan in tqdm(plans, desc="Probing", disable=None, leave=False, file=sys.stderr):
        runs = [blocks.looped(batch, plan, (*gains, _PROBE_GAIN)) for batch in batches]
        *states, half = zip(*runs, strict=True)
        increase = {gain: _loss(blocks, batches, each) - loss for gain, each in zip(gains, states, strict=True)}
        divergence = sum(_kl(blocks.model.lm_head, p, q) * len(p) for p, q in zip(plain, half, strict=True)) / len(ids)
        found.append(ProbedBlock(plan.loop[0], plan.loop[-1], increase, divergence))
    return ProbeReport(donor.name, layers, loss, ids[:, 1:].numel(), gains, tuple(found))


@torch.no_grad()
def _loss(blocks: LoopedBlocks, batches: Sequence[Tensor], states: Sequence[Tensor]) -> float:
    """Mean over all tokens, in nats."""
    sums = [token_losses(state, ids, blocks.model.lm_head).double().sum() for ids, state in zip(batches, states, strict=True)]
    return float(sum(sums) / sum(ids[:, 1:].numel() for ids in batches))

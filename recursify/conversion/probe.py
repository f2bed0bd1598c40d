"""What it costs to loop a block of a donor's layers before any training, measured on text.

    LoopedBlocks   a donor of which any block of layers can be looped
    probe          layer_selection auto: the block whose looping changes the donor's predictions least
    measure        every block of some lengths at some gains, as a ProbeReport: `recursify probe`

The donor's tensors are read once: the model has all of its layers, in their order, and a plan only says which of them are the loop. The
cycles are the network's own (`Recursion.steps`), with the start states that a conversion draws. The input e of a block is the donor's
hidden state before it; each is computed once for a batch, and all blocks that begin there share it.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.donor import Donor, donor_tokenizer, open_donor
from ..data.calibration import calibration_windows
from ..errors import UserError
from ..network.configuration_recursive_llm import GAIN_SUM
from ..network.losses import token_losses
from ..network.plan import ConversionPlan
from ..utils.device import choose_device
from .build import build_model, recursive_config
from .layer_selection import candidates
from .probe_report import AUTO_GAIN, ProbedBlock, ProbeReport
from .settings import ConvertSettings, ProbeSettings, Say

CPU = torch.device("cpu")
_PROBE_TOKENS = 128
_PROBE_WINDOWS = 8


class LoopedBlocks:
    """A donor with all of its layers, of which any contiguous block can be looped.

    Args:
        H_cycles, L_cycles: Of the loop.
        device: Where it runs.
    """

    def __init__(self, donor: Donor, H_cycles: int = 1, L_cycles: int = 0, device: torch.device = CPU):
        self.donor, self.settings = donor, ConvertSettings(qwen_model=donor.name, H_cycles=H_cycles, L_cycles=L_cycles)
        self.single = candidates(donor.name, donor.config.num_hidden_layers, 1)  # each layer as a block
        dtype = None if device.type == "cuda" else torch.float32  # of a few passes alone; many CPUs are slow in bfloat16
        config = recursive_config(donor, self.single[0], self.settings)
        self.model: Any = build_model(donor, self.single[0], config, dtype)[0].eval().to(device)
        self._configs: dict[ConversionPlan, Any] = {}

    @torch.no_grad()
    def plain(self, ids: Tensor) -> Tensor:
        """Inputs of the head, `[B, T, D]`: the donor's own."""
        state: Tensor = self.model.model(ids, H_cycles=0, use_cache=False).last_hidden_state
        return state

    @torch.no_grad()
    def starts(self, ids: Tensor, plans: Sequence[ConversionPlan]) -> Iterator[tuple[ConversionPlan, Tensor]]:
        """The plans by the first layer of their loops, each with the input e of its loop, `[B, T, D]`. Every layer is run once at most."""
        e = self.model.model.embed_tokens(ids)
        for first, single in enumerate(self.single[: 1 + max(plan.loop[0] for plan in plans)]):
            yield from ((plan, e) for plan in plans if plan.loop[0] == first)
            with self._looping(single) as base:
                e = base.begin_pass(ids, e=e)[1](e, 0)

    @torch.no_grad()
    def cycles(self, ids: Tensor, plan: ConversionPlan, e: Tensor, gain: float) -> Tensor:
        """Inputs of the head, `[B, T, D]`, after the last cycle of the plan's loop.

        Args:
            e: The input of the loop, `[B, T, D]`.
            gain: Weight of a state in its own update; that of the other state is the same, or what is left of `GAIN_SUM`.
        """
        with self._looping(plan) as base:
            for injection in (base.recursion.inject_L, base.recursion.inject_H):
                injection.theta_A.fill_(math.atanh(gain))
                injection.theta_B.fill_(math.atanh(min(gain, GAIN_SUM - gain)))
            _, block, read = base.begin_pass(ids, e=e)
            *_, z_H = base.recursion.steps(e, block, *base.cycles())
            state: Tensor = read(z_H)
            return state

    @torch.no_grad()
    def twice(self, ids: Tensor, plan: ConversionPlan, e: Tensor) -> Tensor:
        """Inputs of the head, `[B, T, D]`, with the block run twice, as auto does it: the second time on the mean of its first input e and
        output."""
        with self._looping(plan) as base:
            _, block, read = base.begin_pass(ids, e=e)
            state: Tensor = read(block(e + AUTO_GAIN * (block(e, 0) - e), 1))
            return state

    @contextmanager
    def _looping(self, plan: ConversionPlan) -> Iterator[Any]:
        """The base model with the loop of a plan: only the configuration says where it is."""
        base = self.model.model
        if plan not in self._configs:
            self._configs[plan] = recursive_config(self.donor, plan, self.settings)
            self._configs[plan]._attn_implementation = self.model.config._attn_implementation
        base.config = self._configs[plan]
        try:
            yield base
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
    blocks = LoopedBlocks(donor)
    reference, costs = blocks.plain(ids), {}
    for plan, e in blocks.starts(ids, plans):
        costs[plan] = _kl(blocks.model.lm_head, reference, blocks.twice(ids, plan, e)) / len(ids)
        say(f"  loop {plan.loop[0]:>3}..{plan.loop[-1]:<3} KL {costs[plan]:.4f} nats")
    return min(costs, key=lambda plan: costs[plan])


@torch.no_grad()
def _kl(head: Any, reference: Tensor, other: Tensor) -> float:
    """KL(reference || other) in nats per token, summed over windows; one window at a time to bound the memory of the logits."""
    total = 0.0
    for p, q in zip(reference, other, strict=True):
        log_p, log_q = (head(x).float().log_softmax(-1) for x in (p, q))
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total


# recursify probe


def run(settings: ProbeSettings) -> ProbeReport:
    """Probe the donor that the settings name.

    Raises:
        UserError: An unusable donor or text, a length that the donor does not have, or more tokens than it has positions.
    """
    settings.validate()
    donor = open_donor(settings.checkpoint, revision=settings.revision)
    tokenizer = donor_tokenizer(donor, settings.tokenizer_path)
    ids = calibration_windows(settings.text, tokenizer, settings.seq_len, settings.max_windows, least=2, flag="--text")
    return measure(donor, ids, settings)


def measure(donor: Donor, ids: Tensor, settings: ProbeSettings) -> ProbeReport:
    """Every block of the lengths at the gains of the settings.

    Args:
        ids: `[windows, T]`.

    Raises:
        UserError: As `run`.
    """
    positions = getattr(donor.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] > positions:
        raise UserError(f"--seq_len: expected at most {positions}, the positions that {donor.name} has, got {settings.seq_len}")
    plans, gains, own = _plans(donor, settings.lengths), tuple(sorted(set(settings.gains))), 0.0
    blocks = LoopedBlocks(donor, settings.H_cycles, settings.L_cycles, choose_device(settings.device))
    batches = ids.to(blocks.model.device).split(settings.batch_size)
    nats: dict[ConversionPlan, list[float]] = defaultdict(lambda: [0.0] * len(gains))
    divergences: dict[ConversionPlan, float] = defaultdict(float)
    with tqdm(total=len(plans) * len(batches), desc="Probing", disable=None, leave=False, file=sys.stderr) as bar:
        for batch in batches:
            plain = blocks.plain(batch)
            own += _nats(blocks, batch, plain)
            for plan, e in blocks.starts(batch, plans):
                divergences[plan] += _kl(blocks.model.lm_head, plain, blocks.twice(batch, plan, e))
                for place, gain in enumerate(gains):
                    nats[plan][place] += _nats(blocks, batch, blocks.cycles(batch, plan, e, gain))
                bar.update()
    tokens = ids[:, 1:].numel()
    found = tuple(
        ProbedBlock(
            plan.loop[0], plan.loop[-1], {gain: (sum_ - own) / tokens for gain, sum_ in zip(gains, nats[plan], strict=True)},
            divergences[plan] / len(ids),
        )
        for plan in plans
    )  # fmt: skip
    layers, cycles = donor.config.num_hidden_layers, (settings.H_cycles, settings.L_cycles)
    return ProbeReport(donor.name, _source(settings), layers, own / tokens, tokens, *cycles, gains, found)


def _plans(donor: Donor, lengths: Sequence[int]) -> list[ConversionPlan]:
    """Every block of the lengths, or of the default ones; shorter blocks first."""
    layers = donor.config.num_hidden_layers
    if wrong := [length for length in lengths if length > layers]:
        raise UserError(f"--lengths: expected at most {layers}, the layers of {donor.name}, got {wrong[0]}")
    chosen = lengths or (max(1, layers // 12), max(1, layers // 6), max(1, layers // 4))
    return [plan for length in sorted(set(chosen)) for plan in candidates(donor.name, layers, length)]


def _source(settings: ProbeSettings) -> str:
    """The flags of `recursify convert` that name the donor."""
    names = {"qwen_model": settings.checkpoint, "revision": settings.revision, "tokenizer_path": settings.tokenizer_path}
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in names.items() if value is not None)


@torch.no_grad()
def _nats(blocks: LoopedBlocks, ids: Tensor, state: Tensor) -> float:
    """Loss of all tokens of a batch, in nats.

    Args:
        state: Input of the head, `[B, T, D]`.
    """
    return float(token_losses(state, ids, blocks.model.lm_head).double().sum())

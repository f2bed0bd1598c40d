"""layer_selection auto: find the block whose looping changes the donor's predictions least, measured on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checkpoints.donor import Donor, donor_tokenizer
from ..data.calibration import calibration_windows
from ..network.plan import ConversionPlan
from .build import build_model, recursive_config
from .settings import ConvertSettings, Say

_PROBE_TOKENS = 128
_PROBE_WINDOWS = 8
_PROBE_GAIN = 0.5


def probe(donor: Donor, plans: Sequence[ConversionPlan], settings: ConvertSettings, say: Say) -> ConversionPlan:
    """The plan whose looped block changes the donor least.

    For every start of the block, the donor runs with the block applied twice; the second input is half-way between the block's first input
    and output (gain 0.5). The start with the lowest KL divergence from the donor's own next-token distribution is chosen.
    """
    tokenizer = donor_tokenizer(donor, settings.tokenizer_path)
    ids = calibration_windows(settings.calibration_file or "", tokenizer, _PROBE_TOKENS, _PROBE_WINDOWS)
    say(f"auto: probing {len(plans)} starts with {len(plans) + 1} passes of the whole donor over {ids.numel()} tokens")
    base = ConvertSettings(**{**vars(settings), "H_cycles": 2, "L_cycles": 0, "injection": "anchored"})
    model, _ = build_model(donor, plans[0], recursive_config(donor, plans[0], base))
    recursion = model.model.recursion
    size, dtype = model.config.hidden_size, model.dtype
    half, none = torch.full((size,), _PROBE_GAIN, dtype=dtype), torch.zeros(size, dtype=dtype)
    recursion.inject_H.gains = lambda dtype: (half, none)
    with torch.no_grad():
        recursion.H_init.zero_()  # so the input of the first cycle is e
        reference = model.model(ids, H_cycles=0, use_cache=False).last_hidden_state
        costs = []
        for plan in plans:
            model.model.config = recursive_config(donor, plan, base)  # the model has all layers; only the start of the loop differs
            model.model.config._attn_implementation = model.config._attn_implementation
            looped = model.model(ids, use_cache=False).last_hidden_state
            costs.append(_kl(model.lm_head, reference, looped))
            say(f"  loop {plan.loop[0]:>3}..{plan.loop[-1]:<3} KL {costs[-1]:.4f} nats")
    return plans[costs.index(min(costs))]


def _kl(head: Any, reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) in nats per token, one window at a time to bound the memory of the logits."""
    total = 0.0
    for p, q in zip(reference, other, strict=True):
        log_p, log_q = (head(x).float().log_softmax(-1) for x in (p, q))
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total / len(reference)

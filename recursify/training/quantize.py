"""4-bit weights of a frozen donor, as in QLoRA (arXiv 2305.14314): bitsandbytes' NF4 with doubly quantised scales.

Quantised are the linear layers of the donor's layers; embeddings, norms and head stay. An adapter that was trained beside a quantised donor
is used with the donor in any precision: its files name the donor's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserError

# Per weight: half a byte, an 8-bit scale for every 64 weights, and a float32 one for every 256 of these.
BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
DEVICES = ("cpu", "cuda")


def check_4bit(settings: Any, device: torch.device) -> None:
    """Check whether a run can have 4-bit weights, if it is to.

    Raises:
        UserError: bitsandbytes is missing or has no 4-bit layers for the device, or the run shards weights.
    """
    if not getattr(settings, "load_in_4bit", False):
        return
    if device.type not in DEVICES:
        raise UserError(f"--load_in_4bit: expected a device of {' or '.join(DEVICES)}, got {device}; leave it out")
    if settings.fsdp or settings.deepspeed is not None:
        flag = "--fsdp" if settings.fsdp else "--deepspeed"
        raise UserError(f"--load_in_4bit: expected no {flag}: 4-bit weights are not sharded; every process holds all of them (DDP)")
    _layers()


def quantize_layers(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the frozen linear layers of an adapter's donor by 4-bit ones on the device, in place.

    Args:
        model: An adapter.
        dtype: In which the products are computed.
    """
    layers = _layers()
    for layer in model.model.layers:
        for parent in list(layer.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, _quantized(child, layers, device, dtype))
    for updates, layer in zip(model.model.recursion.lora, model.model.looped_layers, strict=True):
        updates.attach(layer)  # to the new linear layers


def _layers() -> Any:
    """The module with bitsandbytes' 4-bit layers."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"--load_in_4bit: expected bitsandbytes to be installed ({error}); pip install bitsandbytes, or leave it out"
        ) from error
    return bitsandbytes.nn


def _quantized(linear: nn.Linear, layers: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        other = layers.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    other.weight = layers.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    other.bias = linear.bias
    other.train(linear.training)
    return other.to(device)

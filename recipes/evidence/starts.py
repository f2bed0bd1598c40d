"""Weights that the loop's layers start from, other than those of the layers that were picked."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def average_neighbours(model: Any, donor: Any) -> Any:
    """Each of the K layers of a compact model becomes the mean of one of the K parts into which the donor's layers are cut, in order."""
    layers, sources = model.model.layers, donor.model.layers
    for number, layer in enumerate(layers):
        part = sources[number * len(sources) // len(layers) : (number + 1) * len(sources) // len(layers)]
        averages = [torch.stack(same).mean(dim=0) for same in zip(*(source.parameters() for source in part), strict=True)]
        for own, average in zip(layer.parameters(), averages, strict=True):
            own.copy_(average)
    return model

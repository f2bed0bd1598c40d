"""A small adapter of a small donor, what it is trained on, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from recursify import as_adapter, convert
from recursify.training import TrainSettings
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_donor

SEQ_LEN = 16
SHAPE: dict[str, Any] = {"keep_donor": True, "L_layers": 2, "H_cycles": 3, "L_cycles": 1}


def blocks(count: int) -> list[dict[str, list[int]]]:
    tokens = make_tiny_tokenizer()(" ".join(sentences(5, 40 * count))).input_ids
    rows = [tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN] for i in range(count)]
    assert len(rows[-1]) == SEQ_LEN
    return [{"input_ids": row, "labels": row} for row in rows]


def settings(**changes: Any) -> TrainSettings:
    common: dict[str, Any] = {
        "checkpoint": "", "seq_len": SEQ_LEN, "batch_size": 2, "lr": 1e-2, "warmup_steps": 0, "max_steps": 3,
        "enable_deep_supervision": True, "generate_every": 0, "save_every": 0, "device": "cpu", "bf16": False,
    }  # fmt: skip
    return TrainSettings(**common | changes)


def donor_and_adapter(folder: Path, family: str = "qwen2", lora: dict[str, Any] | None = None, **shape: Any) -> tuple[Any, Any]:
    """The donor's own model, and an adapter of it that does nothing yet."""
    tiny_donor(family, folder, num_hidden_layers=5)
    model = convert(str(folder), **SHAPE | shape)
    return AutoModelForCausalLM.from_pretrained(folder), as_adapter(model, **{"lora_rank": 2} | (lora or {}))

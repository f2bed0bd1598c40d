"""A small model trained in memory for a few steps."""

from __future__ import annotations

from typing import Any

import torch

from recursify import RecursiveLLM
from recursify.network.configuration_recursive_llm import from_donor
from recursify.training import FitResult, TrainSettings, fit
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_config

SEQ_LEN = 16


def recursive(seed: int = 0, **recursion: Any) -> Any:
    """Three random layers, the middle one looped, with gains and states that matter."""
    torch.manual_seed(seed)
    shape = {"prelude_layers": 1, "L_layers": 1, "coda_layers": 1, "H_cycles": 3, "L_cycles": 1, "gain_init": 0.2, "state_init_std": 0.5}
    return RecursiveLLM(from_donor(tiny_config("qwen2", num_hidden_layers=3), [0, 1, 2], **(shape | recursion)))


def blocks(count: int, seed: int = 1) -> list[dict[str, Any]]:
    ids = make_tiny_tokenizer()(" ".join(sentences(seed, 2 * count))).input_ids
    return [{"input_ids": ids[i * SEQ_LEN : (i + 1) * SEQ_LEN]} for i in range(count)]


def settings(**changes: Any) -> TrainSettings:
    common: dict[str, Any] = {
        "checkpoint": "in memory", "seq_len": SEQ_LEN, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "num_epochs": 1, "log_every": 1,
        "generate_every": 0, "device": "cpu",
    }  # fmt: skip
    return TrainSettings(**(common | changes))


def run(model: Any, train_blocks: Any = None, **changes: Any) -> FitResult:
    passed_on = {name: changes.pop(name) for name in ("teacher", "saver", "callbacks") if name in changes}
    console = changes.pop("console", False)
    return fit(
        model, make_tiny_tokenizer(), train_blocks or blocks(8), blocks(5, seed=2), settings(**changes), console=console, **passed_on
    )


def logged(result: FitResult, key: str) -> list[Any]:
    return [entry[key] for entry in result.history if key in entry]

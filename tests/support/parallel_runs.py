"""A run of several processes, or of one: the same model, text and settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from recursify import RecursiveLLM
from recursify.network.configuration_recursive_llm import from_donor
from recursify.training import TrainSettings, fit
from recursify.training.parallel import (
    full_optimizer_state,
    full_state,
)
from recursify.training.saving import Saver
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_config

SEQ_LEN, SEQUENCES, STEPS, SAVED = 16, 24, 6, 3


PATIENCE = 240.0  # seconds for a launch; a deadlock of the processes lasts half an hour


def launch(arguments: Sequence[str | Path], processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m module`, in several processes that find each other.

    Args:
        arguments: Of torchrun, as it takes them after its own options.
        environment: Variables to set for all of them.

    Returns:
        The exit status, which is 0 if that of all processes is, and what they wrote, all of it as stdout.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True) as running:
        try:
            output, _ = running.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            output, _ = running.communicate()
            output += f"\nkilled after {PATIENCE:g} seconds"
    return subprocess.CompletedProcess(command, running.returncode, output)


def recursive(seed: int = 0, **recursion: Any) -> Any:
    """Four random layers, the second and third looped, with gains and states that matter, and a tied head."""
    torch.manual_seed(seed)
    shape = {"prelude_layers": 1, "L_layers": 2, "coda_layers": 1, "H_cycles": 3, "L_cycles": 1, "gain_init": 0.2, "state_init_std": 0.5}
    return RecursiveLLM(from_donor(tiny_config("qwen2", num_hidden_layers=4), [0, 1, 2, 3], **(shape | recursion)))


def text(first: int, count: int) -> list[dict[str, Any]]:
    ids = [number for line in sentences(3, 120) for number in make_tiny_tokenizer()(line).input_ids]
    return [{"input_ids": ids[i * SEQ_LEN : (i + 1) * SEQ_LEN]} for i in range(first, first + count)]


def settings(**changes: Any) -> TrainSettings:
    """Four sequences per step, whatever the number of processes: 6 steps in one epoch."""
    common: dict[str, Any] = {
        "checkpoint": "in memory", "seq_len": SEQ_LEN, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "num_epochs": 1, "log_every": 1,
        "generate_every": 0, "save_every": 0, "device": "cpu", "enable_deep_supervision": True, "max_grad_norm": 0.5,
    }  # fmt: skip
    return TrainSettings(**(common | changes))


class TakeWeights(TrainerCallback):
    """The whole weights and the whole optimizer state when the run ends, and how the model is spread."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = full_state(kwargs["model"].model)
        self.moments = full_optimizer_state(kwargs["optimizer"])
        self.sharded = isinstance(kwargs["model"], FSDPModule)


def run(folder: Path | None = None, resume_from: Path | None = None, model: Any = None, **changes: Any) -> dict[str, Any]:
    """Train, and return the results. With a folder, a checkpoint is saved there after step 3."""
    model, taken = model or recursive(), TakeWeights()
    saver = None if folder is None else Saver(folder, make_tiny_tokenizer(), torch.float32)
    result = fit(
        model, make_tiny_tokenizer(), text(0, SEQUENCES), text(SEQUENCES, 5), settings(**changes), saver=saver, resume_from=resume_from,
        console=False, callbacks=[taken],
    )  # fmt: skip
    found = {"history": result.history, "weights": taken.weights, "moments": taken.moments, "sharded": taken.sharded}
    return found

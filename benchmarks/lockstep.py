"""Two trainers that step in turn: each step of ours stands beside one of the donor's, taken moments before."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from recursify.training import TrainSettings, fit
from recursify.training.collate import Collate
from recursify.training.trainer import peak_memory

from .measure import finish, processes
from .models import Shape, build


class Turn(TrainerCallback):
    """One side: hands over at the end of each of its steps but the last, and goes on when it is its turn again. Its first step, which
    allocates, is not counted.

    Args:
        hand_over: Returns when it is this side's turn.
    """

    def __init__(self, device: torch.device, hand_over: Callable[[], None]):
        self.device, self.hand_over = device, hand_over
        self.seconds: list[float] = []
        self.since: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish(self.device)
        if self.since is not None:
            self.seconds.append(time.perf_counter() - self.since)
        if state.global_step < state.max_steps:
            self.hand_over()
        self.since = time.perf_counter()


class Donor:
    """transformers' own Trainer over a plain model with its own loss, a step at a time, in a process of its own: two trainers in one
    process would share what torch keeps its threads with, and the second would be slower.

    Args:
        batch: Rows of a forward pass, and passes of an optimizer step.
    """

    def __init__(self, shape: Shape, rows: list[Any], batch: tuple[int, int], device: torch.device, bf16: bool):
        self.peak = 0  # bytes of its process, at most so far
        context = processes()
        self.line, other = context.Pipe()
        self.process = context.Process(target=_train, args=(other, shape, rows, batch, device, bf16), daemon=True)
        self.process.start()
        other.close()
        self._answer()  # the step that is not counted

    def step(self) -> float:
        """Seconds of one step."""
        self.line.send(True)
        return self._answer()

    def stop(self) -> None:
        self.line.close()
        self.process.join()

    def _answer(self) -> float:
        try:
            took, self.peak = self.line.recv()
            return float(took)
        except EOFError:
            raise RuntimeError("the donor's trainer ended before its time; what it said is above") from None


def _train(line: Connection, shape: Shape, rows: list[Any], batch: tuple[int, int], device: torch.device, bf16: bool) -> None:
    """The donor's process: a step, how long it took, and the next one when it is asked for; ends when nobody asks any more."""

    def wait() -> None:
        line.send((turn.seconds[-1] if turn.seconds else 0.0, peak_memory(device)))
        try:
            line.recv()
        except EOFError:
            raise SystemExit from None

    turn = Turn(device, wait)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], max_steps=10**6,
            learning_rate=1e-5, weight_decay=0.01,
            optim="adamw_torch_fused", bf16=bf16, use_cpu=device.type == "cpu", logging_steps=10**6, save_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=device.type == "cuda",
            accelerator_config={"non_blocking": device.type == "cuda"},
        )  # fmt: skip
        trainer = Trainer(build(shape.config(), device), args, train_dataset=rows, data_collator=Collate(None), callbacks=[turn])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@contextmanager
def donor_trainer(shape: Shape, rows: list[Any], batch: tuple[int, int], device: torch.device, bf16: bool) -> Iterator[Donor]:
    """A donor's trainer, one step old, and stopped at the end."""
    donor = Donor(shape, rows, batch, device, bf16)
    try:
        yield donor
    finally:
        donor.stop()


def steps_in_turn(model: Any, rows: list[Any], settings: TrainSettings, donor: Donor | None) -> tuple[list[float], list[float]]:
    """Seconds per step of `fit`, and of the donor's step before each. All of a step is counted: batch, both passes, clipping, optimizer.

    Args:
        donor: None where there is nothing to compare with; then the second list is empty.
    """
    theirs: list[float] = []

    def hand_over() -> None:
        if donor is not None:
            theirs.append(donor.step())

    assert settings.device is not None and settings.max_steps is not None
    turn = Turn(torch.device(settings.device), hand_over)
    short = [{"input_ids": rows[0]["input_ids"][:8]}]  # what is validated at the end is not timed
    fit(model, None, rows, short, settings, console=False, callbacks=[turn])  # type: ignore[arg-type]
    return turn.seconds, theirs

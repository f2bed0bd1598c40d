"""Two trainers that step in turn: each step of ours stands beside one of the donor's, taken moments before."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from recursify.training import TrainSettings, fit
from recursify.training.run import Collate

from .measure import finish


class Turn(TrainerCallback):
    """One side: waits at the end of each of its steps until it is its turn again. Its first step, which allocates, is not counted."""

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
    """transformers' own Trainer over a plain model with its own loss, in a thread of its own, a step at a time."""

    def __init__(self, model: Any, rows: list[Any], batch_size: int, device: torch.device, bf16: bool):
        self.turn = Turn(device, self._wait)
        self.mine, self.done, self.over = threading.Event(), threading.Event(), False
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._train, args=(model, rows, batch_size, bf16), daemon=True)

    def step(self) -> float:
        """Seconds of one step; the first call makes the one that is not counted."""
        self.done.clear()
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.mine.set()
        self.done.wait()
        if self.failed is not None:
            raise self.failed
        return self.turn.seconds[-1] if self.turn.seconds else 0.0

    def stop(self) -> None:
        self.over = True
        self.mine.set()
        self.thread.join()

    def _wait(self) -> None:
        self.done.set()
        self.mine.wait()
        self.mine.clear()

    def _train(self, model: Any, rows: list[Any], batch_size: int, bf16: bool) -> None:
        device = self.turn.device
        try:
            with tempfile.TemporaryDirectory() as folder:
                args = TrainingArguments(
                    output_dir=folder, per_device_train_batch_size=batch_size, max_steps=10**6, learning_rate=1e-5, weight_decay=0.01,
                    optim="adamw_torch_fused", bf16=bf16, use_cpu=device.type == "cpu", logging_steps=10**6, save_strategy="no",
                    report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=device.type == "cuda",
                )  # fmt: skip
                trainer = Trainer(model, args, train_dataset=rows, data_collator=Collate(None), callbacks=[self.turn, _Ends(self)])
                trainer.remove_callback(PrinterCallback)
                trainer.train()
        except BaseException as error:  # raised again where the steps are asked for
            self.failed = error
            self.done.set()


class _Ends(TrainerCallback):
    """Comes after `Turn`: ends the run where the last step has been asked for."""

    def __init__(self, donor: Donor):
        self.donor = donor

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.donor.over


@contextmanager
def donor_trainer(model: Any, rows: list[Any], batch_size: int, device: torch.device, bf16: bool) -> Iterator[Donor]:
    """A donor's trainer, one step old, and stopped at the end."""
    donor = Donor(model, rows, batch_size, device, bf16)
    donor.step()
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
    fit(model, None, rows, rows[:1], settings, console=False, callbacks=[turn])  # type: ignore[arg-type]
    return turn.seconds, theirs

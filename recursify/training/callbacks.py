"""What a run prints and writes on the way. The bar goes to stderr, samples and summaries to stdout.

All intervals are counted in optimizer steps, never in micro-batches.

Floor 3.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..errors import UserError
from ..generation import Sampling, generate_text
from .settings import RunSettings

# As tqdm's own, without the rate.
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
SECONDS_BETWEEN_LINES = 30.0  # of a bar that is written to a file
SAMPLE_TOKENS = 50
# What a validation may give beside the losses, and how a summary says it.
FIGURES = {"eval_perplexity": "Perplexity: {:.2f}", "eval_nearest_right": "Nearest Embedding Right: {:.2%}"}


def say(text: str) -> None:
    """Print on stdout without tearing a bar apart."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class ProgressBar(TrainerCallback):
    """`Training:  42%|████      | 420/1000 [04:21<06:00, loss=2.4521, lr=1e-05]` on stderr."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        interval = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="Training", bar_format=BAR_FORMAT, mininterval=interval, file=sys.stderr
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(f"loss={logs['loss']:.4f}, lr={logs['learning_rate']:.3g}", refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Samples(TrainerCallback):
    """Text that the model writes as it learns. Drawing it leaves the run's random numbers alone."""

    def __init__(self, model: Any, tokenizer: Any, settings: RunSettings):
        """Raises UserError for a prompt that the model cannot read."""
        self.model, self.tokenizer = model, tokenizer
        self.prompt, self.every, self.seed = settings.generation_prompt, settings.generate_every, settings.seed
        positions = getattr(model.config, "max_position_embeddings", None) or SAMPLE_TOKENS + len(self.prompt)
        room = positions - len(tokenizer(self.prompt).input_ids)
        if room < 1:
            raise UserError(f"--generation_prompt: expected fewer tokens than the model's {positions} positions, got {positions - room}")
        self.sampling = Sampling(max_new_tokens=min(SAMPLE_TOKENS, room))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.is_world_process_zero:
            text = generate_text(self.model, self.tokenizer, self.prompt, self.sampling, seed=self.seed).text
            say(f"\nStep {state.global_step} - Generating sample:\nPrompt: {self.prompt}\nOutput: {self.prompt}{text}")


class EpochSummary(TrainerCallback):
    """After each validation: the summary, and the best model so far put aside.

    Args:
        save_best: Called with the epoch's metrics when the validation loss is the lowest yet; returns where it saved, None if nowhere.
        quiet: Save only.
    """

    def __init__(self, save_best: Callable[[dict[str, float]], Path | None], quiet: bool = False):
        self.save_best, self.quiet = save_best, quiet

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        loss = metrics["eval_loss"]
        lines = [
            f"\nEpoch {math.ceil(state.epoch or 0)} Summary:",
            f"  Train Loss: {metrics['train_loss']:.4f}",
            f"  Val Loss: {loss:.4f}",
            *(f"  {text.format(metrics[name])}" for name, text in FIGURES.items() if name in metrics),
        ]
        # The trainer compares and remembers after its callbacks, so this is the best of the epochs before.
        best = state.best_metric
        is_best = math.isfinite(loss) and (best is None or loss < best)
        saved = self.save_best(metrics) if is_best and state.is_world_process_zero else None
        if saved is not None:
            lines.append(f"  ✓ New best model saved: {saved}")
        if state.is_world_process_zero and not self.quiet:
            say("\n".join(lines))


class SaveSteps(TrainerCallback):
    """Asks for a checkpoint every so many steps, with everything before it logged.

    At the end of an epoch the checkpoint waits for the validation: a run that is resumed from it would otherwise never make it.
    """

    def __init__(self, every: int):
        self.every, self.waiting = every, False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.ask(state, control)

    def ask(self, state: TrainerState, control: TrainerControl) -> None:
        if at_epoch_end(state):
            self.waiting = True
        else:
            control.should_log = control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = True
        if self.waiting:
            self.waiting, control.should_save = False, True


class StopOnSignal(TrainerCallback):
    """Ctrl-C ends the run after the current optimizer step, with a checkpoint; a second one ends it at once, without."""

    def __init__(self, save: SaveSteps | None):
        self.save, self.asked = save, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT while inside; only the main thread of a program may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step; Ctrl-C again stops at once and saves nothing.", file=sys.stderr)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_training_stop = True
            if self.save is not None:
                self.save.ask(state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked and not at_epoch_end(state):
            control.should_evaluate = False


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: one line per log entry. A resumed run first puts back what was logged up to its checkpoint, and no more."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def at_epoch_end(state: TrainerState) -> bool:
    """Whether the step just made is the last of an epoch or of the run."""
    return state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()

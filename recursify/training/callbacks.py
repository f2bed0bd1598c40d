"""Callbacks of a run: progress bar (stderr), samples and summaries (stdout), metrics file, validation, checkpoints, signals.

All intervals are in optimizer steps, not micro-batches.
"""

from __future__ import annotations

import json
import logging
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
from ..inference.generation import generate_text
from ..inference.options import Sampling
from ..network.losses import perplexity_text
from .settings import RunSettings

logger = logging.getLogger(__name__)

# tqdm's default without the rate.
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
SECONDS_BETWEEN_LINES = 30.0  # if stderr is not a terminal
SAMPLE_TOKENS = 50
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and the signal of schedulers before preemption
# Validation metrics other than losses, and their lines in the summary.
METRIC_LINES: dict[str, tuple[str, Callable[[float], str]]] = {
    "eval_perplexity": ("Perplexity", lambda value: perplexity_text(math.log(value))),
    "eval_nearest_right": ("Nearest Embedding Right", "{:.2%}".format),
}


def print_line(text: str) -> None:
    """Print on stdout without breaking a progress bar."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)  # a terminal without ✓ must not end a run
    sys.stdout.flush()


class ProgressBar(TrainerCallback):
    """`Training:  42%|████      | 420/1000 [04:21<06:00, loss=2.4521, cycles=2.61/2.47/2.45, lr=1e-05, 1,210 tok/s, 1.9 GiB]` on stderr."""

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
            self.bar.set_postfix_str(self._postfix(logs), refresh=False)

    def _postfix(self, logs: dict[str, float]) -> str:
        cycles = [f"{value:.2f}" for name, value in logs.items() if name.startswith("loss_cycle_")]
        each = [f"cycles={'/'.join(cycles)}"] if len(cycles) > 1 else []
        speed = f"{logs['tokens_per_second']:,.0f} tok/s, {logs['memory']:.1f} GiB"
        return ", ".join([f"loss={logs['loss']:.4f}", *each, f"lr={logs['learning_rate']:.3g}", speed])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Samples(TrainerCallback):
    """Generates sample texts during training. The random state of the run is not affected.

    Args:
        inference_model: Context manager in which the model is averaged, gathered and uncompiled. Collective.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: RunSettings, inference_model: Callable[[], Any]):
        """Raises UserError for a prompt that leaves no position for a new token."""
        self.model, self.tokenizer, self.inference_model = model, tokenizer, inference_model
        self.prompt, self.every, self.seed = settings.generation_prompt, settings.generate_every, settings.seed
        positions = getattr(model.config, "max_position_embeddings", None) or SAMPLE_TOKENS + len(self.prompt)
        room = positions - len(tokenizer(self.prompt).input_ids)
        if room < 1:
            raise UserError(f"--generation_prompt: expected fewer tokens than the model's {positions} positions, got {positions - room}")
        self.sampling = Sampling(max_new_tokens=min(SAMPLE_TOKENS, room))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        with self.inference_model():
            if state.is_world_process_zero:
                text = generate_text(self.model, self.tokenizer, self.prompt, self.sampling, seed=self.seed).text
                print_line(f"\nStep {state.global_step} - Generating sample:\nPrompt: {self.prompt}\nOutput: {self.prompt}{text}")


class AfterOptimizer(TrainerCallback):
    """Calls a function after every step of the optimizer."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.call()


class AtStart(TrainerCallback):
    """Calls a function before the first step of a run, not of a resumed one."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.call()


class Validate(TrainerCallback):
    """Requests a validation every N steps. The Trainer validates at the end of each epoch; no step is validated twice."""

    def __init__(self, every: int | None):
        self.every = every

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0 and not at_epoch_end(state):
            control.should_log = control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
            control.should_evaluate = False


class EarlyStopping(TrainerCallback):
    """Stops the run when the validation loss has not improved for `patience` validations. Stateless: it reads the log history."""

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        if len(losses) - 1 - best >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.info("\nThe validation loss has not improved for %d validations: stopping.", self.patience)


class Summary(TrainerCallback):
    """After each validation: prints the summary, and saves the model if it is the best so far.

    Args:
        save_best: Called on all ranks with the metrics when the validation loss is the lowest so far; returns the path, None if not saved.
        quiet: Save without printing.
        streamed: The data are a stream of unknown length, which the Trainer counts as one epoch whenever the run ends.
    """

    def __init__(self, save_best: Callable[[dict[str, float]], Path | None], quiet: bool = False, streamed: bool = False):
        self.save_best, self.quiet, self.streamed = save_best, quiet, streamed

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        loss = metrics["eval_loss"]
        lines = [
            f"\n{self._trained(state)} Summary:",
            f"  Train Loss: {metrics['train_loss']:.4f}",
            f"  Val Loss: {loss:.4f}",
            *(f"  {title}: {text(metrics[name])}" for name, (title, text) in METRIC_LINES.items() if name in metrics),
        ]
        # The Trainer updates it after its callbacks, so this is the best of the earlier validations.
        best = state.best_metric
        is_best = math.isfinite(loss) and (best is None or loss < best)
        saved = self.save_best(metrics) if is_best else None
        if saved is not None:
            lines.append(f"  ✓ New best model saved: {saved}")
        if state.is_world_process_zero and not self.quiet:
            print_line("\n".join(lines))

    def _trained(self, state: TrainerState) -> str:
        epochs = float(state.epoch or 0)
        return f"Epoch {epochs:.0f}" if epochs.is_integer() and not self.streamed else f"Step {state.global_step}"


class SaveSteps(TrainerCallback):
    """Requests a checkpoint every N steps, after logging what is pending.

    At the end of an epoch the checkpoint is saved after the validation, which a run that resumes from it would otherwise skip.
    """

    def __init__(self, every: int):
        self.every, self.waiting = every, False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.request_save(state, control)

    def request_save(self, state: TrainerState, control: TrainerControl) -> None:
        if at_epoch_end(state):
            self.waiting = True
        else:
            control.should_log = control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = True
        if self.waiting:
            self.waiting, control.should_save = False, True


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM stops the run after the current optimizer step, or of several processes after the next one, with a checkpoint; a
    second signal stops it immediately, without.

    Args:
        save: The callback that requests the checkpoint; None if nothing is saved.
        any_rank: `(requested) -> bool`: whether a stop was requested on any rank. All ranks must stop at the same step.
    """

    def __init__(self, save: SaveSteps | None, any_rank: Callable[[bool], bool]):
        self.save, self.any_rank = save, any_rank
        self.requested = self.stopped = False  # a signal during the last validation is too late: `requested`, not `stopped`

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Installs the signal handlers; in the main thread only, as Python requires."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [signal.signal(number, self._on_signal) for number in STOP_SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(STOP_SIGNALS, before, strict=True):
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.info("\nStopping after this step; Ctrl-C again stops at once and saves nothing.")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.any_rank(self.requested):
            self.requested = self.stopped = control.should_training_stop = True
            if self.save is not None:
                self.save.request_save(state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped and not at_epoch_end(state):
            control.should_evaluate = False


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: one line per log entry. A resumed run first truncates it to the entries up to its checkpoint."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write("w", state, state.log_history)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write("a", state, state.log_history[-1:])

    def _write(self, mode: str, state: TrainerState, entries: list[dict[str, float]]) -> None:
        if not state.is_world_process_zero:
            return
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            raise UserError(
                f"{self.path}: could not be written ({error.strerror}); the checkpoints saved so far are intact. Free some space, then "
                "continue with --resume"
            ) from error


def at_epoch_end(state: TrainerState) -> bool:
    """Whether the current step is the last of an epoch or of the run."""
    return state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()

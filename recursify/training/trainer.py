"""`transformers.Trainer` with our objective, a depth per step, validation per cycle, and our checkpoints.

Units: losses per token, in nats, or 1 - cosine for embeddings; lengths in tokens, steps are optimizer steps, memory in GiB.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..checkpoints.adapter import PREFIX as ADAPTER_PREFIX
from ..errors import UserError
from ..network.losses import counted, perplexity
from ..utils.files import read_json
from .cost import pass_flops
from .depth import DepthSchedule
from .finite import GradientCheck, HostCopy, Step
from .loss_module import LossModule, scored_tokens
from .optimizers import EMA, build_optimizer, learning_rate_factor, warmup_of
from .parallel import (
    ShardedTrainerMixin,
    check_sharding,
    full_optimizer_state,
    full_state,
    gathered,
    load_full_state,
    read_state,
    shard_like,
)
from .saving import AVERAGES, MASTERS, RUN, STATE, Saver, training_notes
from .settings import RunSettings

GIB = 2**30


class MetricWindow:
    """Sums since the last log entry: of the loss of each cycle, of additional terms, and of the tokens."""

    def __init__(self, deepest: int):
        self.deepest = deepest
        self.sums: dict[str, Tensor] = {}

    def add(self, outputs: dict[str, Any], scale: Any, tokens: Tensor, H: int) -> None:
        """Add a micro-batch.

        Args:
            outputs: Of `LossModule`, divided by `scale` tokens.
            tokens: Number of scored tokens on this rank.
        """
        cycle_losses, scored = outputs["cycle_losses"] * scale, outputs["scored"] * tokens
        self._add("cycles", torch.stack([cycle_losses, scored]))
        self._add("last", torch.stack([cycle_losses[H - 1], tokens.to(cycle_losses.dtype)]))
        for name, value in outputs["terms"].items():
            self._add(name, torch.stack([value * scale, tokens.to(value.dtype)]))

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums[name] + values if name in self.sums else values

    def drain(self, accelerator: Any) -> tuple[dict[str, float], float, float]:
        """Reduce over all ranks and reset. Returns the means (`loss_cycle_i`, `loss_<term>`), the summed loss of the last cycle, and its
        tokens. Collective."""
        sums = {name: accelerator.reduce(value.double(), "sum") for name, value in sorted(self.sums.items())}
        self.sums = {}
        cycle_losses, scored = sums.pop("cycles").tolist()
        last, tokens = sums.pop("last").tolist()
        means = {f"loss_cycle_{i}": loss / n for i, (loss, n) in enumerate(zip(cycle_losses, scored, strict=True), start=1) if n}
        for name, value in sums.items():
            total, n = value.tolist()
            means[f"loss_{name}"] = total / max(1.0, n)
        return means, last, tokens


class CycleTrainer(ShardedTrainerMixin, Trainer):
    """`Trainer` with our objective, parameter groups and depths, a validation loss per token, and our checkpoint format."""

    loss_is_scaled_for_ga = True
    model: Any  # a LossModule
    optimizer: Any

    def __init__(
        self,
        model: LossModule,
        args: TrainingArguments,
        settings: RunSettings,
        depths: DepthSchedule | None,
        saver: Saver | None,
        **kwargs: Any,
    ):
        super().__init__(model, args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.settings, self.depths, self.saver = settings, depths, saver
        self.ema: EMA | None = None
        self.window = MetricWindow(model.deepest)
        # Sums of the last cycle since the last validation: loss, tokens.
        self.epoch_loss, self.epoch_tokens = 0.0, 0.0
        self.started = time.perf_counter()
        self.throughput = Throughput()
        self.gradients = GradientCheck(saver.folder if saver else None, args.process_index)
        self.flags: HostCopy | None = None  # of `any_rank`
        self.batches: list[dict[str, Any]] = []  # micro-batches of the current optimizer step
        self.cycle_losses: Tensor | None = None
        self.flops: dict[tuple[int, int], int] = {}  # of a micro-batch, by tokens and depth

    # The objective

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        H = self.depth
        outputs = model(**inputs, H_cycles=H, num_items_in_batch=num_items_in_batch)
        tokens = counted(inputs["labels"])
        divisor = tokens if num_items_in_batch is None else num_items_in_batch
        self.window.add(outputs, divisor, tokens, H or 1)
        self.batches.append(inputs)
        self.cycle_losses = outputs["cycle_losses"]
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.accelerator.num_processes
        # Each rank divides by the tokens of all ranks, and DDP averages the gradients.
        loss = outputs["loss"] * self.accelerator.num_processes if num_items_in_batch is not None else outputs["loss"]
        return (loss, outputs) if return_outputs else loss

    @property
    def depth(self) -> int | None:
        """Cycles of the current optimizer step; None for a model without cycles."""
        return None if self.depths is None else self.depths.at(self.state.global_step)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of the forward and backward pass, with every application of the loop."""
        key = tokens, depth = inputs["input_ids"].numel(), self.depth or 1
        if key not in self.flops:  # called for every micro-batch
            (teacher,) = self.model.teacher
            self.flops[key] = int(pass_flops(self.model.model.config, self.settings, tokens, depth, teacher and teacher.config))
        return self.flops[key]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Has the gradient norm checked, after the backward pass and before the weights are updated."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.gradients.watch(Step(self.state.global_step + 1, self.depth, self.batches, self.cycle_losses), norm, self.optimizer)
        self.batches = []
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.gradients.settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # The optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model.model, self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            warmup, settings = warmup_of(self.settings, num_training_steps), self.settings
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_factor(settings.lr_schedule, step, warmup, num_training_steps, settings.decay_share),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        check_sharding(model, self.settings)
        if self.settings.ema_decay:
            self.ema = EMA([p for p in self.model.parameters() if p.requires_grad], self.settings.ema_decay)
            if resume_from_checkpoint is not None:
                state = read_state(Path(resume_from_checkpoint) / AVERAGES)
                shards = [shard_like(own, full) for own, full in zip(self.ema.averages, state["averages"], strict=True)]
                self.ema.load_state_dict(state | {"averages": shards})
        return model, loader

    def update_average(self) -> None:
        assert self.ema is not None
        self.ema.update()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the weights are their moving average, if the run has one: for validation, samples and checkpoints."""
        if self.ema is None:
            yield
        else:
            with self.ema.swapped():
                yield

    @contextmanager
    def inference_model(self) -> Iterator[None]:
        """Inside, the model is averaged, gathered on each rank, and not compiled: each length would recompile. Collective."""
        eager = torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()
        with self.averaged_weights(), gathered(self.model), eager:
            yield

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; of several as of the call before, so that none waits for its device. Collective."""
        if self.accelerator.num_processes == 1:
            return flag
        before, own = self.flags, torch.full((), float(flag), device=self.args.device)
        self.flags = HostCopy(self.accelerator.reduce(own, "sum"))
        return before is not None and before.read() > 0

    # Validation and logging

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The validation loss of every cycle, as a mean over all tokens, not over batches."""
        with self.throughput.stopped():
            means = self._means(self.model.row_sums, eval_dataset)
        metrics = self._eval_metrics(means, metric_key_prefix)
        if self.window.sums:
            self._drain_window()
        metrics["train_loss"] = self.epoch_loss / max(1.0, self.epoch_tokens)
        self.epoch_loss, self.epoch_tokens = 0.0, 0.0
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log_donor_loss(self) -> None:
        """Log `donor_loss`: the validation loss before the first step at 0 cycles, where the model is its donor."""
        with self.throughput.stopped():
            (loss,) = self._means(self.model.plain_sums, None)
        self.log({"donor_loss": loss})

    def _means(self, row_sums: Callable[..., Tensor], eval_dataset: Any) -> list[float]:
        """What `row_sums` of `LossModule` adds up, per scored token. Collective."""
        self.model.eval()
        sums: list[Tensor] = []
        tokens = 0
        with self.averaged_weights():
            for batch in self.get_eval_dataloader(eval_dataset):
                with self.accelerator.autocast():
                    rows = row_sums(**batch)
                rows, scored = self.accelerator.gather_for_metrics((rows, scored_tokens(batch["labels"])))
                sums.append(rows.cpu().double().sum(dim=0))
                tokens += int(scored.sum())
        return (torch.stack(sums).sum(dim=0) / max(1, tokens)).tolist()

    def _eval_metrics(self, means: list[float], prefix: str) -> dict[str, float]:
        losses, hits = means[: self.model.deepest], means[self.model.deepest :]
        loss = losses[self.model.main_cycle - 1]
        quality = ("nearest_right", hits[0]) if hits else ("perplexity", perplexity(loss))
        metrics = [("loss", loss), quality, *((f"loss_cycle_{i}", each) for i, each in enumerate(losses, start=1))]
        return {f"{prefix}_{name}": value for name, value in metrics}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:  # the Trainer's final summary, which has no new information
            return
        if "loss" in logs:
            logs |= self._drain_window()
            logs["tokens_per_second"] = round(self.throughput.rate(self.state.num_input_tokens_seen), 1)
            logs["memory"] = round(peak_memory(self.args.device) / GIB, 3)
        logs["tokens"], logs["flops"] = self.state.num_input_tokens_seen, self.state.total_flos
        logs["seconds"] = round(time.perf_counter() - self.started, 3)
        super().log(logs)

    def _drain_window(self) -> dict[str, float]:
        means, loss, tokens = self.window.drain(self.accelerator)
        self.epoch_loss, self.epoch_tokens = self.epoch_loss + loss, self.epoch_tokens + tokens
        return means

    # Checkpoints and resume

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save the weights and the further state for a resume. Collective; the first rank writes."""
        if self.saver is None:
            return
        if self.is_deepspeed_enabled:  # only DeepSpeed can gather its sharded states
            if self.args.should_save:
                self.saver.save_step(self.state.global_step, self.model.model, None, **self.notes())
            return
        assert self.lr_scheduler is not None
        state: dict[str, Any] = {OPTIMIZER_NAME: full_optimizer_state(self.optimizer), SCHEDULER_NAME: self.lr_scheduler.state_dict()}
        if self.saver.dtype != torch.float32 or self.ema is not None:
            # Copied, because on a CPU these are the weights themselves, which averaged_weights overwrites during the save.
            weights = full_state(self.model.model)
            if self.model.model.config.is_adapter:  # the donor's are in its own files
                weights = {name: weight for name, weight in weights.items() if name.startswith(ADAPTER_PREFIX)}
            state[MASTERS] = weights if self.ema is None else copy.deepcopy(weights)
        if self.ema is not None:
            state[AVERAGES] = full_optimizer_state(self.ema)
        random = self._random_states()

        def write(folder: Path) -> None:
            for name, content in state.items():
                torch.save(content, folder / name)
            for name, content in random.items():
                (folder / name).write_bytes(content)
            self.state.save_to_json(str(folder / STATE))
            (folder / RUN).write_text(json.dumps(self._run_state(), indent=2) + "\n", encoding="utf-8")

        with self.inference_model():
            if self.args.should_save:
                self.saver.save_step(self.state.global_step, self.model.model, write, **self.notes())

    def notes(self) -> dict[str, Any]:
        """Metadata of the run for a checkpoint of the current step."""
        return training_notes(self.settings, self.state)

    def _run_state(self) -> dict[str, Any]:
        sums = {"saved_at": time.time(), "epoch_loss": self.epoch_loss, "epoch_tokens": self.epoch_tokens}
        data = self.saver.data if self.saver is not None else None
        return {**sums, "approach": self.settings.approach, "settings": asdict(self.settings), "data": data}

    def _random_states(self) -> dict[str, bytes]:
        """File name -> contents, of all ranks. Collective."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._save_rng_state(folder)
                own = [(file.name, file.read_bytes()) for file in Path(folder).iterdir()]
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise UserError(
                f"{tempfile.gettempdir()}: the random states of a checkpoint could not be written to this temporary folder ({error}); "
                "the checkpoints saved so far are intact. Free some space, or set another folder with TMPDIR, and continue with --resume"
            ) from error
        return dict(gather_object(own))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the float32 weights if those in the .pt, which the model has, are rounded or averaged; and the sums of the epoch."""
        folder = Path(resume_from_checkpoint)
        if (folder / MASTERS).is_file():
            load_full_state(self.model.model, read_state(folder / MASTERS))
        run = read_json(folder / RUN)
        self.epoch_loss, self.epoch_tokens = run["epoch_loss"], run["epoch_tokens"]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        spent = self.state.log_history[-1]["seconds"] if self.state.log_history else 0.0
        self.started = time.perf_counter() - spent
        self.throughput.start(self.state.num_input_tokens_seen)
        return position


class Throughput:
    """Training tokens per second, without the time of validation."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, tokens: int) -> None:
        self.tokens, self.since = tokens, time.perf_counter()

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        rate = (tokens - self.tokens) / max(1e-9, now - self.since)
        self.tokens, self.since = tokens, now
        return rate

    @contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - before


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, else resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows, where psutil has the peak
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

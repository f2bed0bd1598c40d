"""Our settings in the words of transformers' TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..errors import UserError
from .parallel import processes
from .saving import Saver
from .settings import RunSettings

if TYPE_CHECKING:
    pass


def training_arguments(settings: RunSettings, device: torch.device, saver: Saver | None) -> TrainingArguments:
    """Our settings in the words of transformers. What is not named here is decided by `RecursiveTrainer`.

    Raises:
        UserError: A second GPU, bfloat16 on a device without it, or an unknown tracker or one that is not installed.
    """
    if device.index and processes() == 1:
        raise UserError(f"--device: training takes the first GPU that it sees, got {device}; choose by CUDA_VISIBLE_DEVICES={device.index}")
    _check_trackers(settings.report_to)
    args = TrainingArguments(
        output_dir=str(saver.folder if saver else "."),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum_steps,
        num_train_epochs=settings.num_epochs,
        max_steps=named_steps(settings) or -1,
        learning_rate=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="no",  # SaveSteps asks instead
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        bf16=computes_in_bf16(settings, device),
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,  # idle parameters are frozen
        deepspeed=settings.deepspeed,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        seed=settings.seed,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer splits every batch over all GPUs with DataParallel, which is slower than one of them
    return args


def computes_in_bf16(settings: RunSettings, device: torch.device) -> bool:
    """What the settings say; where they leave it open, whether it is a GPU that has it: a CPU's is slower than its float32.

    Raises:
        UserError: It is asked of a device without it.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if settings.bf16 and not (on_gpu or device.type == "cpu"):
        raise UserError(f"--bf16: {device} does not compute in bfloat16; leave the flag out")
    return on_gpu if settings.bf16 is None else settings.bf16


def _check_trackers(names: Sequence[str]) -> None:
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to: expected one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(f"--report_to {name}: cannot be used: {error}") from error


def total_steps(blocks: Any, settings: RunSettings) -> int:
    """Optimizer steps of a run: those that the settings name, else those of the epochs. The last step of an epoch may have fewer
    micro-batches, the last micro-batch fewer sequences. A stream has no length, and is not asked for it."""
    if named := named_steps(settings):
        return named
    batches = math.ceil(len(blocks) / (settings.batch_size * processes()))
    return math.ceil(batches / settings.grad_accum_steps) * settings.num_epochs


def named_steps(settings: RunSettings) -> int | None:
    """max_steps, or as many as max_tokens take; None where the epochs decide."""
    if settings.max_tokens is None:
        return settings.max_steps
    return math.ceil(settings.max_tokens / (settings.seq_len * settings.batch_size * settings.grad_accum_steps * processes()))

"""Conversion between our settings and transformers' TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils.import_utils import is_torch_tf32_available

from ..errors import UserError
from ..utils.device import product_seconds
from ..utils.options import ALIASES
from .parallel import announce, processes
from .saving import Saver
from .settings import FitSettings, RunSettings

_PROBED_FLOPS, _BF16_PAYS = 1e9, 1.5  # of the probe of `choose_autocast`: least work of a product, and least gain in speed


def training_arguments(settings: RunSettings, device: torch.device, saver: Saver | None, validates: bool = True) -> TrainingArguments:
    """Our settings as TrainingArguments. Everything not set here is handled by `CycleTrainer`.

    Args:
        validates: Whether there is validation data.

    Raises:
        UserError: A GPU other than the first one, bfloat16 on a device without it, or a tracker that is unknown or not installed.
    """
    if device.index and processes() == 1:
        raise UserError(f"--device: training uses the first visible GPU, got {device}; select it by CUDA_VISIBLE_DEVICES={device.index}")
    _check_trackers(settings.report_to)
    args = TrainingArguments(
        output_dir=str(saver.folder if saver else "."),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum_steps,
        num_train_epochs=settings.num_epochs,
        max_steps=requested_steps(settings) or -1,
        learning_rate=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if validates else "no",
        save_strategy="no",  # SaveSteps requests saves
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        bf16=bool(settings.bf16),
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,  # freeze_rest freezes unused parameters
        deepspeed=settings.deepspeed,
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},
        remove_unused_columns=False,
        seed=settings.seed,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # otherwise the Trainer uses DataParallel, which is slower than a single GPU
    return args


# TrainingArguments without effect here: a run validates after each epoch in any case.
_IGNORED_ARGUMENTS = {
    "dataloader_pin_memory", "disable_tqdm", "do_eval", "do_predict", "do_train", "eval_strategy", "log_level", "logging_dir",
    "logging_first_step", "run_name",
}  # fmt: skip
_VALUES: dict[str, dict[Any, Any]] = {  # name -> value of TrainingArguments -> our value
    "use_cpu": {True: "cpu"},
    "save_strategy": {"no": 0},
}


def from_training_arguments(args: Any) -> FitSettings:
    """TrainingArguments as our settings. Arguments at their default keep our default.

    Raises:
        UserError: Not TrainingArguments, or an argument without counterpart here.
    """
    if not isinstance(args, TrainingArguments):
        raise UserError(f"args: expected FitSettings, or transformers' TrainingArguments, got {type(args).__name__}")
    ours = {field.name for field in fields(FitSettings)}
    names = {theirs: name for name, theirs in ALIASES.items() if name in ours} | {name: name for name in ours}
    names |= {"use_cpu": "device", "save_strategy": "save_every"}
    defaults = TrainingArguments(output_dir=args.output_dir)
    given = {
        field.name: getattr(args, field.name) for field in fields(TrainingArguments) if field.init and field.name not in _IGNORED_ARGUMENTS
    }
    given = {name: value for name, value in given.items() if name == "output_dir" or value != getattr(defaults, name)}
    if other := sorted(name for name, value in given.items() if name not in names or (name == "save_strategy" and value != "no")):
        raise UserError(f"args: {', '.join(other)}: not supported; use FitSettings, whose fields `recursify train --help` explains")
    return FitSettings(**{names[name]: _as_ours(name, value) for name, value in given.items()})


def _as_ours(name: str, value: Any) -> Any:
    value = getattr(value, "value", value)
    if name in _VALUES:
        return _VALUES[name].get(value, value)
    if name == "num_train_epochs" and value == int(value):
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def choose_autocast(settings: RunSettings, config: Any, device: torch.device) -> RunSettings:
    """The settings with `bf16` filled in: as set; else on GPUs that support it, and on CPUs where a probe finds it faster for this model.

    The probe times a product of a batch's tokens and a matrix of the feed-forward in both types, for some milliseconds. Products below
    `_PROBED_FLOPS` are not worth it, and several processes, which would have to agree, are not probed.

    Raises:
        UserError: It is set, and the device does not support it.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if settings.bf16 and not (on_gpu or device.type == "cpu"):
        raise UserError(f"--bf16: {device} does not support bfloat16; leave the flag out")
    if settings.bf16 is not None:
        return settings
    faster = device.type == "cpu" and processes() == 1 and _bf16_pays(settings.batch_size * settings.seq_len, config)
    if faster:
        announce("Training in bfloat16 autocast, which is faster on this CPU; the weights stay float32 (--bf16 False sets float32)")
    return replace(settings, bf16=on_gpu or faster)


def check_tf32(settings: RunSettings, device: torch.device) -> None:
    """Raise a UserError for `tf32` on a device that has none."""
    if settings.tf32 and not (device.type == "cuda" and is_torch_tf32_available()):
        raise UserError(f"--tf32: expected an NVIDIA GPU of the Ampere generation or newer, got {device}; leave the flag out")


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, a GPU may round the factors of float32 matrix products to TF32. Without the flag the setting of the program holds.

    It is set by torch's oldest way: after the newer ones `torch.compile` cannot read it, and transformers' `enable_tf32` has an effect only
    once in a process.
    """
    if not tf32:
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if before == "tf32" else "highest")


def _bf16_pays(tokens: int, config: Any) -> bool:
    shape = tokens, config.hidden_size, config.intermediate_size
    if 2 * math.prod(shape) < _PROBED_FLOPS:
        return False
    return _BF16_PAYS * product_seconds(torch.bfloat16, *shape, rounds=3) < product_seconds(torch.float32, *shape, rounds=3)


def _check_trackers(names: Sequence[str]) -> None:
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to: expected one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(f"--report_to {name}: cannot be used: {error}") from error


def total_steps(blocks: Any, settings: RunSettings) -> int:
    """Optimizer steps of a run: as set, else those of num_epochs. The last step of an epoch may have fewer micro-batches, and its last
    micro-batch fewer sequences. The length of a stream, which has none, is not queried."""
    if named := requested_steps(settings):
        return named
    batches = math.ceil(len(blocks) / (settings.batch_size * processes()))
    return math.ceil(batches / settings.grad_accum_steps) * settings.num_epochs


def requested_steps(settings: RunSettings) -> int | None:
    """max_steps, or the steps that max_tokens take; None if num_epochs decides."""
    if settings.max_tokens is None:
        return settings.max_steps
    return math.ceil(settings.max_tokens / (settings.seq_len * settings.batch_size * settings.grad_accum_steps * processes()))

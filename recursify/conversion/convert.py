"""Convert a donor to a recursive model: plan, read the tensors, check the result, save it.

    convert(...)    the Python function: takes a donor, returns a model
    run(settings)   the command `recursify convert`: the same, with a report, to a file or a folder

Every donor tensor is copied or left out by name, and every tensor of the model has a source (`mapping.match_tensors`). Every copied tensor
is compared with the donor's file, and the model is run against the same layers in transformers' own class.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoints import checkpoint
from ..checkpoints.donor import Donor, donor_tokenizer, open_donor
from ..errors import UserError
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import ConversionPlan
from ..utils.device import choose_device
from .build import build_model, recursive_config
from .inspection import Inspection, inspect
from .layer_selection import candidates, make_plan
from .mapping import TensorMapping
from .probe import probe
from .self_check import SelfCheck, compare_logits, compare_tensors, plain_twin
from .settings import ConvertSettings, Say

DEFAULT_SEQ_LEN = 512


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: the model, its plan, the mapping of tensors, and the result of the self-check."""

    model: RecursiveLLM
    plan: ConversionPlan
    mapping: TensorMapping
    check: SelfCheck


def convert(
    donor: str,
    *,
    L_layers: int = 4,
    H_cycles: int = 3,
    L_cycles: int = 3,
    layer_selection: Literal["uniform", "first", "last", "middle", "stride", "auto"] | None = None,
    keep_donor: bool = False,
    prelude_layers: int = 0,
    coda_layers: int = 0,
    gain: float = 0.0,
    injection: Literal["anchored", "sum_norm"] = "anchored",
    freeze_embeddings: bool = False,
    calibration_file: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> RecursiveLLM:
    """Make a recursive model from a donor.

    The model records its donor and plan in `config.conversion`, which `save_pretrained` writes. There is no `trust_remote_code`: all
    supported donor families are part of transformers, and no code of the donor's repository is run.

    Args:
        donor: Hub id or folder.
        L_layers, H_cycles, L_cycles: Shape of the loop.
        layer_selection, keep_donor, prelude_layers, coda_layers: Which donor layers go where; see `layer_selection.make_plan`.
        gain: Start value of the gains; 0 makes every cycle equal to the plain pass.
        injection: How states and embedding are mixed: `anchored`, or `sum_norm` (not exact at conversion).
        freeze_embeddings: Keep the embeddings, and a head tied to them, out of training.
        calibration_file: Text file for `layer_selection="auto"`.
        revision: Branch, tag or commit of a donor on the hub; its main branch where None.
        token: Access token of the hub; where None, HF_TOKEN or that of `hf auth login`.
        dtype: Dtype of the model, such as `torch.bfloat16` or "bfloat16"; None and "auto" mean that of the donor.
        device: Device of the model; the CPU, where the conversion runs, where None.

    Raises:
        UserError: A ValueError whose text says what was wrong and how to mend it.
    """
    settings = ConvertSettings(
        qwen_model=donor, L_layers=L_layers, H_cycles=H_cycles, L_cycles=L_cycles, layer_selection=layer_selection, keep_donor=keep_donor,
        prelude_layers=prelude_layers, coda_layers=coda_layers, gain=gain, injection=injection, freeze_embeddings=freeze_embeddings,
        calibration_file=calibration_file, revision=revision,
    )  # fmt: skip
    settings.validate()
    target, wanted = None if device is None else choose_device(str(device)), _dtype(dtype)
    found = open_donor(donor, revision=revision, token=token)
    model: Any = convert_tensors(found, resolve_plan(found, settings), settings, dtype=wanted).model
    return model if target is None else model.to(target)


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype from its name; None for "auto"."""
    found = getattr(torch, given, given) if isinstance(given, str) else given
    if found is None or found == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype: expected a floating-point dtype of torch such as bfloat16, or auto, got {given!r}")
    return found


def resolve_plan(donor: Donor, settings: ConvertSettings, say: Say = lambda _: None) -> ConversionPlan:
    """The plan that the flags describe for this donor. Only `auto` reads the donor's weights.

    Raises:
        UserError: Flags that contradict the donor or each other.
    """
    if settings.layer_selection == "auto":
        plans = _auto_candidates(donor, settings)
        return probe(donor, plans, settings, say)
    return make_plan(
        donor.name,
        donor.config.num_hidden_layers,
        L_layers=settings.L_layers,
        layer_selection=settings.layer_selection,
        keep_donor=settings.keep_donor,
        prelude_layers=settings.prelude_layers,
        coda_layers=settings.coda_layers,
    )


def check_seq_len(donor: Donor, seq_len: int | None) -> int:
    """The sequence length of a conversion; None is DEFAULT_SEQ_LEN, or the donor's number of positions if that is less.

    Raises:
        UserError: Longer than the donor's number of positions.
    """
    positions = getattr(donor.config, "max_position_embeddings", None)
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, positions or DEFAULT_SEQ_LEN)
    if seq_len < 1 or (positions is not None and seq_len > positions):
        raise UserError(f"--seq_len: expected 1 to {positions} (the donor's positions), got {seq_len}")
    return seq_len


def _auto_candidates(donor: Donor, settings: ConvertSettings) -> Sequence[ConversionPlan]:
    settings.validate()
    return candidates(donor.name, donor.config.num_hidden_layers, settings.L_layers)


def convert_tensors(
    donor: Donor,
    plan: ConversionPlan,
    settings: ConvertSettings,
    say: Say = lambda _: None,
    save: Callable[[RecursiveLLM, Callable[[], Any]], Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Read the tensors of the plan, build the model around them, and check it.

    Args:
        save: Writes the model while it is being checked. Called with the model and a function that waits for the checks and raises their
            errors; call that before renaming anything that was written.
        dtype: Dtype of the model; that of the donor where None.

    Raises:
        UserError: The donor's files are damaged or do not match its configuration.
        RuntimeError: The model differs from the donor's layers: a bug, never a fault of the input.
    """
    model, mapping = build_model(donor, plan, recursive_config(donor, plan, settings), dtype)
    say("✓ Initialized recursive model")
    say("✓ Copied embeddings")
    say(f"✓ Copied {len(plan.loop)} transformer layers from indices {list(plan.loop)}")
    if plan.prelude or plan.coda:
        say(f"✓ Copied {len(plan.prelude)} prelude layers and {len(plan.coda)} coda layers")
    say("✓ Copied LM head")
    twin = plain_twin(donor.config, plan, model)
    with _check_pool() as pool:
        tensors = pool.submit(compare_tensors, donor, mapping, model)
        logits = pool.submit(compare_logits, donor, plan, mapping, model, twin)
        if save is not None:
            save(model, lambda: (tensors.result(), logits.result()))
        tensors.result()
        return Conversion(model, plan, mapping, logits.result())


@dataclass(frozen=True)
class ConvertReport:
    """The result of the command, for `--json`."""

    inspection: Inspection
    check: SelfCheck | None
    output_path: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        check = None if self.check is None else self.check.to_dict()
        return {**self.inspection.to_dict(), "check": check, "output_path": self.output_path, "seconds": self.seconds}


def run(settings: ConvertSettings, say: Say = print) -> ConvertReport:
    """Run the command `recursify convert`.

    Raises:
        UserError: Bad input; nothing is written.
    """
    start = time.monotonic()
    settings.validate()
    if not settings.dry_run:
        checkpoint.check_writable(settings.output_path)
    replaced = Path(settings.output_path).exists()
    donor = open_donor(settings.qwen_model, revision=settings.revision)
    seq_len = check_seq_len(donor, settings.seq_len)
    if settings.seq_len is None and seq_len < DEFAULT_SEQ_LEN:
        say(f"✓ Sequence length {seq_len}, the donor's number of positions (the default is {DEFAULT_SEQ_LEN})")
    if settings.dry_run:
        return _dry_run(donor, settings, say, start)
    tokenizer = donor_tokenizer(donor, settings.tokenizer_path)
    plan = resolve_plan(donor, settings, say)
    donor.check_weights()
    c = donor.config
    family = "Qwen" if c.model_type.startswith("qwen") else type(c).__name__.removesuffix("Config")
    say(f"✓ Loaded {family} model: hidden_size={c.hidden_size}, num_layers={c.num_hidden_layers}, vocab_size={c.vocab_size}")
    notes = {**donor.origin, "seq_len": seq_len}

    def save(model: RecursiveLLM, checked: Callable[[], Any]) -> None:
        checkpoint.save(settings.output_path, model, tokenizer, plan, notes, approve=checked)

    done = convert_tensors(donor, plan, settings, say, save)
    check = done.check
    for line in (*_verdict(check, settings), *_closing(settings, plan, replaced)):
        say(line)
    seconds = round(time.monotonic() - start, 2)
    config: Any = done.model.config
    return ConvertReport(inspect(config), check, settings.output_path, seconds)


def _check_pool() -> ThreadPoolExecutor:
    """Threads for the checks, which run while the result is written; one core is left for writing."""
    return ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(max(1, torch.get_num_threads() - 1),))


def _verdict(check: SelfCheck, settings: ConvertSettings) -> list[str]:
    worst = max(check.cycle_differences, default=0.0)
    where = "at every cycle" if worst == 0.0 else "in a plain pass"
    lines = [f"✓ Checked against {check.reference}: {check.tensors_compared} tensors equal, logits equal {where} (max difference 0.0)"]
    if worst > 0.0:
        cause = f"--gain {settings.gain}" if settings.injection == "anchored" else f"--injection {settings.injection}"
        lines.append(f"! Not exact with cycles: {cause} changes their logits by up to {worst:.3g}")
    return lines


def _closing(settings: ConvertSettings, plan: ConversionPlan, replaced: bool) -> list[str]:
    """What to know about the model that was written, and what to do with it."""
    lines = []
    if settings.H_cycles == 0:
        lines.append("! 0 cycles: the recursion is never run, so this model cannot be trained; --H_cycles 1 or more makes one that can")
    if plan.dropped:
        lines.append(
            f"! {len(plan.dropped)} of the donor's {plan.donor_layers} layers are dropped: the model is not the donor until it is trained "
            "(--keep_donor keeps all)"
        )
    if replaced:
        lines.append(f"! {settings.output_path} existed and was replaced")
    return [*lines, f"✓ Saved to {settings.output_path}", f"Next: {_next_command(settings)}"]


def _next_command(settings: ConvertSettings) -> str:
    """A command for the shell that goes on from here, and can be given as it stands."""
    model = shlex.quote(settings.output_path)
    if settings.H_cycles == 0:
        return f'recursify generate --checkpoint {model} --prompt "Once upon a time"'
    folder = shlex.quote(f"runs/{Path(settings.output_path).name.removesuffix('.pt')}")
    return f"recursify train --checkpoint {model} --dataset_name wikitext --enable_deep_supervision --output_dir {folder}"


def _dry_run(donor: Donor, settings: ConvertSettings, say: Say, start: float) -> ConvertReport:
    if settings.layer_selection == "auto":
        plans = _auto_candidates(donor, settings)
        say(f"auto would probe {len(plans)} starts, 0 to {len(plans) - 1}, with {len(plans) + 1} donor passes; shown with the block at 0")
        plan = plans[0]
    else:
        plan = resolve_plan(donor, settings)
    found = inspect(recursive_config(donor, plan, settings))
    say(found.render())
    return ConvertReport(found, None, None, round(time.monotonic() - start, 2))

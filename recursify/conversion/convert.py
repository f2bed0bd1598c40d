"""From a donor to a recursive model: plan, stream the wanted tensors, check the result, save it.

    convert(...)    the Python door: donor in, model out
    run(settings)   what `recursify convert` does: the same, with a report, into a file or a folder

Every donor tensor is copied or left out by name, and every one of ours has a source (`mapping.match_tensors`); every copied tensor is
compared with the donor's file, and the finished model is run against the same layers in transformers' own class.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..checkpoints import checkpoint
from ..checkpoints.donor import Donor, open_donor
from ..checkpoints.tokenizer import load_tokenizer
from ..errors import UserError
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import ConversionPlan
from .build import build_model, recursive_config
from .inspection import Inspection, inspect
from .layer_selection import candidates, make_plan
from .mapping import TensorMapping
from .probe import probe
from .self_check import SelfCheck, compare_logits, compare_tensors, plain_twin
from .settings import ConvertSettings, Say


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: the model, how it was made, and how it was checked."""

    model: RecursiveLLM
    plan: ConversionPlan
    fates: TensorMapping
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
) -> RecursiveLLM:
    """Make a recursive model from a donor, on the CPU, in the donor's dtype.

    Args:
        donor: Hub id or folder.
        L_layers, H_cycles, L_cycles: Shape of the loop.
        layer_selection, keep_donor, prelude_layers, coda_layers: Which donor layers go where; see `layer_selection.make_plan`.
        gain: Start value of the gains; 0 makes every cycle equal to the plain pass.

    Raises:
        UserError: A ValueError whose text says what was wrong and how to mend it.
    """
    settings = ConvertSettings(
        qwen_model=donor, L_layers=L_layers, H_cycles=H_cycles, L_cycles=L_cycles, layer_selection=layer_selection, keep_donor=keep_donor,
        prelude_layers=prelude_layers, coda_layers=coda_layers, gain=gain, injection=injection, freeze_embeddings=freeze_embeddings,
        calibration_file=calibration_file,
    )  # fmt: skip
    found = open_donor(donor)
    return convert_tensors(found, resolve_plan(found, settings), settings).model


def resolve_plan(donor: Donor, settings: ConvertSettings, say: Say = lambda _: None) -> ConversionPlan:
    """The plan that the flags mean for this donor. Only `auto` reads the donor's weights.

    Raises:
        UserError: Flags that do not fit the donor or each other.
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


def check_seq_len(donor: Donor, seq_len: int) -> None:
    """Raise a UserError for sequences that are longer than the donor has positions."""
    positions = getattr(donor.config, "max_position_embeddings", None)
    if seq_len < 1 or (positions is not None and seq_len > positions):
        raise UserError(f"--seq_len: expected 1 to {positions} (the donor's positions), got {seq_len}")


def _auto_candidates(donor: Donor, settings: ConvertSettings) -> Sequence[ConversionPlan]:
    if settings.prelude_layers or settings.coda_layers:
        raise UserError("--layer_selection auto: it chooses prelude and coda itself; leave --prelude_layers and --coda_layers out")
    if settings.calibration_file is None:
        raise UserError("--layer_selection auto: needs --calibration_file, a text file like what the model is for")
    return candidates(donor.name, donor.config.num_hidden_layers, settings.L_layers)


def convert_tensors(
    donor: Donor,
    plan: ConversionPlan,
    settings: ConvertSettings,
    say: Say = lambda _: None,
    save: Callable[[RecursiveLLM, Callable[[], Any]], Any] | None = None,
) -> Conversion:
    """Stream the tensors that the plan wants, build the model around them, and check it.

    Args:
        save: Writes the model while it is being checked. It gets the model, and what waits for the checks and raises what they raise:
            to be called before anything that was written gets its place.

    Raises:
        UserError: The donor's files are damaged or do not match its configuration.
        RuntimeError: The finished model differs from the donor's layers: a fault of ours, never of the input.
    """
    model, fates = build_model(donor, plan, recursive_config(donor, plan, settings))
    say("✓ Initialized recursive model")
    say("✓ Copied embeddings")
    say(f"✓ Copied {len(plan.loop)} transformer layers from indices {list(plan.loop)}")
    if plan.prelude or plan.coda:
        say(f"✓ Copied {len(plan.prelude)} prelude layers and {len(plan.coda)} coda layers")
    say("✓ Copied LM head")
    twin = plain_twin(donor.config, plan, model)
    with _beside() as pool:
        tensors, logits = pool.submit(compare_tensors, donor, fates, model), pool.submit(compare_logits, donor, plan, fates, model, twin)
        if save is not None:
            save(model, lambda: (tensors.result(), logits.result()))
        tensors.result()
        return Conversion(model, plan, fates, logits.result())


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
    """What `recursify convert` does.

    Raises:
        UserError: Bad input; nothing is written then.
    """
    start = time.monotonic()
    if not settings.dry_run:
        checkpoint.check_writable(settings.output_path)
    donor = open_donor(settings.qwen_model)
    check_seq_len(donor, settings.seq_len)
    if settings.dry_run:
        return _dry_run(donor, settings, say, start)
    tokenizer = load_tokenizer(settings.tokenizer_path or donor.name)
    plan = resolve_plan(donor, settings, say)
    donor.check_weights()
    c = donor.config
    family = "Qwen" if c.model_type.startswith("qwen") else type(c).__name__.removesuffix("Config")
    say(f"✓ Loaded {family} model: hidden_size={c.hidden_size}, num_layers={c.num_hidden_layers}, vocab_size={c.vocab_size}")
    notes = {"donor": donor.name, "seq_len": settings.seq_len}

    def save(model: RecursiveLLM, checked: Callable[[], Any]) -> None:
        checkpoint.save(settings.output_path, model, tokenizer, plan, notes, approve=checked)

    done = convert_tensors(donor, plan, settings, say, save)
    check = done.check
    say(f"✓ Checked against {check.reference}: {check.tensors_compared} tensors equal, {_verdict(check)}")
    say(f"✓ Saved to {settings.output_path}")
    seconds = round(time.monotonic() - start, 2)
    config: Any = done.model.config
    return ConvertReport(inspect(config, plan), check, settings.output_path, seconds)


def _beside() -> ThreadPoolExecutor:
    """Threads that compare while the result is being written; of torch's own threads they leave one core to the writing."""
    return ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(max(1, torch.get_num_threads() - 1),))


def _verdict(check: SelfCheck) -> str:
    worst = max(check.cycle_differences, default=0.0)
    if worst == 0.0:
        return "logits equal at every cycle (max difference 0.0)"
    return f"logits of a plain pass equal (max difference 0.0); the start gain or sum_norm moves those of the cycles by up to {worst:.3g}"


def _dry_run(donor: Donor, settings: ConvertSettings, say: Say, start: float) -> ConvertReport:
    if settings.layer_selection == "auto":
        plans = _auto_candidates(donor, settings)
        say(f"auto would probe {len(plans)} starts, 0 to {len(plans) - 1}, with {len(plans) + 1} donor passes; shown with the block at 0")
        plan = plans[0]
    else:
        plan = resolve_plan(donor, settings)
    found = inspect(recursive_config(donor, plan, settings), plan)
    say(found.render())
    return ConvertReport(found, None, None, round(time.monotonic() - start, 2))

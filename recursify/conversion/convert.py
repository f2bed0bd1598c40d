"""From a donor to a recursive model: plan, stream the wanted tensors, check the result, save it.

    convert(...)    the Python door: donor in, model out
    run(settings)   what `recursify convert` does: the same, with a report, into a file or a folder

Nothing is believed on faith. Every tensor has a fate (`weights.settle`), every copied tensor is compared with the donor's file, and the
finished model is run against the same layers in transformers' own class. Floor 2.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoints import checkpoint
from ..checkpoints.donor import Donor, load_tokenizer, open_donor
from ..checkpoints.guide_names import Fates, settle
from ..errors import UserError
from ..network.configuration_recursive_llm import from_donor
from ..network.modeling_recursive_llm import FAMILIES, RecursiveLLM
from .inspection import Inspection, inspect
from .layer_selection import ConversionPlan, candidates, make_plan

Say = Callable[[str], None]
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_PROBE_TOKENS, _PROBE_WINDOWS, _PROBE_GAIN = 128, 8, 0.5
_COMPARED_TOKENS = 4  # a few: they must be equal bit by bit, and each of the passes reads all weights


@dataclass(kw_only=True)
class LoopSettings:
    """The shape of the loop: flags of every job that makes one."""

    L_layers: int = 4
    """Layers in the looped block."""
    H_cycles: int = 3
    """Cycles; each ends in a state that can be read out."""
    L_cycles: int = 3
    """Updates of z_L within a cycle. The block is applied H_cycles * (L_cycles + 1) times."""


@dataclass(kw_only=True)
class ConvertSettings(LoopSettings):
    """Turn a pretrained language model into a recursive one."""

    qwen_model: str = "Qwen/Qwen2-0.5B"
    """The donor: a hub id, or a folder with config.json and safetensors. Qwen2, Qwen2.5, Qwen3, Llama, Mistral, SmolLM3, OLMo2 or Phi3."""
    seq_len: int = 512
    """Longest sequence you mean to use: checked against the donor's positions, and kept in the checkpoint's notes."""
    layer_selection: Literal["uniform", "first", "last", "middle", "stride", "auto"] | None = None
    """Which donor layers make the block. Default: uniform, or middle with --keep_donor. auto probes every start and keeps the donor."""
    calibration_file: str | None = None
    """Text that auto measures on."""
    freeze_embeddings: bool = False
    """Keep the embeddings (and a head that is tied to them) out of training."""
    keep_donor: bool = False
    """Keep every donor layer: those before and after the block run once. Exact at conversion."""
    prelude_layers: int = 0
    """Donor layers kept before the loop."""
    coda_layers: int = 0
    """Donor layers kept after the loop."""
    gain: float = 0.0
    """Start value of the gains on the states, 0 <= gain <= 0.45. At 0 every cycle equals the plain pass."""
    injection: Literal["anchored", "sum_norm"] = "anchored"
    """How states and embedding mix: anchored, or sum_norm (TRM's bare sum with a norm; not exact at conversion)."""
    dry_run: bool = False
    """Print the plan with parameter counts and stop. Reads config.json only."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer, when the donor has none."""
    output_path: str = "qwen_recursive_init.pt"
    """Where to write: a .pt file (with its tokenizer beside it), or a new folder in the Hugging Face layout."""
    json: bool = False
    """Print the result as one JSON object on stdout; everything else goes to stderr."""


@dataclass(frozen=True)
class SelfCheck:
    """What the finished model was measured to do, on a few tokens.

    Args:
        reference: What it was compared with.
        plain_difference: Largest absolute difference of the logits of a plain pass (H_cycles = 0). Must be 0.
        cycle_differences: The same after each cycle. 0 at gain 0; otherwise what the start gain changes.
        tensors_compared: How many tensors were compared with the donor's files, element by element.
    """

    reference: str
    plain_difference: float
    cycle_differences: tuple[float, ...]
    tensors_compared: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "plain_difference": self.plain_difference,
            "cycle_differences": list(self.cycle_differences),
            "tensors_compared": self.tensors_compared,
        }


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: the model, how it was made, and how it was checked."""

    model: RecursiveLLM
    plan: ConversionPlan
    fates: Fates
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
        layer_selection, keep_donor, prelude_layers, coda_layers: Which donor layers go where; see `plan.make_plan`.
        gain: Start value of the gains; 0 makes every cycle equal to the plain pass.

    Raises:
        UserError: A ValueError whose text says what was wrong and how to mend it.
    """
    settings = ConvertSettings(
        qwen_model=donor, L_layers=L_layers, H_cycles=H_cycles, L_cycles=L_cycles, layer_selection=layer_selection, keep_donor=keep_donor,
        prelude_layers=prelude_layers, coda_layers=coda_layers, gain=gain, injection=injection, freeze_embeddings=freeze_embeddings,
        calibration_file=calibration_file, seq_len=1,
    )  # fmt: skip
    found = open_donor(donor)
    return carry_out(found, resolve_plan(found, settings), settings).model


def resolve_plan(donor: Donor, settings: ConvertSettings, say: Say = lambda _: None) -> ConversionPlan:
    """The plan that the flags mean for this donor. Only `auto` reads the donor's weights.

    Raises:
        UserError: Flags that do not fit the donor or each other.
    """
    positions = getattr(donor.config, "max_position_embeddings", None)
    if settings.seq_len < 1 or (positions is not None and settings.seq_len > positions):
        raise UserError(f"--seq_len: expected 1 to {positions} (the donor's positions), got {settings.seq_len}")
    if settings.layer_selection == "auto":
        plans = _auto_candidates(donor, settings)
        return _probe(donor, plans, settings, say)
    return make_plan(
        donor.name,
        donor.config.num_hidden_layers,
        L_layers=settings.L_layers,
        layer_selection=settings.layer_selection,
        keep_donor=settings.keep_donor,
        prelude_layers=settings.prelude_layers,
        coda_layers=settings.coda_layers,
    )


def _auto_candidates(donor: Donor, settings: ConvertSettings) -> Sequence[ConversionPlan]:
    if settings.prelude_layers or settings.coda_layers:
        raise UserError("--layer_selection auto: it chooses prelude and coda itself; leave --prelude_layers and --coda_layers out")
    if settings.calibration_file is None:
        raise UserError("--layer_selection auto: needs --calibration_file, a text file like what the model is for")
    return candidates(donor.name, donor.config.num_hidden_layers, settings.L_layers)


def recursive_config(donor: Donor, plan: ConversionPlan, settings: ConvertSettings) -> Any:
    """The configuration of the model that a plan makes.

    Raises:
        UserError: A cycle count, gain or injection out of range.
    """
    try:
        return from_donor(
            donor.config,
            plan.indices,
            prelude_layers=len(plan.prelude),
            L_layers=len(plan.loop),
            coda_layers=len(plan.coda),
            H_cycles=settings.H_cycles,
            L_cycles=settings.L_cycles,
            gain_init=settings.gain,
            injection=settings.injection,
            freeze_embeddings=settings.freeze_embeddings,
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error


def carry_out(donor: Donor, plan: ConversionPlan, settings: ConvertSettings, say: Say = lambda _: None) -> Conversion:
    """Stream the tensors that the plan wants, build the model around them, and check it.

    Raises:
        UserError: The donor's files are damaged or do not match its configuration.
        RuntimeError: The finished model differs from the donor's layers: a fault of ours, never of the input.
    """
    model, fates, twin = _make(donor, plan, settings, say)
    compare_tensors(donor, fates, model)
    return Conversion(model, plan, fates, compare_logits(donor, plan, fates, model, twin))


def _make(donor: Donor, plan: ConversionPlan, settings: ConvertSettings, say: Say) -> tuple[RecursiveLLM, Fates, Any]:
    """The model, the fates of its tensors, and what its logits are compared with."""
    model, fates = _fill(donor, plan, settings)
    say("✓ Initialized recursive model")
    say("✓ Copied embeddings")
    say(f"✓ Copied {len(plan.loop)} transformer layers from indices {list(plan.loop)}")
    if plan.prelude or plan.coda:
        say(f"✓ Copied {len(plan.prelude)} prelude layers and {len(plan.coda)} coda layers")
    say("✓ Copied LM head")
    return model, fates, _plain_twin(donor.config, plan, model)


def _fill(donor: Donor, plan: ConversionPlan, settings: ConvertSettings) -> tuple[RecursiveLLM, Fates]:
    """The model, around the donor's tensors in the type in which transformers loads the donor."""
    config = recursive_config(donor, plan, settings)
    config.tie_word_embeddings = tied = bool(config.tie_word_embeddings) and not _has_own_head(donor)
    with torch.device("meta"):
        ours = [name for name in FAMILIES[config.model_type](config).state_dict() if not (tied and name == _HEAD)]
    fates = settle(donor.tensor_names, ours, plan, tied)
    model = checkpoint.build(config, {name: donor.read(source) for name, source in fates.copied.items()}, donor.name, donor.dtype)
    model.generation_config = donor.generation_config()
    return model, fates


def _has_own_head(donor: Donor) -> bool:
    """Whether the files hold a head of its own, whatever the configuration says of a tie; transformers, too, goes by the files then."""
    return {_HEAD, _EMBED} <= set(donor.tensor_names) and not torch.equal(donor.read(_HEAD), donor.read(_EMBED))


def compare_tensors(donor: Donor, fates: Fates, model: RecursiveLLM) -> None:
    """Compare every copied tensor with its file, read anew.

    Raises:
        RuntimeError: One differs.
    """
    state = model.state_dict()
    for ours, source in fates.copied.items():
        if not _same_bits(state[ours], donor.pieces(source)):
            raise RuntimeError(f"{ours} differs from {source} of {donor.name} after conversion")


def compare_logits(donor: Donor, plan: ConversionPlan, fates: Fates, model: RecursiveLLM, twin: Any) -> SelfCheck:
    """Compare the logits of a plain pass, and of every cycle, with transformers' own class over the same layers.

    Args:
        twin: A model of that class, around the same tensors.

    Raises:
        UserError: The donor's own logits are not finite.
        RuntimeError: Those of a plain pass differ.
    """
    ids = torch.randint(model.config.vocab_size, (1, _COMPARED_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = twin(ids, use_cache=False).logits
        if not expected.isfinite().all():
            raise UserError(f"{donor.name}: its layers {plan.indices} give logits that are not finite; the donor's weights are damaged")
        plain_state = model.model(ids, H_cycles=0, use_cache=False).last_hidden_state
        plain = (model.lm_head(plain_state) - expected).abs().max().item()
        cycles = model.model(ids, output_cycle_states=True, use_cache=False).cycle_states
        # a wide head takes as long as several layers, and what it says of equal states is known
        by_cycle = tuple(plain if torch.equal(z, plain_state) else (model.lm_head(z) - expected).abs().max().item() for z in cycles)
    if plain != 0.0:
        raise RuntimeError(f"a plain pass differs from {type(twin).__name__} over layers {plan.indices} by {plain}")
    name = "the donor itself" if plan.keeps_donor else f"{type(twin).__name__} over layers {plan.indices}"
    return SelfCheck(name, plain, by_cycle, len(fates.copied))


def _same_bits(tensor: torch.Tensor, pieces: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor is what a file holds, given piece by piece."""
    flat, start = tensor.flatten(), 0
    for piece in pieces:
        one, other = flat[start : start + len(piece)], piece.to(tensor.dtype)
        # torch compares word by word: by single bytes, which any tensor can be seen as, takes seven times as long as by eight
        wide = len(one) * one.itemsize % 8 == 0 and one.storage_offset() * one.itemsize % 8 == 0
        if not torch.equal(*(part.view(torch.int64 if wide else torch.uint8) for part in (one, other))):
            return False
        start += len(piece)
    return start == len(flat)


def _plain_twin(donor_config: PreTrainedConfig, plan: ConversionPlan, model: RecursiveLLM) -> Any:
    """transformers' own model over the plan's layers, around the same tensors: nothing is copied."""
    config = copy.deepcopy(donor_config)
    config.num_hidden_layers, config.tie_word_embeddings = len(plan.indices), model.config.tie_word_embeddings
    for name in ("layer_types", "no_rope_layers"):
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[i] for i in plan.indices])
    state = {name: tensor for name, tensor in model.state_dict().items() if ".recursion." not in name}
    kernel = model.config._attn_implementation
    with checkpoint.quiet():
        twin = model.donor_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype, attn_implementation=kernel)
    return twin.eval()


def _probe(donor: Donor, plans: Sequence[ConversionPlan], settings: ConvertSettings, say: Say) -> ConversionPlan:
    """`auto`: the start at which looping the block disturbs the donor least.

    For every start the donor runs with the block applied twice, the second time on a point half-way to its first output (gain 0.5); the
    start with the least KL divergence from the donor's own next-token distribution wins.
    """
    ids = _calibration_windows(settings.calibration_file or "", load_tokenizer(settings.tokenizer_path or donor.name))
    say(f"auto: probing {len(plans)} starts with {len(plans) + 1} passes of the whole donor over {ids.numel()} tokens")
    base = ConvertSettings(**{**vars(settings), "H_cycles": 2, "L_cycles": 0, "injection": "anchored"})
    model, _ = _fill(donor, plans[0], base)
    recursion = model.model.recursion
    size, dtype = model.config.hidden_size, model.dtype
    half, none = torch.full((size,), _PROBE_GAIN, dtype=dtype), torch.zeros(size, dtype=dtype)
    recursion.inject_H.gains = lambda dtype: (half, none)
    with torch.no_grad():
        recursion.H_init.zero_()  # so the first cycle sees e alone
        reference = model.model(ids, H_cycles=0, use_cache=False).last_hidden_state
        costs = []
        for plan in plans:
            model.model.config = recursive_config(donor, plan, base)  # all layers are there: only where the loop begins differs
            model.model.config._attn_implementation = model.config._attn_implementation
            looped = model.model(ids, use_cache=False).last_hidden_state
            costs.append(_kl(model.lm_head, reference, looped))
            say(f"  loop {plan.loop[0]:>3}..{plan.loop[-1]:<3} KL {costs[-1]:.4f} nats")
    return plans[costs.index(min(costs))]


def _kl(head: Any, reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) in nats per token, one window at a time: the vocabulary is wide."""
    total = 0.0
    for p, q in zip(reference, other, strict=True):
        log_p, log_q = (head(x).float().log_softmax(-1) for x in (p, q))
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return total / len(reference)


def _calibration_windows(file: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibration_file: {file} cannot be read as text ({error}); name a UTF-8 text file") from error
    ids = tokenizer(text[: _PROBE_TOKENS * _PROBE_WINDOWS * 16], verbose=False)["input_ids"]
    count = min(len(ids) // _PROBE_TOKENS, _PROBE_WINDOWS)
    if count == 0:
        raise UserError(f"--calibration_file: {file} has {len(ids)} tokens; expected at least {_PROBE_TOKENS}")
    return torch.tensor(ids[: count * _PROBE_TOKENS]).view(count, _PROBE_TOKENS)


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
    if settings.dry_run:
        return _dry_run(donor, settings, say, start)
    tokenizer = load_tokenizer(settings.tokenizer_path or donor.name)
    plan = resolve_plan(donor, settings, say)
    # for their errors, before anything is said
    recursive_config(donor, plan, settings)
    donor.tensor_names  # noqa: B018
    c = donor.config
    family = "Qwen" if c.model_type.startswith("qwen") else type(c).__name__.removesuffix("Config")
    say(f"✓ Loaded {family} model: hidden_size={c.hidden_size}, num_layers={c.num_hidden_layers}, vocab_size={c.vocab_size}")
    model, fates, twin = _make(donor, plan, settings, say)
    with _beside() as pool:
        tensors, logits = pool.submit(compare_tensors, donor, fates, model), pool.submit(compare_logits, donor, plan, fates, model, twin)
        notes = {"donor": donor.name, "seq_len": settings.seq_len}
        checkpoint.save(settings.output_path, model, tokenizer, plan, notes, approve=lambda: (tensors.result(), logits.result()))
    check = logits.result()
    say(f"✓ Checked against {check.reference}: {check.tensors_compared} tensors equal, {_verdict(check)}")
    say(f"✓ Saved to {settings.output_path}")
    seconds = round(time.monotonic() - start, 2)
    config: Any = model.config
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

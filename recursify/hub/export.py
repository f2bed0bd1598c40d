"""Export a checkpoint: a folder for the hub, or a plain model for engines that do not support recursion.

    run(settings)         the command `recursify export`: a folder with model card and charts or, with --donor, a plain model; --push. With
                          --check, compare a running server with such a folder (engine_check.py)
    export_donor(model)   the layers of a recursive model as a model of the donor's class: the recursive model at H_cycles = 0

Every tensor of the plain model comes from the recursive one; tensors that are left out are listed with their number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import checkpoint
from ..checkpoints.dialects import write_config, write_tokenizer
from ..checkpoints.model_card import Evaluation, Extras, Row, base_model, donor_card, pictures, public, public_record, recursive_card
from ..errors import UserError
from ..evaluation.evaluate import evaluate
from ..evaluation.settings import EvaluateSettings, TextMeasurement
from ..network.configuration_recursive_llm import RecursiveLLMConfig
from ..network.modeling_recursive_llm import RecursiveLLM
from ..network.plan import ConversionPlan
from ..utils.atomic import write_atomic
from ..utils.files import read_json
from ..utils.models import without_donor_settings
from . import engine_check, upload
from .settings import ExportSettings

Say = Callable[[str], None]
_RECURSION = "model.recursion."
_CHECKED_TOKENS = 12


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Args:
        files: Name -> bytes, of the files in the folder `out`.
        left_out: Name -> number of parameters, of tensors that the plain model does not have.
        address: Of the uploaded repository.
    """

    out: str
    files: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    address: str | None = None


def run(settings: ExportSettings, say: Say = print) -> ExportReport:
    """Run the command `recursify export`.

    Raises:
        UserError: Bad input, and nothing is written; a failed upload of a folder that has been written; or a server that differs.
    """
    _check(settings)
    if settings.check is not None:
        engine_check.compare(settings.checkpoint, settings.check, settings.cycles, say)
        return ExportReport(settings.checkpoint, {})
    measured = _read_evaluations(settings.evaluation)
    if settings.push is not None:
        upload.check(settings.push)
    found = checkpoint.load(settings.checkpoint, tokenizer_path=settings.tokenizer_path, revision=settings.revision)
    tokenizer = checkpoint.require_tokenizer(found, settings.checkpoint)
    if settings.adapter_only and not found.model.config.is_adapter:
        raise UserError(f"--adapter_only: expected an adapter, as recursify train --adapter makes, got {settings.checkpoint}; leave it out")
    if settings.donor:
        checkpoint.require_head(found, settings.checkpoint)
    model = _in_dtype(found.model, settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"✓ Loaded {model.config.model_type}: {parameters:,} parameters, {_name(model.dtype)}")
    if measured is not None:
        _check_evaluation(measured, model.config)
    elif settings.dataset_name is not None:
        checkpoint.require_head(found, settings.checkpoint)
        measured = _measure(model, tokenizer, settings)
        say(f"✓ Measured on {measured.windows} windows of {measured.seq_len} tokens of {measured.dataset}")
    extras = Extras(
        name=settings.push or Path(settings.out).name, license=settings.license, base_model=settings.base_model, evaluation=measured,
        evaluation_note=_rounded(found.model.dtype, settings), illustrated=not settings.donor,
        chat=bool(tokenizer.chat_template), adapter=settings.adapter_only,
    )  # fmt: skip
    lost: dict[str, int] = {}
    if settings.donor:
        donor, lost = export_donor(model), left_out(model)
        check_donor(donor, model)
        say(f"✓ Checked {type(donor).__name__} against the recursive model at 0 cycles: logits equal (max difference 0.0)")
        say(f"✓ Left out the recursion: {len(lost)} tensors, {sum(lost.values()):,} parameters")
        for name, count in lost.items():
            say(f"    {name:<36} {count:>12,}")
        written = _write_donor(donor, tokenizer, found, lost, settings, extras)
    else:
        written = _write_recursive(model, tokenizer, found, settings, extras)
    say(f"✓ Wrote {settings.out}: {len(written)} files, {_size(sum(written.values()))}")
    for name, size in written.items():
        say(f"    {name:<36} {_size(size):>12}")
    address = _upload(settings, written)
    if address is not None:
        say(f"✓ Uploaded to {address}")
    return ExportReport(settings.out, written, lost, address)


# Checks


def _check(settings: ExportSettings) -> None:
    settings.validate()
    if settings.check is not None:
        return
    out = Path(settings.out)
    if checkpoint.is_file_form(out):
        raise UserError(f"{out}: expected the name of a folder, got one of a .pt file; a hub repository is a folder")
    checkpoint.check_writable(out)
    if settings.donor and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is a folder with other things in it; --donor expects a new or empty one")
    if out.resolve() in (Path(settings.checkpoint).resolve(), checkpoint.tokenizer_folder(settings.checkpoint).resolve()):
        raise UserError(f"{out}: is the checkpoint itself; export it to another folder")
    if settings.dataset_name is not None:
        _as_evaluate(settings).validate()


# Evaluation results


def _read_evaluations(files: tuple[str, ...]) -> Evaluation | None:
    """The results in files of `recursify evaluate --json`, of a model and baselines on one text."""
    found = [_read_evaluation(file) for file in files]
    if not found:
        return None
    for file, other in zip(files, found, strict=True):
        if other.text != found[0].text:
            raise UserError(
                f"--evaluation: {file} is of {other.text}, {files[0]} of {found[0].text}; losses on different text cannot be compared"
            )
    rows = [row for each in found for row in each.rows]
    lines = [(row.H_cycles, row.name if row.H_cycles is None else "") for row in rows]
    if len(set(lines)) < len(lines):
        raise UserError(f"--evaluation: {', '.join(files)}: the same depth twice; give one file of the model and one of each donor")
    return replace(found[0], rows=tuple(rows))


def _read_evaluation(file: str) -> Evaluation:
    if not Path(file).is_file():
        raise UserError(f"--evaluation: {file}: no such file; `recursify evaluate ... --json > {file}` writes one")
    fields = read_json(Path(file))
    try:
        return _evaluation(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--evaluation: {file} is not what `recursify evaluate --json` prints ({error!r})") from error


def _evaluation(fields: Mapping[str, Any]) -> Evaluation:
    rows = tuple(
        Row(
            None if row["H_cycles"] is None else int(row["H_cycles"]),
            float(row["loss"]),
            None if row["standard_error"] is None else float(row["standard_error"]),
            int(row["layer_applications"]),
            str(public(fields["checkpoint"])),
        )
        for row in fields["rows"]
    )
    return Evaluation(str(fields["dataset"]), int(fields["windows"]), int(fields["seq_len"]), int(fields["stride"]), rows)


def _check_evaluation(measured: Evaluation, config: Any) -> None:
    """Raise a UserError for results of another model, by its layer applications."""
    for row in measured.depths:
        expected = config.depth(row.H_cycles)
        if row.layer_applications != expected:
            raise UserError(
                f"--evaluation: is of another model: {row.layer_applications} layer applications at {row.H_cycles} cycles, this one has "
                f"{expected}; measure it with recursify evaluate"
            )


def _as_evaluate(settings: ExportSettings) -> EvaluateSettings:
    shared = {each.name: getattr(settings, each.name) for each in fields(TextMeasurement)}
    shared["cycles"] = settings.cycles or ((0,) if settings.donor else ())
    return EvaluateSettings(checkpoint=settings.checkpoint, **shared)


def _measure(model: Any, tokenizer: PreTrainedTokenizerBase, settings: ExportSettings) -> Evaluation:
    report = evaluate(model, tokenizer, _as_evaluate(settings))
    model.to("cpu")
    return _evaluation(report.to_dict())


def _rounded(stored: torch.dtype, settings: ExportSettings) -> str:
    if not settings.evaluation or settings.dtype in (None, _name(stored)):
        return ""
    return f"Measured before the weights were converted to {settings.dtype}."


# Weights


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_dtype(model: RecursiveLLM, settings: ExportSettings) -> RecursiveLLM:
    """The model in the dtype of the export.

    Raises:
        UserError: Weights that the dtype cannot represent.
    """
    if settings.dtype is None or settings.dtype == _name(model.dtype):
        return model
    dtype = getattr(torch, settings.dtype)
    state = checkpoint.stored_state(model, dtype)
    before = model.state_dict()
    if lost := [name for name, tensor in state.items() if not tensor.isfinite().all() and before[name].isfinite().all()]:
        raise UserError(f"--dtype {settings.dtype}: cannot hold the values of {', '.join(lost[:3])}; choose float32 or bfloat16")
    converted = checkpoint.build(model.config, state, settings.checkpoint, dtype)
    converted.generation_config = model.generation_config
    return converted


def export_donor(model: RecursiveLLM) -> PreTrainedModel:
    """The layers of a recursive model as a model of the donor's class, equal to the recursive model at `H_cycles = 0`.

    Tensors and generation config are shared with `model`; the recursion is left out. Save it with `save_pretrained`.
    """
    source: Any = model
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_RECURSION)}
    with checkpoint.quiet():
        donor, info = source.donor_class.from_pretrained(
            None,
            config=_donor_config(source),
            state_dict=dict(state),
            dtype=model.dtype,
            attn_implementation=source.config._attn_implementation,
            output_loading_info=True,
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise RuntimeError(f"{type(donor).__name__} lacks {sorted(info['missing_keys'])} and has no {sorted(info['unexpected_keys'])}")
    donor.generation_config = model.generation_config
    return donor.eval()


def _donor_config(model: Any) -> PreTrainedConfig:
    """The configuration of the donor's class over the physical layers, without the fields of the recursion."""
    physical = model.config.as_physical()
    config_class = model.donor_class.config_class
    own = set(config_class.__dataclass_fields__)
    added = {name for name in RecursiveLLMConfig.__dataclass_fields__ if name not in own}
    fields = {key: value for key, value in physical.to_dict().items() if key not in added}
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    return config_class(**fields, architectures=[model.donor_class.__name__])


def left_out(model: Any) -> dict[str, int]:
    """Name -> number of parameters of the tensors that a plain model does not have."""
    return {name: tensor.numel() for name, tensor in model.state_dict().items() if name.startswith(_RECURSION)}


def check_donor(donor: Any, model: Any) -> None:
    """Compare tensors and the logits of a few tokens.

    Raises:
        RuntimeError: Any bit of the logits differs, or tensors are missing: a bug, never a fault of the input.
    """
    expected = {name for name in model.state_dict() if not name.startswith(_RECURSION)}
    if set(donor.state_dict()) != expected:
        raise RuntimeError(f"unmapped tensors: {sorted(set(donor.state_dict()) ^ expected)}")
    ids = torch.randint(model.config.vocab_size, (1, _CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, own = donor(ids, use_cache=False).logits, model(ids, H_cycles=0, use_cache=False).logits
    if not torch.equal(plain, own):
        worst = (plain - own).abs().max().item()
        raise RuntimeError(f"{type(donor).__name__} differs from the recursive model at H_cycles = 0 by {worst}")


# Files


def _write_recursive(
    model: RecursiveLLM, tokenizer: PreTrainedTokenizerBase, found: checkpoint.Checkpoint, settings: ExportSettings, extras: Extras
) -> dict[str, int]:
    plan, notes = public_record(found.plan, found.notes)
    if settings.adapter_only:
        plan, notes = _with_hub_id(plan, notes, base_model(found.plan, found.notes, extras))
    card = recursive_card(model, plan, notes, extras)
    drawn = pictures(model, plan, extras.evaluation)

    def write(folder: Path) -> None:
        checkpoint.write_folder(
            folder,
            model,
            tokenizer,
            plan,
            notes,
            model.dtype,
            card=card,
            max_shard_size=settings.max_shard_size,
            whole=not settings.adapter_only,
        )
        for name, svg in drawn.items():
            (folder / name).write_text(svg, encoding="utf-8")
        if found.notes.get("approach") != checkpoint.EMBEDDING:  # without a trained head it says nothing
            engine_check.write(folder, model, tokenizer)

    return _write(settings, write)


def _with_hub_id(plan: ConversionPlan | None, notes: dict[str, Any], base: str | None) -> tuple[ConversionPlan | None, dict[str, Any]]:
    """The record of an adapter that names its donor by hub id."""
    if base is None or plan is None:
        raise UserError(
            "--adapter_only: the adapter names its donor by a local folder, which others do not have; give its hub id with --base_model"
        )
    return replace(plan, donor=base), {name: value for name, value in notes.items() if name != "donor_folder"} | {"donor": base}


def _write_donor(
    donor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: checkpoint.Checkpoint,
    lost: dict[str, int],
    settings: ExportSettings,
    extras: Extras,
) -> dict[str, int]:
    card = donor_card(donor, *public_record(found.plan, found.notes), lost, extras)

    def write(folder: Path) -> None:
        with checkpoint.quiet(), without_donor_settings(donor):
            donor.save_pretrained(folder, max_shard_size=settings.max_shard_size)
        donor.generation_config.to_json_file(folder / "generation_config.json")
        write_config(folder, read_json(folder / "config.json"), found.notes.get("donor_fields"))
        write_tokenizer(tokenizer, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return _write(settings, write)


def _write(settings: ExportSettings, write: Callable[[Path], None]) -> dict[str, int]:
    """Write the folder atomically; returns name -> bytes of the written files. Other files in the folder are kept."""
    written: dict[str, int] = {}

    def write_and_list(folder: Path) -> None:
        write(folder)
        written.update({path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()})

    write_atomic({Path(settings.out): write_and_list}, {Path(settings.out): checkpoint.is_replaced})
    return written


def _upload(settings: ExportSettings, written: dict[str, int]) -> str | None:
    if settings.push is None:
        return None
    return upload.push(Path(settings.out), list(written), settings.push, private=settings.private, message=settings.commit_message)


def _size(count: int) -> str:
    for unit, word in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {word}"
    return f"{count} B"

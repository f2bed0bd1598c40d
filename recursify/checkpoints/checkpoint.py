"""Recursive models on disk, in two forms that every command reads.

    X.pt + X_tokenizer/   {format, config, plan, notes, generation_config, model_state_dict} with the guides' names, beside its tokenizer
    a folder              the Hugging Face layout; loads through AutoModelForCausalLM, also without recursify installed

Of an adapter, both hold the parameters of the recursion alone, beside the place and the hash of the donor's files (`adapter`).

How a model was made (donor, plan, training summary) is `config.conversion`; `config.json` holds it as it is, a `.pt` file as `plan` and
`notes`. Folders of version 0.1.0 hold it in a file of its own, RECORD.

Both forms are written to a temporary place and renamed, so a checkpoint is complete or absent. `.pt` files are read with
`weights_only=True`; a pickle that contains code is refused. Derived fields of a configuration are recomputed.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import UserError, first_line
from ..network.configuration_recursive_llm import CONFIGS, RecursiveLLMConfig
from ..network.modeling_recursive_llm import FAMILIES, RecursiveLLM
from ..network.plan import ConversionPlan, conversion_record, notes_of, plan_of
from ..utils.atomic import write_atomic
from ..utils.files import read_json
from ..utils.models import without_donor_settings
from . import adapter
from .configs import CONFIG_FAULTS, generation_config, reason
from .dialects import write_config, write_tokenizer
from .guide_names import from_guides, to_guides
from .repository import HUB_ID, check_revision, no_config
from .settings import MAX_SHARD_SIZE
from .tokenizer import check_vocabulary, load_tokenizer

FORMAT = "recursify/1"
RECORD = "recursify.json"  # plan and notes in folders of version 0.1.0
# A save replaces files with these suffixes in an existing folder, and keeps all others.
_WRITTEN = (".json", ".safetensors", ".py", ".md", ".jinja")
PLAN_PICTURE, LOSS_PICTURE = _PICTURES = "plan.svg", "loss_by_cycles.svg"
_GENERATION = "generation_config.json"
EMBEDDING = "embedding"  # notes["approach"] of a model that predicts embeddings and has no trained head
# Files of an older tokenizer that a save removes from the folder beside a .pt: they would be read together with the new one.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # downloaded from the hub: neither code nor pictures


@dataclass
class Checkpoint:
    """A model and its tokenizer.

    Args:
        model: On the CPU, in the stored dtype, in evaluation mode.
        tokenizer: None where the checkpoint has none.
    """

    model: RecursiveLLM
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def plan(self) -> ConversionPlan | None:
        """How the model was converted; None where that is not recorded."""
        return plan_of(self.model.config)

    @property
    def notes(self) -> dict[str, Any]:
        """The rest of the conversion record, such as donor, revision and a training summary. JSON types."""
        return notes_of(self.model.config)


def tokenizer_folder(path: str | Path) -> Path:
    """Folder of a checkpoint's tokenizer: `X_tokenizer/` beside `X.pt`, otherwise the folder itself."""
    path = Path(path)
    return path.with_name(path.stem + "_tokenizer") if is_file_form(path) else path


def is_file_form(path: str | Path) -> bool:
    """Whether a path names the `.pt` form."""
    return Path(path).suffix == ".pt"


def load(
    path: str | Path,
    *,
    tokenizer_path: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    donor: str | None = None,
    **overrides: Any,
) -> Checkpoint:
    """Read a checkpoint of either form, or a folder of that form on the hub.

    Args:
        path: A path or hub id.
        tokenizer_path: Folder or hub id of another tokenizer than the checkpoint's own.
        revision, token: Of the hub, as `from_pretrained` takes them.
        donor: Folder or hub id of the donor of an adapter; where None, the one that the adapter names.
        overrides: Fields of the configuration, such as `H_cycles=5`.

    Raises:
        UserError: Missing, not a recursive model, truncated, a pickle with code in it, a field that is unknown or out of range, a
            revision of a path, or a donor that is not the adapter's.
    """
    check_revision(str(path), revision)
    path = _local(path, revision, token)
    found = _load_folder(path, overrides, donor) if path.is_dir() else _load_file(path, overrides, donor)
    folder = tokenizer_folder(path)
    if tokenizer_path is not None:
        found.tokenizer = load_tokenizer(tokenizer_path, token=token)
    elif (folder / "tokenizer_config.json").is_file():
        found.tokenizer = load_tokenizer(str(folder))
    if found.tokenizer is not None:
        check_vocabulary(found.tokenizer, found.model.config.vocab_size, tokenizer_path or str(path))
    return found


def _local(name: str | Path, revision: str | None, token: str | None) -> Path:
    """The path itself, or a downloaded snapshot of a hub id, without code."""
    path = Path(name)
    if path.exists():
        return path
    expected = f"{name}: no such checkpoint; expected a .pt file or a folder that convert or train wrote, or a hub id"
    if is_file_form(path) or not HUB_ID.fullmatch(str(name)):
        raise UserError(expected)
    try:
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=_FETCHED))
    except Exception as error:  # errors of the hub's client and of the network have no common base
        raise UserError(f"{expected}; the hub does not have it or cannot be reached ({first_line(error)})") from error


def require_tokenizer(found: Checkpoint, path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        UserError: The checkpoint has none.
    """
    if found.tokenizer is None:
        raise UserError(f"{path}: no tokenizer in {tokenizer_folder(path)}; name one with --tokenizer_path")
    return found.tokenizer


def require_head(found: Checkpoint, path: str | Path) -> None:
    """Check that a checkpoint has a trained head.

    Raises:
        UserError: It was trained in embedding space.
    """
    if found.notes.get("approach") == EMBEDDING:
        raise UserError(
            f"{path}: was trained in embedding space: it predicts embeddings and has no head that predicts tokens, so it cannot generate; "
            "recursify train and recursify train --approach hybrid make models that do"
        )


def save(
    path: str | Path,
    model: RecursiveLLM,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: ConversionPlan | None = None,
    notes: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    beside: Mapping[Path, Callable[[Path], Any]] | None = None,
    approve: Callable[[], Any] = lambda: None,
    whole: bool = False,
) -> None:
    """Write a checkpoint atomically; the suffix `.pt` chooses the form.

    Args:
        plan, notes: The conversion record of the stored model; that of the model in memory where both are None.
        dtype: Dtype of the stored weights; the model's own where None.
        beside: Further files and folders to write, path -> writer. All are written, or nothing changes. They are renamed last, so a
            killed process never leaves them beside weights that they do not belong to.
        whole: Of an adapter: write the donor's weights, too, as of any other model.
        approve: Called after everything is written and before anything is renamed; an exception in it leaves everything unchanged.

    Raises:
        UserError: The parent folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    stored = dtype or model.dtype
    if plan is None and notes is None:
        plan, notes = plan_of(model.config), notes_of(model.config)
    alone = model.config.is_adapter and not whole
    writers: dict[Path, Callable[[Path], Any]] = {}
    if is_file_form(path):
        if tokenizer is not None:
            writers[tokenizer_folder(path)] = partial(write_tokenizer, tokenizer)
        config: Any = model.config
        content = {
            "format": FORMAT,
            "config": _config_dict(model, stored),
            "plan": None if plan is None else _plain(plan.to_dict()),
            "notes": _plain(notes or {}),
            "generation_config": json.loads(model.generation_config.to_json_string()),
            "model_state_dict": to_guides(adapter.own_state(model) if alone else stored_state(model, stored), config),
        }
        writers[path] = lambda target: _write_pt(content, target)
    else:
        writers[path] = lambda folder: write_folder(folder, model, tokenizer, plan, notes or {}, stored, whole=whole)
    writers |= beside or {}
    folders = {
        each: _is_tokenizer_file if each == tokenizer_folder(path) != path else is_replaced for each in writers if not is_file_form(each)
    }
    write_atomic(writers, folders, approve)


def check_writable(path: str | Path) -> None:
    """Check that an output path can be written, before the work begins.

    Raises:
        UserError: Its folder is missing or not writable, or the path holds something other than a recursive model.
    """
    path = Path(path)
    parent = path.absolute().parent
    try:
        if not parent.is_dir():
            raise UserError(f"{path}: the folder {parent} does not exist; make it first (mkdir -p {parent})")
        _check_replaceable(path)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot write in {parent} ({error.strerror}); choose another place") from error


def _check_replaceable(path: Path) -> None:
    if is_file_form(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is a folder; expected the name of a .pt file")
        folder = tokenizer_folder(path)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file, where the tokenizer of {path} goes; move it away, or choose another output path")
    elif path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{str(path)!r}: is the folder you are in, or one above it; expected the name of a .pt file or of a new folder")
    elif path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; expected a new folder, or a name that ends in .pt")
    elif path.is_dir() and any(path.iterdir()) and not _holds_recursive_model(path):
        raise UserError(f"{path}: is a folder with other things in it; expected a new or empty one, or one that holds a recursive model")


def _holds_recursive_model(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("model_type") in CONFIGS
    except UserError:
        return False


def _load_file(path: Path, overrides: dict[str, Any], donor: str | None) -> Checkpoint:
    content = _read_pt(path)
    try:
        fields, stored, notes, generation = (content[part] for part in ("config", "model_state_dict", "notes", "generation_config"))
        if not all(isinstance(part, dict) for part in (fields, stored, notes, generation)):
            raise TypeError("config, model_state_dict, notes and generation_config must be dicts")
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in stored.items()):
            raise TypeError("model_state_dict must hold tensors by name")
        record = conversion_record(content["plan"] and ConversionPlan.from_dict(content["plan"]), notes)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: a part of this checkpoint is missing or damaged ({error!r}); make it again with convert") from error
    config = _read_config(fields, overrides, str(path))
    config.conversion = record
    names = stored_names(config)
    if config.is_adapter and not any(name.startswith("inner.L_level.") for name in stored):
        own = from_guides(stored, [name for name in names if name.startswith(adapter.PREFIX)], config, str(path))
        model = _on_donor(config, own, str(path), donor)
    else:
        model = build(config, from_guides(stored, names, config, str(path)), str(path))
    model.generation_config = generation_config(generation, path)
    return Checkpoint(model, None)


def _on_donor(config: Any, own: dict[str, torch.Tensor], where: str, donor: str | None) -> RecursiveLLM:
    """The model of an adapter: its own parameters and the donor's, in the donor's dtype."""
    names = set(stored_names(config))
    if left_over := sorted(set(own) - names) + sorted(name for name in names - set(own) if name.startswith(adapter.PREFIX)):
        _check_complete(left_over, where)
    tensors = adapter.donor_tensors(config.conversion or {}, names, where, donor)
    return build(config, {**tensors, **own}, where)


def _read_pt(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated, or not a .pt file at all; expected one that convert or train wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: not a checkpoint of recursify: a pickle with objects other than tensors and plain values, which could run code; "
            "it was not loaded. Make one with convert"
        ) from error
    except Exception as error:  # torch's reader of a damaged pickle raises whatever it meets: of indices, of types, of struct
        raise UserError(f"{path}: truncated, corrupt, or not a .pt file ({first_line(error)}); make it again with convert") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        has = f"a {type(content).__name__}"
        if isinstance(content, dict):
            has = repr(content["format"]) if "format" in content else f"a dict of {', '.join(map(str, list(content)[:6]))}"
        raise UserError(f"{path}: not a checkpoint of recursify: expected format {FORMAT!r}, got {has}; make one with convert")
    return content


def _load_folder(path: Path, overrides: dict[str, Any], donor: str | None) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise UserError(no_config(path))
    config = _read_config(read_json(path / "config.json"), overrides, str(path))
    if config.conversion is None and (path / RECORD).is_file():
        config.conversion = _read_record(path / RECORD)
    has_generation = (path / _GENERATION).is_file()
    generation = generation_config(read_json(path / _GENERATION), path / _GENERATION) if has_generation else None
    if adapter.is_adapter_folder(path):
        model = _on_donor(config, adapter.read(path), str(path), donor)
        model.generation_config = generation or model.generation_config
        return Checkpoint(model, None)
    try:
        with quiet():
            model, info = FAMILIES[config.model_type].from_pretrained(path, config=config, use_safetensors=True, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        _check_shapes(config, _shapes_in(path), str(path))
        raise UserError(
            f"{path}: its weights are missing, truncated or corrupt ({first_line(error)}); copy it again or make it again with convert"
        ) from error
    _check_complete([*info["missing_keys"], *info["unexpected_keys"]], str(path))
    return Checkpoint(model, None)


def _read_record(path: Path) -> dict[str, Any] | None:
    """The conversion record of a folder of version 0.1.0."""
    record = read_json(path)
    try:
        return conversion_record(record["plan"] and ConversionPlan.from_dict(record["plan"]), record["notes"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: missing parts or damaged ({error!r}); delete it to load the model without its plan") from error


def _read_config(fields: Any, overrides: dict[str, Any], where: str) -> Any:
    """The configuration in a file, with overrides.

    Raises:
        UserError: Not of a recursive model, a value out of range, or a name that looks like a misspelt field.
    """
    if not isinstance(fields, dict) or fields.get("model_type") not in CONFIGS:
        given = fields.get("model_type") if isinstance(fields, dict) else fields
        raise UserError(f"{where}: not a recursive model (model_type {given!r}); convert it first: recursify convert --qwen_model {where}")
    config_class = CONFIGS[fields["model_type"]]
    merged = {**fields, **overrides}
    for name in set(merged) - set(config_class.__dataclass_fields__):
        close = difflib.get_close_matches(name, RecursiveLLMConfig.__dataclass_fields__, n=1, cutoff=0.8)
        if close and close[0][:2].lower() == name[:2].lower():  # a donor may have similar fields of its own, such as n_layers
            raise UserError(f"{where}: unknown field {name} in its config; did you mean {close[0]}?")
    try:
        config = config_class.from_dict(fields)
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f"dtype: expected a type of torch such as bfloat16, got {config.dtype!r}")
        if config.is_encoder_decoder:
            raise ValueError(f"is_encoder_decoder: expected false, got {config.is_encoder_decoder!r}")
        stored_names(config)
        plan_of(config)
    except CONFIG_FAULTS as error:
        raise UserError(f"{where}: its config is damaged: {reason(error)}; copy it again or make it again with convert") from error
    try:
        return config_class.from_dict(merged)
    except CONFIG_FAULTS as error:
        raise UserError(f"{where}: {reason(error)}") from error


def build(config: Any, state: dict[str, torch.Tensor], where: str, dtype: torch.dtype | None = None) -> RecursiveLLM:
    """A model of `config` around the tensors of `state`, under transformers' names. Missing parameters of the recursion are initialised.

    The tensors become the parameters without a copy. A missing donor tensor is an error.

    Args:
        dtype: Dtype of the parameters; that of the first tensor where None. Tensors of another dtype are converted, which copies them.

    Raises:
        UserError: A shape that does not match the configuration, or a missing tensor outside the recursion.
    """
    for name, tensor in state.items():
        if not tensor.dtype.is_floating_point:
            raise UserError(
                f"{where}: expected weights of float32, bfloat16 or float16, got {tensor.dtype} in {name}; make it again with convert"
            )
    dtype = dtype or next(iter(state.values())).dtype
    family = FAMILIES[config.model_type]
    try:
        with quiet():
            model, info = family.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True)
    except RuntimeError as error:
        _check_shapes(config, {name: [*tensor.shape] for name, tensor in state.items()}, where)
        raise UserError(f"{where}: {first_line(error)}") from error
    fresh = {name for name in info["missing_keys"] if name.startswith("model.recursion.")}
    _check_complete([*(set(info["missing_keys"]) - fresh), *info["unexpected_keys"]], where)
    return model.eval()


def _check_shapes(config: Any, found: dict[str, list[int]], where: str) -> None:
    """Raise a UserError that names the tensors whose shape differs from that of the configuration, if any."""
    with torch.device("meta"):
        wanted = {name: [*tensor.shape] for name, tensor in FAMILIES[config.model_type](config).state_dict().items()}
    differ = [f"{name} (expected {wanted[name]}, got {shape})" for name, shape in found.items() if wanted.get(name, shape) != shape]
    if differ:
        rest = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(
            f"{where}: shape mismatch between its config and its tensors: {', '.join(differ[:3])}{rest}; "
            "one of the two was changed: restore it, or make the model again"
        )


def _shapes_in(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, from the headers of the safetensors files that can be read."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118 - a handle, not a dict
    return found


def _check_complete(names: list[str], where: str) -> None:
    if names:
        raise UserError(f"{where}: tensors missing or left over: {', '.join(sorted(names))}; the weights do not match their config")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' progress bars and its table of missing parameters, which are checked here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def stored_names(config: Any) -> list[str]:
    """transformers' names of all tensors of a model of this configuration, from a model on the meta device."""
    with torch.device("meta"):
        return list(FAMILIES[config.model_type](config).state_dict())


def stored_state(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict on the CPU in `dtype`; the tied head stays the same tensor as the embeddings."""
    seen: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen[tensor.data_ptr()] = tensor.detach().to("cpu", dtype)
        state[name] = seen[tensor.data_ptr()]
    return state


def _config_dict(model: RecursiveLLM, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration as a `.pt` file holds it: plan and notes have their own places there."""
    fields = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("conversion", "_name_or_path"):  # the latter is a path of this machine
        fields.pop(name, None)
    return {**fields, "dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}


def _plain(value: Any) -> Any:
    """JSON types, which a `.pt` file is read back with; anything else is an error before it is written."""
    return json.loads(json.dumps(value))


def _write_pt(content: dict[str, Any], target: Path) -> None:
    with open(target, "wb") as file:  # torch.save to an open file raises an OSError when the disk is full
        torch.save(content, file)


def write_folder(
    folder: Path,
    model: RecursiveLLM,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: ConversionPlan | None,
    notes: dict[str, Any],
    dtype: torch.dtype,
    *,
    card: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    whole: bool = False,
) -> None:
    """Write the folder form into an existing empty folder; `write_atomic` makes that atomic.

    Args:
        plan, notes: The conversion record to store, in place of the one in `model.config`.
        dtype: Dtype of the stored weights.
        card: The README.md; made from model and record where None.
        max_shard_size: Larger weights are divided into several files, as by transformers.
        whole: As for `save`.
    """
    from .model_card import Extras, recursive_card  # not needed to read checkpoints

    record = conversion_record(plan, notes)
    if model.config.is_adapter and not whole:
        model.config.to_json_file(folder / "config.json")
        adapter.write(folder, adapter.own_state(model), model.config, record or {})
    else:
        with quiet(), without_donor_settings(model):
            model.save_pretrained(folder, state_dict=stored_state(model, dtype), max_shard_size=max_shard_size)
    # by itself: published donors have inconsistent ones, such as a temperature without sampling, which transformers refuses to save
    model.generation_config.to_json_file(folder / _GENERATION)
    fields = read_json(folder / "config.json")  # with dtype and record of the model in memory
    # engines find the class by `architectures`, which `save_pretrained` alone would write
    fields |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch."), "conversion": record}
    write_config(folder, fields, notes.get("donor_fields"))
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
    extras = Extras(chat=bool(getattr(tokenizer, "chat_template", None)), adapter=model.config.is_adapter and not whole)
    (folder / "README.md").write_text(card or recursive_card(model, plan, notes, extras), encoding="utf-8")


def is_replaced(entry: Path) -> bool:
    """Whether saving into an existing folder replaces this entry; other entries are kept."""
    return entry.suffix in _WRITTEN or entry.name in _PICTURES


def _is_tokenizer_file(entry: Path) -> bool:
    return entry.name in _TOKENIZER

"""Recursive models on disk, in two forms that every command reads.

    X.pt + X_tokenizer/   {format, config, plan, notes, generation_config, model_state_dict} with the guides' names, beside its tokenizer
    a folder              the Hugging Face layout; loads through AutoModelForCausalLM, also without recursify installed

Both are written aside and renamed, so what is there is whole. `.pt` files are read with `weights_only=True` and nothing else: a pickle that
carries code is refused. Derived fields of a configuration are recomputed, never trusted.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
from ..network.plan import ConversionPlan
from ..utils.atomic import write_whole
from ..utils.files import read_json
from .configs import CONFIG_FAULTS, generation_config, reason
from .guide_names import from_guides, to_guides
from .repository import HUB_ID
from .tokenizer import load_tokenizer

FORMAT = "recursify/1"
RECORD = "recursify.json"  # in a folder: what a .pt holds beside config and weights
# What a save replaces in a folder that is there already. Anything else in it is somebody's, and stays.
_WRITTEN = (".json", ".safetensors", ".py", ".md", ".jinja")
PLAN_PICTURE, LOSS_PICTURE = _PICTURES = "plan.svg", "loss_by_cycles.svg"
EMBEDDING = "embedding"  # notes["approach"] of a model that predicts embeddings, whose head means nothing
# In a folder beside a .pt only these and what the new tokenizer writes: left from another tokenizer, they would be read with the new one.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # from the hub; code and pictures stay there
MAX_SHARD_SIZE = "5GB"


@dataclass
class Checkpoint:
    """What a path holds.

    Args:
        model: On the CPU, in the stored dtype, in evaluation mode.
        tokenizer: None where the path has none.
        plan: How it was converted, None for a model that was never converted.
        notes: What else its maker wrote down: donor, package version, a training summary. JSON types.
    """

    model: RecursiveLLM
    tokenizer: PreTrainedTokenizerBase | None
    plan: ConversionPlan | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def tokenizer_folder(path: str | Path) -> Path:
    """Where the tokenizer of a checkpoint is: `X_tokenizer/` beside `X.pt`, the folder itself otherwise."""
    path = Path(path)
    return path.with_name(path.stem + "_tokenizer") if is_file_form(path) else path


def is_file_form(path: str | Path) -> bool:
    return Path(path).suffix == ".pt"


def load(path: str | Path, *, tokenizer_path: str | None = None, **overrides: Any) -> Checkpoint:
    """Read a checkpoint of either form, or a folder of that form on the hub.

    Args:
        tokenizer_path: A tokenizer from elsewhere, instead of the checkpoint's own.
        overrides: Fields of the configuration, such as `H_cycles=5`.

    Raises:
        UserError: Missing, not ours, truncated, a pickle with code in it, or a field that is unknown or out of range.
    """
    path = _fetched(path)
    found = _load_folder(path, overrides) if path.is_dir() else _load_file(path, overrides)
    folder = tokenizer_folder(path)
    if tokenizer_path is not None:
        found.tokenizer = load_tokenizer(tokenizer_path)
    elif (folder / "tokenizer_config.json").is_file():
        found.tokenizer = load_tokenizer(str(folder))
    return found


def _fetched(name: str | Path) -> Path:
    """The file or folder itself; of a hub id the hub's snapshot, code left out."""
    path = Path(name)
    if path.exists():
        return path
    expected = f"{name}: no such checkpoint; expected a .pt file or a folder that convert or train wrote, or a hub id"
    if is_file_form(path) or not HUB_ID.fullmatch(str(name)):
        raise UserError(expected)
    try:
        return Path(snapshot_download(str(name), allow_patterns=_FETCHED))
    except Exception as error:  # of the hub's client or of the network's, with no base in common
        raise UserError(f"{expected}; the hub does not have it or cannot be reached ({first_line(error)})") from error


def need_tokenizer(found: Checkpoint, path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that must have one.

    Raises:
        UserError: It has none.
    """
    if found.tokenizer is None:
        raise UserError(f"{path}: no tokenizer in {tokenizer_folder(path)}; name one with --tokenizer_path")
    return found.tokenizer


def require_head(found: Checkpoint, path: str | Path) -> None:
    """Refuse a checkpoint whose head was never trained with the rest.

    Raises:
        UserError: It was trained in embedding space.
    """
    if found.notes.get("approach") == EMBEDDING:
        raise UserError(
            f"{path}: was trained in embedding space, so it predicts embeddings and has no head that could say which token comes next; "
            "for a model that writes text use train_qwen_recursive.py or train_qwen_trm_hybrid.py"
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
) -> None:
    """Write a checkpoint, whole or not at all; the suffix `.pt` chooses the form.

    Args:
        dtype: Type of the stored weights; the model's own where None.
        beside: What else to write, path -> writer: all of it is there afterwards, or nothing has changed. It gets its places last, so
            that a kill leaves none of it beside weights to which it does not belong.
        approve: Called when all is written, and before anything is where it belongs: what it raises leaves everything as it was.

    Raises:
        UserError: The folder above is missing or not writable, or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    stored = dtype or model.dtype
    notes = notes or {}
    writers: dict[Path, Callable[[Path], Any]] = {}
    if is_file_form(path):
        if tokenizer is not None:
            writers[tokenizer_folder(path)] = tokenizer.save_pretrained
        config: Any = model.config
        content = {
            "format": FORMAT,
            "config": _config_dict(model, stored),
            "plan": None if plan is None else plan.to_dict(),
            "notes": notes,
            "generation_config": model.generation_config.to_diff_dict(),
            "model_state_dict": to_guides(stored_state(model, stored), config),
        }
        writers[path] = lambda target: _write_pt(content, target)
    else:
        writers[path] = lambda folder: write_folder(folder, model, tokenizer, plan, notes, stored)
    writers |= beside or {}
    folders = {
        each: _is_tokenizers if each == tokenizer_folder(path) != path else is_replaced for each in writers if not is_file_form(each)
    }
    write_whole(writers, folders, approve)


def check_writable(path: str | Path) -> None:
    """Whether an output path could be written, before hours are spent on what goes there.

    Raises:
        UserError: Its folder is missing or not writable, or what stands there already is not a recursive model.
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
    elif path.is_dir() and any(path.iterdir()) and not _holds_ours(path):
        raise UserError(f"{path}: is a folder with other things in it; expected a new or empty one, or one that holds a recursive model")


def _holds_ours(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("model_type") in CONFIGS
    except UserError:
        return False


def _load_file(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    content = _read_pt(path)
    try:
        fields, stored, notes, generation = (content[part] for part in ("config", "model_state_dict", "notes", "generation_config"))
        if not all(isinstance(part, dict) for part in (fields, stored, notes, generation)):
            raise TypeError("config, model_state_dict, notes and generation_config must be dicts")
        if not all(isinstance(tensor, torch.Tensor) for tensor in stored.values()):
            raise TypeError("model_state_dict must hold tensors")
        plan = content["plan"] and ConversionPlan.from_dict(content["plan"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: a part of this checkpoint is missing or damaged ({error!r}); make it again with convert") from error
    config = _read_config(fields, overrides, str(path))
    model = build(config, from_guides(stored, stored_names(config), config, str(path)), str(path))
    model.generation_config = generation_config(generation)
    return Checkpoint(model, None, plan, notes)


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
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: truncated, corrupt, or not a .pt file ({first_line(error)}); make it again with convert") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        has = f"a {type(content).__name__}"
        if isinstance(content, dict):
            has = repr(content["format"]) if "format" in content else f"a dict of {', '.join(map(str, list(content)[:6]))}"
        raise UserError(f"{path}: not a checkpoint of recursify: expected format {FORMAT!r}, got {has}; make one with convert")
    return content


def _load_folder(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json in this folder; expected a folder that convert or train wrote")
    config = _read_config(read_json(path / "config.json"), overrides, str(path))
    record = read_json(path / RECORD) if (path / RECORD).is_file() else {"plan": None, "notes": {}}
    try:
        plan, notes = record["plan"] and ConversionPlan.from_dict(record["plan"]), record["notes"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / RECORD}: missing parts or damaged ({error!r}); delete it to load the model without its plan") from error
    try:
        with quiet():
            model, info = FAMILIES[config.model_type].from_pretrained(path, config=config, use_safetensors=True, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        _check_shapes(config, _shapes_in(path), str(path))
        raise UserError(
            f"{path}: its weights are missing, truncated or corrupt ({first_line(error)}); copy it again or make it again with convert"
        ) from error
    _nothing_lost([*info["missing_keys"], *info["unexpected_keys"]], str(path))
    return Checkpoint(model, None, plan, notes)


def _read_config(fields: Any, overrides: dict[str, Any], where: str) -> Any:
    """The configuration in a file, with overrides.

    Raises:
        UserError: Not one of ours, a value out of range, or a name that looks like a misspelt field of ours.
    """
    if not isinstance(fields, dict) or fields.get("model_type") not in CONFIGS:
        given = fields.get("model_type") if isinstance(fields, dict) else fields
        raise UserError(f"{where}: not a recursive model (model_type {given!r}, expected one of {', '.join(CONFIGS)}); convert it first")
    config_class = CONFIGS[fields["model_type"]]
    merged = {**fields, **overrides}
    for name in set(merged) - set(config_class.__dataclass_fields__):
        close = difflib.get_close_matches(name, RecursiveLLMConfig.__dataclass_fields__, n=1, cutoff=0.8)
        if close and close[0][:2].lower() == name[:2].lower():  # a donor may bring fields of its own, such as n_layers
            raise UserError(f"{where}: unknown field {name} in its config; did you mean {close[0]}?")
    try:
        config = config_class.from_dict(fields)
        if not isinstance(config.dtype, torch.dtype | None):
            raise ValueError(f"dtype: expected a type of torch such as bfloat16, got {config.dtype!r}")
        stored_names(config)
    except CONFIG_FAULTS as error:
        raise UserError(f"{where}: its config is damaged: {reason(error)}; copy it again or make it again with convert") from error
    try:
        return config_class.from_dict(merged)
    except CONFIG_FAULTS as error:
        raise UserError(f"{where}: {reason(error)}") from error


def build(config: Any, state: dict[str, torch.Tensor], where: str, dtype: torch.dtype | None = None) -> RecursiveLLM:
    """A model of `config` around the tensors of `state`, under our names; parameters of the recursion that are not there start fresh.

    The tensors become the parameters: nothing is copied. Donor layers are never filled with random values in silence.

    Args:
        dtype: Type of the parameters; that of the first tensor where None. Tensors of another type are converted, which copies them.

    Raises:
        UserError: A shape that the configuration does not have, or a tensor outside the recursion that is missing.
    """
    dtype = dtype or next(iter(state.values())).dtype
    family = FAMILIES[config.model_type]
    try:
        with quiet():
            model, info = family.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True)
    except RuntimeError as error:
        _check_shapes(config, {name: [*tensor.shape] for name, tensor in state.items()}, where)
        raise UserError(f"{where}: {first_line(error)}") from error
    fresh = {name for name in info["missing_keys"] if name.startswith("model.recursion.")}
    _nothing_lost([*(set(info["missing_keys"]) - fresh), *info["unexpected_keys"]], where)
    return model.eval()


def _check_shapes(config: Any, found: dict[str, list[int]], where: str) -> None:
    """Raise a UserError that names tensors of another shape than the configuration's, where there are any."""
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


def _nothing_lost(names: list[str], where: str) -> None:
    if names:
        raise UserError(f"{where}: tensors missing or left over: {', '.join(sorted(names))}; the weights do not match their config")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its table of fresh parameters: what is missing is judged here."""
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
    """Our names of all tensors of a model of this configuration, without building it: on the meta device."""
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
    fields = json.loads(model.config.to_json_string(use_diff=False))  # JSON types, whatever the configuration holds
    fields.pop("_name_or_path", None)  # where it was loaded from, which is nobody's business elsewhere
    return {**fields, "dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}


def _write_pt(content: dict[str, Any], target: Path) -> None:
    with open(target, "wb") as file:  # from a file of Python's, a full disk raises an OSError
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
) -> None:
    """Write the folder form into a folder that exists and is empty; `write_whole` makes it whole or nothing.

    Args:
        dtype: Type of the stored weights.
        card: The README.md; one from what is known here where None.
        max_shard_size: Weights of more than that are divided into several files, as transformers does it.
    """
    from .model_card import recursive_card  # here: who reads checkpoints draws nothing

    with quiet():
        model.save_pretrained(folder, state_dict=stored_state(model, dtype), max_shard_size=max_shard_size)
    fields = read_json(folder / "config.json")  # which states the type of the model in memory
    (folder / "config.json").write_text(json.dumps({**fields, "dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    record = {"format": FORMAT, "plan": None if plan is None else plan.to_dict(), "notes": notes}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card or recursive_card(model, plan, notes), encoding="utf-8")


def is_replaced(entry: Path) -> bool:
    """Whether a save of ours replaces an entry of a folder that is there already; anything else in it is somebody's, and stays."""
    return entry.suffix in _WRITTEN or entry.name in _PICTURES


def _is_tokenizers(entry: Path) -> bool:
    return entry.name in _TOKENIZER

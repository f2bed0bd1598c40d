"""Fields that moved between transformers 4 and 5, written under both names.

transformers 4 and most engines read `rope_theta`, `rope_scaling` and `torch_dtype` of a config.json, and take a default where they are
missing; transformers 5 writes `rope_parameters` and `dtype`. Of a tokenizer_config.json they read `additional_special_tokens`, and do not
know the class `TokenizersBackend`. transformers 5 reads both dialects, with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..network.configuration_recursive_llm import PREFIX
from ..utils.files import read_json
from .repository import find_file

# Fields of a donor's config.json that are written anew: they depend on the selected layers, the dtype, or the rotary parameters.
_OWN = {
    "architectures", "auto_map", "dtype", "layer_types", "model_type", "no_rope_layers", "num_hidden_layers", "rope_parameters",
    "rope_scaling", "rope_theta", "torch_dtype", "transformers_version",
}  # fmt: skip
_NEW_CLASS = "TokenizersBackend"
_PHI3_SCALING = ("type", "long_factor", "short_factor")  # transformers 4 refuses a rope_scaling of Phi3 with other keys


def changed_fields(donor_fields: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Fields of a donor's config.json whose value transformers changes while it reads them, such as an unused `sliding_window`."""
    read = config.to_dict()
    return {name: value for name, value in donor_fields.items() if name in read and name not in _OWN and read[name] != value}


def with_old_names(fields: Mapping[str, Any], donor_fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of a config.json in both dialects.

    Args:
        fields: As transformers 5 writes them.
        donor_fields: From `changed_fields`; they replace those of the same name.
    """
    both = {**fields, **(donor_fields or {})}
    if both.get("dtype") is not None:
        both["torch_dtype"] = both["dtype"]
    rope = both.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return both  # no rotary embedding, or one per layer type, which has no old form
    if rope.get("rope_theta") is not None:
        both["rope_theta"] = rope["rope_theta"]
    if rope.get("partial_rotary_factor") is not None:
        both["partial_rotary_factor"] = rope["partial_rotary_factor"]
    kind = str(both.get("model_type"))
    scaling = _old_scaling(rope, kind)
    # Of a recursive model, which no engine runs without our code, transformers 5 reads the tokenizer without that code only if it need not
    # convert a scaling of a configuration whose class it does not know.
    if scaling is None or not kind.startswith(PREFIX):
        both["rope_scaling"] = scaling
    return both


def _old_scaling(rope: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    scaling["type"] = kind
    return {name: scaling[name] for name in _PHI3_SCALING} if model_type.endswith("phi3") and kind == "longrope" else scaling


def write_config(folder: Path, fields: Mapping[str, Any], donor_fields: Mapping[str, Any] | None = None) -> None:
    """Write config.json in both dialects."""
    text = json.dumps(with_old_names(fields, donor_fields), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer into a folder, in both dialects; its chat template is a file, and a field of tokenizer_config.json.

    The class is the one that the tokenizer's own files name: transformers 5 replaces it by that of the model's family, and reads either.
    """
    named = _named_class(tokenizer)  # before saving, which may write into the folder that it was read from
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    fields = read_json(path)
    fields["tokenizer_class"] = named or fields.get("tokenizer_class")
    if fields["tokenizer_class"] == _NEW_CLASS:
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, dict):
        fields["chat_template"] = template
    for name in ("is_local", "local_files_only"):  # of the machine that it was read on
        fields.pop(name, None)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _named_class(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The class in the tokenizer_config.json that a tokenizer was read from, if that is still there; the hub is not asked again."""
    source = getattr(tokenizer, "name_or_path", "") or ""
    file = find_file(source, "tokenizer_config.json", local_files_only=True) if source else None
    return read_json(Path(file)).get("tokenizer_class") if file else None

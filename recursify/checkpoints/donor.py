"""The donor: a pretrained causal language model in a folder or on the hub, read without building it.

Opening a donor reads only its config.json, and refuses unsupported features by name and field. Tensors are read one by one from
safetensors; only files that hold a wanted tensor are fetched or opened.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import extract_commit_hash, is_flash_attn_2_available

from ..errors import UserError, first_line, short
from ..network.configuration_recursive_llm import CONFIGS, PREFIX, from_donor
from ..utils.files import read_json
from .configs import CONFIG_FAULTS, generation_config, reason
from .dialects import changed_fields
from .repository import file_exists, find_file, read_config, require_file
from .tokenizer import check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)

FAMILIES = tuple(model_type.removeprefix(PREFIX) for model_type in CONFIGS)
_SUPPORTED = f"Supported: {', '.join(FAMILIES)} (Qwen2.5 is qwen2)"
_PIECE = 2**22  # bytes read at a time where a whole tensor is not wanted
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Features of a donor that the recursive model does not implement, by the field that switches them on.
_REFUSED = {
    "quantization_config": "quantised weights",
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "embedding_multiplier": "a multiplier in its own forward",
    "residual_multiplier": "a multiplier in its own forward",
    "attention_multiplier": "a multiplier in its own forward",
    "logits_scaling": "a multiplier in its own forward",
    "logit_scale": "a multiplier in its own forward",
    "scale_emb": "a multiplier in its own forward",
    "attn_logit_softcapping": "soft-capping",
    "final_logit_softcapping": "soft-capping",
    "per_layer_config": "layers of different shapes",
    "num_kv_shared_layers": "keys and values shared between layers",
}


class Donor:
    """A supported donor.

    Args:
        name: A hub id, or a folder.
        config: Its configuration.
        fields: Its config.json.
        hub: The revision and token that its files are read with.
    """

    def __init__(self, name: str, config: PreTrainedConfig, fields: dict[str, Any], **hub: Any):
        self.name, self.config, self.fields, self.hub = name, config, fields, hub
        self._where: dict[str, str] | None = None
        self._open: dict[str, Any] = {}

    @property
    def origin(self) -> dict[str, Any]:
        """What a converted model records of its donor: the name; the absolute path of a folder, or the commit of a hub id; and fields of
        its config.json that transformers does not keep as they are."""
        folder = os.path.abspath(self.name) if os.path.isdir(self.name) else None
        commit = None if folder else extract_commit_hash(find_file(self.name, "config.json", **self.hub), None)
        found = {"donor_folder": folder, "revision": commit, "donor_fields": changed_fields(self.fields, self.config)}
        return {"donor": self.name} | {name: value for name, value in found.items() if value}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which transformers loads the donor: that of its configuration, else that of its first tensor."""
        stated = self.config.dtype
        return stated if isinstance(stated, torch.dtype) else self.read(self.tensor_names[0]).dtype

    @property
    def tensor_names(self) -> list[str]:
        """Every tensor in the donor's files; of sharded weights only the index is read."""
        return list(self._files())

    def weight_files(self) -> dict[str, str]:
        """File name -> path, of every file with weights; all are fetched."""
        return {file: require_file(self.name, file, **self.hub) for file in sorted(set(self._files().values()))}

    def check_weights(self) -> None:
        """Raise a UserError where weights are missing or the index is damaged. Of a single file only the header is read."""
        self._files()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as a private memory-mapped view of the file that holds it.

        Raises:
            UserError: The file is truncated or corrupt, or the tensor is quantised.
        """
        file = self._files()[name]
        try:
            tensor = self._handle(file).get_tensor(name)
        except SafetensorError as error:
            raise _corrupt(self.name, file, error) from error
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{self.name}: has quantised weights ({name} is {tensor.dtype}), which are not carried over. {_SUPPORTED}")
        return tensor

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The elements of a tensor in order, read again from its file in pieces of at most `_PIECE` bytes; each piece reuses the memory of
        the one before. (The views that `read` returns may have been written to since.)"""
        file, dtype = self._files()[name], self.read(name).dtype
        with open(require_file(self.name, file, **self.hub), "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            first, last = json.loads(stream.read(header))[name]["data_offsets"]
            stream.seek(8 + header + first)
            room = memoryview(bytearray(min(_PIECE, last - first)))
            for start in range(first, last, _PIECE):
                piece = room[: min(_PIECE, last - start)]
                stream.readinto(piece)
                yield torch.frombuffer(piece, dtype=dtype)

    def generation_config(self) -> GenerationConfig:
        """The donor's generation config; derived from its configuration where there is no generation_config.json.

        Raises:
            UserError: generation_config.json is not a JSON object, or has values of other types.
        """
        path = find_file(self.name, "generation_config.json", **self.hub)
        return GenerationConfig.from_model_config(self.config) if path is None else generation_config(read_json(Path(path)), path)

    def load(self, **kwargs: Any) -> PreTrainedModel:
        """The donor itself, as a transformers model.

        Args:
            kwargs: For `from_pretrained`.

        Raises:
            UserError: Files are missing, truncated or corrupt, or do not match the configuration.
        """
        try:
            return AutoModelForCausalLM.from_pretrained(self.name, config=copy.deepcopy(self.config), **self.hub, **kwargs)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{self.name}: transformers cannot load it ({first_line(error)}); download or copy it again") from error

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if self._where is None:
            if find_file(self.name, _SINGLE, **self.hub) is not None:
                self._where = {name: _SINGLE for name in self._handle(_SINGLE).keys()}  # noqa: SIM118 - a safetensors handle, not a dict
            elif (index := find_file(self.name, _INDEX, **self.hub)) is not None:
                self._where = _weight_map(index, self.name)
            else:
                raise _no_weights(self.name, self.hub)
        return self._where

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = require_file(self.name, file, **self.hub)
            try:
                self._open[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _corrupt(self.name, file, error) from error
        return self._open[file]


def recorded_donor(record: Mapping[str, Any]) -> tuple[str | None, str | None, bool]:
    """The donor in a conversion record: its name, of a folder the absolute path; its revision; and whether it is a folder that is not
    there any more. The name is None where the record has none."""
    folder = record.get("donor_folder")
    return folder or record.get("donor"), record.get("revision"), folder is not None and not os.path.isdir(folder)


def open_donor(name: str, *, revision: str | None = None, token: str | None = None) -> Donor:
    """Find a donor and check that all its features are supported. Reads config.json only.

    Args:
        name: A hub id, or a folder.
        revision, token: Of the hub, as `from_pretrained` takes them.

    Raises:
        UserError: Not found, no config.json, an unsupported feature, or a revision of a folder.
    """
    hub = {"revision": revision, "token": token}
    fields = read_config(name, **hub)
    for field, feature in _REFUSED.items():
        if fields.get(field) not in (None, False, 0, {}, []):
            found = f"{field} = {short(fields[field])}"
            raise UserError(f"{name}: has {feature} (config.json: {found}), which is not carried over. {_SUPPORTED}")
    if fields.get("model_type") not in FAMILIES:
        already = str(fields.get("model_type", "")).startswith(PREFIX)
        hint = "it is a recursive model already" if already else "this model type is not supported"
        raise UserError(f"{name}: {hint} (config.json: model_type = {fields.get('model_type')!r}). {_SUPPORTED}")
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        _replace_missing_attention(name, config, fields)
        _check_builds(config)
    except CONFIG_FAULTS as error:
        raise UserError(
            f"{name}: config.json is not a valid {fields['model_type']} configuration: {reason(error)}; download or copy it again"
        ) from error
    return Donor(name, config, fields, **hub)


def _replace_missing_attention(name: str, config: Any, fields: dict[str, Any]) -> None:
    """Use sdpa where config.json names a flash attention that is not installed."""
    named = fields.get("attn_implementation") or fields.get("_attn_implementation")
    if str(named).startswith("flash") and not is_flash_attn_2_available():
        logger.warning("%s: config.json names %s, which is not installed here; using sdpa", name, named)
        config._attn_implementation = "sdpa"


def donor_tokenizer(donor: Donor, tokenizer_path: str | None = None) -> PreTrainedTokenizerBase:
    """The donor's tokenizer, or the one that `tokenizer_path` names.

    Raises:
        UserError: No tokenizer there, or one with more tokens than the donor has rows.
    """
    found = load_tokenizer(tokenizer_path, token=donor.hub.get("token")) if tokenizer_path else load_tokenizer(donor.name, **donor.hub)
    check_vocabulary(found, donor.config.vocab_size, tokenizer_path or donor.name)
    return found


def _check_builds(config: PreTrainedConfig) -> None:
    """Build the donor's class and the recursive one on the meta device, which raises over a damaged configuration."""
    if not isinstance(config.dtype, torch.dtype | None):
        raise ValueError(f"dtype: expected a type of torch such as bfloat16, got {config.dtype!r}")
    count = config.num_hidden_layers
    from_donor(config, [*range(count)], L_layers=count)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(copy.deepcopy(config))  # from_config writes into its argument


def _weight_map(index: str, name: str) -> dict[str, str]:
    found = read_json(Path(index)).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{name}/{_INDEX}: expected weight_map, the file of each tensor, got {short(found)}; download or copy it again")
    return found


def _no_weights(name: str, hub: dict[str, Any]) -> UserError:
    pickled = next((file for file in ("pytorch_model.bin", "pytorch_model.bin.index.json") if file_exists(name, file, **hub)), None)
    if pickled is not None:
        return UserError(
            f"{name}: has {pickled} only, a pickle that can run code; expected safetensors. Convert it once: "
            f'AutoModelForCausalLM.from_pretrained("{name}").save_pretrained("a_folder"), then name that folder'
        )
    if not os.path.isdir(name):
        require_file(name, _SINGLE, **hub)
    return UserError(f"{name}: no {_SINGLE} and no {_INDEX}; expected a donor with its weights as safetensors")


def _corrupt(name: str, file: str, error: Exception) -> UserError:
    return UserError(f"{name}/{file}: truncated or corrupt safetensors ({first_line(error)}); download or copy it again")

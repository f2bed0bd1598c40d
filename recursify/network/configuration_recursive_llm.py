# Copyright 2026 The recursify authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The configuration of a recursive language model: the donor's own configuration and the shape of the loop.

    prelude_layers, L_layers, coda_layers   physical layers, in this order
    H_cycles, L_cycles                      the looped block is applied max(1, H_cycles * (L_cycles + 1)) times

`num_hidden_layers` and `layer_types` are derived: they describe the *virtual* depth, one entry per layer application, because transformers'
caches allocate their slots by them (as for transformers' own recursive model, `hrm_text`). They are recomputed whenever the shape changes,
and values in a file are ignored. The order of slots is prelude, coda, applications of the loop, so each depth uses a prefix of the slots of
a deeper one.

This file is saved beside the weights: it imports transformers only.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.utils import auto_docstring

# |A| + |B| is at most GAIN_SUM in every channel, so states stay bounded for any number of cycles. GAIN_MAX is the largest equal gain.
GAIN_SUM = 0.9
GAIN_MAX = GAIN_SUM / 2
INJECTIONS = ("anchored", "sum_norm")
LORA_TARGETS = ("all", "attention", "mlp")
PREFIX = "recursive_"
_FULL, _SLIDING = _KINDS = ("full_attention", "sliding_attention")

_LAYERS = {"prelude_layers": 0, "L_layers": 1, "coda_layers": 0}  # name: minimum
_CYCLES = {"H_cycles": 0, "L_cycles": 0}
_LORA = {"lora_rank": 0, "lora_pairs": 1}
# Far beyond any model: a larger number is a damaged one, and lists of so many layers would fill memory.
_MOST_LAYERS, _MOST_APPLICATIONS = 10_000, 100_000


def applications(H_cycles: int, L_cycles: int) -> int:
    """Applications of the looped block in one forward pass; `H_cycles = 0` is one plain pass."""
    return max(1, H_cycles * (L_cycles + 1))


# Fields of the class below, for the documentation of every family.
FIELDS = r"""
prelude_layers (`int`, *optional*, defaults to 0):
    Layers before the loop.
L_layers (`int`, *optional*, defaults to 4):
    Layers in the loop.
coda_layers (`int`, *optional*, defaults to 0):
    Layers after the loop.
H_cycles (`int`, *optional*, defaults to 3):
    Cycles. Logits are available after each. 0 is one plain pass through the layers.
L_cycles (`int`, *optional*, defaults to 3):
    Updates of `z_L` per cycle, before the one update of `z_H`.
injection (`str`, *optional*, defaults to `"anchored"`):
    `anchored` (an affine mix around the embedding) or `sum_norm` (TRM's plain sum, normalised after the block).
gain_init (`float`, *optional*, defaults to 0.0):
    Initial value of the per-channel gains of `anchored`, at most 0.45. At 0 every cycle equals the plain pass.
state_init_std (`float`, *optional*, defaults to 0.02):
    Standard deviation of the initialisation of `H_init` and `L_init`.
freeze_embeddings (`bool`, *optional*, defaults to `False`):
    Keep the token embeddings (and a head tied to them) out of training.
lora_rank (`int`, *optional*, defaults to 0):
    Above 0, the recursion is an adapter: the donor's weights are frozen, the first application of the loop is the donor's own, and in all
    others low-rank updates (LoRA) of this rank are added to the linear layers of the loop.
lora_alpha (`float`, *optional*, defaults to 32.0):
    Low-rank updates are scaled by `lora_alpha / lora_rank`.
lora_targets (`str`, *optional*, defaults to `"all"`):
    The linear layers with updates: `attention`, `mlp` or `all`.
lora_pairs (`int`, *optional*, defaults to 1):
    Updates per linear layer: 1, shared by all cycles, or one for each of the first cycles; deeper cycles have the last.
block_types (`list[str]`, *optional*):
    Attention type of each physical layer; derived as by the donor's class where None.
layer_types (`list[str]`, *optional*):
    Derived, one per cache slot.
conversion (`dict`, *optional*):
    How the model was made, in JSON types: `donor`, `revision`, `plan` (which donor layers it has), a training summary. Documentation only.
"""
_SMOLLM3 = r"""
no_rope_layers (`list[int]`, *optional*):
    For each physical layer, 1 with rotary embedding and 0 without.
no_rope_layer_interval (`int`, *optional*, defaults to 4):
    Where `no_rope_layers` is None, every n-th layer has no rotary embedding.
"""
_PHI3 = r"""
original_max_position_embeddings (`int`, *optional*, defaults to 4096):
    Positions before rotary scaling.
"""
_INTRO = "Configuration of a recursive model of this family: that of the donor, and the shape of the loop."

# A base class for type checking only: at run time its defaults would replace the donor's.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Mixed
else:
    _Mixed = object


@dataclass(kw_only=True)
class RecursiveLLMConfig(_Mixed):
    """The fields of recursive models of all families, mixed into the donor's configuration class.

    Like transformers' Auto classes, it returns an instance of a subclass: `RecursiveLLMConfig(model_type="recursive_llama")` and
    `RecursiveLLMConfig.from_pretrained(name)` return that of the family. The default family is Qwen2.

    The fields are described in `FIELDS`.

    Raises:
        ValueError: A value out of range, or a list whose length is not the number of layers.
    """

    prelude_layers: int = 0
    L_layers: int = 4
    coda_layers: int = 0
    H_cycles: int = 3
    L_cycles: int = 3
    injection: str = "anchored"
    gain_init: float = 0.0
    state_init_std: float = 0.02
    freeze_embeddings: bool = False
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_targets: str = "all"
    lora_pairs: int = 1
    block_types: list[str] | None = None
    layer_types: list[str] | None = None
    conversion: dict[str, Any] | None = None

    base_model_pp_plan: ClassVar[Any] = None  # the donor's pipeline plan assumes that each layer runs once

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        family = family_config(kwargs.get("model_type", PREFIX + "qwen2")) if cls is RecursiveLLMConfig else cls
        return super().__new__(family)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_pretrained`; the common class returns that of the family in the file."""
        if cls is RecursiveLLMConfig:
            found, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, *args, **kwargs)
            return family_config(found.get("model_type", "")).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        _check(key, value)
        made = self.__dict__.get("_made", False)
        if made and key in _LAYERS and value != getattr(self, key):
            raise ValueError(f"{key}: the layers of a configuration are fixed, expected {getattr(self, key)}, got {value}; make a new one")
        super().__setattr__(key, value)
        if made and key in _CYCLES:
            self._derive()

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        self._check_depth()
        count = self.physical_layers
        types = self.block_types
        if types is not None and len(types) != count:
            raise ValueError(f"block_types: expected one entry for each of the {count} layers of the plan, got {len(types)}: {types}")
        # The donor's constructor needs the number of physical layers; the virtual depth in a file is ignored.
        self.num_hidden_layers, self.layer_types = count, types
        super().__post_init__(**kwargs)
        windowed = getattr(self, "sliding_window", None) is not None
        self.block_types = self.layer_types or [_SLIDING if windowed else _FULL] * count
        if unknown := sorted({str(kind) for kind in self.block_types} - set(_KINDS)):
            raise ValueError(f"block_types: expected {' or '.join(_KINDS)} for each layer, got {', '.join(unknown)}")
        if _SLIDING in self.block_types and not windowed:
            raise ValueError(f"block_types: {_SLIDING} needs a sliding_window, got None; give one, or use {_FULL}")
        self._derive()
        self._made = True

    def check_adapter(self, L_cycles: int | None = None) -> None:
        """Raise a ValueError for what an adapter cannot have: `sum_norm`, or no updates of `z_L`, of which the first is the donor's."""
        if not self.is_adapter:
            return
        if self.injection != "anchored":
            raise ValueError(f"injection: expected 'anchored' with an adapter, got {self.injection!r}")
        L = self.L_cycles if L_cycles is None else L_cycles
        if L < 1:
            raise ValueError(f"L_cycles: expected at least 1 with an adapter, whose first update of z_L is the donor's own, got {L}")

    @property
    def is_adapter(self) -> bool:
        """Whether the donor's weights are frozen and the recursion is an adapter of them."""
        return self.lora_rank > 0

    @property
    def first_exit(self) -> int:
        """The earliest cycle that a token can exit at: 0 where the first application of the loop is the donor's own."""
        return 0 if self.is_adapter else 1

    @property
    def physical_layers(self) -> int:
        """Number of physical layers: prelude, looped block and coda."""
        return self.prelude_layers + self.L_layers + self.coda_layers

    def depth(self, H_cycles: int | None = None, L_cycles: int | None = None) -> int:
        """Number of layer applications in one pass, and of cache slots; at the configuration's cycles where None."""
        H = self.H_cycles if H_cycles is None else H_cycles
        L = self.L_cycles if L_cycles is None else L_cycles
        return self.prelude_layers + self.L_layers * applications(H, L) + self.coda_layers

    def at_depth(self, H_cycles: int | None = None, L_cycles: int | None = None) -> "RecursiveLLMConfig":
        """A copy for another depth, whose caches have its number of slots."""
        other = copy.copy(self)
        other.H_cycles = self.H_cycles if H_cycles is None else H_cycles
        other.L_cycles = self.L_cycles if L_cycles is None else L_cycles
        return other

    def as_physical(self) -> "RecursiveLLMConfig":
        """A copy in which `num_hidden_layers` and `layer_types` describe the physical layers, as the donor's classes expect."""
        other = copy.copy(self)
        other.num_hidden_layers, other.layer_types = self.physical_layers, self.block_types
        return other

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, as `PreTrainedConfig.to_dict`."""
        out = super().to_dict()
        out.pop("_made", None)
        return out

    def _check_depth(self) -> None:
        """Raise a ValueError for a pass of more layers than a list can hold."""
        if (depth := self.depth()) > _MOST_APPLICATIONS:
            raise ValueError(
                f"H_cycles, L_cycles: expected at most {_MOST_APPLICATIONS:,} layer applications in a pass, got {depth:,}; choose fewer"
            )

    def _derive(self) -> None:
        self.check_adapter()
        self._check_depth()
        P, K, types = self.prelude_layers, self.L_layers, self.block_types or []
        self.layer_types = types[:P] + types[P + K :] + types[P : P + K] * applications(self.H_cycles, self.L_cycles)
        self.num_hidden_layers = len(self.layer_types)


def _check(name: str, value: Any) -> None:
    """Raise a ValueError for a field of the recursion that is out of range."""
    least = (_LAYERS | _CYCLES | _LORA).get(name)
    if least is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if name in _LAYERS and value > _MOST_LAYERS:
        raise ValueError(f"{name}: expected a whole number of {least} to {_MOST_LAYERS:,}, got {value}")
    if name == "conversion" and not isinstance(value, dict | None):
        raise ValueError(f"conversion: expected an object with donor and plan, or null, got {value!r}")
    if name == "injection" and value not in INJECTIONS:
        raise ValueError(f"injection: expected one of {', '.join(INJECTIONS)}, got {value!r}")
    if name == "lora_targets" and value not in LORA_TARGETS:
        raise ValueError(f"lora_targets: expected one of {', '.join(LORA_TARGETS)}, got {value!r}")
    if name == "lora_alpha" and not value > 0:
        raise ValueError(f"lora_alpha: expected a number above 0, got {value!r}")
    if name == "gain_init" and not 0.0 <= value <= GAIN_MAX:
        raise ValueError(f"gain: expected 0 <= gain <= {GAIN_MAX} (two of them add up to at most {GAIN_SUM}), got {value}")


@auto_docstring(custom_intro=_INTRO, custom_args=FIELDS)
class RecursiveQwen2Config(RecursiveLLMConfig, Qwen2Config):
    model_type = "recursive_qwen2"


@auto_docstring(custom_intro=_INTRO, custom_args=FIELDS)
class RecursiveQwen3Config(RecursiveLLMConfig, Qwen3Config):
    model_type = "recursive_qwen3"


@auto_docstring(custom_intro=_INTRO, custom_args=FIELDS)
class RecursiveLlamaConfig(RecursiveLLMConfig, LlamaConfig):
    model_type = "recursive_llama"


@auto_docstring(custom_intro=_INTRO, custom_args=FIELDS)
class RecursiveMistralConfig(RecursiveLLMConfig, MistralConfig):
    model_type = "recursive_mistral"


@auto_docstring(custom_intro=_INTRO, custom_args=FIELDS + _SMOLLM3)
class RecursiveSmolLM3Config(RecursiveLLMConfig, SmolLM3Config):
    model_type = "recursive_smollm3"


@auto_docstring(custom_intro=_INTRO, custom_args=FIELDS)
class RecursiveOlmo2Config(RecursiveLLMConfig, Olmo2Config):
    model_type = "recursive_olmo2"


@auto_docstring(custom_intro=_INTRO, custom_args=FIELDS + _PHI3)
class RecursivePhi3Config(RecursiveLLMConfig, Phi3Config):
    model_type = "recursive_phi3"


CONFIGS: dict[str, Any] = {
    config.model_type: config
    for config in (
        RecursiveQwen2Config,
        RecursiveQwen3Config,
        RecursiveLlamaConfig,
        RecursiveMistralConfig,
        RecursiveSmolLM3Config,
        RecursiveOlmo2Config,
        RecursivePhi3Config,
    )
}


def family_config(model_type: str) -> Any:
    """The configuration class of a recursive `model_type`.

    Raises:
        ValueError: Unknown type.
    """
    if model_type not in CONFIGS:
        raise ValueError(f"model_type: expected one of {', '.join(CONFIGS)}, got {model_type!r}")
    return CONFIGS[model_type]


# Lists with one entry per donor layer, selected by donor layer index: this preserves sliding windows and layers without RoPE.
_PER_LAYER = {"layer_types": "block_types", "no_rope_layers": "no_rope_layers"}


def from_donor(donor: PreTrainedConfig, indices: list[int], **recursion: Any) -> Any:
    """The configuration of a recursive model over layers of a donor.

    Args:
        donor: The donor's own configuration.
        indices: Donor layer of each layer of the recursive model: prelude, looped block, coda.
        recursion: Fields of `RecursiveLLMConfig`.
    """
    fields = donor.to_dict()
    for name in ("num_hidden_layers", "architectures", "auto_map", "transformers_version", "model_type"):
        fields.pop(name, None)
    for theirs, ours in _PER_LAYER.items():
        values = fields.pop(theirs, None)
        if values is not None:
            fields[ours] = [values[i] for i in indices]
    return family_config(PREFIX + donor.model_type)(**fields, **recursion)


_GUIDE_FIELDS = {"num_heads": "num_attention_heads", "seq_len": "max_position_embeddings"}
_GUIDE_WIDTHS = {"vocab_size", "hidden_size", "num_heads", "num_attention_heads", "num_key_value_heads", "seq_len"}
_GUIDE_ONLY = {"batch_size", "pos_encodings", "expansion", "pretrained_model_name", *_GUIDE_FIELDS}


def from_guide(guide: dict[str, Any]) -> Any:
    """The configuration for the technical guide's dictionary (step 3 of its "Detailed Implementation").

    With `pretrained_model_name` the donor's configuration overrides the widths in the dictionary, and the layers are those of the guide's
    step 4, `int(i * N / K)`. `batch_size` is ignored; `seq_len` is the number of positions of a model without a donor.

    Raises:
        ValueError: An unknown key, a width that is missing or out of range, or another value of `pos_encodings` than `rope`.
    """
    given = dict(guide)
    config_class = family_config(given.pop("model_type", PREFIX + "qwen2"))
    known = set(config_class.__dataclass_fields__) | _GUIDE_ONLY
    if unknown := sorted(set(given) - known):
        raise ValueError(f"RecursiveLLM: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if given.pop("pos_encodings", "rope") != "rope":
        raise ValueError(f"pos_encodings: expected 'rope' (the donor's own rotary embedding), got {guide['pos_encodings']!r}")
    given.pop("batch_size", None)
    _check_guide(guide)
    expansion, name = given.pop("expansion", None), given.pop("pretrained_model_name", None)
    fields = {_GUIDE_FIELDS.get(key, key): value for key, value in given.items()}
    if name is None:
        needed = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_attention_heads": "num_heads"}
        if missing := [guides for ours, guides in needed.items() if ours not in fields]:
            raise ValueError(f"RecursiveLLM: without pretrained_model_name the dictionary needs {', '.join(missing)}")
        return config_class(**_guide_widths(fields, expansion))
    donor = AutoConfig.from_pretrained(name)
    shape = {key: value for key, value in fields.items() if key in RecursiveLLMConfig.__dataclass_fields__}
    count = shape.get("L_layers", RecursiveLLMConfig.L_layers)
    return from_donor(donor, [int(i * donor.num_hidden_layers / count) for i in range(count)], **shape)


def _check_guide(guide: dict[str, Any]) -> None:
    """Raise a ValueError for a width of the dictionary that is out of range."""
    for name in _GUIDE_WIDTHS & set(guide):
        value = guide[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    expansion = guide.get("expansion", 1)
    if not isinstance(expansion, int | float) or isinstance(expansion, bool) or not 0 < expansion < float("inf"):
        raise ValueError(f"expansion: expected a number above 0 (feed-forward width / hidden_size), got {expansion!r}")
    size, heads = guide.get("hidden_size", 0), guide.get("num_heads", guide.get("num_attention_heads", 1))
    if "head_dim" not in guide and size % heads:
        raise ValueError(f"hidden_size: expected a multiple of num_heads = {heads}, got {size}")


def _guide_widths(fields: dict[str, Any], expansion: float | None) -> dict[str, Any]:
    """Add the widths that the dictionary does not have: feed-forward from `expansion`, one key/value head per head."""
    widths = {"num_key_value_heads": fields["num_attention_heads"]}
    if expansion is not None:
        widths["intermediate_size"] = int(fields["hidden_size"] * expansion)
    return widths | fields

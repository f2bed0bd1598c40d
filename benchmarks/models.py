"""The models that are measured: random weights in real shapes, since time and memory do not depend on the values."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
from transformers.initialization import no_init_weights

from recursify import RecursiveLLM
from recursify.conversion.layer_selection import make_plan
from recursify.network.configuration_recursive_llm import from_donor


@dataclass(frozen=True)
class Shape:
    """A donor of the Qwen2 family.

    Args:
        name: As it stands in tables.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    tied: bool = True

    def config(self, layers: int | None = None, vocabulary: int | None = None) -> Qwen2Config:
        """The donor's configuration; with other layers or words where they are named."""
        return Qwen2Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=layers or self.layers,
            vocab_size=vocabulary or self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=32_768,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


TOY = Shape("toy", 64, 128, 4, 2, 4, 512)
HALF_B = Shape("Qwen2-0.5B", 896, 4_864, 14, 2, 24, 151_936)
ONE_AND_A_HALF_B = Shape("Qwen2-1.5B", 1_536, 8_960, 12, 2, 28, 151_936)
SEVEN_B = Shape("Qwen2-7B", 3_584, 18_944, 28, 4, 28, 152_064, tied=False)

# The bundled donors, as folders.
SHIPPED = str(resources.files("recursify.demo") / "donors" / "prose")
TRACKER = str(resources.files("recursify.demo") / "donors" / "tracker")


def shipped_shape() -> Shape:
    """Of the bundled donor."""
    c: Any = AutoConfig.from_pretrained(SHIPPED)
    sizes = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.num_hidden_layers, c.vocab_size
    return Shape("the one that ships", *sizes, tied=c.tie_word_embeddings)


def recursive_config(
    donor: Qwen2Config, *, keep_donor: bool = False, L_layers: int = 4, H_cycles: int = 3, L_cycles: int = 3, lora_rank: int = 0
) -> Any:
    """What `recursify convert` makes of a donor with these flags, and `train --adapter` where there is a rank; with gains of 0.2, so that
    no cycle is idle."""
    plan = make_plan("random", donor.num_hidden_layers, L_layers=min(L_layers, donor.num_hidden_layers), keep_donor=keep_donor)
    return from_donor(
        donor,
        plan.indices,
        prelude_layers=len(plan.prelude),
        L_layers=len(plan.loop),
        coda_layers=len(plan.coda),
        H_cycles=H_cycles,
        L_cycles=L_cycles,
        gain_init=0.2,
        lora_rank=lora_rank,
    )


def build(config: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A model of random weights: ours for a recursive configuration, else transformers' own. Made where it is used.

    The same few million random numbers fill every matrix: their values do not matter, and drawing half a billion takes long.
    """
    with device, no_init_weights():
        model: Any = RecursiveLLM(config) if hasattr(config, "H_cycles") else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    noise = config.initializer_range * torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                _fill(module.weight, noise)
                if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
                    bias.zero_()
            else:
                model._init_weights(module)
    model.tie_weights()
    return model.to(dtype)


def _fill(weight: Any, noise: torch.Tensor) -> None:
    flat = weight.view(-1)
    for start in range(0, len(flat), len(noise)):
        flat[start : start + len(noise)] = noise[: len(flat) - start]


def tokens(config: Any, rows: int, length: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """`[rows, length]` random ids."""
    return torch.randint(1, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)

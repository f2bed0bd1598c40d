"""Donors in the files of transformers 4: the config.json and tokenizer_config.json of published models, in small.

Each entry of CONFIGS is a config.json as hubs have it: `rope_theta` and `rope_scaling` at the top, `torch_dtype`, fields that the newest
transformers changes while it reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .tiny import make_tiny_tokenizer

_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
    "initializer_range": 0.05, "use_cache": True, "torch_dtype": "float32", "transformers_version": "4.46.3", "hidden_act": "silu",
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-06, "sliding_window": 131072, "use_sliding_window": False,
        "max_window_layers": 5, "tie_word_embeddings": True,
    },
    "qwen2_yarn": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 1000000.0, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 128, "type": "yarn"},
        "rms_norm_eps": 1e-06, "sliding_window": 64, "use_sliding_window": False, "max_window_layers": 5, "tie_word_embeddings": False,
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 5000000, "rope_scaling": None, "rms_norm_eps": 1e-06, "sliding_window": None, "use_sliding_window": False,
        "max_window_layers": 5, "tie_word_embeddings": True, "head_dim": 16, "attention_bias": False,
    },
    "llama_dynamic": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 500000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
        "pretraining_tp": 1, "attention_bias": False, "mlp_bias": False, "head_dim": 8,
    },
    "llama3": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "pretraining_tp": 1, "eos_token_id": [0, 1],
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64, "rope_type": "llama3",
        },
    },
    "mistral": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-05, "sliding_window": 16, "tie_word_embeddings": False, "head_dim": 8,
    },
    "smollm3": {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 5000000.0, "rope_scaling": None, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1], "sliding_window": None, "use_sliding_window": False, "max_window_layers": 5, "pad_token_id": 1,
        "layer_types": ["full_attention"] * 5,
    },
    "olmo2": {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "rope_theta": 500000, "rope_scaling": None, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "attention_bias": False,
        "pad_token_id": 1,
    },
    "phi3": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "original_max_position_embeddings": 128, "rope_theta": 20000.0, "rope_scaling": {"type": "longrope", **_FACTORS},
        "rms_norm_eps": 1e-05, "sliding_window": 2047, "tie_word_embeddings": False, "pad_token_id": 1,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "phi4_mini": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 5, "max_position_embeddings": 512,
        "original_max_position_embeddings": 128, "rope_theta": 20000.0, "partial_rotary_factor": 0.5, "hidden_size": 64,
        "rope_scaling": {"type": "longrope", **_FACTORS}, "rms_norm_eps": 1e-05, "sliding_window": 262144, "tie_word_embeddings": True,
        "pad_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
}  # fmt: skip
TOKENIZER = {
    "additional_special_tokens": ["<|im_start|>"], "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "clean_up_tokenization_spaces": False, "eos_token": "<|endoftext|>", "model_max_length": 512,
    "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip


def fields_of(name: str) -> dict[str, Any]:
    return _SHAPE | CONFIGS[name]


def old_donor(name: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """A donor with random weights, whose config.json and tokenizer_config.json are those above, word for word."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields_of(name)))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields_of(name)))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return model.eval()

"""Recursive models in vLLM: a plugin, loaded by the entry point `vllm.general_plugins` of this package. Start with model.py.

    vllm serve FOLDER --hf-overrides '{"H_cycles": 3}'

FOLDER is what `recursify convert`, `train` or `export` writes. The depth is the server's, the same for all requests; 0 cycles is the plain
pass through the layers. Nothing here is imported outside vLLM, and nothing of recursify but its configurations.
"""

from __future__ import annotations

__all__ = ["FAMILIES", "REFUSED", "register"]

# Families of which vLLM has layers of its own. Those that it runs through transformers (SmolLM3, OLMo2) have no attention to divide.
FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral", "Phi3")
REFUSED = ("SmolLM3", "Olmo2")


def register() -> None:
    """Make vLLM and transformers know the recursive models. Called by vLLM in each of its processes, perhaps more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from recursify.network.configuration_recursive_llm import CONFIGS

    for name, config in CONFIGS.items():
        AutoConfig.register(name, config, exist_ok=True)
    for family in (*FAMILIES, *REFUSED):
        ModelRegistry.register_model(f"Recursive{family}ForCausalLM", "recursify_vllm.model:RecursiveForCausalLM")

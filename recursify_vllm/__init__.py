"""Recursive models in vLLM: a plugin, which vLLM finds by the entry point `vllm.general_plugins` of this package. Start with model.py.

    vllm serve FOLDER --hf-overrides '{"H_cycles": 3}'

FOLDER is what `recursify convert`, `train` or `export` writes. The depth is the server's, the same for all requests; 0 cycles is the plain
pass through the layers. Nothing here is imported outside vLLM, and of recursify it needs the configurations, and for the folder of an
adapter what reads adapters.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make vLLM and transformers know the recursive models. vLLM calls it in each of its processes, perhaps more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from recursify.network.configuration_recursive_llm import CONFIGS

    for name, config in CONFIGS.items():
        AutoConfig.register(name, config, exist_ok=True)
        # of `RecursiveQwen2Config`, the class in config.json is `RecursiveQwen2ForCausalLM`; here one class serves all of them
        architecture = config.__name__.removesuffix("Config") + "ForCausalLM"
        ModelRegistry.register_model(architecture, "recursify_vllm.model:RecursiveForCausalLM")

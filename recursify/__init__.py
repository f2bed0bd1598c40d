"""recursify: turn a pretrained language model into a recursive reasoner.

    model = convert("Qwen/Qwen2-0.5B", L_layers=4, H_cycles=3, L_cycles=3)   # -> RecursiveLLM
    model.generate(input_ids, H_cycles=5)

Importing this package registers the recursive families with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import _moved
from .conversion.convert import convert
from .network.configuration_recursive_llm import CONFIGS, RecursiveLLMConfig
from .network.decoding_recursive_llm import RecursiveCache
from .network.modeling_recursive_llm import FAMILIES, RecursiveLLM
from .network.plan import ConversionPlan

__all__ = ["ConversionPlan", "RecursiveCache", "RecursiveLLM", "RecursiveLLMConfig", "convert"]
__version__ = "0.1.0"

_moved.install()

for _type, _config in CONFIGS.items():
    _family = FAMILIES[_type]
    AutoConfig.register(_type, _config, exist_ok=True)
    AutoModel.register(_config, _family.base_class, exist_ok=True)
    AutoModelForCausalLM.register(_config, _family, exist_ok=True)
    # `save_pretrained` then writes the model files beside the weights, for trust_remote_code
    _config.register_for_auto_class()
    _family.register_for_auto_class("AutoModelForCausalLM")
    _family.base_class.register_for_auto_class("AutoModel")

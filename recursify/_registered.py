"""Importing this module registers the recursive families with transformers' Auto classes, and their targets with PEFT."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .network.configuration_recursive_llm import CONFIGS, PREFIX
from .network.modeling_recursive_llm import FAMILIES
from .utils import peft_defaults

peft_defaults.install(PREFIX, (model_type.removeprefix(PREFIX) for model_type in CONFIGS))

for _type, _config in CONFIGS.items():
    _family = FAMILIES[_type]
    AutoConfig.register(_type, _config, exist_ok=True)
    AutoModel.register(_config, _family.base_class, exist_ok=True)
    AutoModelForCausalLM.register(_config, _family, exist_ok=True)
    # `save_pretrained` then writes the model files beside the weights, for trust_remote_code
    _config.register_for_auto_class()
    _family.register_for_auto_class("AutoModelForCausalLM")
    _family.base_class.register_for_auto_class("AutoModel")

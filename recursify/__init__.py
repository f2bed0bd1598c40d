"""recursify: turn a pretrained language model into a recursive reasoner.

    model = convert("Qwen/Qwen2-0.5B", L_layers=4, H_cycles=3, L_cycles=3)   # -> RecursiveLLM
    model.generate(input_ids, H_cycles=5)

Importing this package registers the recursive families with transformers' Auto classes. What trains, generates and measures is imported
when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import _moved
from .checkpoints.checkpoint import Checkpoint, load, save
from .checkpoints.loading import load_model
from .conversion.convert import convert
from .errors import UserError
from .network.configuration_recursive_llm import CONFIGS, PREFIX, RecursiveLLMConfig
from .network.decoding_recursive_llm import RecursiveCache
from .network.modeling_recursive_llm import FAMILIES, RecursiveLLM
from .network.plan import ConversionPlan
from .utils import peft_defaults

if TYPE_CHECKING:
    from .data.loading import load_blocks
    from .evaluation.evaluate import evaluate
    from .evaluation.settings import EvaluateSettings, MeasureSettings
    from .evaluation.text_loss import measure
    from .inference.generation import Generated, generate_batch, generate_text
    from .inference.options import Sampling
    from .training import EmbeddingSettings, FitResult, FitSettings, HybridSettings, RecursiveTrainer, TrainSettings, fit, train

__all__ = [
    "Checkpoint",
    "ConversionPlan",
    "EmbeddingSettings",
    "EvaluateSettings",
    "FitResult",
    "FitSettings",
    "Generated",
    "HybridSettings",
    "MeasureSettings",
    "RecursiveCache",
    "RecursiveLLM",
    "RecursiveLLMConfig",
    "RecursiveTrainer",
    "Sampling",
    "TrainSettings",
    "UserError",
    "convert",
    "evaluate",
    "fit",
    "generate_batch",
    "generate_text",
    "load",
    "load_blocks",
    "load_model",
    "measure",
    "save",
    "train",
]
__version__ = "0.1.0"

# Public names whose modules are imported when they are first asked for: a model is loaded without the weight of the training stack.
_LATER = {
    "EmbeddingSettings": "training",
    "EvaluateSettings": "evaluation.settings",
    "FitResult": "training",
    "FitSettings": "training",
    "Generated": "inference.generation",
    "HybridSettings": "training",
    "MeasureSettings": "evaluation.settings",
    "RecursiveTrainer": "training",
    "Sampling": "inference.options",
    "TrainSettings": "training",
    "evaluate": "evaluation.evaluate",
    "fit": "training",
    "generate_batch": "inference.generation",
    "generate_text": "inference.generation",
    "load_blocks": "data.loading",
    "measure": "evaluation.text_loss",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'recursify' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_moved.install()
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

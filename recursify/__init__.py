"""recursify: turn a pretrained language model into a recursive reasoner.

    model = convert("Qwen/Qwen2-0.5B", L_layers=4, H_cycles=3, L_cycles=3)   # -> RecursiveLLM
    model.generate(input_ids, H_cycles=5)

Importing this package registers the recursive families with transformers' Auto classes. What trains, generates and measures is imported
when it is first asked for.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _moved
from .errors import UserError

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint, load, save
    from .checkpoints.loading import load_model
    from .conversion.adapter import as_adapter
    from .conversion.convert import convert
    from .data.loading import load_blocks
    from .evaluation.evaluate import evaluate
    from .evaluation.settings import EvaluateSettings, MeasureSettings
    from .evaluation.text_loss import measure
    from .inference.generation import Generated, generate_batch, generate_text
    from .inference.options import Sampling
    from .network.configuration_recursive_llm import RecursiveLLMConfig
    from .network.decoding_recursive_llm import RecursiveCache
    from .network.modeling_recursive_llm import RecursiveLLM
    from .network.plan import ConversionPlan
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
    "as_adapter",
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

# Public names and their modules, which are imported when a name is first asked for.
_PLACES = {
    "Checkpoint": "checkpoints.checkpoint",
    "ConversionPlan": "network.plan",
    "EmbeddingSettings": "training",
    "EvaluateSettings": "evaluation.settings",
    "FitResult": "training",
    "FitSettings": "training",
    "Generated": "inference.generation",
    "HybridSettings": "training",
    "MeasureSettings": "evaluation.settings",
    "RecursiveCache": "network.decoding_recursive_llm",
    "RecursiveLLM": "network.modeling_recursive_llm",
    "RecursiveLLMConfig": "network.configuration_recursive_llm",
    "RecursiveTrainer": "training",
    "Sampling": "inference.options",
    "TrainSettings": "training",
    "as_adapter": "conversion.adapter",
    "convert": "conversion.convert",
    "evaluate": "evaluation.evaluate",
    "fit": "training",
    "generate_batch": "inference.generation",
    "generate_text": "inference.generation",
    "load": "checkpoints.checkpoint",
    "load_blocks": "data.loading",
    "load_model": "checkpoints.loading",
    "measure": "evaluation.text_loss",
    "save": "checkpoints.checkpoint",
    "train": "training",
}
# Commands answer --help and errors in flags before torch and transformers are imported, which takes seconds; `cli.main` registers after.
_COMMANDS = (
    "recursify",
    "convert_qwen_to_recursive",
    "train_qwen_recursive",
    "train_qwen_trm",
    "train_qwen_trm_hybrid",
    "inference_qwen_recursive",
)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'recursify' has no attribute {name!r}")
    import_module(f"{__name__}._registered")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is a command: `recursify`, `python -m recursify`, or a script of the guides."""
    started = Path(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
    return started in _COMMANDS or (started == "-m" and ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False))


_moved.install()
if not _is_command():
    import_module(f"{__name__}._registered")

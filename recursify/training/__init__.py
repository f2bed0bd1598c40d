"""Fine-tuning with transformers' Trainer, with optional deep supervision (a loss at every cycle).

    train(TrainSettings(checkpoint="qwen_recursive_init.pt"))     # a run that reads and writes files
    train(HybridSettings(model_name="Qwen/Qwen2-0.5B"))           # the same from a donor; also EmbeddingSettings
    fit(model, tokenizer, train_blocks, eval_blocks, settings)    # the same training on a model in memory, recursive or a plain donor
    RecursiveTrainer(model=, args=, train_dataset=, ...).train()  # the same as a Trainer

Imports `conversion`, `inference` (for samples), `data`, `checkpoints` and `network`. Start with `loss_module.py`: the loss of a batch over
the cycles, and backpropagation through them. Around it: `settings.py` (the flags), `approaches.py` (the three approaches of the guides),
`run.py` (runs on files), `fitting.py` (training in memory), `trainer.py`, `callbacks.py`, `saving.py`, `parallel.py`, `optimizers.py`,
`depth.py`, `gains.py`, `collate.py`, `arguments.py` (our flags as TrainingArguments), `cost.py` (FLOPs and memory, for --dry_run).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import EmbeddingSettings, FitSettings, HybridSettings, TrainSettings

if TYPE_CHECKING:
    from .fitting import FitResult, RecursiveTrainer, fit
    from .run import TrainResult, train

__all__ = [
    "EmbeddingSettings",
    "FitResult",
    "FitSettings",
    "HybridSettings",
    "RecursiveTrainer",
    "TrainResult",
    "TrainSettings",
    "fit",
    "train",
]

_PLACES = {"FitResult": "fitting", "RecursiveTrainer": "fitting", "fit": "fitting", "TrainResult": "run", "train": "run"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)  # with torch, which the flags do without

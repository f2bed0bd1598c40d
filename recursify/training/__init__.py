"""Fine-tuning on transformers' Trainer, with a loss at every cycle.

    train(TrainSettings(checkpoint="qwen_recursive_init.pt"))     # a whole run from files to files
    train(HybridSettings(model_name="Qwen/Qwen2-0.5B"))           # the same from a donor; EmbeddingSettings, too
    fit(model, tokenizer, train_blocks, eval_blocks, settings)    # the same loop on a model in memory; a plain donor, too
    RecursiveTrainer(model=, args=, train_dataset=, ...).train()  # the same as a Trainer

Imports `conversion`, `inference` (for samples), `data`, `checkpoints` and `network`. Start with `loss_module.py`: the loss of a batch over
the cycles, and the ways back through them. Around it: `settings.py` (the flags), `approaches.py` (the guides' three approaches as one
table), `run.py` (from files to files), `fitting.py` (in memory), `trainer.py`, `callbacks.py`, `saving.py`, `parallel.py`, `optimizers.py`,
`depth.py`, `gains.py`, `collate.py`, `arguments.py` (our flags as TrainingArguments), `cost.py` (FLOPs and memory, for --dry_run).
"""

from .fitting import FitResult, RecursiveTrainer, fit
from .run import TrainResult, train
from .settings import EmbeddingSettings, FitSettings, HybridSettings, TrainSettings

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

"""Fine-tuning with transformers' Trainer, with optional deep supervision (a loss at every cycle).

    train(TrainSettings(checkpoint="qwen_recursive_init.pt"))     # a run that reads and writes files
    train(HybridSettings(model_name="Qwen/Qwen2-0.5B"))           # the same from a donor; also EmbeddingSettings
    fit(model, tokenizer, train_blocks, eval_blocks, settings)    # the same loop on a model in memory, recursive or a plain donor
    RecursiveTrainer(model=, args=, train_dataset=, ...).train()  # the same as a Trainer

Imports `conversion`, `inference` (for samples), `data`, `checkpoints` and `network`. Start with `loss_module.py`: the loss of a batch over
the cycles, and backpropagation through them. Around it: `settings.py` (the flags), `approaches.py` (the three approaches of the guides),
`run.py` (runs on files), `fitting.py` (training in memory), `trainer.py`, `callbacks.py`, `saving.py`, `parallel.py`, `optimizers.py`,
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

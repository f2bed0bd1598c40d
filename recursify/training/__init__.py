"""Fine-tuning: settings, the trainer, and what it prints and saves on the way.

    train(TrainSettings(checkpoint="qwen_recursive_init.pt"))     # a whole run from files to files
    fit(model, tokenizer, train_blocks, eval_blocks, settings)    # the same loop on a model in memory; a plain donor, too

Floor 3.
"""

from .settings import TrainSettings
from .trainer import FitResult, TrainResult, fit, train

__all__ = ["FitResult", "TrainResult", "TrainSettings", "fit", "train"]

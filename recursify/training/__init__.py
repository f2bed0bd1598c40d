"""Training: settings, the three approaches, the trainer, and what it prints and saves on the way.

    train(TrainSettings(checkpoint="qwen_recursive_init.pt"))     # a whole run from files to files
    train(HybridSettings(model_name="Qwen/Qwen2-0.5B"))           # the same from a donor; EmbeddingSettings, too
    fit(model, tokenizer, train_blocks, eval_blocks, settings)    # the same loop on a model in memory; a plain donor, too

Floor 3.
"""

from .run import FitResult, TrainResult, fit, train
from .settings import EmbeddingSettings, HybridSettings, TrainSettings

__all__ = ["EmbeddingSettings", "FitResult", "HybridSettings", "TrainResult", "TrainSettings", "fit", "train"]

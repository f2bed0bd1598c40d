"""Export a checkpoint: a folder for the Hugging Face hub, or a plain model for engines that do not support recursion.

Imports `evaluation` (for the results in the model card) and the packages that it imports. Start with `export.py`; `upload.py` uploads the
folder. Model cards are written by checkpoints/model_card.py, because every saved folder has one.
"""

"""A checkpoint as others will meet it: a folder ready for the Hugging Face hub, or the plain donor for engines without loops.

Imports `evaluation` (the figures of the card) and all below. Start with `export.py`; `upload.py` sends the folder. The card itself is
written by checkpoints/model_card.py, since every saved folder has one.
"""

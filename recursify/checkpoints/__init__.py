"""Read and write models on disk and on the hub: donors, recursive checkpoints, tokenizers and model cards.

Imports `network`, `reports` (for the charts of a model card) and `utils`. Start with `checkpoint.py`: `load` and `save` for `.pt` files and
folders. `loading.py` opens a recursive or plain model by path or hub id. `donor.py` reads a pretrained model tensor by tensor without
building it, with `repository.py` (single files of a folder or hub repository), `tokenizer.py` and `configs.py`. `settings.py` has the flags
that name a model, `guide_names.py` translates between the tensor names of transformers and of the guides, `model_card.py` writes README.md.
"""

"""Models on disk and on the hub, read and written: donors, recursive checkpoints of both forms, their tokenizers and cards.

Imports `network`, `reports` (for the pictures of a card) and `utils`. Start with `checkpoint.py`: `load` and `save` of `.pt` files and of
folders. `loading.py` opens whatever a path or hub id names, recursive or plain; `donor.py` reads a pretrained model tensor by tensor
without building it, over `repository.py` (single files of a folder or hub repository), `tokenizer.py` and `configs.py`; `settings.py` has
the flags that name a model; `guide_names.py` translates between transformers' names of tensors and those of the guides; `model_card.py`
writes the README.md.
"""

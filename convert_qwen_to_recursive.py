"""Step 1 of the quick start: turn a pretrained model into a recursive one. The same as `recursify convert`."""

from recursify.cli import convert
from recursify.weights import copy_attention_weights, copy_mlp_weights  # step 4 of the technical guide imports them from here

__all__ = ["convert", "copy_attention_weights", "copy_mlp_weights"]

if __name__ == "__main__":
    convert()

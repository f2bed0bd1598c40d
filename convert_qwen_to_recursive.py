"""Step 1 of the quick start: turn a pretrained model into a recursive one. The same as `recursify convert`."""

from recursify.checkpoints.guide_names import (  # step 4 of the technical guide imports them from here
    copy_attention_weights,
    copy_mlp_weights,
)
from recursify.cli.main import convert

__all__ = ["convert", "copy_attention_weights", "copy_mlp_weights"]

if __name__ == "__main__":
    convert()

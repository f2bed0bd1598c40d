"""Step 1 of the quick start: convert a pretrained model to a recursive one. The same as `recursify convert`."""

from recursify.cli.main import convert

if __name__ == "__main__":
    convert()
else:  # the conversion guide imports them from here
    from recursify.conversion.mapping import copy_attention_weights, copy_mlp_weights

    __all__ = ["convert", "copy_attention_weights", "copy_mlp_weights"]

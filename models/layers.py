"""`Attention` (wq, wk, wv, wo) and `SwiGLU` (w1, w2, w3) of the guides: views of the layer's modules."""

from recursify.network.modeling_recursive_llm import Attention, SwiGLU

__all__ = ["Attention", "SwiGLU"]

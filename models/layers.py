"""The guides' names for a layer's parts: `Attention` (wq, wk, wv, wo) and `SwiGLU` (w1, w2, w3), views of the donor's own modules."""

from recursify.network.modeling_recursive_llm import Attention, SwiGLU

__all__ = ["Attention", "SwiGLU"]

"""The recursive network: a base model's layers, looped over two states, with its caches, losses and size.

Imports torch and transformers only. Three files are saved beside the weights in every folder and load there without recursify; they import
only each other: `configuration_recursive_llm.py`, `modeling_recursive_llm.py` and `decoding_recursive_llm.py`.

Start with `modeling_recursive_llm.py` (`Recursion` is the loop, `ForwardPass` its slots in the KV cache). Beside it:
`decoding_recursive_llm.py` (KV caches, early exit, self-speculative decoding), `losses.py` (training losses, as pure functions), `plan.py`
(which donor layers a model has, and the conversion record), `size.py` (parameters and bytes, from a configuration alone).
"""

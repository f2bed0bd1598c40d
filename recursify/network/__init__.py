"""The recursive network: a base model's layers, looped over two states, with its caches, its losses and its size.

Imports torch and transformers, nothing else and no other room, because three of its files travel beside the weights of every saved folder
and load there without recursify: `configuration_recursive_llm.py`, `modeling_recursive_llm.py` and `decoding_recursive_llm.py`, which
import only each other.

Start with `modeling_recursive_llm.py` (`Recursion` is the loop, `ForwardPass` its slots in the KV cache). Beside it:
`decoding_recursive_llm.py` (caches, early exit, self-speculative decoding), `losses.py` (what training minimises, as pure functions),
`plan.py` (which donor layers a network is made of), `size.py` (parameters and bytes, from a configuration alone).
"""

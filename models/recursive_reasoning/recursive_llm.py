"""Import path of the guide for `RecursiveLLM`, see `recursify/network/modeling_recursive_llm.py`."""

from recursify.network.modeling_recursive_llm import RecursiveLLM

__all__ = ["RecursiveLLM"]

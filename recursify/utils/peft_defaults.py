"""Default target modules of PEFT's methods for our model types: those of the donor's type.

PEFT looks them up by `config.model_type` in tables of its own, which are extended as soon as it is imported, before or after recursify.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from typing import Any

_TABLES = "_TARGET_MODULES_MAPPING"
_ATTENTION = ["q_proj", "v_proj"]  # for types that PEFT does not know, as it has them for most decoders
_FUSED = {"phi3": ["qkv_proj"]}


def install(prefix: str, families: Iterable[str]) -> None:
    """Extend PEFT's tables by `prefix + family` for each family, now if PEFT is imported, else when it is."""
    families = tuple(families)
    if "peft" in sys.modules:
        _extend(prefix, families)
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft(prefix, families))


def _extend(prefix: str, families: Iterable[str]) -> None:
    constants = vars(importlib.import_module("peft.utils.constants"))
    for table in (value for name, value in constants.items() if name.endswith(_TABLES) and isinstance(value, dict)):
        for family in families:
            known = table.get(family, table.get("llama") and _FUSED.get(family, _ATTENTION))
            if known:
                table.setdefault(prefix + family, known)


class _AfterPeft:
    """An import finder for `peft` itself, until it is imported. Looking for the package without importing it changes nothing."""

    def __init__(self, prefix: str, families: tuple[str, ...]):
        self.prefix, self.families, self.asking = prefix, families, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module: Any) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _extend(self.prefix, self.families)

            spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec

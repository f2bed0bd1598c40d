"""The plugin for vLLM, without vLLM: that it writes the same texts is tested by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import recursify_vllm
from recursify.network.configuration_recursive_llm import CONFIGS

ROOT = Path(__file__).resolve().parents[2]


def test_entry_point_and_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["vllm.general_plugins"] == {"recursify": "recursify_vllm:register"}
    assert "recursify_vllm" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_every_family_has_layers() -> None:
    tree = ast.parse((ROOT / "recursify_vllm" / "layers.py").read_text(encoding="utf-8"))
    (layers,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "LAYERS")
    assert {key.value for key in layers.keys} == set(CONFIGS)  # type: ignore[union-attr]


def test_nothing_imports_it() -> None:
    assert "recursify_vllm.model" not in sys.modules
    for path in (ROOT / "recursify").rglob("*.py"):
        assert "recursify_vllm" not in path.read_text(encoding="utf-8"), path


def test_registers_where_vllm_is() -> None:
    pytest.importorskip("vllm", reason="needs vLLM: make test-vllm has an environment with it")
    from vllm import ModelRegistry

    recursify_vllm.register()
    assert "RecursiveQwen2ForCausalLM" in ModelRegistry.get_supported_archs()

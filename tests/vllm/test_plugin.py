"""The plugin for vLLM, without vLLM: that it writes the same texts is tested by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import recursify_vllm
from recursify.network.configuration_recursive_llm import CONFIGS, GAIN_SUM
from recursify.network.modeling_recursive_llm import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ast.parse((ROOT / "recursify_vllm" / "model.py").read_text(encoding="utf-8"))


def constant(name: str) -> ast.expr:
    for node in SOURCE.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value  # type: ignore[union-attr, return-value]
    raise AssertionError(name)


def test_entry_point_and_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["vllm.general_plugins"] == {"recursify": "recursify_vllm:register"}
    assert "recursify_vllm" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_every_family_is_served_or_refused() -> None:
    names = {model.__name__ for model in FAMILIES.values()}
    assert names == {f"Recursive{family}ForCausalLM" for family in (*recursify_vllm.FAMILIES, *recursify_vllm.REFUSED)}
    served = {key.value for key in constant("DONORS").keys}  # type: ignore[attr-defined]
    assert served == {f"recursive_{family.lower()}" for family in recursify_vllm.FAMILIES} < set(CONFIGS)


def test_the_gains_are_bounded_alike() -> None:
    assert ast.literal_eval(constant("GAIN_SUM")) == GAIN_SUM


def test_nothing_imports_it_and_it_imports_configurations_alone() -> None:
    assert "recursify_vllm.model" not in sys.modules
    for path in (ROOT / "recursify").rglob("*.py"):
        assert "recursify_vllm" not in path.read_text(encoding="utf-8"), path
    imported = {
        node.module
        for path in (ROOT / "recursify_vllm").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("recursify.")
    }
    assert imported == {"recursify.network.configuration_recursive_llm"}


def test_registers_where_vllm_is() -> None:
    pytest.importorskip("vllm", reason="needs vLLM: make test-vllm has an environment with it")
    from vllm import ModelRegistry

    recursify_vllm.register()
    assert "RecursiveQwen2ForCausalLM" in ModelRegistry.get_supported_archs()

"""One small case of `make test-vllm`, where that has made its environment; and what can be told about the plugin without vLLM."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from recursify.network.configuration_recursive_llm import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PLUGIN = ROOT / "recursify_vllm"


def test_vllm_finds_the_plugin_and_nothing_else_imports_it() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nrecursify = "recursify_vllm:register"' in declared
    assert all(
        entry.value == "recursify_vllm:register" for entry in entry_points(group="vllm.general_plugins") if entry.name == "recursify"
    )
    importing = [path for path in (ROOT / "recursify").rglob("*.py") if "recursify_vllm" in path.read_text(encoding="utf-8")]
    assert not importing


def test_every_family_has_layers() -> None:
    tree = ast.parse((PLUGIN / "layers.py").read_text())
    table = next(node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS")
    assert isinstance(table.value, ast.Dict) and {ast.literal_eval(key) for key in table.value.keys if key} == set(CONFIGS)


@pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not here: `make test-vllm` makes an environment for it, and compares all cases")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_case_in_vllm(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "tests.vllm.write", str(tmp_path), "qwen3"], cwd=ROOT, env=environment, check=True)
    read = [str(PYTHON), "tests/vllm/read.py", str(tmp_path / "qwen3"), "--depth", "2,1"]
    done = subprocess.run(read, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "equal, log-probabilities within" in done.stdout

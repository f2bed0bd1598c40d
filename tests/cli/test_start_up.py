"""Help and errors in flags come without torch and transformers; what is registered with transformers, and when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recursify.cli.main import JOBS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib", "pandas", "sklearn", "accelerate", "lm_eval", "fastapi")
SCRIPTS = sorted(file.name for file in ROOT.glob("*.py"))


def imported(*words: str) -> tuple[int, str, set[str]]:
    """Exit status, messages and top-level modules of a process."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, "\n".join(line for line in lines if not line.startswith("import time:")), modules


@pytest.mark.parametrize("command", [[], ["--version"], ["help", "train"], *([job, "--help"] for job in JOBS)], ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    status, errors, modules = imported("-m", "recursify", *command)
    assert (status, errors) == (0, "") and "recursify.cli.main" in modules
    assert not modules.intersection(HEAVY)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_the_scripts_of_the_guides(script: str) -> None:
    status, errors, modules = imported(script, "--help")
    assert (status, errors) == (0, "") and "recursify.cli.main" in modules and not modules.intersection(HEAVY)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --checkpoint x --lr -1", "error: --lr: expected a number above 0, got -1.0"),
        ("train --checkpoint x --approach hybrid", "error: --checkpoint: not used by this approach"),
        ("train --config no.yaml", "error: --config: no.yaml cannot be read"),
        ("generate --checkpoint x --temperature -1", "error: --temperature: expected a number of at least 0"),
        ("evaluate --checkpoint x --cycles 2 2", "error: --cycles: expected whole numbers of at least 0, each once"),
        ("serve --checkpoint x --port 70000", "error: --port: expected 0 to 65535"),
        ("compare a", "error: recursify compare: expected at least two checkpoints"),
        ("nothing", "error: recursify: unknown command 'nothing'; expected one of"),
        ("trian", "error: recursify: unknown command 'trian'; did you mean train?"),
    ],
)
def test_errors_in_flags_import_nothing_heavy(words: str, message: str) -> None:
    status, errors, modules = imported("-m", "recursify", *words.split())
    assert status == 2 and errors.startswith(message)
    assert not modules.intersection(HEAVY)


@pytest.mark.parametrize("first", ["import recursify, transformers", "import transformers, recursify"])
def test_importing_the_package_registers_its_models(first: str) -> None:
    """In a program of the user's, whatever it is called."""
    code = f"{first}; from transformers import AutoConfig; print(AutoConfig.for_model('recursive_qwen2', vocab_size=8).model_type)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "recursive_qwen2\n", done.stderr


def test_a_module_that_imports_the_package_is_no_command(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import recursify, sys\nprint('recursify._registered' in sys.modules)\n")
    (tmp_path / "mine" / "__main__.py").write_text("")
    done = subprocess.run([sys.executable, "-m", "mine"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_name_of_the_package_registers_in_a_command_too(tmp_path: Path) -> None:
    script = tmp_path / "recursify"
    script.write_text(
        "import sys, recursify\nprint('torch' in sys.modules)\nrecursify.load\nprint('recursify._registered' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False\nTrue\n", done.stderr

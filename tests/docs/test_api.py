"""docs/api.md: made from the docstrings, complete, without a warning; and the public names are typed for a strict checker."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import recursify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_page_is_built_without_warnings(tool: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = tool.page()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("griffe")] == []
    assert made == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "`make docs` writes docs/api.md anew"


def test_every_public_name_has_an_entry_with_a_description(tool: Any) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in recursify.__all__:
        assert getattr(recursify, name).__doc__
        (entry,) = [part for part in page.split("\n### ")[1:] if part.startswith(f"`{name}`\n")]
        assert len(entry.split()) > 8


def test_a_public_name_without_a_group_is_an_error(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "GROUPS", {"Conversion": ("convert",)})
    with pytest.raises(ValueError, match=r"expected the names in recursify.__all__, differs in .*'fit'"):
        tool.page()


PROGRAM = """
from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import recursify


def use(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[int]]]) -> float | None:
    model: recursify.RecursiveLLM = recursify.convert("donor", L_layers=4, H_cycles=3, keep_donor=True, dtype=torch.bfloat16)
    done: recursify.FitResult = recursify.fit(model, tokenizer, rows, rows, recursify.FitSettings(lr=1e-4, max_steps=10))
    recursify.save(Path("out"), model, tokenizer)
    found: recursify.Checkpoint = recursify.load("out", H_cycles=5)
    text: recursify.Generated = recursify.generate_text(found.model, tokenizer, "Once", recursify.Sampling(max_new_tokens=5), seed=1)
    trainer = recursify.RecursiveTrainer(model=model, args=recursify.FitSettings(), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    print(text.text, recursify.measure(model, rows, (1, 2))[0].loss)
    return done.eval_loss
"""


@pytest.mark.slow
def test_public_names_pass_mypy_strict_and_misuse_fails(tmp_path: Path) -> None:
    """`mypy --strict` on a program that uses them, and on one that uses four of them wrongly."""
    wrong = PROGRAM
    for right, other in (("H_cycles=3,", 'H_cycles="3",'), ("lr=1e-4", 'lr="fast"'), ("done.eval_loss", "done.loss"), ('"Once", ', "5, ")):
        assert right in PROGRAM
        wrong = wrong.replace(right, other)
    (tmp_path / "right.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--follow-imports=silent", "right.py", "wrong.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)})
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    places = {line.split(" error:")[0] for line in errors}
    assert places == {"wrong.py:13:", "wrong.py:14:", "wrong.py:17:", "wrong.py:21:"}, done.stdout

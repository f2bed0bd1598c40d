"""The package and its benchmarks where only torch, transformers, accelerate and what these bring along are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_THERE = ("datasets", "fastapi", "lm_eval", "pandas", "peft", "pyarrow", "rich", "tyro", "uvicorn")

WITHOUT = f"""
import importlib.util, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {NOT_THERE} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
assert importlib.util.find_spec("datasets") is None
"""

PROGRAM = """
from pathlib import Path

import torch
import recursify.inference.early_exit
from recursify import convert
from recursify.checkpoints import checkpoint
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.evaluation.text_loss import measure
from recursify.inference.generation import generate_text
from recursify.inference.options import Sampling
from recursify.training import TrainSettings, fit

donor, folder = sys.argv[1:]
model, tokenizer = convert(donor, L_layers=2, H_cycles=2, L_cycles=1), load_tokenizer(donor)
rows = [{"input_ids": torch.randint(1, 300, (16,)).tolist()} for _ in range(4)]
settings = TrainSettings(checkpoint="", seq_len=16, batch_size=2, max_steps=2, device="cpu", separate_documents=True)
assert fit(model, tokenizer, rows, rows, settings, console=False).steps == 2
checkpoint.save(Path(folder) / "model.pt", model, tokenizer, None, {})
model = checkpoint.load(Path(folder) / "model.pt").model
assert [row.H_cycles for row in measure(model, rows, (1, 2))] == [1, 2]
assert generate_text(model, tokenizer, "The", Sampling(max_new_tokens=3)).token_ids
print("done")
"""

BENCHMARKS = """
from pathlib import Path

from benchmarks.case import registry

assert not registry().missing, registry().missing
from benchmarks import gpu
from benchmarks.job_queue import Place

place = Place("quick", Path(sys.argv[2]))
jobs = {job.name: job for job in gpu.jobs("quick")}
study = "evidence: state_tracking, "
for name in (f"{study}the donor", f"{study}ours: keep_donor, H 3, L 1, seed 0"):
    assert jobs[name].obstacle(place) is None
    jobs[name].work(place, lambda data: None)
assert "datasets" in jobs["evidence: prose, the donor"].obstacle(place)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [PROGRAM, BENCHMARKS], ids=["the package", "benchmarks"])
def test_only_datasets_and_tables_need_extra_packages(program: str, donor_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT + program, str(donor_folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr

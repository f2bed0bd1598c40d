"""A random donor of the size of Qwen2-0.5B (494 M parameters, vocabulary 151,936) converts in seconds and little memory.

Its tokenizer is of Qwen2's kind and size: 151,643 entries, and three special tokens behind them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from recursify import RecursiveLLM
from recursify.checkpoints import checkpoint
from tests.support.tiny import make_qwen_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 131_072, "tie_word_embeddings": True, "eos_token_id": 151_643,
    "bos_token_id": 151_643, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16",
}  # fmt: skip
# Measured after the imports, which alone take as much memory as the weights.
CONVERT = """
import json, re, sys
from recursify import cli
def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = memory("VmRSS")
cli.convert(sys.argv[1:])
print(json.dumps({"before": before, "peak": memory("VmHWM")}))
"""


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The donor in bfloat16, 988 MB on the disk while the tests of this file run."""
    folder = tmp_path_factory.mktemp("real") / "donor"
    config = Qwen2Config(**SHAPE)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).named_parameters()}
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            count = shape.numel()
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    del tensors
    make_qwen_tokenizer(folder, size=SHAPE["eos_token_id"])
    yield folder
    shutil.rmtree(folder.parent)  # pytest would keep it for three runs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_conversion_time_memory_and_generation_at_real_size(donor: Path) -> None:
    out = donor.parent / "qwen_recursive_init.pt"
    flags = ["--qwen_model", str(donor), "--L_layers", "4", "--H_cycles", "3", "--output_path", str(out), "--json"]
    done = subprocess.run([sys.executable, "-c", CONVERT, *flags], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "✓ Loaded Qwen model: hidden_size=896, num_layers=24, vocab_size=151936" in done.stderr
    assert "✓ Copied 4 transformer layers from indices [0, 8, 16, 23]" in done.stderr
    report, memory = (json.loads(line) for line in done.stdout.splitlines())
    written = out.stat().st_size
    assert report["check"]["plain_difference"] == 0.0 and report["check"]["cycle_differences"] == [0.0] * 3
    assert 2 * report["parameters"]["total"] < written < 2.01 * report["parameters"]["total"]
    assert memory["peak"] - memory["before"] < 1.5 * written
    assert report["seconds"] < 60

    found = checkpoint.load(out)
    assert isinstance(found.model, RecursiveLLM) and found.model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in found.model.parameters()) == report["parameters"]["total"]
    assert found.tokenizer.eos_token_id == SHAPE["eos_token_id"] and len(found.tokenizer) == 151_646
    prompt = found.tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        text = found.model.generate(**prompt, H_cycles=2, max_new_tokens=4, do_sample=False)
    assert text.shape == (1, prompt["input_ids"].shape[1] + 4) or text[0, -1] == SHAPE["eos_token_id"]

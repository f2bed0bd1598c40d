"""Folders of small recursive models, and what they write: python -m tests.vllm.write OUT, in recursify's own environment.

Every folder has `expected.json`: for every depth the greedy continuation and the log-probabilities of its tokens, of prompts of 1 to 300
tokens, in float32, without a cache of vLLM's. read.py compares a vLLM with them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from recursify import RecursiveLLM, convert
from recursify.network.configuration_recursive_llm import from_donor
from tests.support.tiny import make_tiny_tokenizer, tiny_config

LENGTHS = (1, 2, 3, 5, 7, 16, 17, 31, 40, 63, 64, 100, 128, 200, 255, 300)
NEW = 64
# head size 32: what vLLM's attention on a CPU wants
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-whole": ("qwen2", {"prelude_layers": 1, "L_layers": 2, "coda_layers": 1, "H_cycles": 3, "L_cycles": 1}),
    "qwen2-compact": ("qwen2", {"L_layers": 2, "H_cycles": 2, "L_cycles": 0}),
    "qwen3-whole": ("qwen3", {"prelude_layers": 1, "L_layers": 1, "coda_layers": 2, "H_cycles": 2, "L_cycles": 1}),
    "llama-whole": ("llama", {"prelude_layers": 2, "L_layers": 2, "H_cycles": 2, "L_cycles": 0}),
    "llama-sum_norm": ("llama", {"L_layers": 2, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1, "injection": "sum_norm"}),
    "mistral-whole": ("mistral", {"prelude_layers": 1, "L_layers": 2, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1}),
    "phi3-whole": ("phi3", {"prelude_layers": 1, "L_layers": 2, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1}),
}


def model_of(name: str) -> Any:
    """Random, with gains and states that matter."""
    family, shape = CASES[name]
    layers = sum(shape.get(part, 0) for part in ("prelude_layers", "L_layers", "coda_layers"))
    torch.manual_seed(len(name))
    gains = {} if shape.get("injection") == "sum_norm" else {"gain_init": 0.3}
    donor = tiny_config(family, num_hidden_layers=layers, **WIDE, **({"sliding_window": 48} if family == "mistral" else {}))
    model: Any = RecursiveLLM(from_donor(donor, list(range(layers)), state_init_std=0.5, **gains, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.1 if gains else 1.0)  # logits that differ, and yet do not multiply what float32 rounds
    return model.eval()


def write(folder: Path, model: Any, tokenizer: Any, depths: tuple[int, ...], lengths: tuple[int, ...] = LENGTHS) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    prompts = [torch.randint(5, min(300, model.config.vocab_size), (length,)).tolist() for length in lengths]
    expected = {str(depth): [continuation(model, prompt, depth) for prompt in prompts] for depth in depths}
    (folder / "expected.json").write_text(json.dumps({"prompts": prompts, "new": NEW, "expected": expected}))
    print(folder, flush=True)


@torch.no_grad()
def continuation(model: Any, prompt: list[int], depth: int) -> dict[str, Any]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, H_cycles=depth, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, eos_token_id=None)
    chosen = out[0, len(prompt) :]
    logits = model(out, H_cycles=depth, use_cache=False).logits[0, len(prompt) - 1 : -1]
    found = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    margin = logits.topk(2).values
    return {"ids": chosen.tolist(), "logprobs": found.tolist(), "margins": (margin[:, 0] - margin[:, 1]).tolist()}


def main(out: Path) -> None:
    for name in CASES:
        write(out / name, model_of(name), make_tiny_tokenizer(), (0, 1, 2, 3))
    if donor := os.environ.get("RECURSIFY_SMOLLM2"):
        from transformers import AutoTokenizer

        real: Any = convert(donor, keep_donor=True, L_layers=4, L_cycles=1, H_cycles=2, gain=0.2, dtype=torch.float32).eval()
        write(out / "smollm2", real, AutoTokenizer.from_pretrained(donor), (0, 2), (1, 9, 120))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

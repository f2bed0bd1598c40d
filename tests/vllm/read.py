"""Compares vLLM with what write.py wrote: python tests/vllm/read.py FOLDER..., in an environment with vLLM and this package's plugin.

Greedy texts must be equal token by token, 16 requests at once, prompts in chunks of 64 tokens, prefixes cached; log-probabilities within
1e-4.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
TOLERANCE = 1e-4


def check(folder: Path, depth: str, options: dict[str, Any]) -> str:
    """One line on a folder at a depth.

    Raises:
        AssertionError: Other tokens or log-probabilities.
    """
    from vllm import LLM, SamplingParams

    told = json.loads((folder / "expected.json").read_text())
    llm = LLM(
        model=str(folder), dtype="float32", hf_overrides={"H_cycles": int(depth)}, skip_tokenizer_init=True, max_model_len=512,
        max_num_seqs=16, max_num_batched_tokens=64, enable_chunked_prefill=True, enable_prefix_caching=True, **options,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=told["new"], ignore_eos=True, logprobs=0, detokenize=False)
    worst = 0.0
    for turn in range(2):  # the second time from the cache of prefixes
        found = llm.generate([{"prompt_token_ids": ids} for ids in told["prompts"]], sampling, use_tqdm=False)
        for number, (each, expected) in enumerate(zip(found, told["expected"][depth], strict=True)):
            ids = list(each.outputs[0].token_ids)
            where = f"{folder.name}, H {depth}, turn {turn}, prompt {number} of {len(told['prompts'][number])} tokens"
            first = next((n for n, (a, b) in enumerate(zip(ids, expected["ids"], strict=True)) if a != b), None)
            assert first is None, f"{where}: another token at {first}, where the best two are {expected['margins'][first or 0]:.2g} apart"
            logprobs = [step[token].logprob for step, token in zip(each.outputs[0].logprobs, ids, strict=True)]
            worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, expected["logprobs"], strict=True)))
    assert worst <= TOLERANCE, f"{folder.name}, H {depth}: log-probabilities are {worst:.2g} apart"
    return f"{folder.name:<16} H {depth}  {len(told['prompts'])} prompts twice, equal; log-probabilities within {worst:.1e}"


def main(folders: list[Path]) -> None:
    eager = os.environ.get("RECURSIFY_VLLM_COMPILE") != "1"
    for folder in folders:
        for depth in json.loads((folder / "expected.json").read_text())["expected"]:
            print(check(folder, depth, {"enforce_eager": eager}), flush=True)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])

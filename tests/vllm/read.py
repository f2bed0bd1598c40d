"""Serve what write.py wrote by vLLM, and compare: python tests/vllm/read.py FOLDER..., with vLLM and this package installed.

16 requests at once, prompts in chunks of 64 tokens, prefixes cached: every request comes twice, the second time after its prefix. Greedy
texts must be equal token by token, log-probabilities within 1e-4. The faults of MUTANTS must be noticed: `--mutant NAME` expects a
difference. `--compile` has vLLM compile the model, as it does by default, and `--tensor_parallel 2` divides it.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
TOLERANCE = 1e-4  # of log-probabilities in nats, in float32: sums run in another order


def one_slot_per_layer() -> None:
    """Every application of a layer uses the slot of its first, as caches do that count layers and not applications."""
    from recursify_vllm import model

    made: dict[Any, Any] = {}
    view = model.view
    model.view = lambda layer, attention, updates: view(layer, made.setdefault(id(layer), attention), updates)


def loop_before_coda() -> None:
    """The slots in another order than that of recursify: prelude, loop, coda."""
    from recursify_vllm import model

    order = model.slot_order

    def other(config: Any) -> list[tuple[int, int]]:
        slots, P, C = order(config), config.prelude_layers, config.coda_layers
        return slots[:P] + slots[P + C :] + slots[P : P + C]

    model.slot_order = other


MUTANTS: dict[str, Callable[[], None]] = {"one_slot_per_layer": one_slot_per_layer, "loop_before_coda": loop_before_coda}


def differences(folder: Path, told: dict[str, Any], run: dict[str, Any], options: dict[str, Any]) -> tuple[list[str], float, int]:
    """What differs in words, the largest difference of log-probabilities in nats, and how many tokens of prompts came from the cache."""
    from vllm import LLM, SamplingParams

    tokens = 64 if "speculative_config" not in options else 128  # 16 sequences with drafts of 4 are more than 64
    llm = LLM(
        model=str(folder), dtype="float32", hf_overrides={name: run[name] for name in ("H_cycles", "L_cycles")}, max_model_len=512,
        max_num_seqs=16, max_num_batched_tokens=tokens, enable_chunked_prefill=True, enable_prefix_caching=True, disable_log_stats=True,
        block_size=32, **options,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=told["new"], ignore_eos=True, logprobs=0, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in told["prompts"]]
    wrong, worst, cached = [], 0.0, 0
    for turn in (1, 2):
        for each, prompt, expected in zip(llm.generate(prompts, sampling, use_tqdm=False), told["prompts"], run["texts"], strict=True):
            ids, cached = list(each.outputs[0].token_ids), cached + (each.num_cached_tokens or 0)
            first = next((n for n, (a, b) in enumerate(zip(ids, expected["ids"], strict=True)) if a != b), None)
            if first is not None:
                lead = expected["lead"][first]
                wrong.append(f"turn {turn}, prompt of {len(prompt)}: token {first} is another one ({lead:.2g} nats ahead of the second)")
            same = slice(first)
            logprobs = [step[token].logprob for step, token in zip(each.outputs[0].logprobs[same], ids[same], strict=True)]
            worst = max([worst, *(abs(a - b) for a, b in zip(logprobs, expected["logprobs"][same], strict=True))])
    if worst > TOLERANCE:
        wrong.append(f"log-probabilities {worst:.2g} apart")
    del llm
    gc.collect()
    return wrong, worst, cached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--depth", help="one depth alone, such as 3,1 for H_cycles, L_cycles")
    parser.add_argument("--mutant", choices=MUTANTS)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tensor_parallel", type=int, default=1)
    parser.add_argument("--draft", help="a plain model that drafts four tokens at a time, such as recursify export --donor writes")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if given.mutant:
        MUTANTS[given.mutant]()
    options: dict[str, Any] = {"enforce_eager": not given.compile, "tensor_parallel_size": given.tensor_parallel}
    if given.draft:
        options["speculative_config"] = {"method": "draft_model", "model": given.draft, "num_speculative_tokens": 4}
    failed = 0
    for folder in (path for path in given.folders if (path / "expected.json").is_file()):
        told = json.loads((folder / "expected.json").read_text())
        for run in told["runs"]:
            if given.depth in (None, f"{run['H_cycles']},{run['L_cycles']}"):
                wrong, worst, cached = differences(folder, told, run, options)
                where = f"{folder.name:<22} H {run['H_cycles']} L {run['L_cycles']}"
                failed += bool(wrong)
                what = f"DIFFERS: {len(wrong)} times; {wrong[0]}" if wrong else f"equal, log-probabilities within {worst:.1e}"
                print(f"{where}  {len(told['prompts'])} prompts twice, {cached} tokens from the cache: {what}", flush=True)
    print("failed" if failed else "passed")
    return int(bool(failed) != bool(given.mutant))


if __name__ == "__main__":
    sys.exit(main())

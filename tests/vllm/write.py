"""Write small recursive models and the text that each must write: python -m tests.vllm.write FOLDER [CASE...], with recursify installed.

Each case is a folder that vLLM serves, with `expected.json`: for each depth, greedy texts of prompts of 1 to 300 tokens, in float32, by
`generate`. Their log-probabilities are those of passes without any cache, so a fault of a cache cannot be on both sides.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recursify import as_adapter, convert
from recursify.checkpoints import checkpoint
from tests.support.tiny import make_tiny_tokenizer, tiny_donor

LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 40, 63, 64, 100, 129, 200, 255, 300)
NEW = 64
# Heads of 32, the least that vLLM's attention on a CPU has; weights so small that rounding does not grow from cycle to cycle.
WIDTHS: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "initializer_range": 0.08,
}  # fmt: skip
WHOLE: dict[str, Any] = {"keep_donor": True, "L_layers": 2}  # prelude, loop and coda
ALL = [(H, L) for H in range(4) for L in (0, 1)]
SOME = [(0, 1), (3, 1)]


@dataclass(frozen=True)
class Case:
    """A model, and the depths (H_cycles, L_cycles) to serve it at.

    Args:
        shape: Of `convert`.
        donor: Fields of the donor.
        lora: Of `as_adapter`; None for a model that is none.
        alone: Of an adapter: its own folder, beside its donor, instead of a whole one.
    """

    family: str
    shape: dict[str, Any]
    depths: Iterable[tuple[int, int]] = tuple(SOME)
    donor: Any = ()
    lora: dict[str, Any] | None = None
    alone: bool = False


WINDOW = ("sliding_window", 48)
CASES = {
    "qwen2": Case("qwen2", WHOLE, ALL),  # tied head, biases
    "qwen2-compact": Case("qwen2", {"L_layers": 2}, ALL),
    "qwen3": Case("qwen3", WHOLE, ALL),
    "qwen3-compact": Case("qwen3", {"L_layers": 2}, ALL),
    "llama": Case("llama", WHOLE, ALL),  # untied head
    "llama-compact": Case("llama", {"L_layers": 2}, ALL),
    "llama-sum_norm": Case("llama", WHOLE | {"injection": "sum_norm"}),
    "mistral": Case("mistral", WHOLE, donor=(WINDOW,)),
    "smollm3": Case("smollm3", WHOLE, donor=(WINDOW,)),  # a layer without rotary embedding and with a window
    "olmo2": Case("olmo2", WHOLE),
    "phi3": Case("phi3", WHOLE),
    "qwen3-adapter": Case("qwen3", WHOLE, [(0, 1), (1, 1), (3, 1), (2, 2)], lora={"lora_rank": 2, "lora_per": "cycle"}),
    "qwen2-adapter-alone": Case("qwen2", WHOLE, lora={"lora_rank": 2}, alone=True),
    "phi3-adapter": Case("phi3", WHOLE, lora={"lora_rank": 2}),
    "llama-adapter-mlp": Case("llama", WHOLE, lora={"lora_rank": 2, "lora_targets": "mlp"}),
}


def make(case: Case, folder: Path) -> None:
    """Write the folder of a case, by the code that every command saves with."""
    donor = folder.with_name(f"{folder.name}-donor")
    tiny_donor(case.family, donor, **WIDTHS | dict(case.donor))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = convert(str(donor), H_cycles=3, L_cycles=1, **case.shape)
        if case.lora is not None:
            model = as_adapter(model, **case.lora)
        with torch.no_grad():  # gains, states and updates that matter
            for name, parameter in model.model.recursion.named_parameters():
                if "theta" in name:
                    parameter.copy_(0.6 * torch.rand_like(parameter) - 0.1)
                elif name.endswith(".B"):
                    parameter.normal_(std=0.03)
                elif name.endswith("_init"):
                    parameter.normal_(std=0.5)
    checkpoint.save(folder, model, make_tiny_tokenizer(), whole=not case.alone)


def make_real(donor: str, folder: Path) -> None:
    """The real donor of `python -m recipes.donors smollm2`, converted, with gains and states that matter, in float32."""
    model = convert(donor, keep_donor=True, L_layers=4, H_cycles=2, L_cycles=1, gain=0.2).float()
    with torch.no_grad():
        for name in ("H_init", "L_init"):
            getattr(model.model.recursion, name).normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    checkpoint.save(folder, model, checkpoint.load_tokenizer(donor))


@torch.no_grad()
def expected(model: Any, prompts: list[list[int]], H: int, L: int) -> list[dict[str, Any]]:
    """For each prompt the greedy continuation, the log-probabilities of its tokens in nats, and how far ahead of the second each was."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    depth = {"H_cycles": H, "L_cycles": L}
    written = model.generate(
        ids, attention_mask=mask, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **depth
    )
    found = []
    for prompt, row in zip(prompts, written[:, longest:], strict=True):
        whole = torch.tensor([prompt + row.tolist()])
        logprobs = model(whole, use_cache=False, **depth).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        best = logprobs.topk(2)
        lead = (best.values[:, 0] - best.values[:, 1]).tolist()
        same = [first == token for first, token in zip(best.indices[:, 0].tolist(), row.tolist(), strict=True)]
        assert all(equal or ahead < 1e-5 for equal, ahead in zip(same, lead, strict=True)), "generate and an uncached pass disagree"
        chosen = logprobs.gather(1, row[:, None])[:, 0]
        found.append({"ids": row.tolist(), "logprobs": chosen.tolist(), "lead": lead})
    return found


def write(folder: Path, make_folder: Any, depths: Iterable[tuple[int, int]], lengths: Iterable[int]) -> None:
    """Make a folder, and write what the model in it says."""
    make_folder(folder)
    model: Any = checkpoint.load(folder).model
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 300, (length,), generator=draw).tolist() for length in lengths]
    runs = [{"H_cycles": H, "L_cycles": L, "texts": expected(model, prompts, H, L)} for H, L in depths]
    (folder / "expected.json").write_text(json.dumps({"prompts": prompts, "new": NEW, "runs": runs}))
    print(f"wrote {folder}", flush=True)


def main(out: Path, names: list[str]) -> None:
    for name in names or CASES:
        if name in CASES:
            write(out / name, partial(make, CASES[name]), CASES[name].depths, LENGTHS)
    if (donor := os.environ.get("RECURSIFY_SMOLLM2")) and (not names or "smollm2" in names):
        write(out / "smollm2", partial(make_real, donor), [(0, 1), (2, 1)], (1, 9, 40, 120, 300))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

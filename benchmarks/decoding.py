"""Decoding throughput beside the donor's: by depth, batch, context, cache policy."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from recursify import RecursiveLLM, convert
from recursify.checkpoints.donor import open_donor
from recursify.network.decoding_recursive_llm import RecursiveCache

from .case import Bench, Check, Table, case
from .ceilings import ceilings
from .measure import alternate, ratio, say
from .models import HALF_B, SHIPPED, TOY, build, recursive_config, tokens

DEPTH_BOUND, CONTEXT_BOUND = 0.9, 1.5
MS, GB = 1e3, 1e9


@dataclass(frozen=True)
class Writer:
    """A model and how it decodes.

    Args:
        how: Arguments of a pass.
    """

    name: str
    model: Any
    how: dict[str, Any]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def applications(self) -> int:
        """Of layers, for one token."""
        return int(self.config.depth()) if isinstance(self.model, RecursiveLLM) else int(self.config.num_hidden_layers)

    def cache(self, rows: int, context: int) -> Any:
        """A KV cache of a given length with arbitrary contents."""
        own = isinstance(self.model, RecursiveLLM)
        past: Any = RecursiveCache(self.config, **self.how) if own else DynamicCache(config=self.config)
        shape = rows, self.config.num_key_value_heads, context, self.config.hidden_size // self.config.num_attention_heads
        for slot in range(len(past.layers)):
            keys, values = (torch.randn(shape, device=self.model.device, dtype=self.model.dtype) for _ in range(2))
            past.update(keys, values, slot)
        return past

    def work(self, rows: int, context: int) -> tuple[float, float]:
        """FLOPs of one token of each row, and bytes that must be read for it: weights once per application, keys and values."""
        base, size = self.model.base_model, self.model.dtype.itemsize
        layers = sum(p.numel() for p in base.layers.parameters()) / len(base.layers) * self.applications
        head = self.model.lm_head.weight.numel()
        attended = 2 * context * self.applications
        widths = self.config.hidden_size, self.config.hidden_size * self.config.num_key_value_heads / self.config.num_attention_heads
        return rows * (2 * (layers + head) + 2 * attended * widths[0]), size * (layers + head + rows * attended * widths[1])


def writers(bench: Bench) -> list[Writer]:
    plain = bench.pick(TOY, HALF_B, HALF_B).config()
    loop = {"L_layers": min(4, plain.num_hidden_layers - 2)}
    made = partial(build, device=bench.device, dtype=bench.dtype)
    compact = made(recursive_config(plain, **loop)).eval()
    return [
        Writer("donor", made(plain).eval(), {}),
        Writer("compact, H 3, L 3", compact, {}),
        Writer("compact, H 3, L 3, --cache_policy last", compact, {"cache_policy": "last"}),
        Writer("keep_donor, H 3, L 1", made(recursive_config(plain, keep_donor=True, L_cycles=1, **loop)).eval(), {}),
    ]


# One token


@torch.no_grad()
def one_token(all_of_them: list[Writer], rows: int, context: int, bench: Bench) -> list[dict[str, Any]]:
    """Decode step: one token of each row, after a given context."""
    say(f"decoding: {rows} rows at context {context}")
    token = tokens(all_of_them[0].config, rows, 1, bench.device)
    sides: dict[str, Callable[[], Any]] = {}
    for one in all_of_them:
        sides[one.name] = partial(one.model, token, past_key_values=one.cache(rows, context), use_cache=True, **one.how)
    sides["attention"] = _attention(all_of_them[0], rows, context)
    times = alternate(sides, bench.pick(1, 3, 20), bench.device)
    donor, *_ = all_of_them
    attention = statistics.median(times["attention"])
    found = []
    for one in all_of_them:
        took = statistics.median(times[one.name])
        row = {"rows": rows, "context": context, "model": one.name, "applications": one.applications, "ms": MS * took}
        row |= {"tokens/s": rows / took, "of it attention's own, ms": MS * attention * one.applications}
        if one is not donor:
            row["speed x applications / donor"] = ratio(times["donor"], times[one.name], by=donor.applications / one.applications)
        top, (flops, moved) = ceilings(bench.device, bench.dtype), one.work(rows, context)
        if bench.on_gpu:
            row |= {"GB to read": moved / GB, "of the bandwidth": moved / top.bytes / took}
        row["limit"] = top.limit(took, flops, moved)
        found.append(row)
    return found


def _attention(one: Writer, rows: int, context: int) -> Callable[[], Any]:
    """Attention alone over keys and values of one slot, which reads them and little else."""
    heads, kv, size = (
        one.config.num_attention_heads,
        one.config.num_key_value_heads,
        one.config.hidden_size // one.config.num_attention_heads,
    )
    make = partial(torch.randn, device=one.model.device, dtype=one.model.dtype)
    q, k, v = make(rows, heads, 1, size), make(rows, kv, context + 1, size), make(rows, kv, context + 1, size)
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# A prompt


@torch.no_grad()
def a_prompt(all_of_them: list[Writer], rows: int, length: int, bench: Bench) -> list[dict[str, Any]]:
    """Prefill: a whole prompt into an empty cache; the head reads its last token."""
    say(f"decoding: a prompt of {rows} x {length}")
    prompt = tokens(all_of_them[0].config, rows, length, bench.device)
    sides = {one.name: partial(one.model, prompt, use_cache=True, logits_to_keep=1, **one.how) for one in all_of_them}
    times = alternate(sides, bench.pick(1, 2, 10), bench.device)
    donor, *_ = all_of_them
    found = []
    for one in all_of_them:
        took = statistics.median(times[one.name])
        row = {"prompt": f"{rows} x {length}", "model": one.name, "seconds": took, "tokens/s": rows * length / took}
        if one is not donor:
            row["speed x applications / donor"] = ratio(times["donor"], times[one.name], by=donor.applications / one.applications)
        flops, moved = one.work(1, length // 2)
        row["limit"] = ceilings(bench.device, bench.dtype).limit(
            took, rows * length * (flops - 2 * one.model.lm_head.weight.numel()), moved
        )
        found.append(row)
    return found


# A text


def write(model: Any, prompt: torch.Tensor, new: int, **kwargs: Any) -> Any:
    """A `generate` of an exact number of tokens, greedy by default."""
    model.generation_config.eos_token_id = None  # no end token, so no processor is needed
    given = {"do_sample": False, "max_new_tokens": new, "attention_mask": torch.ones_like(prompt)} | kwargs
    return model.generate(prompt, return_dict_in_generate=True, pad_token_id=0, **given)


def texts(name: str, donor: Any, model: Any, new: int, bench: Bench, depths: tuple[int, ...] = (1, 3), **how: Any) -> list[dict[str, Any]]:
    """`generate` as it is used, beside the donor's."""
    prompt, found = tokens(model.config, 1, 16, bench.device), []
    sides: dict[str, Callable[[], Any]] = {"donor": partial(write, donor, prompt, new, **how)}
    sides |= {f"H {H}": partial(write, model, prompt, new, H_cycles=H, **how) for H in depths}
    say(f"decoding: texts of {name}")
    times = alternate(sides, bench.pick(1, 3, 7), bench.device)
    layers = donor.config.num_hidden_layers
    for H in depths:
        share = ratio(times["donor"], times[f"H {H}"], by=layers / model.config.depth(H))
        found.append(
            {
                "model": name,
                "H": H,
                "applications": f"{model.config.depth(H)}, donor's {layers}",
                "tokens/s": new / statistics.median(times[f"H {H}"]),
                "donor's tokens/s": new / statistics.median(times["donor"]),
                "speed x applications / donor": share,
                "limit": "as a pass of one token, and transformers' loop around it",
            }
        )
    return found


def shipped(device: torch.device) -> tuple[Any, Any]:
    """The bundled donor, and the recursive model that the demo makes of it."""
    donor = open_donor(SHIPPED).load(dtype=torch.float32).eval().to(device)
    model = convert(SHIPPED, keep_donor=True, L_layers=2, H_cycles=3, L_cycles=1, gain=0.2).float().eval().to(device)
    return donor, model


@case("decoding", "Writing")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """Random weights in the shape of Qwen2-0.5B, all layers; float32 on a CPU, bfloat16 on a GPU. "speed x applications / donor" is tokens
    per second over the donor's, times the ratio of layer applications per token: 1 where a recursive model pays for its applications
    and for nothing else. One token: a pass behind a cache that holds so many tokens. Attention's own time is that of its kernel alone
    over keys and values of that length, times the applications; in the bound on context it is subtracted. Texts: `generate` as it is
    used; the static cache, which transformers compiles on a GPU, has a case of its own.
    """
    all_of_them = writers(bench)
    points = bench.pick(
        [(1, 8), (1, 64), (2, 8)],
        [(1, 128), (1, 1024), (1, 8192), (8, 128), (64, 128)],
        [(batch, context) for batch in (1, 8, 64) for context in (128, 4096)],
    )
    rows = [row for batch, context in points for row in one_token(all_of_them, batch, context, bench)]
    yield Table("One token", rows)
    for row in rows:
        if "speed x applications / donor" in row and (row["context"] == points[0][1]):
            what = f"{row['rows']} rows at context {row['context']}, {row['model']}: speed x applications / donor"
            yield Check(what, row["speed x applications / donor"]["median"], least=DEPTH_BOUND)
    yield from _context(rows, bench)
    prompts = bench.pick([(1, 16)], [(1, 128)], [(1, 128), (1, 4096), (8, 1024)])
    yield Table("A prompt", [row for batch, length in prompts for row in a_prompt(all_of_them, batch, length, bench)])
    donor, keep = all_of_them[0].model, all_of_them[-1].model
    found = texts("random, Qwen2-0.5B", donor, keep, bench.pick(4, 8, 64), bench)
    del all_of_them, donor, keep
    gc.collect()
    found += texts("the one that ships", *shipped(bench.device), bench.pick(4, 64, 64), bench)
    yield Table("A text", found)
    for row in found:
        yield Check(
            f"a text, {row['model']}, H {row['H']}: speed x applications / donor",
            row["speed x applications / donor"]["median"],
            least=DEPTH_BOUND,
        )


def _context(rows: list[dict[str, Any]], bench: Bench) -> Iterator[Check]:
    """Cost of a long context beyond reading its KV cache."""
    least, most = min(row["context"] for row in rows), max(row["context"] for row in rows if row["rows"] == 1)
    for model in dict.fromkeys(row["model"] for row in rows):
        rest = {r["context"]: r["ms"] - r["of it attention's own, ms"] for r in rows if r["model"] == model and r["rows"] == 1}
        what = f"{model}: a token at {most} over one at {least}, attention's own reads subtracted"
        yield Check(what, rest[most] / rest[least], most=CONTEXT_BOUND, must=model != "donor")

"""Whether conversion, decoding and serving pass on a GPU what the tests check on a CPU: small checks of the bundled model."""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

from recursify import convert
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.inference.generation import generate_batch, generate_text
from recursify.inference.options import Sampling

from .case import Bench, Check, Table, case
from .decoding import write
from .decoding_static import captured, compiled
from .models import SHIPPED, tokens
from .named_checks import Named, Skip, outcomes
from .speculation_and_early_exit import rough

SHAPE: dict[str, Any] = {"keep_donor": True, "L_layers": 2, "H_cycles": 3, "L_cycles": 1}
PROMPTS = ("The old man", "It was a dark night, and the captain of the ship", "She", "In the morning the children went to")
NEW = 24  # tokens
CLOSE = 1e-4  # of the largest logit: other kernels add float32 in another order
CLOSE_BF16 = 0.05  # of the norm of all logits


def shipped(bench: Bench, gain: float = 0.2, dtype: torch.dtype = torch.float32, donor: str = SHIPPED) -> Any:
    """The bundled donor, made recursive, or another one in a folder; the same every time."""
    torch.manual_seed(0)
    return convert(donor, **SHAPE, gain=gain, dtype=dtype, device=bench.device).eval()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def same_text(found: torch.Tensor, expected: torch.Tensor) -> str:
    different = int((found != expected).sum()) if found.shape == expected.shape else -1
    assert different == 0, f"expected the same tokens, got {found.tolist()} for {expected.tolist()}"
    return f"{expected.shape[0]} x {expected.shape[1]} tokens are the same"


# Conversion


@torch.no_grad()
def exact(bench: Bench, dtype: torch.dtype, folder: str = SHIPPED) -> str:
    """With gains 0 every readout is the donor's, bit for bit."""
    donor: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    donor.to(bench.device).eval()
    model = shipped(bench, gain=0.0, dtype=dtype, donor=folder)
    ids = tokens(donor.config, 2, 48, bench.device)
    expected = donor(ids).logits
    readouts = {0: model(ids, H_cycles=0).logits} | dict(enumerate(model(ids, output_cycle_logits=True).cycle_logits, start=1))
    assert len(readouts) == 4
    wrong = {H: apart(logits, expected) for H, logits in readouts.items() if not torch.equal(logits, expected)}
    assert not wrong, f"cycles differ from the donor's logits, of the largest by: {wrong}"
    return "cycles 0 to 3 equal the donor bit for bit"


# Decoding


@torch.no_grad()
def cached(bench: Bench) -> str:
    model = rough(bench.device, torch.float32)
    ids = tokens(model.config, 3, 24, bench.device)
    whole, past, pieces = model(ids, use_cache=False).logits, None, []
    for piece in (ids[:, :10], *ids[:, 10:].split(1, dim=1)):
        output = model(piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        pieces.append(output.logits)
    off = apart(torch.cat(pieces, dim=1), whole)
    assert off < CLOSE, f"cached logits differ by {off:.2g} of the largest"
    return f"logits within {off:.1g} of the largest; {same_text(*(_text(model, use_cache=cache) for cache in (False, True)))}"


def _text(model: Any, rows: int = 4, **how: Any) -> torch.Tensor:
    found: torch.Tensor = write(model, tokens(model.config, rows, 12, model.device), NEW, **how).sequences
    return found


def speculation(bench: Bench) -> str:
    model = rough(bench.device, torch.float32)
    plain = _text(model)
    for k in (0, 1, 2):
        same_text(_text(model, draft_cycles=k), plain)
    return f"drafts of 0, 1 and 2 cycles: {same_text(_text(model, rows=1, draft_cycles=1), _text(model, rows=1))}"


def early_exit(bench: Bench) -> str:
    """One that never halts is full depth; one that always does is the first cycle that it may halt at."""
    model = rough(bench.device, torch.float32)
    plain, outcomes = _text(model), []
    for criterion, never, always in (("q_head", 1.0, 0.0), ("kl", 0.0, float("inf")), ("entropy", 0.0, float("inf"))):
        same_text(_text(model, halt=criterion, halt_threshold=never), plain)
        x = tokens(model.config, 2, 12, bench.device)
        with torch.no_grad():
            used = model(x, halt=criterion, halt_threshold=always).halt_cycles
        assert int(used.max()) < model.config.H_cycles, f"{criterion} at {always}: halts at {used.unique().tolist()}"
        outcomes.append(f"{criterion} halts at {used.unique().tolist()}")
    return f"never halting is full depth; {', '.join(outcomes)} of {model.config.H_cycles}"


@torch.no_grad()
def static_graph(bench: Bench) -> str:
    """Of few layers: what compiles takes longest."""
    model = rough(bench.device, torch.float32, layers=3, L_layers=1, H_cycles=2)
    prompt, new = tokens(model.config, 2, 8, bench.device), tokens(model.config, 2, 6, bench.device, seed=1)
    torch._dynamo.reset()
    run, before = compiled(model), captured()
    pasts = [StaticCache(config=model.config.at_depth(), max_cache_len=16) for _ in range(2)]
    for past in pasts:
        model(prompt, past_key_values=past)
    worst = 0.0
    for token in new.split(1, dim=1):
        graph, eager = (call(token, past_key_values=past).logits for call, past in zip((run, model), pasts, strict=True))
        worst = max(worst, apart(graph, eager))
    made = captured() - before
    assert made == 1, f"expected one graph, got {made}"
    assert worst < CLOSE, f"compiled logits differ by {worst:.2g} of the largest"
    return f"one graph, logits within {worst:.1g}; generate: {same_text(_text(model, cache_implementation='static'), _text(model))}"


@torch.no_grad()
def kernel(bench: Bench, name: str, package: str | None, dtype: torch.dtype) -> str:
    """Beside eager attention."""
    if package is not None and (importlib.util.find_spec(package) is None or not bench.on_gpu):
        raise Skip(f"{package} is not here, or no GPU")
    model = shipped(bench, dtype=dtype)
    ids = tokens(model.config, 2, 64, bench.device)
    logits = []
    for one in ("eager", name):
        model.set_attn_implementation(one)
        logits.append(model(ids).logits.float())
    off = apart(logits[1], logits[0]) if dtype == torch.float32 else float((logits[1] - logits[0]).norm() / logits[0].norm())
    bound = CLOSE if dtype == torch.float32 else CLOSE_BF16
    assert off < bound, f"{name} differs from eager by {off:.2g}, more than {bound}"
    return f"within {off:.1g} of eager, {str(dtype).removeprefix('torch.')}"


def uneven_batch(bench: Bench) -> str:
    model, tokenizer, sampling = shipped(bench), load_tokenizer(SHIPPED), Sampling(max_new_tokens=NEW, temperature=0.0)
    together = [one.token_ids for one in generate_batch(model, tokenizer, PROMPTS, sampling)]
    alone = [generate_text(model, tokenizer, prompt, sampling).token_ids for prompt in PROMPTS]
    assert together == alone, f"expected each text as alone, got {together} for {alone}"
    return f"{len(PROMPTS)} prompts of {', '.join(str(len(tokenizer(p)['input_ids'])) for p in PROMPTS)} tokens, each as alone"


# Where the weights are


@torch.no_grad()
def split_weights(bench: Bench) -> str:
    """Layers with an even number lie elsewhere until they are called: in the CPU's memory for a GPU, on disk for a CPU."""
    home, away = (0, "cpu") if bench.on_gpu else ("cpu", "disk")
    with tempfile.TemporaryDirectory() as folder:
        whole = shipped(bench)
        whole.save_pretrained(Path(folder) / "model")
        rest = ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.recursion")
        places = dict.fromkeys(rest, home) | {f"model.layers.{i}": home if i % 2 else away for i in range(whole.config.physical_layers)}
        model: Any = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, device_map=places, offload_folder=str(Path(folder) / "offload")
        ).eval()
        assert any(parameter.is_meta for parameter in model.parameters()), "expected weights elsewhere, got all in one place"
        ids = tokens(whole.config, 2, 24, bench.device)
        off = apart(model(ids).logits, whole(ids).logits)
        assert off < CLOSE, f"logits differ by {off:.2g} of the largest"
        outcome = same_text(_text(model, rows=1), _text(whole, rows=1))
    return f"half of the layers on {away}: logits within {off:.1g} of the largest, {outcome}"


# Serving


def engine(bench: Bench) -> str:
    """Two depths answer as `generate` does."""
    try:
        from recursify.serving.engine import Engine, Job
        from recursify.serving.sampling import Choice
    except ImportError as error:
        raise Skip(str(error)) from error
    model = shipped(bench)
    prompts = [tokens(model.config, 1, length, bench.device, seed=length) for length in (5, 11)]
    expected = {H: [write(model, prompt, 8, H_cycles=H).sequences[0, prompt.shape[1] :].tolist() for prompt in prompts] for H in (1, 3)}
    served = Engine(model, [], (1, 3), max_queue=8, cache_tokens=512, batch_tokens=64, max_running=4)
    try:
        for H in (1, 3):
            found = asyncio.run(_answers(served, H, [Job(prompt[0].tolist(), 8, Choice()) for prompt in prompts]))
            assert found == expected[H], f"{H} cycles: expected {expected[H]}, got {found}"
    finally:
        served.stop()
    return "two texts at 1 and 3 cycles, as generate writes them"


async def _answers(served: Any, H: int, jobs: list[Any]) -> list[list[int]]:
    """The tokens of each job, of the one batcher of a depth, which is started in this loop."""
    found: list[list[int]] = [[] for _ in jobs]
    done = [asyncio.Event() for _ in jobs]

    def notify(number: int, event: Any) -> None:
        if isinstance(event, Exception):
            raise event
        if event is None:
            done[number].set()
        else:
            found[number] += [token.id for token in event]

    served.batchers[H].start()
    for number, job in enumerate(jobs):
        served.batchers[H].submit(job, partial(notify, number))
    await asyncio.wait_for(asyncio.gather(*(one.wait() for one in done)), 40)
    return found


F32, BF16 = torch.float32, torch.bfloat16


def conversion_of(folder: str) -> Named:
    return {f"exact at conversion, {name}": partial(exact, dtype=getattr(torch, name), folder=folder) for name in ("float32", "bfloat16")}


DECODING: Named = {
    "cached equals uncached": cached,
    "draft and verify equals greedy": speculation,
    "early exit": early_exit,
    "static cache as one graph": static_graph,
    "attention: sdpa, float32": partial(kernel, name="sdpa", package=None, dtype=F32),
    "attention: sdpa, bfloat16": partial(kernel, name="sdpa", package=None, dtype=BF16),
    "attention: flash_attention_2, bfloat16": partial(kernel, name="flash_attention_2", package="flash_attn", dtype=BF16),
    "prompts of uneven lengths in a batch": uneven_batch,
    "weights in two places": split_weights,
    "the server's engine": engine,
}


@case("works", "Whether it works: conversion and decoding", sizes=("cuda",))
def measure(bench: Bench) -> Iterator[Table | Check]:
    """Small checks of the donor that ships, made recursive, and of a smaller model of random weights with large gains. Each passes or fails
    by itself. "Within" is the largest difference over the largest logit in float32, the norm of the difference over the norm in bfloat16.
    """
    yield from outcomes("Conversion", conversion_of(SHIPPED), bench)
    yield from outcomes("Decoding and serving", DECODING, bench)

"""Throughput of engines side by side: 16 requests at once, each 32 tokens of prompt and 64 more, greedy.

    python -m benchmarks.engine_throughput DONOR --vllm .venv-vllm/bin/python

vLLM with the donor, vLLM with our plugin, `recursify serve` and transformers' continuous batching in a process of its own, the last three
with the donor's layers made recursive (4 of them in a loop, `--H_cycles` times). Sides take turns, with new prompts in every round.
`efficiency` is tokens per second times the layer applications of a token, over that of the donor in vLLM: 1 where an application costs
what it costs there. The vLLM of another environment is started by its Python; on a GPU it is the one at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .job_queue import Keep, Place

REQUESTS, PROMPT, NEW, ROUNDS = 16, 32, 64, 5
BOUND = 0.85  # of the plugin's efficiency
VOCABULARY = range(1000, 20_000)  # ids that are words in any tokenizer of this size
_PATIENCE = 600.0  # seconds until an engine has started


@dataclass
class Side:
    """A server with OpenAI's API.

    Args:
        applications: Of layers, for one token.
        rates: Tokens per second, one per round.
    """

    name: str
    url: str
    applications: int
    rates: list[float] = field(default_factory=list)


def round_of(side: Side, rng: random.Random) -> float:
    """Tokens per second of all requests together. Prompts are new ones, so no prefix is cached."""
    import httpx

    prompts = [rng.choices(VOCABULARY, k=PROMPT) for _ in range(REQUESTS)]
    with httpx.Client(base_url=side.url, timeout=600) as client, ThreadPoolExecutor(REQUESTS) as pool:
        model = client.get("/v1/models").json()["data"][0]["id"]

        def ask(prompt: list[int]) -> int:
            answer = client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0})
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        begun = time.perf_counter()
        tokens = sum(pool.map(ask, prompts))
        return tokens / (time.perf_counter() - begun)


def compare(sides: Sequence[Side], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each side, the first of which is what the others are compared with."""
    for number in range(rounds + 1):
        for side in sides:
            rate = round_of(side, random.Random(number))
            if number:  # the first warms up
                side.rates.append(rate)
    first = statistics.median(sides[0].rates) * sides[0].applications
    return [
        {
            "engine": side.name, "applications": side.applications, "tokens_per_s": round(statistics.median(side.rates), 1),
            "lowest": round(min(side.rates), 1), "highest": round(max(side.rates), 1), "rounds": rounds,
            "efficiency": round(statistics.median(side.rates) * side.applications / first, 3),
        }
        for side in sides
    ]  # fmt: skip


# Engines


def measure_engines(donor: str, vllm: str, device: str, dtype: str, H_cycles: int, rounds: int, work: Path) -> list[dict[str, Any]]:
    """Make the recursive model, start all engines, and compare them."""
    folder, log = work / "recursive", work / "log"
    layers, applications = _make(donor, folder, H_cycles, dtype)
    of_vllm = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--dtype", dtype]
    of_vllm += ["--gpu-memory-utilization", "0.25"] if device == "cuda" else ["--enforce-eager"]
    ours = [sys.executable, "-m", "recursify", "serve", "--checkpoint", str(folder), "--device", device, "--dtype", dtype]
    batching = [sys.executable, "-m", __spec__.name if __spec__ else "benchmarks.engine_throughput", str(folder), "--serve", device]
    commands: dict[str, tuple[list[str], int]] = {
        "donor in vLLM": ([*of_vllm, "--model", donor], layers),
        "plugin in vLLM": ([*of_vllm, "--model", str(folder)], applications),
        "recursify serve": (ours, applications),
        "transformers' continuous batching": (batching, applications),
    }
    with ExitStack() as running:
        sides = [Side(name, running.enter_context(started(argv, log)), count) for name, (argv, count) in commands.items()]
        return compare(sides, rounds)


def _make(donor: str, folder: Path, H_cycles: int, dtype: str) -> tuple[int, int]:
    """A recursive folder with gains that matter; the donor's layers and the layer applications of a token."""
    import torch

    from recursify import convert
    from recursify.checkpoints import checkpoint
    from recursify.checkpoints.tokenizer import load_tokenizer

    model = convert(donor, keep_donor=True, L_layers=4, H_cycles=H_cycles, L_cycles=1, gain=0.1)
    checkpoint.save(folder, model, load_tokenizer(donor), dtype=getattr(torch, dtype))
    return model.config.physical_layers, model.config.num_hidden_layers


@contextmanager
def started(argv: Sequence[str], log: Path) -> Iterator[str]:
    """A server on a free port, until the end; its address once it answers.

    Raises:
        RuntimeError: It ended, or does not answer in time.
    """
    import httpx

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    url, give_up = f"http://127.0.0.1:{port}", time.monotonic() + _PATIENCE
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    with log.open("ab") as out, subprocess.Popen([*argv, "--port", str(port)], stdout=out, stderr=out, env=environment) as server:
        try:
            while True:
                if server.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{' '.join(argv)} does not answer: {log.read_text(errors='replace')[-2000:]}")
                try:
                    httpx.get(f"{url}/v1/models", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()


def serve_by_transformers(folder: str, device: str, port: int) -> None:
    """transformers' continuous batching as it is, behind the least of a server: what is asked within a moment becomes one batch."""
    import asyncio

    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers import AutoModelForCausalLM, GenerationConfig

    import recursify  # noqa: F401 - registers the models

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    model = loaded.to(device).eval()
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    waiting: list[tuple[list[int], asyncio.Future[int]]] = []

    async def models(request: Any) -> JSONResponse:
        return JSONResponse({"data": [{"id": "m"}]})

    async def complete(request: Any) -> JSONResponse:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting.append(((await request.json())["prompt"], done))
        if len(waiting) == REQUESTS:
            batch, waiting[:] = list(waiting), []
            found = await asyncio.to_thread(model.generate_batch, [prompt for prompt, _ in batch], config)
            for (_, future), output in zip(batch, found.values(), strict=True):
                future.set_result(len(output.generated_tokens))
        return JSONResponse({"usage": {"completion_tokens": await done}})

    app = Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="warning")


# In the queue of a GPU


def obstacle(place: Place) -> str | None:
    if find_spec("vllm") is None:
        return "needs vLLM in this environment: pip install vllm"
    return None if place.donor is not None else "needs a pretrained donor: --donor FOLDER"


def measure(place: Place, keep: Keep) -> dict[str, Any]:
    """`tables` and `checks`."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_engines(str(place.donor), sys.executable, "cuda", "bfloat16", 2, ROUNDS, Path(folder))
    return {"donor": str(place.donor), "tables": [{"title": "Engines, 16 requests at once", "rows": rows, "note": ""}], "checks": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("donor", help="folder of a plain model")
    parser.add_argument("--vllm", default=sys.executable, help="the Python of the environment that has vLLM and recursify")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--H_cycles", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serve", metavar="DEVICE", help="serve that folder by transformers' continuous batching; used by the benchmark")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    if args.serve:
        serve_by_transformers(args.donor, args.serve, args.port)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_engines(args.donor, args.vllm, args.device, args.dtype, args.H_cycles, args.rounds, Path(folder))
    import torch

    from .record import provenance

    print(json.dumps({"rows": rows, "donor": args.donor, "machine": provenance(torch.device(args.device))}, indent=1))


if __name__ == "__main__":
    main()

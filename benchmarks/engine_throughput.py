"""Throughput of running servers with OpenAI's API, side by side: 16 requests at once, each 32 tokens of prompt and 64 more, greedy.

    vllm serve DONOR --port 8101 --dtype float32 --served-model-name m
    vllm serve FOLDER --port 8102 --dtype float32 --served-model-name m
    recursify serve --checkpoint FOLDER --port 8103
    python benchmarks/engine_throughput.py donor=8101/30 plugin=8102/42 recursify=8103/42

The number behind the port counts layer applications per token. Sides take turns. `efficiency` is tokens per second times applications, over
that of the first side: 1 where an application costs what it costs there. Needs httpx alone, so any environment runs it.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

REQUESTS, PROMPT, NEW = 16, 32, 64
VOCABULARY = range(1000, 20_000)  # ids that are words in any tokenizer of this size


@dataclass
class Side:
    """A server.

    Args:
        applications: Of layers, for one token.
        rates: Tokens per second, one per round.
    """

    name: str
    url: str
    applications: int
    rates: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, text: str) -> Side:
        """From `name=port/applications`."""
        name, rest = text.split("=")
        port, applications = rest.split("/")
        return cls(name, f"http://127.0.0.1:{port}", int(applications))

    def round(self, rng: random.Random) -> float:
        """Tokens per second of all requests together. Prompts are new ones, so no prefix is cached."""
        prompts = [rng.choices(VOCABULARY, k=PROMPT) for _ in range(REQUESTS)]
        with httpx.Client(base_url=self.url, timeout=600) as client, ThreadPoolExecutor(REQUESTS) as pool:
            model = client.get("/v1/models").json()["data"][0]["id"]

            def ask(prompt: list[int]) -> int:
                answer = client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0})
                return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

            begun = time.perf_counter()
            tokens = sum(pool.map(ask, prompts))
            return tokens / (time.perf_counter() - begun)


def main(sides: list[Side], rounds: int = 5) -> None:
    for number in range(rounds + 1):
        for side in sides:
            rate = side.round(random.Random(number))
            if number:  # the first warms up
                side.rates.append(rate)
    first = statistics.median(sides[0].rates) * sides[0].applications
    for side in sides:
        rate = statistics.median(side.rates)
        row = {"side": side.name, "applications": side.applications, "tokens_per_s": round(rate, 1),
               "lowest": round(min(side.rates), 1), "highest": round(max(side.rates), 1),
               "efficiency": round(rate * side.applications / first, 3)}  # fmt: skip
        print(json.dumps(row))


if __name__ == "__main__":
    main([Side.of(text) for text in sys.argv[1:]])

"""What a token costs with a static cache, when a whole pass, all of its applications, is one graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from recursify import RecursiveLLM

from .case import Bench, Check, Table, case
from .ceilings import ceilings
from .decoding import GB, MS, Writer, texts, writers
from .measure import alternate, ratio, say
from .models import tokens

WARM = 3  # passes: CUDA graphs are recorded at the second


class Graph:
    """One token after the other behind a static cache, by a compiled pass.

    Args:
        room: Tokens that it will write at most.
        piece: Tokens of its prompt that are read at once.
    """

    def __init__(self, one: Writer, rows: int, context: int, room: int, piece: int):
        model = one.model
        config = model.config.at_depth() if isinstance(model, RecursiveLLM) else model.config
        self.cache, self.token = StaticCache(config=config, max_cache_len=context + room), tokens(model.config, rows, 1, model.device)
        prompt = tokens(model.config, rows, context, model.device)
        for part in prompt.split(piece, dim=1):
            model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.run = compiled(model)

    def step(self) -> None:
        self.run(self.token, past_key_values=self.cache, use_cache=True)


def compiled(model: Any) -> Any:
    """A pass as one graph, or an error; on a GPU as transformers compiles it, on a CPU captured and no more, which shows that it is one."""
    how: dict[str, Any] = {"mode": "reduce-overhead"} if model.device.type == "cuda" else {"backend": "eager"}
    return torch.compile(model, fullgraph=True, dynamic=False, **how)


@torch.no_grad()
def one_token(all_of_them: list[Writer], rows: int, context: int, bench: Bench) -> list[dict[str, Any]]:
    """A pass of one token of each row, eager and as one graph, in turn."""
    say(f"decoding_static: {rows} rows at context {context}")
    torch._dynamo.reset()
    rounds, piece = bench.pick((2, 5), None, (20, 512))
    graphs = {one.name: Graph(one, rows, context, WARM + rounds, piece) for one in all_of_them}
    token = tokens(all_of_them[0].config, rows, 1, bench.device)
    sides: dict[str, Callable[[], Any]] = {}
    for one in all_of_them:
        sides[f"{one.name}, eager"] = partial(one.model, token, past_key_values=one.cache(rows, context), use_cache=True)
        sides[f"{one.name}, graph"] = graphs[one.name].step
    before = captured()
    times = alternate(sides, rounds, bench.device, warm=WARM)
    made = captured() - before
    donor, top, found = all_of_them[0], ceilings(bench.device, bench.dtype), []
    for one in all_of_them:
        eager, graph = times[f"{one.name}, eager"], times[f"{one.name}, graph"]
        took, (flops, moved) = statistics.median(graph), one.work(rows, context)
        row = {"rows": rows, "context": context, "model": one.name, "applications": one.applications, "ms": MS * took}
        row |= {"eager, ms": MS * statistics.median(eager), "speed / eager": ratio(eager, graph), "tokens/s": rows / took}
        if one is not donor:
            row["speed x applications / donor"] = ratio(times[f"{donor.name}, graph"], graph, by=donor.applications / one.applications)
        row |= {"GB to read": moved / GB, "of the bandwidth": moved / top.bytes / took, "graphs": made / len(all_of_them)}
        found.append(row | {"limit": top.limit(took, flops, moved)})
    return found


def captured() -> int:
    """Graphs that torch has captured so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _rows(bench: Bench, points: list[tuple[int, int]]) -> Iterator[Table | Check]:
    donor, compact, *_ = writers(bench)
    rows = [row for batch, context in points for row in one_token([donor, compact], batch, context, bench)]
    yield Table("One token, one graph", rows)
    yield Check("graphs of a model at one batch and context", max(row["graphs"] for row in rows), most=1)


@case("decoding_static", "Writing with a static cache", sizes=("cuda",))
def measure(bench: Bench) -> Iterator[Table | Check]:
    """The models of the case before, with transformers' static cache and torch.compile of the whole pass into one graph (CUDA graphs, mode
    reduce-overhead), beside the same pass written eagerly behind a cache that grows. GB to read: weights once per application, keys and
    values; over the time and the copy's bandwidth.
    """
    yield from _rows(bench, [bench.pick((1, 8), None, (1, 128))])


@case("decoding_static_text", "Texts with a static cache", sizes=("cuda",))
def measure_text(bench: Bench) -> Iterator[Table | Check]:
    """`generate(cache_implementation="static")` as it is used, which compiles in the same way, beside the donor's."""
    donor, *_, keep = writers(bench)
    found = texts("random, Qwen2-0.5B", donor.model, keep.model, bench.pick(4, None, 64), bench, (3,), cache_implementation="static")
    yield Table("A text, static cache", found)


@case("decoding_static_batches", "Writing with a static cache, in batches", sizes=("cuda",))
def measure_batches(bench: Bench) -> Iterator[Table | Check]:
    """As the case before, of 8 and of 64 rows."""
    yield from _rows(bench, bench.pick([(2, 8)], None, [(8, 128), (64, 128)]))


@case("decoding_static_long", "Writing with a static cache, at a long context", sizes=("cuda",))
def measure_long(bench: Bench) -> Iterator[Table | Check]:
    """As the case before, of 1 and of 64 rows behind 4,096 tokens."""
    yield from _rows(bench, bench.pick([(1, 16)], None, [(1, 4096), (64, 4096)]))

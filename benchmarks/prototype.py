"""Baseline: the prototype behind the guides, with one forward pass per position in training and no KV cache in decoding."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recursify.network.configuration_recursive_llm import applications
from recursify.network.size import parameters_by_part, shape_of
from recursify.training import TrainSettings
from recursify.training.cost import step_flops

from .case import Bench, Check, Table, case
from .ceilings import ceilings
from .lockstep import steps_in_turn
from .measure import alternate, ratio, say, seconds
from .models import HALF_B, TOY, build, recursive_config, tokens
from .record import spread

TRAINING_BOUND, WRITING_AIM = 100, 10
OURS, PROTOTYPE, KINDER = "recursify", "prototype", "prototype, passes over the tokens so far"


class Prototype:
    """Trains and decodes one position at a time.

    Args:
        ids: `[rows, T]`.
        every_cycle: Whether the loss is the mean of all cycles, or that of the last.
        one_length: Whether every pass is as long as the sequence, filled up behind the token.
    """

    def __init__(self, model: Any, ids: Tensor, every_cycle: bool, one_length: bool):
        self.model, self.ids, self.every_cycle, self.one_length = model.train(), ids, every_cycle, one_length
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def learn(self, t: int) -> None:
        """Token t + 1 from those up to t; its gradient is added to that of the sequence."""
        device, seen = self.ids.device, self.ids[:, : t + 1]
        if self.one_length:
            seen = F.pad(seen, (0, self.ids.shape[1] - seen.shape[1]))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = self.model(seen, use_cache=False, output_cycle_logits=self.every_cycle)
            readouts = output.cycle_logits if self.every_cycle else (output.logits,)
            losses = torch.stack([F.cross_entropy(logits[:, t].float(), self.ids[:, t + 1]) for logits in readouts])
        losses.mean().backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sequences(self, count: int, rounds: int) -> list[float]:
        """Seconds of a whole sequence, once a round, from `count` of its positions. A round has pairs of them, one as far from the start
        as the other is from the end, so that each has the mean length of all."""
        device, length = self.ids.device, self.ids.shape[1] - 1
        spots = [(2 * i + 1) * length // (2 * count) for i in range(count)]
        halves = list(zip(spots[: count // 2], reversed(spots), strict=False))
        pairs: list[tuple[int, ...]] = [*halves] or [(spots[0],)] * rounds
        if device.type == "cuda":
            self.learn(spots[0])  # warms up; a step takes too long on a CPU to need it
        found = []
        for turn in range(rounds):
            took = [seconds(partial(self.learn, t), device) for pair in pairs[turn::rounds] for t in pair]
            found.append(length * statistics.mean(took) + seconds(self.update, device))
        return found


def fit_steps(model: Any, ids: Tensor, every_cycle: bool, steps: int) -> list[float]:
    """Seconds of `steps` optimizer steps of `fit` on one batch, after one that is not counted."""
    rows = [{"input_ids": row} for row in ids.tolist()]
    settings = TrainSettings(
        checkpoint="", seq_len=ids.shape[1], batch_size=len(rows), eval_batch_size=1, max_steps=1 + steps, warmup_steps=0, lr=1e-5,
        start_gain=0.2, generate_every=0, save_every=0, log_every=1000, device=ids.device.type, enable_deep_supervision=every_cycle,
        deep_supervision_schedule="constant", deep_supervision_weight=1.0, backprop="full",
        bf16=ids.device.type == "cuda",  # as the prototype beside it
    )  # fmt: skip
    return steps_in_turn(model, rows * (1 + steps), settings, None)[0]


def train_rows(model: Any, ids: Tensor, every_cycle: bool, positions: int, rounds: int) -> list[dict[str, Any]]:
    """All ways of training."""
    name = "every cycle" if every_cycle else "last cycle"
    say(f"prototype: training, {name}")
    took = {
        PROTOTYPE: Prototype(model, ids, every_cycle, one_length=True).sequences(1, rounds),  # all positions cost the same
        KINDER: Prototype(model, ids, every_cycle, one_length=False).sequences(positions, rounds),
        OURS: fit_steps(model, ids, every_cycle, rounds),
    }
    config, device, (batch, length) = model.config, ids.device, ids.shape
    scored, bf16 = config.H_cycles if every_cycle else 1, device.type == "cuda"

    def flops(length: int) -> float:
        return step_flops(config, batch * length, length, supervised=scored)

    once = 3 * 4 * sum(parameters_by_part(config).values())  # bytes: weights read forward and back, gradients written
    work = {
        PROTOTYPE: (flops(length) * (length - 1), once * (length - 1)),
        KINDER: (sum(map(flops, range(1, length))), once * (length - 1)),
        OURS: (flops(length), once),
    }
    top = ceilings(device, torch.bfloat16 if bf16 else torch.float32)
    rows = []
    for way, times in took.items():
        median = statistics.median(times)
        rows.append(
            {
                "scored": name,
                "way": way,
                "seconds a step": spread(times),
                "tokens/s": spread(ids.numel() / t for t in times),
                "GFLOP": work[way][0] / 1e9,
                "ours over it": "" if way == OURS else ratio(times, took[OURS]),
                "its FLOPs over ours": work[way][0] / work[OURS][0],
                "limit": top.limit(median, *work[way]),
            }
        )
    return rows


@torch.inference_mode()
def write_rows(model: Any, ids: Tensor, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Both ways of writing a token behind the context `ids` `[1, T]`, and the spread of whole passes over cached ones."""
    context, config, device = ids.shape[1], model.config, ids.device
    say(f"prototype: writing, context {context}")
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    sides = {
        PROTOTYPE: lambda: model(ids, use_cache=False).logits[:, -1].argmax(-1),
        OURS: lambda: model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1),
    }
    took = alternate(sides, rounds, device, warm=2 if device.type == "cuda" else 0)
    matrices = shape_of(config).matrices
    passed = matrices["lm_head"] + applications(config.H_cycles, config.L_cycles) * matrices["L_level"]
    top, found, read = ceilings(device, model.dtype), ratio(took[PROTOTYPE], took[OURS]), passed * model.dtype.itemsize
    return [
        {
            "context": context,
            "way": way,
            "seconds a token": spread(took[way]),
            "over the prototype": found if way == OURS else "",
            "limit": top.limit(statistics.median(took[way]), 2 * passed * count, read),
        }
        for way, count in ((PROTOTYPE, context), (OURS, 1))
    ], found


@case("prototype", "The prototype's way: a pass per position")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """The prototype behind the guides, in a few lines: in training a forward and backward pass for every position and one optimizer step
    for the sequence; in writing a pass over the whole prompt for every token, without a cache. It knew one sequence length only, so
    each of its passes is as long as the sequence; beside it a kinder one, whose passes end with the token, which arithmetic alone
    puts at about half. Every pass reads out all of its positions, as a plain call does. The model is the same on all sides, compact,
    of random weights, and so are gradients (back through all cycles) and the optimizer, fused AdamW. A sequence of the prototype is
    not run whole: evenly spread positions are timed, and their mean counts for all of them. Ours is a step of `fit`. A pair is a
    round of the one and a step of the other. Writing: both take turns; ours begins behind a prefill that is not counted. The limit
    counts every application's read of the looped block, which no cache holds.
    """
    device, shape = bench.device, bench.pick(TOY, HALF_B, HALF_B)
    config = recursive_config(shape.config())
    model = build(config, device)
    length = bench.pick(16, 128, 128)
    ids = tokens(config, 1, length, device)
    title = f"{shape.name} compact, 4 layers, H 3, L 3"
    rows = []
    # positions and rounds; a CPU takes a tenth of a minute for a position
    for every_cycle, (positions, rounds) in bench.pick({False: (4, 1)}, {False: (4, 2)}, {False: (8, 4), True: (8, 4)}).items():
        rows += train_rows(model, ids, every_cycle, positions, rounds)
    yield Table(f"Training a sequence of {length} tokens, {title}", rows)
    for row in rows:
        if row["way"] != OURS:
            what = f"tokens/s in training over it: {row['way']}, T {length}, {row['scored']} scored"
            yield Check(what, row["ours over it"]["median"], least=TRAINING_BOUND, must=row["way"] == PROTOTYPE)
    model = model.to(bench.dtype).eval()
    model.zero_grad()
    rows, checks = [], []
    for context, rounds in bench.pick({8: 1, 16: 1}, {128: 3}, {128: 10, 512: 10}).items():
        found_rows, found = write_rows(model, tokens(config, 1, context, device), rounds)
        rows += found_rows
        checks.append(Check(f"tokens/s in writing over the prototype's, context {context}", found["median"], least=WRITING_AIM, must=False))
    yield Table(f"Writing a token, {title}", rows)
    yield checks[0]

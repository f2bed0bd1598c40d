"""What a training step costs beside the donor's own."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from recursify.training import TrainSettings, fit
from recursify.training.cost import step_flops
from recursify.training.trainer import peak_memory

from .case import Bench, Check, Table, case
from .ceilings import ceilings
from .lockstep import Donor, donor_trainer, steps_in_turn
from .measure import alone, forget_peak, give_back_when_freed, held, ratio, say
from .models import HALF_B, ONE_AND_A_HALF_B, SEVEN_B, TOY, Shape, build, recursive_config, shipped_shape

GB = 1e9
GUIDES = 50  # tokens per second that the guides promise for Qwen2-0.5B
ADAPTER_TIME_BOUND, ADAPTER_MEMORY_BOUND = 0.7, 0.45
WORK_BOUND, SUPERVISION_BOUND, MFU_BOUND, BATCH_4_BOUND = 1.10, 1.25, 0.45, 12.0
EVERY = {"enable_deep_supervision": True}


@dataclass(frozen=True)
class Way:
    """A way to train: a shape of the loop, and flags of `train`.

    Args:
        kernel: The attention kernel; transformers' choice where None.
    """

    name: str
    loop: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    kernel: str | None = None


MAIN = Way("last cycle scored")
LAST = Way("last cycle scored, --backprop last", flags={"backprop": "last"})
CYCLE = Way("every cycle scored, --backprop cycle", flags={**EVERY, "backprop": "cycle"})
FULL = Way("every cycle scored", flags=EVERY)
CHECKPOINTED = Way("every cycle scored, --gradient_checkpointing", flags={**EVERY, "gradient_checkpointing": True})
KEEP = Way("keep_donor, L 1, every cycle scored", {"keep_donor": True, "L_cycles": 1}, EVERY)
ADAPTER = Way("keep_donor, L 1, every cycle scored, --adapter", {**KEEP.loop, "lora_rank": 16}, EVERY)
WAYS = (MAIN, KEEP)
# A step of a real shape takes a CPU long: there the small model that ships has these.
MORE_WAYS = (
    LAST,
    CYCLE,
    FULL,
    CHECKPOINTED,
    Way("H 1", {"H_cycles": 1}),
    Way("L 1", {"L_cycles": 1}),
    Way("eager attention", kernel="eager"),
    Way("last cycle scored, --compile", flags={"compile": True}),
)


@dataclass(frozen=True)
class Batch:
    """The rows of an optimizer step.

    Args:
        parts: Forward passes that it is divided into.
    """

    rows: int
    length: int
    parts: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}" + (f" in {self.parts} parts" if self.parts > 1 else "")

    def blocks(self, vocabulary: int, count: int) -> list[dict[str, list[int]]]:
        ids = torch.randint(1, vocabulary, (count, self.length), generator=torch.Generator().manual_seed(0))
        return [{"input_ids": row} for row in ids.tolist()]


def settings_of(way: Way, batch: Batch, device: torch.device, steps: int) -> TrainSettings:
    return TrainSettings(
        checkpoint="", seq_len=batch.length, batch_size=batch.rows // batch.parts, grad_accum_steps=batch.parts, eval_batch_size=1,
        max_steps=steps, warmup_steps=0, lr=1e-5, generate_every=0, save_every=0, log_every=10**6, device=device.type, start_gain=0.2,
        bf16=device.type == "cuda",  # as the donor beside it
        **way.flags,
    )  # fmt: skip


def model_of(way: Way, shape: Shape, device: torch.device) -> Any:
    config = recursive_config(shape.config(), **way.loop)
    config._attn_implementation = way.kernel
    return build(config, device)


def applications(config: Any, way: Way, donor_layers: int) -> float:
    """Layer applications of a step over the donor's. A backward pass counts as two forward passes; the head is not counted."""
    H, a_cycle = config.H_cycles, config.L_layers * (config.L_cycles + 1)
    ends = config.prelude_layers + config.coda_layers * (H if "enable_deep_supervision" in way.flags else 1)
    back = 1 if way.flags.get("backprop") == "last" else H
    return float((ends + H * a_cycle + 2 * (ends + back * a_cycle)) / 3 / donor_layers)


def flops(config: Any, way: Way, batch: Batch) -> float:
    """Model FLOPs of a step, head included; nothing that is computed a second time is counted."""
    scored = config.H_cycles if "enable_deep_supervision" in way.flags else 1
    return step_flops(config, batch.tokens, batch.length, supervised=scored, backprop=way.flags.get("backprop", "full"))


# Time


def time_way(way: Way, shape: Shape, batch: Batch, bench: Bench, donor: Donor | None, steps: int) -> dict[str, Any]:
    """One row."""
    say(f"training: {shape.name}, {batch}, {way.name}")
    model = model_of(way, shape, bench.device)
    forget_peak(bench.device)
    ours, theirs = steps_in_turn(
        model, batch.blocks(model.config.vocab_size, batch.rows * 8), settings_of(way, batch, bench.device, steps), donor
    )
    done = flops(model.config, way, batch)
    took = statistics.median(ours)
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    ceiling = ceilings(bench.device, dtype)
    optimizer = 28 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # weight, gradient, two moments; three of them written
    row: dict[str, Any] = {
        "model": shape.name,
        "batch": str(batch),
        "way": way.name,
        "tokens/s": batch.tokens / took,
        "seconds": took,
        "MFU": done / took / ceiling.flops,
        "limit": ceiling.limit(took, done, optimizer),
    }
    if donor is not None:
        plain = shape.config()
        work = {
            "applications": applications(model.config, way, plain.num_hidden_layers),
            "FLOPs": done / step_flops(plain, batch.tokens, batch.length),
        }
        row |= {"time / donor": ratio(ours, theirs)}
        row |= {f"work: {name}": value for name, value in work.items()}
        row |= {f"time / {name}": ratio(ours, theirs, by=value) for name, value in work.items()}
    if bench.on_gpu:
        row["peak, GB"] = peak_memory(bench.device) / GB
        if donor is not None:
            row |= {"donor's tokens/s": batch.tokens / statistics.median(theirs), "donor's peak, GB": donor.peak / GB}
    del model
    gc.collect()
    return row


SMALL_BATCH = Batch(4, 128)  # of the model that ships
# Of the guides. In parts, so that the donor, whose loss holds all logits, fits on the GPU beside ours.
GUIDES_BATCHES = Batch(4, 128), Batch(32, 1024, parts=8)
STEPS = 5  # of a GPU; the first is not counted


def times(bench: Bench) -> list[dict[str, Any]]:
    if bench.on_gpu:
        return [row for batch in GUIDES_BATCHES for row in in_turn(HALF_B, batch, WAYS, bench, STEPS)]
    real, steps = (bench.pick(TOY, HALF_B, None), bench.pick(Batch(2, 32, parts=2), Batch(1, 128), None)), bench.pick(2, 3, None)
    more = MORE_WAYS[: bench.pick(2, None, None)]
    small = in_turn(shipped_shape(), SMALL_BATCH, (MAIN, *more), bench, bench.pick(2, 7, None))
    return in_turn(*real, WAYS, bench, steps) + small


def in_turn(shape: Shape, batch: Batch, ways: Sequence[Way], bench: Bench, steps: int) -> list[dict[str, Any]]:
    """A row for each way, all beside one donor."""
    rows = batch.blocks(shape.vocabulary, batch.rows * 8)
    with donor_trainer(shape, rows, (batch.rows // batch.parts, batch.parts), bench.device, bf16=bench.on_gpu) as trainer:
        return [time_way(way, shape, batch, bench, trainer, steps) for way in ways]


def _compiled(way: Way) -> Way:
    return replace(way, name=f"{way.name}, --compile", flags={**way.flags, "compile": True})


def alone_rows(bench: Bench, wanted: Sequence[tuple[Shape, Batch, Way]], steps: int) -> list[dict[str, Any]]:
    """Rows without a donor beside them."""
    rows = []
    for shape, batch, way in wanted:
        rows.append(time_way(way, shape, batch, bench, None, steps))
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return rows


# Memory


class Weigh(TrainerCallback):
    """The bytes before the one step of a run, which begins with optimizer states in place, and its peak."""

    def __init__(self, device: torch.device):
        self.device, self.before, self.peak = device, 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter in trained:
            parameter.grad = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = held(self.device)
        forget_peak(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak = peak_memory(self.device)


def weigh_step(way: Way, shape: Shape, batch: Batch, device: torch.device) -> dict[str, float]:
    give_back_when_freed()
    empty = held(device)
    weigh, model = Weigh(device), model_of(way, shape, device)
    rows = batch.blocks(model.config.vocab_size, batch.rows)
    fit(model, None, rows, rows[:1], settings_of(way, batch, device, 1), console=False, callbacks=[weigh])  # type: ignore[arg-type]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "before, GB": weigh.before / GB, "peak, GB": weigh.peak / GB, "step adds, GB": (weigh.peak - weigh.before) / GB,
        "above the weights, GB": (weigh.peak - empty - weights) / GB,
    }  # fmt: skip


def memories(bench: Bench) -> list[dict[str, Any]]:
    shape, batch = bench.pick(TOY, HALF_B, HALF_B), bench.pick(Batch(2, 32), Batch(1, 256), Batch(8, 1024))
    ways = LAST, CYCLE, FULL, CHECKPOINTED
    if bench.on_gpu:
        return weigh_all(ways, shape, batch, bench)
    found = weigh_all(ways[: bench.pick(2, 3, None)], shape, batch, bench)
    return found if bench.size == "quick" else found + weigh_all(ways, shipped_shape(), SMALL_BATCH, bench)


def weigh_all(ways: Sequence[Way], shape: Shape, batch: Batch, bench: Bench) -> list[dict[str, Any]]:
    # a GPU's allocator counts what lives, a process all that it ever held
    weigh = weigh_step if bench.on_gpu else partial(alone, weigh_step)
    rows: list[dict[str, Any]] = []
    for way in ways:
        say(f"training: memory, {shape.name}, {batch}, {way.name}")
        found = weigh(way, shape, batch, bench.device)
        row = {"model": shape.name, "batch": str(batch), "way": way.name, **found}
        row["peak / its first"] = found["peak, GB"] / (rows[0] if rows else found)["peak, GB"]
        row["limit"] = "weights, gradients and optimizer states" if found["step adds, GB"] < found["before, GB"] else "activations"
        rows.append(row)
    return rows


@case("training", "A training step")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """`fit` and transformers' own Trainer on the donor, with its own loss, take a step in turn, each in a process of its own: same
    batches, type (float32 on a CPU, bfloat16 autocast on a GPU), fused AdamW and clipping. All of a step is counted, the loading of the
    batch as well. Compact model of 4 layers, H 3, L 3, every loss at the whole vocabulary, unless the way says otherwise. Its time over
    the donor's is divided by the work in two countings: layer applications, where the head is not counted and a backward pass counts as
    two forward passes, and model FLOPs, with the head of every scored cycle. A CPU's batch is small, so the optimizer's pass over all
    parameters is a part of its steps; the donor has 2.5 times as many of them as the compact model, and as many as keep_donor. MFU is
    model FLOPs over the time and the measured ceiling. Memory: one step in a process of its own, with optimizer states in place before;
    on a CPU resident bytes, on a GPU the allocator's.
    """
    rows = times(bench)
    yield Table("Time of a step over the donor's", rows)
    for row in rows:
        counting = {MAIN.name: "applications", KEEP.name: "FLOPs", CYCLE.name: "FLOPs"}.get(row["way"])
        if counting and row["model"] == rows[0]["model"]:  # the real shape
            at = f", {row['batch']}" if bench.on_gpu else ""
            yield Check(f"{row['way']}{at}: time / {counting}", row[f"time / {counting}"]["median"], most=WORK_BOUND)
    found = memories(bench)
    yield Table("Memory of a step", found)
    for row in found:
        if row["way"] == CYCLE.name:
            what = f"{row['model']}: supervision of every cycle over none: peak memory"
            yield Check(what, row["peak / its first"], most=SUPERVISION_BOUND)


@case("training_adapter", "An adapter beside training everything")
def measure_adapter(bench: Bench) -> Iterator[Table | Check]:
    """keep_donor with 4 looped layers, H 3, L 1, every cycle scored: all weights trained, and the donor frozen with LoRA of rank 16 in
    the loop. Both beside the donor's own step, as in the case before; float32 on a CPU. Above the weights: peak less weights and what the
    process held before, so gradients, optimizer states, activations and logits."""
    shape, batch = bench.pick(TOY, HALF_B, HALF_B), bench.pick(Batch(2, 32, parts=2), Batch(1, 128), GUIDES_BATCHES[1])
    rows = in_turn(shape, batch, (KEEP, ADAPTER), bench, bench.pick(2, 4, STEPS))
    yield Table("Time of a step over the donor's", rows)
    full, adapter = (row["time / donor"]["median"] for row in rows)
    yield Check("adapter over full: time of a step", adapter / full, most=ADAPTER_TIME_BOUND)
    found = weigh_all((KEEP, ADAPTER), shape, replace(batch, parts=1) if not bench.on_gpu else Batch(8, 1024), bench)
    yield Table("Memory of a step", found)
    full, adapter = (row["above the weights, GB"] for row in found)
    yield Check("adapter over full: memory above the weights", adapter / full, most=ADAPTER_MEMORY_BOUND)


@case("training_ways", "Other ways to train", sizes=("cuda",))
def measure_ways(bench: Bench) -> Iterator[Table | Check]:
    """As in the case before, of batches of 8 x 1,024: how far back gradients go, what is scored, checkpointing, the loop's shape, the
    attention kernel, `--compile`.
    """
    shape, batch, ways = bench.pick((TOY, Batch(2, 32), MORE_WAYS[:1]), None, (HALF_B, Batch(8, 1024), MORE_WAYS))
    yield Table("Time of a step over the donor's", in_turn(shape, batch, ways, bench, bench.pick(2, None, STEPS)))


@case("training_sizes", "The guides' sizes", sizes=("cuda",))
def measure_sizes(bench: Bench) -> Iterator[Table | Check]:
    """Steps of `fit` as above, without a donor beside them, in the batches that the guides speak of; their promise was 50 tokens per second
    for Qwen2-0.5B.
    """
    toy, small, large = (TOY, Batch(2, 32)), (HALF_B, Batch(4, 128)), (HALF_B, Batch(32, 1024))
    rows = alone_rows(
        bench,
        bench.pick(
            [(*toy, MAIN), (*toy, CYCLE)],
            None,
            [(*small, MAIN), (*small, _compiled(MAIN)), (*large, CYCLE), (*large, _compiled(CYCLE))],
        ),
        bench.pick(2, None, STEPS),
    )
    for row in rows:
        row["tokens/s / the guides' 50"] = row["tokens/s"] / GUIDES
    yield Table("The guides' sizes", rows)
    if bench.on_gpu:
        yield from _promises(rows)


@case("training_large", "Larger models", sizes=("cuda",))
def measure_large(bench: Bench) -> Iterator[Table | Check]:
    """Steps of `fit` as above, of compact models in the widths of larger donors."""
    compiled = _compiled(CYCLE)
    wanted = bench.pick(
        [(TOY, Batch(2, 32), Way("L_layers 2", {"L_layers": 2}))],
        None,
        [
            (ONE_AND_A_HALF_B, Batch(2, 128), Way("L_layers 6", {"L_layers": 6})),
            (ONE_AND_A_HALF_B, Batch(16, 1024), compiled),
            (SEVEN_B, Batch(4, 1024), compiled),
        ],
    )
    yield Table("Larger models", alone_rows(bench, wanted, bench.pick(2, None, STEPS)))


def _promises(rows: list[dict[str, Any]]) -> Iterator[Check]:
    at_4 = [row for row in rows if row["batch"] == "4 x 128"]
    at_32 = [row for row in rows if row["batch"] == "32 x 1024"]
    yield Check("4 x 128: tokens/s over the guides' 50", max(row["tokens/s"] for row in at_4) / GUIDES, least=200)
    yield Check("4 x 128: peak memory, GB", max(row["peak, GB"] for row in at_4), most=BATCH_4_BOUND)
    yield Check("32 x 1024: tokens/s over the guides' 50", max(row["tokens/s"] for row in at_32) / GUIDES, least=2000)
    yield Check("32 x 1024: MFU", max(row["MFU"] for row in at_32), least=MFU_BOUND)

"""What training costs here, beside what it is compared with: memory of a step, memory and time of the loss, throughput.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/training.py          # a CPU core; about half an hour of it
    python benchmarks/training.py --device cuda                           # a GPU, bfloat16, the real sizes
    python benchmarks/training.py --quick                                 # toy sizes: shows that it runs, measures nothing

memory      one optimizer step of `fit`, each case in a process of its own: the peak, and how far that is above what the process held when
            weights and optimizer states were there. On a CPU both are resident bytes of the whole process, libraries included, and large
            blocks go back to the system when they are freed (M_MMAP_THRESHOLD), so that the peak is that of live tensors; on a GPU
            they are the allocator's bytes.
loss        next_token_losses beside plain logits and cross entropy, forward and backward, one process each; the gradients that both must
            leave behind are in both peaks, and `temporary` is what remains without them. Time: taken in turn in one process.
throughput  `fit` beside transformers' own Trainer with AutoModelForCausalLM and its own loss on the donor, same batches, type, fused AdamW
            and clipping, in turn in one process. A pair gives a ratio of times; the work is divided out twice: by layer applications
            (a backward pass counts as two forward passes; the head is not counted), and by the FLOPs of `recursify.cost`, head
            included, nothing that is computed a second time counted.

Writes training-DEVICE.json and, made from it, training-DEVICE.md. Exit status 1 if a bound is missed. Weights are random: time and memory
do not depend on them. Units: bytes, seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from record import earlier, load, provenance, spread
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

from recursify import RecursiveLLM
from recursify.configuration_recursive_llm import from_donor
from recursify.cost import step_flops
from recursify.objective import next_token_losses
from recursify.plan import make_plan
from recursify.training import TrainSettings, fit
from recursify.training.run import Collate
from recursify.training.trainer import peak_memory

MEMORY_BOUND, LOSS_BOUND, THROUGHPUT_BOUND = 1.25, 1 / 8, 1.15
HALF_B = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}  # Qwen2-0.5B
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
VOCABULARY = 151_936
GB = 1e9
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


@dataclass(frozen=True)
class Batch:
    """`rows` sequences of `seq_len` tokens out of `vocabulary`."""

    vocabulary: int
    rows: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def blocks(self, count: int) -> list[dict[str, list[int]]]:
        ids = torch.randint(self.vocabulary, (count, self.seq_len), generator=torch.Generator().manual_seed(0))
        return [{"input_ids": row} for row in ids.tolist()]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        widths: Of every layer.
        memory: Batches whose step is weighed, of a compact model of 4 layers, 3 cycles of 3 + 1 applications.
        loss_tokens: Of the two losses' memory, and of their time.
        donor_layers: Of the donor whose fine-tuning is timed; half of them make the compact model and the loop, 3 cycles of 1 + 1.
        throughput: Batches that are timed.
        steps: Optimizer steps of each timed run, after one that is not counted.
    """

    widths: dict[str, int]
    memory: tuple[Batch, ...]
    loss_vocabulary: int
    loss_tokens: tuple[int, int]
    donor_layers: int
    throughput: tuple[Batch, ...]
    steps: int
    repetitions: int


SIZES = {
    "quick": Sizes(TOY, (Batch(512, 2, 32),), 512, (2048, 256), 2, (Batch(512, 2, 32),), 1, 1),
    "cpu": Sizes(
        HALF_B, (Batch(32_000, 2, 512), Batch(VOCABULARY, 1, 512)), VOCABULARY, (4096, 1024), 4,
        (Batch(8_192, 2, 256), Batch(VOCABULARY, 1, 256)), 2, 3,
    ),
    "cuda": Sizes(
        HALF_B, (Batch(VOCABULARY, 8, 1024),), VOCABULARY, (8192, 8192), 24, (Batch(8_192, 8, 1024), Batch(VOCABULARY, 8, 1024)), 20, 5
    ),
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="toy sizes; bounds are not judged")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="which of the three parts")
    parser.add_argument(
        "--repetitions", type=int, default=None, help="pairs of each comparison of times; by default 3 on a CPU, 5 on a GPU"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the two files")
    args = parser.parse_args(argv)
    if args.repetitions is not None and args.repetitions < 1:
        parser.error(f"--repetitions: expected at least 1, got {args.repetitions}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return args


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns in a process that does nothing before or after. The libraries are imported once and shared."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch", "transformers", "recursify.training"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *args).result()


def donor_config(widths: dict[str, int], layers: int, vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        **widths, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def settings_for(batch: Batch, device: str, steps: int, **changes: Any) -> TrainSettings:
    return TrainSettings(
        checkpoint="", seq_len=batch.seq_len, batch_size=batch.rows, eval_batch_size=1, max_steps=steps, warmup_steps=0, lr=1e-5,
        generate_every=0, save_every=0, log_every=1000, device=device, **changes,
    )  # fmt: skip


def held_now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def give_back_when_freed() -> None:
    """Blocks of a megabyte or more leave the process when they are freed; where the C library is another one, nothing changes."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)


# Memory of a step


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
        gc.collect()
        self.before = held_now(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak = peak_memory(self.device)


def weigh_step(widths: dict[str, int], batch: Batch, device: str, changes: dict[str, Any]) -> dict[str, Any]:
    give_back_when_freed()
    config = from_donor(donor_config(widths, 4, batch.vocabulary), [0, 1, 2, 3], L_layers=4, H_cycles=3, L_cycles=3)
    weigh = Weigh(torch.device(device))
    settings = settings_for(batch, device, 1, start_gain=0.1, **changes)
    fit(RecursiveLLM(config), None, batch.blocks(batch.rows), batch.blocks(1), settings, console=False, callbacks=[weigh])  # type: ignore[arg-type]
    return {"before": weigh.before, "peak": weigh.peak, "step_adds": weigh.peak - weigh.before}


MODES: dict[str, dict[str, Any]] = {
    "last, last cycle scored": {"backprop": "last"},
    "cycle, every cycle scored": {"backprop": "cycle", "enable_deep_supervision": True},
    "full, every cycle scored": {"backprop": "full", "enable_deep_supervision": True},
}
BASIS, BOUNDED, *_ = MODES


def measure_memory(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    rows = []
    for batch in sizes.memory:
        for checkpointing in (False, True):
            found = {}
            for mode, changes in MODES.items():
                say(f"memory: {mode}, {batch}, gradient_checkpointing {checkpointing}")
                found[mode] = alone(weigh_step, sizes.widths, batch, device, {"gradient_checkpointing": checkpointing, **changes})
                say(f"  {found[mode]}")
            for mode, each in found.items():
                ratios = {f"{name}_ratio": each[name] / found[BASIS][name] for name in ("peak", "step_adds")}
                rows.append({"backprop": mode, "batch": asdict(batch), "gradient_checkpointing": checkpointing, **each, **ratios})
    return rows


# The loss


class Loss:
    """A head and states to read, and the two ways to the loss: `recursify` and `plain`."""

    def __init__(self, hidden: int, vocabulary: int, tokens: int, device: str):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.head = nn.Linear(hidden, vocabulary, bias=False, device=self.device)
        self.state = torch.randn(1, tokens + 1, hidden, device=self.device).requires_grad_()
        self.labels = torch.randint(vocabulary, (1, tokens + 1), device=self.device)

    def plain(self) -> torch.Tensor:
        logits = self.head(self.state[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), self.labels[:, 1:].flatten())

    def recursify(self) -> torch.Tensor:
        return next_token_losses([self.state], self.labels, self.head)[0]

    def run(self, way: str) -> float:
        self.head.weight.grad = self.state.grad = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = getattr(self, way)()
        loss.backward()
        return loss.item()


def weigh_loss(way: str, hidden: int, vocabulary: int, tokens: int, device: str) -> dict[str, float]:
    give_back_when_freed()
    loss = Loss(hidden, vocabulary, tokens, device)
    before = held_now(loss.device)
    value = loss.run(way)
    above, left = peak_memory(loss.device) - before, held_now(loss.device) - before
    return {"loss": value, "above": above, "left": left, "temporary": above - left}


def time_losses(hidden: int, vocabulary: int, tokens: int, device: str, repetitions: int) -> dict[str, list[float]]:
    loss = Loss(hidden, vocabulary, tokens, device)
    seconds: dict[str, list[float]] = {"recursify": [], "plain": []}
    for repetition in range(repetitions + 1):
        for way, found in seconds.items():
            start = clock(loss.device)[0]
            loss.run(way)
            if repetition:  # the first is to warm up
                found.append(clock(loss.device)[0] - start)
    return seconds


def measure_loss(sizes: Sizes, device: str) -> dict[str, Any]:
    hidden, vocabulary, (tokens, timed) = sizes.widths["hidden_size"], sizes.loss_vocabulary, sizes.loss_tokens
    found: dict[str, Any] = {"vocabulary": vocabulary, "hidden_size": hidden, "tokens": tokens, "timed_tokens": timed}
    for way in ("recursify", "plain"):
        say(f"loss: memory of {way}, {tokens} tokens")
        found[way] = alone(weigh_loss, way, hidden, vocabulary, tokens, device)
        say(f"  {found[way]}")
    for name in ("above", "temporary"):
        found[f"{name}_ratio"] = found["recursify"][name] / found["plain"][name]
    say(f"loss: time, {timed} tokens")
    seconds = alone(time_losses, hidden, vocabulary, timed, device, sizes.repetitions)
    return {**found, "seconds": seconds, "time_ratio": spread(a / b for a, b in zip(*seconds.values(), strict=True))}


# Throughput


class Stopwatch(TrainerCallback):
    """Wall-clock and CPU seconds of a run from the end of its first step to the end of its last."""

    def __init__(self, device: torch.device, steps: int):
        self.device, self.steps, self.marks = device, steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (1, self.steps):
            self.marks.append(clock(self.device))

    @property
    def per_step(self) -> list[float]:
        first, last = self.marks
        return [(b - a) / (self.steps - 1) for a, b in zip(first, last, strict=True)]


def clock(device: torch.device) -> tuple[float, float]:
    """Wall-clock and CPU seconds, when all that was begun is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def time_donor(model: Any, batch: Batch, device: str, steps: int) -> list[float]:
    """Seconds per step of transformers' own Trainer."""
    watch = Stopwatch(torch.device(device), steps)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch.rows, max_steps=steps, learning_rate=1e-5, weight_decay=0.01,
            optim="adamw_torch_fused", bf16=device == "cuda", use_cpu=device == "cpu", logging_steps=1000, save_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=device == "cuda",
        )  # fmt: skip
        rows = batch.blocks(batch.rows * steps)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=Collate(None), callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.per_step


def time_ours(model: Any, batch: Batch, settings: TrainSettings) -> list[float]:
    """Seconds per step of `fit`."""
    assert settings.max_steps is not None and settings.device is not None
    watch = Stopwatch(torch.device(settings.device), settings.max_steps)
    rows = batch.blocks(batch.rows * settings.max_steps)
    fit(model, None, rows, batch.blocks(1), settings, console=False, callbacks=[watch])  # type: ignore[arg-type]
    return watch.per_step


def layer_applications(config: Any, settings: TrainSettings) -> float:
    """Of one step and token, in forward and backward passes through a layer: 1 for a donor's layer. A backward pass counts as two."""
    H, a_cycle = config.H_cycles, config.L_layers * (config.L_cycles + 1)
    ends = config.prelude_layers + config.coda_layers * (H if settings.enable_deep_supervision else 1)
    back = 1 if settings.backprop == "last" else H
    return (ends + H * a_cycle + 2 * (ends + back * a_cycle)) / 3


def compare_throughput(sizes: Sizes, batch: Batch, device: str, plan_name: str, mode: str) -> dict[str, Any]:
    donor = donor_config(sizes.widths, sizes.donor_layers, batch.vocabulary)
    plan = make_plan("donor", sizes.donor_layers, L_layers=max(1, sizes.donor_layers // 2), keep_donor=plan_name == "keep_donor")
    shape = {"prelude_layers": len(plan.prelude), "L_layers": len(plan.loop), "coda_layers": len(plan.coda), "H_cycles": 3, "L_cycles": 1}
    config = from_donor(donor, plan.indices, **shape)
    steps = sizes.steps + 1
    settings = settings_for(batch, device, steps, start_gain=0.1, **MODES[mode])
    plain, ours = AutoModelForCausalLM.from_config(donor, dtype=torch.float32), RecursiveLLM(config)
    pairs = [(time_ours(ours, batch, settings), time_donor(plain, batch, device, steps)) for _ in range(sizes.repetitions)]
    scored = 3 if settings.enable_deep_supervision else 1
    flops = step_flops(config, batch.tokens, batch.seq_len, supervised=scored, backprop=settings.backprop)
    work = {
        "layer_applications": layer_applications(config, settings) / sizes.donor_layers,
        "flops": flops / step_flops(donor, batch.tokens, batch.seq_len),
    }
    ratios = {"wall": [a[0] / b[0] for a, b in pairs], "cpu": [a[1] / b[1] for a, b in pairs]}
    return {
        "plan": plan_name, "shape": shape, "backprop": mode, "batch": asdict(batch), "donor_layers": sizes.donor_layers,
        "seconds_per_step": {"recursify": [a[0] for a, _ in pairs], "donor": [b[0] for _, b in pairs]},
        "time_ratio": spread(ratios["wall"]), "cpu_time_ratio": spread(ratios["cpu"]), "work_ratio": work,
        "per_work": {
            f"{kind}_by_{name}": spread(ratio / value for ratio in found) for kind, found in ratios.items() for name, value in work.items()
        },
    }  # fmt: skip


def measure_throughput(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    rows = []
    for batch in sizes.throughput:
        for plan in ("compact", "keep_donor"):
            for mode in MODES:
                say(f"throughput: {plan}, {mode}, {batch}")
                rows.append(alone(compare_throughput, sizes, batch, device, plan, mode))
                say(f"  {rows[-1]['per_work']}")
    return rows


# What is made of it

PARTS: dict[str, Callable[[Sizes, str], Any]] = {"memory": measure_memory, "loss": measure_loss, "throughput": measure_throughput}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bound with what was measured. Throughput is judged where matrix products of the layers dominate: in layer applications
    with the small vocabulary, and in FLOPs, head included, with any."""
    checks = []
    for row in found.get("memory", []):
        if row["backprop"] == BOUNDED and not row["gradient_checkpointing"]:
            checks.append(_check(f"peak of a step, {row['backprop']} / {BASIS}, {_batch(row)}", MEMORY_BOUND, row["peak_ratio"]))
    if "loss" in found:
        checks.append(_check("loss, memory above before, recursify / plain", LOSS_BOUND, found["loss"]["above_ratio"]))
    rows = found.get("throughput", [])
    for row in rows:
        small = row["batch"]["vocabulary"] == min(r["batch"]["vocabulary"] for r in rows)
        for name in ("layer_applications", "flops") if small else ("flops",):
            what = f"time / {name}, {row['plan']}, {row['backprop']}, {_batch(row)}"
            checks.append(_check(what, THROUGHPUT_BOUND, row["per_work"][f"wall_by_{name}"]["median"]))
    return checks


def _check(what: str, bound: float, value: float) -> dict[str, Any]:
    return {"what": what, "bound": bound, "value": value, "holds": value <= bound}


def _batch(row: dict[str, Any]) -> str:
    batch = row["batch"]
    return f"{batch['rows']} x {batch['seq_len']}, V {batch['vocabulary']:,}"


def render(found: dict[str, Any]) -> str:
    """The page, of the JSON alone."""
    machine = found["machine"]
    lines = [
        "# Training, measured", "",
        *(f"- {part}: {when['date']}, commit {when['commit']}" for part, when in found["measured"].items()),
        f"- {machine['gpu'] or machine['cpu']}, pinned to {machine['pinned_to']}, {machine['memory_gib']} GiB; "
        f"load {machine['load']} at the start, {found['load_after']} at the end, this run included",
        "- " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"- widths {found['sizes']['widths']}; {'bfloat16 autocast' if machine['device'] == 'cuda' else 'float32'}",
    ]  # fmt: skip
    if found["quick"]:
        lines += ["", "**Toy sizes: this shows that the benchmark runs, and nothing else.**"]
    for part, write in (("memory", _memory_lines), ("loss", _loss_lines), ("throughput", _throughput_lines)):
        if part in found:
            lines += ["", *write(found[part])]
    lines += ["", "## Bounds", "", "| bound | at most | measured | holds |", "|---|---|---|---|"]
    lines += [f"| {c['what']} | {c['bound']:g} | {c['value']:.3f} | {'yes' if c['holds'] else 'NO'} |" for c in found["checks"]]
    return "\n".join(lines) + "\n"


def _memory_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Memory of a training step (GB)", "", "Compact model: 4 layers, H 3, L 3. Ratios are to the first line of each group.", ""]
    lines += ["| batch | checkpointing | backprop | before | peak | ratio | step adds | ratio |", "|---|---|---|---|---|---|---|---|"]
    return lines + [
        f"| {_batch(r)} | {'yes' if r['gradient_checkpointing'] else 'no'} | {r['backprop']} | {r['before'] / GB:.2f} | "
        f"{r['peak'] / GB:.2f} | {r['peak_ratio']:.3f} | {r['step_adds'] / GB:.2f} | {r['step_adds_ratio']:.3f} |"
        for r in rows
    ]


def _loss_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"## The loss: {found['tokens']:,} tokens, V {found['vocabulary']:,}, D {found['hidden_size']} (GB)", ""]
    lines += ["| | above before | of it left as gradients | temporary | loss |", "|---|---|---|---|---|"]
    for way in ("recursify", "plain"):
        w = found[way]
        lines.append(f"| {way} | {w['above'] / GB:.3f} | {w['left'] / GB:.3f} | {w['temporary'] / GB:.3f} | {w['loss']:.6f} |")
    lines += [f"| ratio | {found['above_ratio']:.4f} | | {found['temporary_ratio']:.4f} | |", ""]
    return [*lines, f"Time, {found['timed_tokens']:,} tokens, recursify / plain: {_spread(found['time_ratio'])}."]


def _throughput_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Throughput: seconds per step over those of the donor under transformers' Trainer", "",
        f"Donor of {rows[0]['donor_layers']} layers. Median of pairs (least to most).", "",
        "| batch | plan | backprop | time | work: applications | work: FLOPs | time / applications | time / FLOPs | CPU time / FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        work, per = r["work_ratio"], r["per_work"]
        lines.append(
            f"| {_batch(r)} | {r['plan']} | {r['backprop']} | {_spread(r['time_ratio'])} | {work['layer_applications']:.2f} | "
            f"{work['flops']:.2f} | {_spread(per['wall_by_layer_applications'])} | {_spread(per['wall_by_flops'])} | "
            f"{_spread(per['cpu_by_flops'])} |"
        )
    return lines


def _spread(found: dict[str, Any]) -> str:
    return f"{found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f})"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sizes = SIZES["quick" if args.quick else args.device]
    if args.repetitions is not None:
        sizes = Sizes(**{**vars(sizes), "repetitions": args.repetitions})
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"training-{'quick' if args.quick else args.device}"
    here: dict[str, Any] = {"machine": provenance(torch.device(args.device)), "quick": args.quick, "sizes": asdict(sizes)}
    found = earlier(stem.with_suffix(".json"), set(PARTS) - set(args.only)) | here
    for part in args.only:
        found[part] = PARTS[part](sizes, args.device)
        found.setdefault("measured", {})[part] = {"date": here["machine"]["date"], "commit": here["machine"]["commit"]}
    found["load_after"], found["checks"] = load(), judge(found)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(render(found), encoding="utf-8")
    print(render(found))
    return 0 if args.quick or all(check["holds"] for check in found["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())

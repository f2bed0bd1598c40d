"""What self-speculation and halting save, on a model that has learnt something, and whether the texts stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from recursify import convert
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.inference.early_exit import measure as measure_halting
from recursify.network.decoding_recursive_llm import HALT_CRITERIA
from recursify.training import TrainSettings, fit

from .case import Bench, Check, Table, case
from .decoding import write
from .measure import alternate, ratio, say
from .models import SHIPPED, TOY, build, recursive_config, tokens

SPECULATION_AIM, HALTING_AIM, HALTING_NATS = 1.5, 0.30, 0.01
WINDOW, PROMPT = 128, 32
HELD_OUT_EVERY = 6  # topics


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """`[windows, WINDOW]` token ids to train on and held out: the language reference that every CPython carries, topic by topic."""
    from pydoc_data.topics import topics

    tokenizer = load_tokenizer(SHIPPED)
    parts: tuple[list[int], list[int]] = [], []
    for index, name in enumerate(sorted(topics)):
        parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].extend(
            [*tokenizer(topics[name], verbose=False)["input_ids"], tokenizer.eos_token_id]
        )
    train, held = (torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW) for ids in parts)
    return train, held


def trained(train: torch.Tensor, held: torch.Tensor, steps: int, device: torch.device) -> Any:
    """The shipped donor, made recursive and fine-tuned for some steps, its halting head as well."""
    model: Any = convert(SHIPPED, keep_donor=True, L_layers=2, H_cycles=3, L_cycles=1)
    settings = TrainSettings(
        checkpoint="", seq_len=WINDOW, batch_size=4, max_steps=steps, lr=3e-4, gain_lr=3e-3, warmup_steps=steps // 8, start_gain=0.1,
        enable_deep_supervision=True, halting_weight=0.1, generate_every=0, save_every=0, log_every=10**6, device=device.type,
    )  # fmt: skip
    rows, few = ([{"input_ids": row} for row in windows.tolist()] for windows in (train, held[:16]))
    fit(model, load_tokenizer(SHIPPED), rows, few, settings, console=False)
    return model.eval()


# Self-speculation


def speculation(model: Any, held: torch.Tensor, bench: Bench) -> Iterator[dict[str, Any]]:
    new, prompts = bench.pick(8, 64, 64), held[::7][: bench.pick(2, 4, 4), :PROMPT]
    for rows, sample, depths in ((1, False, (0, 1)), (1, True, (0,)), (2, False, (1,))):
        batches = prompts.split(min(rows, len(prompts)))
        choice = {"do_sample": True, "temperature": 0.7, "top_k": 0} if sample else {}
        for k in depths:
            say(f"speculation_and_early_exit: self-speculation, {rows} rows, {'sampled' if sample else 'greedy'}, {k} cycles")
            yield _speculate(model, batches, new, k, choice, bench)


def _speculate(model: Any, batches: Any, new: int, k: int, choice: dict[str, Any], bench: Bench) -> dict[str, Any]:
    plain: list[float] = []
    fast: list[float] = []
    same: list[float] = []
    drafted = accepted = 0
    for turn, batch in enumerate([batches[0], *batches]):
        found: dict[str, Any] = {}

        def side(name: str, turn: int = turn, batch: torch.Tensor = batch, found: dict[str, Any] = found, **how: Any) -> None:
            torch.manual_seed(turn)
            found[name] = write(model, batch, new, **choice, **how)

        times = alternate({"plain": partial(side, "plain"), "fast": partial(side, "fast", draft_cycles=k)}, 1, bench.device, warm=0)
        if turn == 0:  # to warm up
            continue
        plain, fast = plain + times["plain"], fast + times["fast"]
        drafted, accepted = drafted + found["fast"].drafted, accepted + found["fast"].accepted
        same.append((found["fast"].sequences == found["plain"].sequences)[:, PROMPT:].float().mean().item())
    return {
        "rows": len(batches[0]),
        "choice": "sampled" if choice else "greedy",
        "draft cycles": k,
        "speed / plain": ratio(plain, fast),
        "accepted": accepted / max(1, drafted),  # none where the clock was against it
        "equal tokens": None if choice else sum(same) / len(same),
        "limit": "drafts that are wrong, and one pass of all cycles per draft",
    }


# Halting


def halting(model: Any, held: torch.Tensor, bench: Bench) -> Iterator[dict[str, Any]]:
    windows = held[: bench.pick(4, 48, 64)]
    first, second = windows[::2], windows[1::2]
    full = measure_halting(model, second, "q_head")
    new = bench.pick(4, 48, 48)
    for criterion in HALT_CRITERIA:
        say(f"speculation_and_early_exit: halting by {criterion}")
        threshold = affordable(model, first, criterion)
        found = asdict(measure_halting(model, second, criterion, threshold))
        plain: list[float] = []
        halted: list[float] = []
        for start in range(min(len(second), bench.pick(1, 4, 5))):
            prompt = second[start : start + 1, :PROMPT]
            sides = {"plain": partial(write, model, prompt, new)}
            sides["halted"] = partial(write, model, prompt, new, halt=criterion, halt_threshold=threshold)
            times = alternate(sides, 1, bench.device, warm=start == 0)
            plain, halted = plain + times["plain"], halted + times["halted"]
        yield {
            "criterion": criterion,
            "threshold": f"{threshold:.3g}",
            "applications saved": 1 - found["share"],
            "nats": found["loss"] - full.loss,
            "tokens by cycle": ", ".join(f"{cycle}: {count:,}" for cycle, count in found["cycles"].items()),
            "speed / plain": ratio(plain, halted),
            "limit": "cycles that tokens need" if criterion == "q_head" else "each cycle's readout takes the coda once more",
        }


def affordable(model: Any, blocks: torch.Tensor, criterion: str) -> float:
    """The threshold that saves most at no more than HALTING_NATS, of a range of them."""
    points = [i / 10 for i in range(11)] if criterion == "q_head" else [0.0, *(10.0**i for i in range(-4, 2)), float("inf")]
    full = measure_halting(model, blocks, criterion)
    found = [measure_halting(model, blocks, criterion, threshold) for threshold in points]
    fit_in = [one for one in found if one.loss - full.loss <= HALTING_NATS]
    return min(fit_in, key=lambda one: one.share).threshold  # type: ignore[return-value]  # "never" fits always


# Agreement


@torch.no_grad()
def agreement(bench: Bench) -> list[dict[str, Any]]:
    """Of random weights with large gains, which is harder than a trained model."""
    rows: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = rough(bench.device, dtype)
        prompts, new = tokens(model.config, bench.pick(4, 8, 16), 24, bench.device), bench.pick(4, 32, 48)
        plain = write(model, prompts, new).sequences[:, 24:]
        others = {
            "uncached": write(model, prompts, new, use_cache=False).sequences[:, 24:],
            "self-speculation, 0 cycles": write(model, prompts, new, draft_cycles=0).sequences[:, 24:],
            "self-speculation, 1 cycle": write(model, prompts, new, draft_cycles=1).sequences[:, 24:],
            "each row alone": torch.cat([write(model, row.unsqueeze(0), new).sequences for row in prompts])[:, 24:],
        }
        for name, found in others.items():
            # after the first different token two texts have nothing to do with each other
            until = (found == plain).long().cumprod(dim=1).sum().item() / found.numel()
            rows.setdefault(name, {"compared with plain cached writing": name})[str(dtype).removeprefix("torch.")] = until
    return [row | {"limit": "bfloat16's rounding, which other shapes round otherwise"} for row in rows.values()]


def rough(device: torch.device, dtype: torch.dtype, *, layers: int = 6, L_layers: int = 4, H_cycles: int = 3) -> Any:
    """A small model that keeps its donor's layers, whose every cycle says something else."""
    donor = TOY.config(layers=layers)
    donor.initializer_range = 0.15
    config = recursive_config(donor, keep_donor=True, L_layers=L_layers, H_cycles=H_cycles, L_cycles=1)
    config.gain_init = 0.3
    return build(config, device, dtype).eval()


@case("speculation_and_early_exit", "Self-speculation and halting")
def measure(bench: Bench) -> Iterator[Table | Check]:
    """On the donor that ships, made recursive (prelude 3, loop 2, coda 3, H 3, L 1) and fine-tuned on the language reference that CPython
    carries, its halting head as well; prompts and text of topics that it was not trained on. Both sides write in turn. Halting: the
    threshold is the one that saves most at no more than 0.01 nats on one half of the windows; loss and applications are those of the
    other half. "equal" counts tokens up to the first difference.
    """
    train, held = (windows.to(bench.device) for windows in text())
    say("speculation_and_early_exit: training the model")
    model = trained(train, held, bench.pick(2, 60, 60), bench.device)
    drafts = list(speculation(model, held, bench))
    yield Table("Self-speculation", drafts)
    for row in drafts:
        if row["equal tokens"] is not None:
            what = f"self-speculation, {row['rows']} rows, {row['draft cycles']} cycles: equal tokens, greedy"
            yield Check(what, row["equal tokens"], least=1.0)
    yield Check(
        "self-speculation: the best speed-up", max(row["speed / plain"]["median"] for row in drafts), least=SPECULATION_AIM, must=False
    )
    stops = list(halting(model, held, bench))
    yield Table("Halting at 0.01 nats", stops)
    saved = max((row["applications saved"] for row in stops if row["nats"] <= HALTING_NATS), default=0.0)
    yield Check("halting: most saved within 0.01 nats", saved, least=HALTING_AIM, must=False)
    same = agreement(bench)
    yield Table("Equal tokens", same)
    for row in same:
        yield Check(f"float32, {row['compared with plain cached writing']}: equal tokens", row["float32"], least=1.0, must=not bench.on_gpu)

"""The tables of docs/evidence.md and of the guides, from the results alone: what stands between `<!-- table NAME -->` and `<!-- end -->`.

    python -m recipes.evidence tables

A test regenerates and compares them, so no figure there is typed in or out of date.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.evidence.study import RESULTS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = tuple(DOCS / name for name in ("evidence.md", "QWEN_TO_RECURSIVE_GUIDE.md", "DEEP_SUPERVISION_GUIDE.md"))
_BLOCK = re.compile(r"(<!-- table (?P<name>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
Runs = list[dict[str, Any]]


def render(page: str, results: Path = RESULTS) -> str:
    """The page with all of its tables regenerated.

    Raises:
        KeyError: No such table.
    """
    return _BLOCK.sub(lambda block: block[1] + make(block["name"], results) + "\n" + block[3], page)


def write() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


def make(name: str, results: Path = RESULTS) -> str:
    """One table by its name: STUDY KIND [GROUP], of the CPU results; those of a GPU with `gpu` behind it."""
    study, kind, *rest = name.split()
    size = "gpu" if "gpu" in rest else "cpu"
    file = results / f"{study}-{size}.json"
    if not file.exists():
        return f"(No results yet: `python -m recipes.evidence {study}{' --size gpu' if size == 'gpu' else ''}` makes them.)"
    groups = [part for part in rest if part != "gpu"]
    return KINDS[kind](json.loads(file.read_text(encoding="utf-8")), groups)


def _rows(found: dict[str, Any], groups: Sequence[str]) -> dict[str, Runs]:
    """Name -> its runs, seed by seed; ours is in every group, to be compared with."""
    named: dict[str, Runs] = {}
    for run in found["runs"]:
        if not groups or run["group"] in groups or run["name"].startswith("ours:"):
            named.setdefault(run["name"], []).append(run)
    return named


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def _flops(runs: Runs, found: dict[str, Any]) -> str:
    """Of training, over what one fine-tuning of the donor on the same tokens costs."""
    plain = next((run["flops"] for run in found["runs"] if run["name"] == SAME_TOKENS), math.nan)
    return f"{runs[0]['flops'] / plain:.2f}" if runs[0]["flops"] else "0"


SAME_TOKENS, SAME_FLOPS = "donor, fine-tuned on the same tokens", "donor, fine-tuned for the same FLOPs"


# Accuracy


def _at(run: dict[str, Any], cycles: int | None, difficulty: str) -> float:
    return run["figures"]["donor" if cycles is None else str(cycles)][difficulty]


def _difficulties(found: dict[str, Any]) -> list[str]:
    return list(next(iter(found["runs"][0]["figures"].values())))


def hard(found: dict[str, Any]) -> str | None:
    """The first difficulty at which the donor that was fine-tuned for the same FLOPs is right less than half of the time."""
    tuned = _rows(found, ["main"])[SAME_FLOPS]
    return next((d for d in _difficulties(found) if statistics.mean(_at(run, None, d) for run in tuned) < 0.5), None)


def accuracy(found: dict[str, Any], groups: Sequence[str]) -> str:
    """In %, at the trained depth, by difficulty."""
    shown = _difficulties(found)
    lines = [
        [name, str(len(runs)), _flops(runs, found)]
        + [_spread([100 * _at(run, run["trained_cycles"], d) for run in runs], ".1f") for d in shown]
        for name, runs in _rows(found, groups).items()
    ]
    return _table(["row", "seeds", "FLOPs", *shown], lines)


def cycles(found: dict[str, Any], groups: Sequence[str]) -> str:
    """In %, at the difficulty where the donor falls below one half, from cycle 1 to twice the trained count."""
    at = hard(found) or _difficulties(found)[-1]
    most = max(len(run["figures"]) for run in found["runs"])
    lines = []
    for name, runs in _rows(found, groups).items():
        if runs[0]["trained_cycles"] is None:
            continue
        depths = range(1, len(runs[0]["figures"]) + 1)
        cells = [_spread([100 * _at(run, H, at) for run in runs], ".1f") for H in depths]
        cells[runs[0]["trained_cycles"] - 1] = f"**{cells[runs[0]['trained_cycles'] - 1]}**"
        lines.append([name, *cells, *[""] * (most - len(cells))])
    return _table([f"row, at {at}", *(f"cycle {H}" for H in range(1, most + 1))], lines)


def grid(found: dict[str, Any], groups: Sequence[str]) -> str:
    """In %, by cycles at test and difficulty; bold: the trained depth."""
    shown, lines = _difficulties(found), []
    for name, runs in _rows(found, groups).items():
        for depth in runs[0]["figures"]:
            cells = [_spread([100 * run["figures"][depth][d] for run in runs], ".1f") for d in shown]
            trained = depth == str(runs[0]["trained_cycles"])
            lines.append(
                [name, str(len(runs)), _flops(runs, found), "" if depth == "donor" else f"**{depth}**" if trained else depth, *cells]
            )
    return _table(["row", "seeds", "FLOPs", "cycles", *shown], lines)


def verdict(found: dict[str, Any], groups: Sequence[str]) -> str:
    """Whether ours is ahead where the donor fails, and whether more cycles ever harm; of the recorded runs."""
    rows = _rows(found, ["main"])
    ours = next((runs for name, runs in rows.items() if name.startswith("ours")), [])
    at = hard(found)
    if at is None or not ours:
        return "The donor fine-tuned for the same FLOPs is right more than half of the time at every difficulty: nothing is left to gain."
    trained, at_most = ours[0]["trained_cycles"], _difficulties(found).index(at)
    margins = {
        name: statistics.mean(100 * _at(run, trained, at) for run in ours) - statistics.mean(100 * _at(run, None, at) for run in rows[name])
        for name in (SAME_FLOPS, SAME_TOKENS)
    }
    falls = {difficulty: _falls(ours, difficulty) for difficulty in _difficulties(found)}
    up, twice = (max(each) for each in zip(*list(falls.values())[: at_most + 1], strict=True))
    mean_up, mean_twice = (statistics.mean(each) for each in zip(*falls.values(), strict=True))
    return "\n".join(
        [
            f"- At {at}, the first where the donor fine-tuned for the same FLOPs is right less than half of the time, ours is "
            f"{margins[SAME_FLOPS]:+.1f} points from it, and {margins[SAME_TOKENS]:+.1f} from the donor fine-tuned on the same tokens.",
            f"- From one cycle to the next, up to the trained {trained}, accuracy falls by at most {max(0.0, up):.1f} points up to {at}; "
            f"the largest fall, as a mean over all difficulties, is {mean_up:+.1f}.",
            f"- From there to {2 * trained} cycles it falls by at most {max(0.0, twice):.1f} points up to {at}; {mean_twice:+.1f} as that "
            "mean.",
        ]
    )


def _falls(runs: Runs, difficulty: str) -> tuple[float, float]:
    """Largest fall from a cycle to the next up to the trained one, and the fall from there to twice as many: points, means over seeds."""
    trained = runs[0]["trained_cycles"]
    share = [0.0] + [100 * statistics.mean(_at(run, H, difficulty) for run in runs) for H in range(1, 2 * trained + 1)]
    return max(share[c] - share[c + 1] for c in range(1, trained)), share[trained] - min(share[trained:])


# Losses


def losses(found: dict[str, Any], groups: Sequence[str]) -> str:
    """Nats per token, and the paired difference from the fine-tuned donor of the same seed."""
    tuned = {run["seed"]: run["figures"]["donor"]["windows"] for run in found["runs"] if run["name"] == SAME_TOKENS}
    lines = []
    for name, runs in _rows(found, groups).items():
        trained = runs[0]["trained_cycles"]
        shown = [None] if trained is None else sorted({1, trained, 2 * trained})
        cells = [_spread([run["figures"]["donor" if H is None else str(H)]["loss"] for run in runs], ".4f") for H in shown]
        if trained == 1:
            cells.insert(0, cells[0])
        cells = ["", cells[0], ""] if trained is None else cells
        lines.append([name, str(len(runs)), _flops(runs, found), *cells, *(_against(runs, tuned, H) for H in (1, trained or 1))])
    head = ["row", "seeds", "FLOPs", "cycle 1", "trained depth", "twice", "cycle 1 against the donor", "trained depth against the donor"]
    return _table(head, lines)


def kept(found: dict[str, Any], groups: Sequence[str]) -> str:
    """The loss of trained adapters at 0 cycles, beside that of their donor."""
    donor = next(run["figures"]["donor"] for run in found["runs"] if run["name"] == "donor as it is")
    runs = [run for run in found["runs"] if "0" in run["figures"]]
    if not runs:
        return "(No adapter has been trained yet.)"
    losses = sorted({str(run["figures"]["0"]["loss"]) for run in runs})
    apart = max(abs(a - b) for run in runs for a, b in zip(run["figures"]["0"]["windows"], donor["windows"], strict=True))
    return (
        f"At 0 cycles, after training, the loss of each of {len(runs)} adapters is {', '.join(losses)}; "
        f"the donor's is {donor['loss']}; the largest difference on a window is {apart:g}."
    )


def _against(runs: Runs, tuned: dict[int, list[float]], H: int) -> str:
    """Mean over seeds, with the standard error over windows of the first."""
    if runs[0]["name"] == SAME_TOKENS or not runs[0]["flops"]:
        return ""
    paired = []
    for run in runs:
        own = run["figures"].get("donor") or run["figures"][str(H)]
        paired.append([a - b for a, b in zip(own["windows"], tuned[run["seed"]], strict=True)])
    error = statistics.stdev(paired[0]) / math.sqrt(len(paired[0]))
    return f"{statistics.mean(statistics.mean(each) for each in paired):+.4f} ± {error:.4f}"


# Exits


def exits(found: dict[str, Any], groups: Sequence[str]) -> str:
    """Early exit beside fixed depths: what it costs, what is right, and what fixed depth gives for the same compute."""
    lines = []
    for run, row in _exits(found, groups):
        fixed = row["exit"] == "fixed"
        name = f"{row['cycles']} cycles" if fixed else f"{row['exit']}, {row['budget']:.0%} of the compute"
        same = ["", "", ""] if fixed else [f"{row['thinks']:.0%}", f"{100 * row['fixed_right']:.1f}", f"{row['fixed_loss']:.4f}"]
        lines.append([run["name"], name, f"{row['applications']:.1f}", f"{100 * row['right']:.1f}", f"{row['loss']:.4f}", *same])
    if not lines:
        return "(No such row has been run yet.)"
    head = ["row", "exit", "layers per token", "right, %", "nats", "take more than 1 cycle", "fixed depth for the same: right", "nats"]
    return _table(head, lines)


def changes(found: dict[str, Any], groups: Sequence[str]) -> str:
    """What each cycle does to the tokens of the one before, in % of the scored tokens."""
    lines = []
    for run, row in _exits(found, groups):
        if row["exit"] == "fixed" and row["cycles"] > 1:
            shares = [row["mended"], row["spoiled"], row["better"], row["worse"], 1 - row["better"] - row["worse"]]
            lines.append([run["name"], f"{row['cycles'] - 1} to {row['cycles']}", *(f"{100 * share:.1f}" for share in shares)])
    if not lines:
        return "(No such row has been run yet.)"
    return _table(["row", "cycle", "mended", "spoiled", "better by .05 nats", "worse by .05 nats", "left as it was"], lines)


def _exits(found: dict[str, Any], groups: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(run, row) for run in found["runs"] if run["group"] in groups for row in run.get("exits", ())]


# Setting


def setting(found: dict[str, Any], groups: Sequence[str]) -> str:
    """How it was made."""
    machine, seconds = found["machine"], sum(run["seconds"] for run in found["runs"] if "machine" not in run)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = machine["gpu"] or machine["cpu"]
    donor = ", ".join(f"{key} {value}" for key, value in found["donor"].items() if key != "seconds")
    elsewhere: dict[str, list[str]] = {}
    for run in found["runs"]:  # rows that were added later, on another machine
        if "machine" in run:
            where = f"{run['machine']['gpu'] or run['machine']['cpu']}, commit {(run['machine']['commit'] or 'unknown')[:10]}"
            where += "" if run.get("bf16", True) else ", in float32"
            elsewhere.setdefault(where, []).append(run["name"])
    added = "".join(f" Rows run on {where}: {'; '.join(dict.fromkeys(names))}." for where, names in elsewhere.items())
    return (
        f"Donor: {donor}. Fine-tuning: {found['steps']} steps of {found['batch_size']} rows of {found['settings']['seq_len']} tokens, "
        f"learning rate {found['settings']['lr']:g}. {seconds / 60:.0f} minutes of training on {device}; {versions}; "
        f"commit {(machine['commit'] or 'unknown')[:10]}.{added}"
    )


KINDS: dict[str, Callable[[dict[str, Any], Sequence[str]], str]] = {
    "accuracy": accuracy, "cycles": cycles, "grid": grid, "verdict": verdict, "losses": losses, "kept": kept, "setting": setting,
    "exits": exits, "changes": changes,
}  # fmt: skip

"""The bundled donor, made recursive and fine-tuned on a small fixed budget of real text, with an ablation of each choice.

    python recipes/shipped_donor.py                      # everything: three seeds, the donor beside them, the ablations
    python recipes/shipped_donor.py --minutes 20         # starts no further run after 20 minutes of CPU time

The text is the language reference that every CPython carries (`pydoc_data.topics`), divided by topics into three: what is trained on, what
the start gain and the settings below were chosen on (validation), and what only the figures are measured on (test). Every run has the same
tokens, and a run of the same seed has them in the same order. The donor fine-tuned on the same tokens is the baseline.

Writes shipped_donor.json and shipped_donor.md, which is made from it; after every run, so nothing is lost when it is stopped. The exit
status is 1 if at any seed the loss of a cycle did not fall, below the start of the training and below the donor as it is, or if a later
cycle is worse than an earlier one by more than TOLERANCE.

Units: nats per token, tokens, seconds of CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from recursify import convert
from recursify.checkpoints.donor import open_donor
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.data.loading import tokenize
from recursify.demo.prose import donor_folder
from recursify.evaluation import text_loss
from recursify.evaluation.statistics import standard_error
from recursify.training import TrainSettings, fit
from recursify.utils.machine import machine, versions

TOLERANCE = 0.005  # nats by which a later cycle may be worse than an earlier one
TEST_EVERY = 3  # windows of the test text: every third is measured, so that measuring takes less time than training
DEPTHS = (1, 2, 3, 4, 5)  # measured; 4 and 5 are deeper than what is trained
SHAPE: dict[str, Any] = {"keep_donor": True, "L_layers": 2, "H_cycles": 3, "L_cycles": 1}
CHOSEN: dict[str, Any] = {
    "seq_len": 128, "batch_size": 8, "lr": 3e-4, "gain_lr": 3e-3, "warmup_steps": 10, "enable_deep_supervision": True,
    "monotone_weight": 0.0,
}  # fmt: skip
MAIN, DONOR = "as chosen", "donor fine-tuned"
# Each differs from CHOSEN in what it names, and in nothing else.
ABLATIONS: dict[str, dict[str, Any]] = {
    "backprop cycle": {"backprop": "cycle"},
    "last cycle scored alone": {"enable_deep_supervision": False},
    "backprop last (scores the last cycle alone)": {"enable_deep_supervision": False, "backprop": "last"},
    "Muon": {"optimizer": "muon"},
    "start gain 0": {"start_gain": 0.0},
    "monotone term 0.5": {"monotone_weight": 0.5},
    "self-distillation 0.5": {"self_distill_weight": 0.5},
    "2, 3 or 4 cycles drawn per step": {"cycle_choices": (2, 3, 4)},
    "learning rates x 1/3": {"lr": 1e-4, "gain_lr": 1e-3},
    "learning rates x 3": {"lr": 1e-3, "gain_lr": 1e-2},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=140, help="optimizer steps of each run, of 8 sequences of 128 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the chosen settings and of the donor; ablations have the first")
    parser.add_argument("--minutes", type=float, default=math.inf, help="CPU minutes after which no further run begins")
    parser.add_argument("--ablations", nargs="*", default=list(ABLATIONS), metavar="NAME", help="which of them; none for the seeds alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the two files")
    args = parser.parse_args(argv)
    if unknown := set(args.ablations) - set(ABLATIONS):
        parser.error(f"--ablations: expected some of {list(ABLATIONS)}, got {sorted(unknown)}")
    return args


@dataclass(frozen=True)
class Text:
    """The three parts, in blocks of the length that is trained on."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_text(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Text:
    """Of every twelve topics in alphabetical order the third is for testing, the sixth and the last are for validation."""
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {"train": [], "test": [], "validation": []}
    for i, name in enumerate(sorted(topics)):
        parts[{2: "test", 5: "validation", 11: "validation"}.get(i % 12, "train")].append(topics[name])
    seen = set(parts["train"])  # a few topics have two names
    held = {part: [text for text in dict.fromkeys(parts[part]) if text not in seen] for part in ("validation", "test")}
    held["test"] = [text for text in held["test"] if text not in set(held["validation"])]
    tables = {part: Dataset.from_dict({"text": texts}) for part, texts in (parts | held).items()}
    blocks = {part: tokenize(table, tokenizer, seq_len) for part, table in tables.items()}
    blocks["test"] = blocks["test"].select(range(0, blocks["test"].num_rows, TEST_EVERY))
    return Text(**blocks)


@dataclass
class AtStart(TrainerCallback):
    """The gain and the losses with which training begins, when the start gain has been chosen."""

    model: Any
    test: Dataset
    losses: list[float] = field(default_factory=list)
    gain: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = losses_of(self.model, self.test).mean(dim=1).tolist()
        if hasattr(self.model.config, "H_cycles"):
            self.gain = round(self.model.model.recursion.inject_H.gains(torch.float32)[0].mean().item(), 6)


def losses_of(model: Any, blocks: Dataset) -> torch.Tensor:
    """`[depths, windows]`, of a donor `[1, windows]`."""
    return text_loss.window_losses(model, blocks, DEPTHS if hasattr(model.config, "H_cycles") else ())


def run_once(name: str, changes: dict[str, Any], seed: int, steps: int, text: Text, tokenizer: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """One run: its record, and its losses on the test windows at the trained depth."""
    print(f"{name}, seed {seed}: {steps} steps", file=sys.stderr, flush=True)
    torch.manual_seed(seed)  # H_init and L_init
    folder = str(donor_folder())
    model: Any = open_donor(folder).load() if name == DONOR else convert(folder, **SHAPE)
    start = AtStart(model.float().eval(), text.test)
    settings = TrainSettings(
        checkpoint=folder, max_steps=steps, seed=seed, device="cpu", generate_every=0, save_every=0, log_every=20, **CHOSEN | changes
    )
    began = time.process_time()
    result = fit(model, tokenizer, text.train, text.validation, settings, console=False, callbacks=[start])
    if result.interrupted:
        sys.exit(130)
    seconds = time.process_time() - began
    losses = losses_of(model, text.test)
    trained = SHAPE["H_cycles"] - 1 if len(losses) > 1 else 0
    row = {
        "name": name, "changes": changes, "seed": seed, "steps": result.steps, "tokens": result.tokens, "start_gain": start.gain,
        "before": start.losses, "after": losses.mean(dim=1).tolist(), "standard_error": standard_error(losses[trained]),
        "validation": {key: value for key, value in result.history[-1].items() if key.startswith("eval_loss_cycle")},
        "cpu_seconds": round(seconds, 1),
        "history": [entry for entry in result.history if "loss" in entry],
    }  # fmt: skip
    return row, losses[trained]


def mean_and_error(values: torch.Tensor) -> dict[str, float | None]:
    return {"mean": values.mean().item(), "standard_error": standard_error(values)}


def verdict(runs: list[dict[str, Any]], as_is: float) -> dict[str, Any]:
    """Whether the two conditions hold at every seed of the chosen settings; False if a run is missing."""
    H = SHAPE["H_cycles"]
    own = [run for run in runs if run["name"] == MAIN]
    falls = [max(after - min(before, as_is) for before, after in zip(run["before"][:H], run["after"][:H], strict=True)) for run in own]
    worse = [max(run["after"][later] - run["after"][c] for c in range(H) for later in range(c + 1, H)) for run in own]
    return {
        "seeds": [run["seed"] for run in own],
        "largest_change_of_a_cycle": max(falls, default=None),
        "every_cycle_falls": bool(own) and max(falls) < 0,
        "largest_rise_from_an_earlier_cycle": max(worse, default=None),
        "later_cycles_not_worse": bool(own) and max(worse) <= TOLERANCE,
    }


def holds(found: dict[str, Any]) -> bool:
    return bool(found["every_cycle_falls"] and found["later_cycles_not_worse"])


def render(found: dict[str, Any]) -> str:
    """The page, from the JSON alone."""
    H, check = found["shape"]["H_cycles"], found["verdict"]
    depths = " | ".join(f"cycle {d}" + ("" if d <= H else " (not trained)") for d in found["depths"])
    lines = [
        "# The donor that ships, trained as a recursive model", "",
        f"Made by `python recipes/shipped_donor.py` in {sum(run['cpu_seconds'] for run in found['runs']) / 60:.0f} minutes of CPU time. "
        f"Every figure is in shipped_donor.json.", "",
        f"- Donor: recursify/demo/donors/prose; plan: {found['shape']}",
        f"- Text: the language reference of Python {found['versions']['Python']}; tokens: "
        + ", ".join(f"{count:,} {part}" for part, count in found["tokens"].items()),
        f"- Each run: {found['steps']} steps; settings: {found['settings']}",
        f"- Machine: {found['machine']}; " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()), "",
        "Losses are nats per token on the test text, which no setting was chosen on. "
        f"The donor as it is: {found['donor_as_is']:.4f}.", "",
        f"| run | seed | start gain | {depths} | against the donor fine-tuned | CPU seconds |",
        f"|---|---|---|{'---|' * len(found['depths'])}---|---|",
        *(_row(run, len(found["depths"])) for run in found["runs"]), "",
        f"Against the donor fine-tuned: cycle {H} minus the donor of the same seed, with the standard error of the mean difference over "
        "test windows. Ablations differ from the chosen settings in what they name alone.", "",
        "Before training, with the start gain (seed by seed): "
        + "; ".join(", ".join(f"{loss:.4f}" for loss in run["before"][:H]) for run in found["runs"] if run["name"] == MAIN) + ".", "",
        f"- The loss of every cycle falls: **{_yes(check['every_cycle_falls'])}** "
        f"(smallest fall {_number(check, 'largest_change_of_a_cycle', -1)} nats)",
        f"- No later cycle is worse than an earlier one by more than {found['tolerance']}: **{_yes(check['later_cycles_not_worse'])}** "
        f"(largest rise {_number(check, 'largest_rise_from_an_earlier_cycle')} nats)",
    ]  # fmt: skip
    if found["not_run"]:
        lines += ["", f"Not run, for want of time: {', '.join(found['not_run'])}."]
    return "\n".join(lines) + "\n"


def _row(run: dict[str, Any], columns: int) -> str:
    losses = [f"{loss:.4f}" for loss in run["after"]]
    losses += [""] * (columns - len(losses))
    gain = "" if run["start_gain"] is None else f"{run['start_gain']:g}"
    against = run["against_donor"]
    difference = "" if against is None else f"{against['mean']:+.4f} ± {against['standard_error']:.4f}"
    return f"| {run['name']} | {run['seed']} | {gain} | {' | '.join(losses)} | {difference} | {run['cpu_seconds']:.0f} |"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _number(found: dict[str, Any], name: str, sign: int = 1) -> str:
    return "unknown" if found[name] is None else f"{sign * found[name]:.4f}"


def write(found: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shipped_donor.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "shipped_donor.md").write_text(render(found), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    tokenizer = load_tokenizer(str(donor_folder()))
    text = load_text(tokenizer, CHOSEN["seq_len"])
    donor: Any = open_donor(str(donor_folder())).load(dtype=torch.float32).eval()
    found: dict[str, Any] = {
        "shape": SHAPE, "settings": CHOSEN, "steps": args.steps, "depths": DEPTHS, "tolerance": TOLERANCE, "machine": machine(),
        "versions": dict(versions()), "tokens": {part: rows.num_rows * CHOSEN["seq_len"] for part, rows in vars(text).items()},
        "donor_as_is": losses_of(donor, text.test).mean().item(), "runs": [],
    }  # fmt: skip
    waiting: list[tuple[str, dict[str, Any], int]] = [(name, {}, seed) for seed in range(args.seeds) for name in (DONOR, MAIN)]
    waiting += [(name, ABLATIONS[name], 0) for name in args.ablations]
    donors: dict[int, torch.Tensor] = {}
    while waiting and time.process_time() < 60 * args.minutes:
        name, changes, seed = waiting.pop(0)
        row, losses = run_once(name, changes, seed, args.steps, text, tokenizer)
        if name == DONOR:
            donors[seed] = losses
        row["against_donor"] = None if name == DONOR else mean_and_error(losses - donors[seed])
        found["runs"].append(row)
        found["verdict"] = verdict(found["runs"], found["donor_as_is"])
        found["not_run"] = [f"{name} (seed {seed})" for name, _, seed in waiting]
        write(found, args.output)
    print(render(found))
    return 0 if holds(found["verdict"]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What writing costs, each time beside plain decoding in the same run: context, depth, self-speculation, halting, and whether texts agree.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/decoding.py          # a CPU core; about a quarter of an hour of it
    python benchmarks/decoding.py --device cuda                           # a GPU, the real sizes
    python benchmarks/decoding.py --quick                                 # toy sizes: shows that it runs, measures nothing

context      time of a token at a context of 1,024 over that at 64: the donor under transformers' own cache, and the recursive model under
             each cache policy. Passes of one token each, in turn.
depth        tokens per second of `generate`, recursive over donor, times the ratio of layer applications per token: 1 where a recursive
             model pays for its applications and for nothing else.
speculation  `generate(draft_cycles=k)` over plain `generate`, on the model that `recursify demo` ends with and texts it was not trained on:
             tokens per second, how many drafted tokens were accepted, and whether the tokens are the same.
halting      the same model: layer applications saved at a threshold that costs at most 0.01 nats. The threshold is found on one half of the
             held-out text, loss and applications are those of the other half; tokens per second over full depth, too.
agreement    share of equal tokens, float32 and bfloat16, of texts that should be the same: cached and uncached, speculative and plain,
             in a batch and alone. Random weights with large gains, which is harder than a trained model.

Times are taken in turn in one process; a pair gives a ratio, and medians are given with least and most. Writes decoding-DEVICE.json and,
made from it, decoding-DEVICE.md. Exit status 1 if a bound is missed. Units: seconds, tokens, nats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from record import earlier, load, provenance, spread
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

from recursify import RecursiveLLM, checkpoint
from recursify.configuration_recursive_llm import from_donor
from recursify.data import DataSettings, load_documents, tokenize
from recursify.decoding_recursive_llm import HALT_CRITERIA
from recursify.demo import DemoSettings
from recursify.halting import measure
from recursify.plan import make_plan

DEPTH_BOUND, SPECULATION_AIM, HALTING_AIM, HALTING_NATS = 0.85, 1.5, 0.30, 0.01
HALF_B = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}  # Qwen2-0.5B
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
PARTS = ("context", "depth", "speculation", "halting", "agreement")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        widths, donor_layers, vocabulary: Of the random donor; the recursive model keeps it, with 4 layers looped, 3 cycles of 1 + 1.
        contexts: Short and long.
        passes: Timed tokens per measurement; `rounds` of them in turn.
        new_tokens, prompts: Texts of self-speculation.
        halting_windows: Windows of 128 tokens of each half of the held-out text.
    """

    widths: dict[str, int]
    donor_layers: int
    vocabulary: int
    contexts: tuple[int, int]
    passes: int
    rounds: int
    new_tokens: int
    prompts: int
    halting_windows: int


SIZES = {
    "quick": Sizes(TOY, 6, 512, (8, 32), 2, 2, 8, 2, 2),
    "cpu": Sizes(HALF_B, 24, 32_000, (64, 1024), 6, 5, 96, 10, 96),
    "cuda": Sizes(HALF_B, 24, 151_936, (64, 1024), 64, 9, 256, 10, 96),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--quick", action="store_true", help="toy sizes; bounds are not judged")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="which of the parts; the others stay as they were")
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="folder of a finished `recursify demo`; run there if it is not"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the two files")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return args


def timed(device: torch.device, work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """Seconds that a call took, and what it returned."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work(*args, **kwargs)
    wait()
    return time.perf_counter() - start, result


def pair(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float32, gain: float = 0.2, std: float = 0.02) -> tuple[Any, Any]:
    """A random donor, and the recursive model that keeps it."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=sizes.vocabulary, num_hidden_layers=sizes.donor_layers, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
        max_position_embeddings=4096, initializer_range=std, **sizes.widths,
    )  # fmt: skip
    donor = AutoModelForCausalLM.from_config(config)
    plan = make_plan("random", sizes.donor_layers, L_layers=min(4, sizes.donor_layers - 2), keep_donor=True)
    shape = {"prelude_layers": len(plan.prelude), "L_layers": len(plan.loop), "coda_layers": len(plan.coda)}
    model = RecursiveLLM(from_donor(config, plan.indices, H_cycles=3, L_cycles=1, gain_init=gain, **shape))
    model.load_state_dict(donor.state_dict(), strict=False)
    return donor.to(device, dtype).eval(), model.to(device, dtype).eval()


def ids(model: Any, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)


def write(model: Any, prompt: torch.Tensor, new: int, **kwargs: Any) -> Any:
    """A `generate` of exactly so many tokens, greedy unless asked otherwise."""
    model.generation_config.eos_token_id = None  # nothing ends a text early, and no processor is needed to see to it
    given = {"do_sample": False, "max_new_tokens": new, "attention_mask": torch.ones_like(prompt)} | kwargs
    return model.generate(prompt, return_dict_in_generate=True, pad_token_id=0, **given)


@torch.no_grad()
def context(sizes: Sizes, device: torch.device, demo: Path) -> list[dict[str, Any]]:
    donor, model = pair(sizes, device)
    runs: list[tuple[str, Any, dict[str, Any], Callable[[], Any]]] = [
        ("donor", donor, {}, lambda: None),
        ("recursive, full", model, {}, lambda: None),
        ("recursive, full, in transformers' DynamicCache", model, {}, lambda: DynamicCache(config=model.config)),
        ("recursive, last", model, {"cache_policy": "last"}, lambda: None),
    ]
    pasts: dict[str, list[Any]] = {}
    for name, network, kwargs, make in runs:
        prompts = [ids(network, 1, n) for n in sizes.contexts]
        pasts[name] = [network(p, past_key_values=make(), use_cache=True, logits_to_keep=1, **kwargs).past_key_values for p in prompts]
    times: dict[str, list[list[float]]] = {name: [[], []] for name in pasts}
    for turn in range(sizes.rounds * sizes.passes):
        for name, network, kwargs, _ in runs:
            for which, past in enumerate(pasts[name]):
                token = ids(network, 1, 1, seed=turn)
                times[name][which].append(timed(device, network, token, past_key_values=past, use_cache=True, **kwargs)[0])
    return [
        {
            "model": name,
            "contexts": sizes.contexts,
            "seconds": [statistics.median(of) for of in both],
            "long_over_short": spread([long / short for short, long in zip(*both, strict=True)]),
        }
        for name, both in times.items()
    ]


def depth(sizes: Sizes, device: torch.device, demo: Path) -> list[dict[str, Any]]:
    """Random weights of the real widths, and the small model that ships."""
    rows = []
    shipped, _ = demo_models(demo, device)
    for name, (donor, model) in (("random, Qwen2-0.5B widths", pair(sizes, device)), ("the demo's model and donor", shipped)):
        small = "demo" in name
        new = sizes.passes * (8 if small else 1) + 2
        for H in (1, 3):
            applications = model.config.depth(H), donor.config.num_hidden_layers
            ratios = []
            for _ in range(sizes.rounds + 1):
                prompt = ids(model, 1, 16)
                theirs, _ = timed(device, write, donor, prompt, new)
                ours, _ = timed(device, write, model, prompt, new, H_cycles=H)
                ratios.append(theirs / ours * applications[0] / applications[1])
            rows.append({"model": name, "H_cycles": H, "applications": applications, "per_application": spread(ratios[1:])})
    return rows


def demo_models(folder: Path, device: torch.device) -> tuple[tuple[Any, Any], Any]:
    """((donor, recursive model), tokenizer) of a finished demo, which is run if it is not there."""
    from recursify import demo_text
    from recursify.donor import open_donor
    from recursify.stages import Clock

    if not (folder / "recursive.pt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        demo_text.run(folder, DemoSettings.steps, DemoSettings.seed, Clock())
    found = checkpoint.load(folder / "recursive.pt")
    donor = open_donor(str(demo_text.donor_folder())).load(dtype=torch.float32).eval().to(device)
    return (donor, found.model.float().eval().to(device)), found.tokenizer


def held_out(folder: Path, tokenizer: Any, size: int) -> torch.Tensor:
    """`[windows, size]` of the demo's validation text."""
    documents = load_documents(DataSettings(dataset_name=str(folder / "language_reference")))
    return torch.tensor(tokenize(documents.validation, tokenizer, size)["input_ids"])


def speculation(sizes: Sizes, device: torch.device, demo: Path) -> list[dict[str, Any]]:
    (_, model), tokenizer = demo_models(demo, device)
    prompts = held_out(demo, tokenizer, 32)[::7][: sizes.prompts].to(device)
    rows = []
    for rows_at_once, sample in ((1, False), (1, True), (8, False)):
        batches = [prompts[i : i + rows_at_once] for i in range(0, len(prompts) - rows_at_once + 1, rows_at_once)] or [prompts]
        choice = {"do_sample": True, "temperature": 0.7, "top_k": 0} if sample else {}
        for k in range(model.config.H_cycles):
            ratios, drafted, accepted, same, total = [], 0, 0, 0, 0
            for turn, batch in enumerate([batches[0], *batches]):
                torch.manual_seed(turn)
                plain, expected = timed(device, write, model, batch, sizes.new_tokens, **choice)
                fast, found = timed(device, write, model, batch, sizes.new_tokens, draft_cycles=k, **choice)
                if turn == 0:  # to warm up
                    continue
                ratios.append(plain / fast)
                drafted, accepted = drafted + found.drafted, accepted + found.accepted
                same += int((found.sequences == expected.sequences)[:, 32:].sum())
                total += batch.shape[0] * sizes.new_tokens
            rows.append(
                {"rows": rows_at_once, "sampled": sample, "draft_cycles": k, "speed_up": spread(ratios), "accepted": accepted / drafted,
                 "equal_tokens": None if sample else same / total}
            )  # fmt: skip
    return rows


def halting(sizes: Sizes, device: torch.device, demo: Path) -> dict[str, Any]:
    (_, model), tokenizer = demo_models(demo, device)
    windows = held_out(demo, tokenizer, 128)[: 2 * sizes.halting_windows].to(device)
    first, second = windows[::2], windows[1::2]
    full = measure(model, second, "q_head")
    rows = []
    for criterion in HALT_CRITERIA:
        threshold = affordable(model, first, criterion)
        found = measure(model, second, criterion, threshold)
        ratios = []
        for start in [0, *range(min(len(second), 6))]:
            prompt = second[start : start + 1, :32]
            plain, _ = timed(device, write, model, prompt, sizes.new_tokens)
            halted, _ = timed(device, write, model, prompt, sizes.new_tokens, halt=criterion, halt_threshold=threshold)
            ratios.append(plain / halted)
        rows.append({**asdict(found), "saved": 1 - found.share, "nats": found.loss - full.loss, "speed_up": spread(ratios[1:])})
    return {"full": asdict(full), "trained_head": bool(model.model.recursion.q_head.bias.item() != 0), "rows": rows}


def affordable(model: Any, blocks: torch.Tensor, criterion: str) -> float:
    """The threshold that saves most at no more than HALTING_NATS, of a range of them."""
    points = [i / 20 for i in range(21)] if criterion == "q_head" else [0.0, *(10 ** (i / 2) for i in range(-10, 4)), float("inf")]
    full = measure(model, blocks, criterion)
    found = [measure(model, blocks, criterion, threshold) for threshold in points]
    fit = [one for one in found if one.loss - full.loss <= HALTING_NATS]
    return min(fit, key=lambda one: one.share).threshold  # type: ignore[return-value]  # "never" fits always


@torch.no_grad()
def agreement(sizes: Sizes, device: torch.device, demo: Path) -> list[dict[str, Any]]:
    small = Sizes(**{**vars(sizes), "widths": TOY, "donor_layers": 6, "vocabulary": 512})
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        _, model = pair(small, device, dtype, gain=0.3, std=0.15)
        prompts, new = ids(model, 16, 24), 4 if sizes.new_tokens < 16 else 48
        plain = write(model, prompts, new).sequences[:, 24:]
        alone = torch.cat([write(model, row.unsqueeze(0), new).sequences for row in prompts])[:, 24:]
        others = {
            "uncached": write(model, prompts, new, use_cache=False).sequences[:, 24:],
            "self-speculation, 0 cycles": write(model, prompts, new, draft_cycles=0).sequences[:, 24:],
            "self-speculation, 1 cycle": write(model, prompts, new, draft_cycles=1).sequences[:, 24:],
            "each row alone": alone,
        }
        for name, tokens in others.items():
            # after the first different token two texts have nothing to do with each other
            until = (tokens == plain).long().cumprod(dim=1).sum().item() / tokens.numel()
            rows.append({"dtype": str(dtype).removeprefix("torch."), "compared": name, "equal_tokens": until})
    return rows


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the measurements must hold, and what they aim at, which does not fail the run."""
    checks = []

    def check(what: str, value: float, bound: float, must: bool = True) -> None:
        checks.append({"what": what, "value": value, "bound": bound, "must": must, "holds": value >= bound})

    for row in found.get("depth", []):
        check(f"depth: {row['model']}, H_cycles {row['H_cycles']}, per application", row["per_application"]["median"], DEPTH_BOUND)
    for row in found.get("agreement", []):
        if row["dtype"] == "float32":
            check(f"agreement: {row['compared']}, float32", row["equal_tokens"], 1.0)
    for row in found.get("speculation", []):
        if row["equal_tokens"] is not None:
            check(f"speculation: {row['rows']} rows, {row['draft_cycles']} cycles, equal tokens", row["equal_tokens"], 1.0)
    if "speculation" in found:
        check("speculation: the best speed-up", max(row["speed_up"]["median"] for row in found["speculation"]), SPECULATION_AIM, must=False)
    if "halting" in found:
        within = [row for row in found["halting"]["rows"] if row["nats"] <= HALTING_NATS]
        check("halting: most saved within 0.01 nats", max((row["saved"] for row in within), default=0.0), HALTING_AIM, must=False)
    return checks


def render(found: dict[str, Any]) -> str:
    """The page."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = ["# What writing costs", "", "Made by `benchmarks/decoding.py`, which says how each figure is taken.", ""]
    lines += [f"{machine['gpu'] or machine['cpu']}; {versions}; commit {machine['commit']}; load {machine['load']}.", ""]
    if found["quick"]:
        lines += ["Toy sizes: these figures mean nothing.", ""]
    if rows := found.get("context"):
        short, long = rows[0]["contexts"]
        lines += ["## Time of a token by context", "", f"| | ms at {short} | ms at {long} | {long} over {short} |", "|---|---|---|---|"]
        lines += [
            f"| {r['model']} | {1e3 * r['seconds'][0]:.1f} | {1e3 * r['seconds'][1]:.1f} | {_ratio(r['long_over_short'])} |" for r in rows
        ]
    if rows := found.get("depth"):
        lines += [
            "",
            "## Tokens per second over the donor's, per layer application",
            "",
            "| | H_cycles | applications, donor's | ratio |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['model']} | {r['H_cycles']} | {r['applications'][0]}, {r['applications'][1]} | {_ratio(r['per_application'])} |"
            for r in rows
        ]
    if rows := found.get("speculation"):
        lines += [
            "",
            "## Self-speculation over plain decoding",
            "",
            "| rows | choice | draft cycles | speed-up | accepted | equal tokens |",
            "|---|---|---|---|---|---|",
        ]
        for r in rows:
            equal = "-" if r["equal_tokens"] is None else f"{r['equal_tokens']:.1%}"
            how = "sampled" if r["sampled"] else "greedy"
            lines += [f"| {r['rows']} | {how} | {r['draft_cycles']} | {_ratio(r['speed_up'])} | {r['accepted']:.1%} | {equal} |"]
    if halted := found.get("halting"):
        lines += ["", "## Halting, at a threshold that costs at most 0.01 nats", "", f"Full depth: {halted['full']['loss']:.4f} nats."]
        if not halted["trained_head"]:
            lines += ["`q_head` of this model was not trained."]
        lines += ["", "| criterion | threshold | applications saved | nats | tokens by cycle | speed-up |", "|---|---|---|---|---|---|"]
        for r in halted["rows"]:
            cycles = ", ".join(f"{cycle}: {count:,}" for cycle, count in r["cycles"].items())
            lines += [
                f"| {r['criterion']} | {r['threshold']:.3g} | {r['saved']:.1%} | {r['nats']:+.4f} | {cycles} | {_ratio(r['speed_up'])} |"
            ]
    if rows := found.get("agreement"):
        lines += [
            "",
            "## Tokens equal to plain cached decoding, up to the first difference",
            "",
            "| | float32 | bfloat16 |",
            "|---|---|---|",
        ]
        by = {(r["compared"], r["dtype"]): r["equal_tokens"] for r in rows}
        lines += [
            f"| {name} | {by[name, 'float32']:.1%} | {by[name, 'bfloat16']:.1%} |" for name in dict.fromkeys(r["compared"] for r in rows)
        ]
    lines += ["", "## Bounds", "", "| | value | bound | |", "|---|---|---|---|"]
    for c in found["checks"]:
        verdict = "holds" if c["holds"] else "MISSED" if c["must"] else "aim missed"
        lines += [f"| {c['what']} | {c['value']:.3f} | {c['bound']:.2f} | {verdict} |"]
    return "\n".join(lines) + "\n"


def _ratio(of: dict[str, float]) -> str:
    return f"{of['median']:.2f} ({of['least']:.2f} to {of['most']:.2f})"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sizes, device = SIZES["quick" if args.quick else args.device], torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"decoding-{'quick' if args.quick else args.device}"
    here: dict[str, Any] = {"machine": provenance(device), "quick": args.quick, "sizes": asdict(sizes)}
    found = earlier(stem.with_suffix(".json"), set(PARTS) - set(args.only)) | here
    work = {"context": context, "depth": depth, "speculation": speculation, "halting": halting, "agreement": agreement}
    for part in args.only:
        print(part, flush=True)
        found[part] = work[part](sizes, device, args.demo)
        found.setdefault("measured", {})[part] = {"date": here["machine"]["date"], "commit": here["machine"]["commit"]}
    found["load_after"], found["checks"] = load(), judge(found)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(render(found), encoding="utf-8")
    print(render(found))
    return 0 if args.quick or all(check["holds"] or not check["must"] for check in found["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Pretrain the bundled state-tracking donor from scratch on synthetic permutation sequences.

    python -m recipes.demo_tracker

A Qwen2-architecture model that reads a sequence of permutations of three things and predicts their product after each: state tracking in
the permutation group S3 (`recursify.data.tasks`). It is trained on sequences of length 8 only, so that it fails on longer ones, which
`recursify demo` is to show. Its tokenizer has a token for each permutation and each state, and encodes all other text byte by byte.
Held-out sequences give the figures of the model card, which is generated.

Run it from the root of the checkout, with the project installed (`make install`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from recipes.demo_donor import hardware, train_tokenizer
from recursify.data.question_rows import question_rows
from recursify.data.tasks import as_text, generate
from recursify.evaluation.accuracy import evaluate_questions
from recursify.inference.options import DecodingOptions
from recursify.training import TrainSettings, fit

LETTERS = 8
FRAME = 7  # tokens besides the permutations: "Question", ":", a new line, "Answer", ":", the answer, the end
VOCABULARY = 320  # bytes, permutations, states and the two words; all merges of such texts are fewer
ASKED = 500
PACKAGED = Path(__file__).resolve().parent.parent / "recursify" / "demo" / "donors" / "tracker"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PACKAGED, help="folder of the finished donor")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=64, help="words per optimizer step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the words")
    return parser.parse_args()


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.06, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",  # at these lengths faster than sdpa
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def pretrain(model: Any, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, object]:
    words = generate("permutations", LETTERS, args.steps * args.batch_size // 4, args.seed)
    blocks = question_rows(words, tokenizer, LETTERS + FRAME)
    settings = TrainSettings(
        checkpoint="", seq_len=LETTERS + FRAME, batch_size=args.batch_size, max_steps=args.steps, lr=1.5e-3, lr_schedule="wsd",
        warmup_steps=100, weight_decay=0.1, bf16=True, generate_every=0, save_every=0, log_every=100, seed=args.seed,
    )  # fmt: skip
    began = time.monotonic()
    fitted = fit(model, tokenizer, blocks, blocks.select(range(args.batch_size)), settings, console=False)
    minutes = (time.monotonic() - began) / 60
    return {
        "training sequences": f"{len(words):,} of {LETTERS} letters",
        "training": f"{minutes:.1f} minutes, {fitted.steps} steps of {args.batch_size} sequences, seed {args.seed}",
        "machine": f"{hardware(args.threads)}, torch {torch.__version__}, transformers {transformers.__version__}",
    }


def shares(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Accuracy by position, of the bundled model, on held-out sequences."""
    items = generate("permutations", 2 * LETTERS, ASKED, 0, split="test")
    report, _ = evaluate_questions(
        Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, "permutations", items, [DecodingOptions()], "labels"
    )
    return {f"accuracy at letter {row.difficulty}": f"{row.accuracy:.1%}" for row in report.rows if row.difficulty is not None}


def write_card(folder: Path, facts: dict[str, object]) -> None:
    item = generate("permutations", LETTERS, 1, 0)[0]
    lines = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# The tracker of recursify's demo\n\n"
        "A tiny Qwen2-architecture model, pretrained from scratch on one synthetic task, for the state-tracking half of `recursify demo`.\n"
        "It reads a sequence of letters, each a permutation of three things, and predicts their product after each letter.\n"
        f"It was trained on sequences of {LETTERS} letters, and can do nothing else.\n\n"
        f"```\n{as_text(item)}\n```\n\n"
        f"The states after each letter here are {' '.join(item.labels)}; the last one is the answer.\n\n"
        "Rebuilt by `python -m recipes.demo_tracker`; every figure below was measured by that run, on held-out sequences "
        f"of {2 * LETTERS} letters.\n\n"
        f"| fact | value |\n|---|---|\n{lines}\n",
        encoding="utf-8",
    )  # fmt: skip


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer([as_text(item) for item in generate("permutations", LETTERS, 1000, args.seed)], VOCABULARY)
    model = build_model(tokenizer)
    made = pretrain(model, tokenizer, args)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)
    write_card(args.output, {
        "architecture": f"Qwen2, {model.config.num_hidden_layers} layers, hidden {model.config.hidden_size}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes of model.safetensors": (args.output / "model.safetensors").stat().st_size,
        **made,
        **shares(args.output, tokenizer),
    })  # fmt: skip


if __name__ == "__main__":
    main()

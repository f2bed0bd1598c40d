"""Pretrain the bundled prose donor from scratch on a folder of books.

    python recipes/demo_donor.py --books FOLDER_OF_TXT --heldout heldout_valid.txt

A Qwen2-architecture model with its own byte-level BPE tokenizer, small enough to ship (bf16, under 8 MB) and to
fine-tune in a demo on two CPU cores. The budget is wall-clock time: the learning rate follows the share of the
time that has passed, so a faster machine reads more text instead of stopping early. It uses a GPU where there is one. Whole books that
were never trained on give the loss that the model card states; the card is generated.

Matrices of the layers are trained with Muon, everything else with AdamW, as in modded-nanogpt and nanochat.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

END_OF_TEXT = "<|endoftext|>"
SHARE_ALIKE = ("wikipedia_", "wikisplit_")  # licences that would follow the weights around: left out
PACKAGED = Path(__file__).resolve().parent.parent / "recursify" / "demo" / "donors" / "prose"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files, documents divided by a line <|endoftext|>")
    parser.add_argument("--heldout", default="heldout_valid.txt", help="file in that folder to measure on, never to train on")
    parser.add_argument("--output", type=Path, default=PACKAGED, help="folder of the finished donor")
    parser.add_argument("--minutes", type=float, default=55.0, help="wall-clock budget of the training")
    parser.add_argument("--vocab_size", type=int, default=4096, help="entries of the tokenizer")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens per training window")
    parser.add_argument("--batch_size", type=int, default=8, help="windows per optimizer step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the windows")
    return parser.parse_args()


def read_documents(path: Path) -> list[str]:
    return [d.strip() for d in path.read_text(encoding="utf-8").split(END_OF_TEXT) if d.strip()]


def train_tokenizer(texts: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's own normaliser and splitting rule: every text can be written, whatever its script.

    transformers gives a folder with a Qwen2 configuration these rules whatever its tokenizer.json says, so they are used from the start.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return Qwen2Tokenizer(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=2048)


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> np.ndarray:
    """All token ids in one sequence, an end-of-text token after each document."""
    ids: list[int] = []
    for row in tokenizer(documents, verbose=False)["input_ids"]:
        ids += [*row, tokenizer.eos_token_id]
    return np.array(ids, dtype=np.uint16)


def build_model(vocab_size: int, eos: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=192, intermediate_size=448, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=eos, pad_token_id=eos, initializer_range=0.02,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


class Optimizers:
    """Muon for the matrices of the layers, AdamW for the rest; one learning-rate factor for both."""

    def __init__(self, model: Qwen2ForCausalLM):
        named = dict(model.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and ".layers." in n]
        embeddings = [p for n, p in named.items() if p.ndim == 2 and ".layers." not in n]
        vectors = [p for p in named.values() if p.ndim == 1]
        self.parts = [
            torch.optim.Muon(matrices, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.05),
            torch.optim.AdamW([{"params": embeddings, "lr": 4e-3}, {"params": vectors, "lr": 4e-3}], betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, factor: float) -> None:
        for part, base in zip(self.parts, self.base, strict=True):
            for group, lr in zip(part.param_groups, base, strict=True):
                group["lr"] = lr * factor
            part.step()
            part.zero_grad(set_to_none=True)


def lr_factor(spent: float) -> float:
    """Warm up over 2 % of the time, hold, fall linearly over the last half."""
    return min(spent / 0.02, 1.0, (1.0 - spent) / 0.5) if spent < 1 else 0.0


@torch.no_grad()
def heldout_loss(model: Qwen2ForCausalLM, ids: np.ndarray, seq_len: int, windows: int | None = None) -> float:
    """Nats per token over disjoint windows, the first token of each not counted."""
    model.eval()
    rows = torch.from_numpy(ids[: len(ids) // seq_len * seq_len].astype(np.int64)).view(-1, seq_len)[:windows].to(model.device)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(16)]
    model.train()
    return sum(losses) / len(rows)


def pretrain(model: Qwen2ForCausalLM, train: np.ndarray, held: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    optimizers, rng = Optimizers(model), np.random.default_rng(args.seed)
    start, step, budget = time.monotonic(), 0, args.minutes * 60
    window = np.arange(args.seq_len)
    while (spent := (time.monotonic() - start) / budget) < 1.0:
        starts = rng.integers(0, len(train) - args.seq_len, args.batch_size)
        batch = torch.from_numpy(train[starts[:, None] + window].astype(np.int64)).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(lr_factor(spent))
        step += 1
        if step % 200 == 0:
            tokens = step * args.batch_size * args.seq_len
            rate = tokens / (time.monotonic() - start)
            print(f"step {step} {spent:.0%} loss {loss.item():.3f} held-out {heldout_loss(model, held, args.seq_len, 64):.3f} "
                  f"{tokens / 1e6:.1f} M tokens {rate:.0f} tokens/s", flush=True)  # fmt: skip
    return {"steps": step, "tokens": step * args.batch_size * args.seq_len, "minutes": round((time.monotonic() - start) / 60, 1)}


def write_card(folder: Path, facts: dict[str, object]) -> None:
    lines = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\nlibrary_name: transformers\n---\n\n# The demo donor of recursify\n\n"
        "A small Qwen2-architecture language model, pretrained from nothing on public-domain English books, so that `recursify demo`\n"
        "has a real donor without a network. It writes old-fashioned prose for a sentence or two; it knows nothing and is good for\n"
        "nothing else.\n\n"
        "Rebuilt by `python recipes/demo_donor.py --books FOLDER`; every figure below was written by that run.\n\n"
        f"| fact | value |\n|---|---|\n{lines}\n",
        encoding="utf-8",
    )  # fmt: skip


def hardware(threads: int) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {threads} of {os.cpu_count()} cores"


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    files = sorted(p for p in args.books.glob("*.txt") if p.name != args.heldout and not p.name.startswith(SHARE_ALIKE))
    documents = [d for path in files for d in read_documents(path)]
    tokenizer = train_tokenizer(documents[::4], args.vocab_size)
    train, held = encode(tokenizer, documents), encode(tokenizer, read_documents(args.books / args.heldout))
    held_bytes = sum(len(d.encode()) for d in read_documents(args.books / args.heldout))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(len(tokenizer), tokenizer.eos_token_id).to(device)
    print(
        f"{len(files)} files, {len(train) / 1e6:.1f} M tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters",
        flush=True,
    )
    spent = pretrain(model, train, held, args)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)
    shipped = Qwen2ForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    loss = heldout_loss(shipped, held, args.seq_len)
    write_card(args.output, {
        "architecture": f"Qwen2, {shipped.config.num_hidden_layers} layers, hidden {shipped.config.hidden_size}, tied embeddings",
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "bytes of model.safetensors": (args.output / "model.safetensors").stat().st_size,
        "text": f"{len(files)} files, {sum(len(d.encode()) for d in documents):,} bytes of public-domain English, {len(train):,} tokens",
        "tokens trained on": f"{spent['tokens']:,} ({spent['tokens'] / len(train):.2f} epochs)",
        "held-out text": f"{args.heldout}: whole books that were not trained on, {len(held):,} tokens",
        "held-out loss (nats per token)": f"{loss:.4f}",
        "held-out bits per byte": f"{loss * len(held) / held_bytes / math.log(2):.4f}",
        "training": f"{spent['minutes']} minutes, {spent['steps']} steps of {args.batch_size} x {args.seq_len} tokens, seed {args.seed}",
        "machine": f"{hardware(args.threads)}, torch {torch.__version__}, transformers {transformers.__version__}",
    })  # fmt: skip
    print(json.dumps({"heldout_loss": loss, **spent}))


if __name__ == "__main__":
    main()

"""What is killed: every command that writes, on a tiny model, each in a second or two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEQ_LEN = 32
_LENGTHS = {"train.txt": 9000, "validation.txt": 4000}  # characters of each text


@dataclass(frozen=True)
class Scenario:
    """A command.

    Args:
        argv: Folder of the inputs, folder to write to -> its words.
        trains: A training, which goes on with --resume; others are repeated.
        processes: How many run it.
        before: Commands whose results the folder already has.
    """

    argv: Callable[[Path, Path], list[str]]
    trains: bool = False
    processes: int = 1
    before: Callable[[Path, Path], list[list[str]]] = lambda inputs, out: []


def _train(*more: str, checkpoint: str = "init.pt") -> Callable[[Path, Path], list[str]]:
    common = (
        f"--seq_len {SEQ_LEN} --batch_size 4 --lr 1e-3 --warmup_steps 1 --num_epochs 1 --max_steps 6 --save_every 2 --log_every 1 "
        "--generate_every 0 --device cpu --start_gain 0.2 --bf16 False --enable_deep_supervision"
    )

    def argv(inputs: Path, out: Path) -> list[str]:
        where = [f"--checkpoint={inputs / checkpoint}", f"--dataset_name={inputs / 'text'}", f"--output_dir={out}"]
        return ["train", *where, *common.split(), *(word.format(inputs=inputs) for word in more)]

    return argv


def _convert(inputs: Path, out: Path) -> list[str]:
    shape = "--keep_donor --L_layers 1 --H_cycles 2 --L_cycles 1"
    return ["convert", f"--qwen_model={inputs / 'donor'}", f"--output_path={out / 'model.pt'}", *shape.split()]


def _export(inputs: Path, out: Path) -> list[str]:
    return ["export", str(out / "exported"), f"--checkpoint={inputs / 'init.pt'}", "--max_shard_size=60KB"]


def _prompts(inputs: Path, out: Path) -> list[str]:
    flags = "--max_new_tokens 8 --batch_size 2 --device cpu --seed 3"
    return ["generate", f"--checkpoint={inputs / 'init.pt'}", f"--prompt_file={inputs / 'prompts.txt'}",
            f"--output_file={out / 'written.jsonl'}", *flags.split()]  # fmt: skip


def _evaluate(inputs: Path, out: Path) -> list[str]:
    text, flags = inputs / "text" / "validation.txt", "--split all --seq_len 32 --cycles 1,2 --device cpu"
    return ["evaluate", f"--checkpoint={inputs / 'init.pt'}", f"--dataset_name={text}", f"--report={out / 'page.html'}", *flags.split()]


SCENARIOS: dict[str, Scenario] = {
    "train": Scenario(_train("--eval_every", "3", "--keep_last", "2"), trains=True),
    "train, adapter": Scenario(_train("--adapter", "--lora_rank", "2"), trains=True),
    "train, backprop cycle": Scenario(_train("--backprop", "cycle", "--grad_accum_steps", "2", "--num_epochs", "2"), trains=True),
    "train, averaged weights": Scenario(_train("--ema_decay", "0.9", "--optimizer", "muon", "--keep_last", "1"), trains=True),
    "train, streaming": Scenario(_train("--streaming", "--save_every", "3"), trains=True),
    "train, mixed": Scenario(_train("--mix", "{inputs}/text/validation.txt=1", "{inputs}/prompts.txt=1", "--save_every", "1"), trains=True),
    "train, two processes": Scenario(_train("--save_every", "3"), trains=True, processes=2),
    "convert": Scenario(_convert),
    "convert, over another": Scenario(_convert, before=lambda inputs, out: [[*_convert(inputs, out), "--gain", "0.1"]]),
    "export": Scenario(_export),
    "export, over another": Scenario(_export, before=lambda inputs, out: [[*_export(inputs, out), "--dtype", "bfloat16"]]),
    "prompts": Scenario(_prompts),
    "evaluate": Scenario(_evaluate),
}


def make_inputs(folder: Path) -> None:
    """A tiny donor with the tokenizer that ships, a model converted from it, and texts from the language reference."""
    from pydoc_data.topics import topics

    from recipes.evidence.study import small_model
    from recursify import convert
    from recursify.checkpoints import checkpoint
    from recursify.checkpoints.tokenizer import load_tokenizer
    from recursify.demo.prose import donor_folder

    tokenizer = load_tokenizer(str(donor_folder()))
    donor = small_model({"hidden_size": 16, "intermediate_size": 32, "layers": 3}, len(tokenizer))
    donor.save_pretrained(folder / "donor")
    tokenizer.save_pretrained(folder / "donor")
    model = convert(str(folder / "donor"), L_layers=1, keep_donor=True, H_cycles=2, L_cycles=1, gain=0.2)
    checkpoint.save(folder / "init.pt", model, tokenizer)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    (folder / "text").mkdir()
    for name, length in _LENGTHS.items():
        part, text = text[:length], text[length:]
        (folder / "text" / name).write_text(part, encoding="utf-8")
    prompts = [line for line in text.splitlines() if line.strip()][:24]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")


def empty(folder: Path) -> Path:
    """A folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

"""The whole command under torchrun, and every way of training in two processes: no parameter is left waiting for a gradient.

As in test_parallel.py this file is a test and the program that the processes run.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from recursify.checkpoints import checkpoint
from recursify.cli import main as cli
from recursify.conversion.convert import convert
from recursify.training import train
from recursify.training.saving import BEST, BEST_ADAPTER
from tests.support.parallel_runs import launch, recursive, run, settings
from tests.support.tiny import make_tiny_tokenizer, sentences, tiny_donor

SUPERVISED: dict[str, Any] = {"enable_deep_supervision": True}
WAYS: dict[str, dict[str, Any]] = {
    "cycle": {"backprop": "cycle", "self_distill_weight": 0.5, "monotone_weight": 0.5, "halting_weight": 0.5},
    "last": {"backprop": "last", "enable_deep_supervision": False},
    "depths": {"backprop": "cycle", "cycle_choices": (1, 2, 4), "gradient_checkpointing": True},
    "last of several": {"backprop": "last", "enable_deep_supervision": False, "cycle_choices": (1, 3)},
    "no L": {"halting_weight": 0.5, "separate_documents": True},
    "frozen": {"backprop": "cycle"},
}
MODELS: dict[str, dict[str, Any]] = {"no L": {"L_cycles": 0}, "frozen": {"freeze_embeddings": True, "prelude_layers": 0, "L_layers": 3}}


def way(name: str, **changes: Any) -> dict[str, Any]:
    return run(model=recursive(**MODELS.get(name, {})), **(WAYS[name] | changes))


def command(folder: Path, out: str, *flags: str) -> list[str]:
    return [
        "train", "--checkpoint", str(folder / "init.pt"), "--dataset_name", str(folder / "text"), "--seq_len", "16", "--lr", "1e-3",
        "--warmup_steps", "0", "--num_epochs", "2", "--log_every", "1", "--save_every", "2", "--generate_every", "3", "--device", "cpu",
        "--enable_deep_supervision", "--output_dir", str(folder / out), *flags,
    ]  # fmt: skip


ADAPTER = ("--adapter", "--lora_rank", "2")
SCALING = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def documented() -> list[list[str]]:
    """The flags of every `recursify train` in docs/scaling.md: one machine, several, FSDP2."""
    shell = " ".join(re.findall(r"```bash\n(.*?)```", SCALING.read_text(encoding="utf-8"), re.DOTALL)).replace("\\\n", " ")
    lines = [line.split("#")[0].split("-m recursify train")[-1] for line in shell.splitlines() if "-m recursify train" in line]
    return [shlex.split(line) for line in lines]


def rehearse(folder: Path, flags: list[str]) -> None:
    """A command of the document as a dry run, on what is here: a tiny checkpoint and a small text."""
    here = [
        "--checkpoint",
        str(folder / "init.pt"),
        "--dataset_name",
        str(folder / "text"),
        "--device",
        "cpu",
        "--dry_run",
        "--seq_len",
        "16",
    ]
    if "--config" in flags:  # its text and its donor are on the hub
        here += ["--dataset_config_name", "None", "--max_tokens", "1024", "--distill_weight", "0", "--output_dir", str(folder / "dry")]
        flags = ["--config", str(SCALING.parent.parent / flags[flags.index("--config") + 1])]
    cli.main(["train", *flags, *here])


def work(folder: Path) -> None:
    for flags in documented():
        if "--deepspeed" not in flags:  # an optional package
            rehearse(folder, flags)
    cli.main(command(folder, "ddp", "--batch_size", "2", "--backprop", "cycle", "--ema_decay", "0.5"))
    cli.main(command(folder, "fsdp", "--batch_size", "2", "--fsdp"))
    cli.main(command(folder, "adapter", "--batch_size", "2", "--fsdp", *ADAPTER))
    if distributed.get_rank() == 0:  # as if the run had been killed after step 4
        (folder / "ddp" / "checkpoint_step_6.pt").unlink()
    distributed.barrier()
    cli.main(command(folder, "ddp", "--batch_size", "2", "--backprop", "cycle", "--ema_decay", "0.5", "--resume"))
    found = {name: way(name, batch_size=2) for name in WAYS}
    torch.save(found, folder / f"found_{distributed.get_rank()}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    distributed.destroy_process_group()
    sys.exit()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of two processes, and their terminal output."""
    folder = tmp_path_factory.mktemp("torchrun")
    tiny_donor("qwen2", folder / "donor", num_hidden_layers=4)
    torch.manual_seed(0)
    model = convert(str(folder / "donor"), keep_donor=True, L_layers=2, H_cycles=3, L_cycles=1, gain=0.2)  # at 0 cycles the donor
    checkpoint.save(folder / "init.pt", model, make_tiny_tokenizer())
    (folder / "text").mkdir()
    for name, seed, sequences in (("train", 5, 12), ("validation", 6, 3)):
        ids = make_tiny_tokenizer()(" ".join(sentences(seed, 60))).input_ids[: 16 * sequences]
        (folder / "text" / f"{name}.txt").write_text(make_tiny_tokenizer().decode(ids))
    finished = launch([__file__, folder])
    assert finished.returncode == 0, finished.stdout
    return folder, finished.stdout


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_training_in_two_processes(name: str, done: tuple[Path, str]) -> None:
    ours, one = torch.load(done[0] / "found_0.pt", weights_only=False)[name], way(name, batch_size=4)
    assert len(ours["history"]) == len(one["history"]) > 6
    for mine, wanted in zip(ours["history"], one["history"], strict=True):
        assert mine.keys() == wanted.keys()
        for key in wanted:
            if key.startswith(("loss", "eval", "grad", "train")):
                assert mine[key] == pytest.approx(wanted[key], rel=2e-4, abs=1e-6), key
    for key, wanted in one["weights"].items():
        assert torch.allclose(ours["weights"][key], wanted, rtol=0, atol=2e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "adapter"])
def test_distributed_command_writes_the_files_of_one_process(name: str, done: tuple[Path, str], tmp_path: Path) -> None:
    """Also where the second half was resumed; and one process loads it and goes on."""
    folder, printed = done
    flags = {"ddp": {"backprop": "cycle", "ema_decay": 0.5}, "fsdp": {}, "adapter": {"adapter": True, "lora_rank": 2}}[name]
    wanted = replace(
        settings(**flags), checkpoint=str(folder / "init.pt"), dataset_name=str(folder / "text"), num_epochs=2, max_grad_norm=1.0,
        save_every=2, output_dir=str(tmp_path / "one"),
    )  # fmt: skip
    one = train(wanted)
    assert one.fit is not None
    ours = entries(folder / name)
    for key in ("donor_loss", "loss", "loss_cycle_1", "eval_loss_cycle_3", "train_loss"):
        mine, theirs = ([entry[key] for entry in history if key in entry] for history in (ours, one.fit.history))
        assert mine == pytest.approx(theirs, rel=2e-4), key
    for file in (BEST_ADAPTER if name == "adapter" else BEST, "checkpoint_step_6.pt"):
        found, expected = (checkpoint.load(place / file).model.state_dict() for place in (folder / name, tmp_path / "one"))
        for key in expected:
            assert torch.allclose(found[key], expected[key], rtol=0, atol=2e-4), key
    assert {path.name for path in (folder / name / "checkpoint_step_6_state").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    further = train(replace(wanted, output_dir=str(folder / name), resume=True, num_epochs=3, batch_size=2, grad_accum_steps=1))
    assert further.fit is not None and further.fit.steps > 6
    assert "cpu, 2 processes (DDP over gloo)" in printed and "cpu, 2 processes (FSDP2 over gloo)" in printed


@pytest.mark.slow
def test_launch_commands_of_the_docs_are_valid(done: tuple[Path, str]) -> None:
    """Each is a dry run in two processes, which prints its cost once."""
    count = sum("--deepspeed" not in flags for flags in documented())
    assert count >= 3 and len(documented()) == count + 1
    assert len(re.findall(r"^steps +\d", done[1], re.MULTILINE)) == count and not (done[0] / "dry").exists()


@pytest.mark.slow
def test_only_rank_0_prints(done: tuple[Path, str]) -> None:
    _, printed = done
    assert printed.count("Epoch 1 Summary") == 3 and printed.count("Step 3 - Generating sample") == 3
    assert printed.count("Resuming from") == 1

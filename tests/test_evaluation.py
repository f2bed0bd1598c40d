"""Loss at every depth, against hand-made sums and plain runs at each depth.

Started by torchrun, this file is also the program that several processes run.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_parallel import launch
from tiny import make_tiny_tokenizer, sentences, tiny_model
from torch import distributed
from torch.nn import functional as F

from recursify import RecursiveLLM, checkpoint, cli, convert
from recursify.errors import UserError
from recursify.evaluation import EvaluateSettings, evaluate, is_first, load_any, measure, run, standard_error, window_losses


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> RecursiveLLM:
    """Keep-donor, gains and states well away from 0, so that every depth says something else."""
    torch.manual_seed(1)
    model = convert(str(donor_folder), L_layers=2, keep_donor=True, H_cycles=2, L_cycles=1)
    with torch.no_grad():
        for parameter in model.model.recursion.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    ids = torch.randint(300, (7, 12), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def by_hand(model: Any, ids: torch.Tensor, **depth: int) -> list[float]:
    """Mean loss of each row, from whole logits of one row at a time."""
    with torch.no_grad():
        rows = [model(row.unsqueeze(0), **depth).logits[0] for row in ids]
    return [F.cross_entropy(logits[:-1], row[1:]).item() for logits, row in zip(rows, ids, strict=True)]


def test_every_depth_equals_a_run_at_that_depth(model: RecursiveLLM, blocks: Dataset) -> None:
    cycles, ids = (3, 0, 1, 2), torch.tensor(blocks["input_ids"])
    losses = window_losses(model, blocks, cycles, batch_size=3)
    for row, H in zip(losses.tolist(), cycles, strict=True):
        assert row == pytest.approx(by_hand(model, ids, H_cycles=H), abs=1e-5)
    assert len({round(row.mean().item(), 4) for row in losses}) == 4


def test_means_errors_and_costs(model: RecursiveLLM, blocks: Dataset) -> None:
    losses = window_losses(model, blocks, (1, 2))
    for row, values, H in zip(measure(model, blocks, (1, 2), batch_size=2), losses, (1, 2), strict=True):
        assert row.H_cycles == H
        assert row.loss == pytest.approx(values.mean().item())
        assert row.standard_error == pytest.approx(values.std().item() / math.sqrt(7))
        assert row.perplexity == pytest.approx(math.exp(row.loss))
        assert row.layer_applications == 22 + 2 * H * 2


def test_the_batch_size_changes_nothing(model: RecursiveLLM, blocks: Dataset) -> None:
    one, all_at_once = (measure(model, blocks, (2,), batch_size=size)[0].loss for size in (1, 7))
    assert one == pytest.approx(all_at_once, abs=1e-6)


def test_a_plain_model_has_one_depth(blocks: Dataset) -> None:
    donor = tiny_model("llama").eval()
    [row] = measure(donor, blocks)
    assert row.H_cycles is None and row.layer_applications == donor.config.num_hidden_layers
    assert row.loss == pytest.approx(sum(by_hand(donor, torch.tensor(blocks["input_ids"]))) / 7, abs=1e-5)


def test_a_single_window_has_no_error(model: RecursiveLLM, blocks: Dataset) -> None:
    assert measure(model, blocks.select([0]), (1,))[0].standard_error is None
    assert standard_error(torch.tensor([1.0, 1.0, 1.0])) == 0.0


def test_training_mode_is_put_back(model: RecursiveLLM, blocks: Dataset) -> None:
    model.train()
    measure(model, blocks.select([0]), (1,))
    assert model.training
    model.eval()


@pytest.mark.parametrize("form", ["m.pt", "folder"])
def test_the_command_reads_both_forms(form: str, model: RecursiveLLM, donor_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint.save(tmp_path / form, model, AutoTokenizer.from_pretrained(donor_folder))
    rows = [json.dumps({"text": f"The ship number {i} crosses the river . " * 5}) for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    settings = EvaluateSettings(checkpoint=str(tmp_path / form), dataset_name=str(tmp_path / "t.jsonl"), seq_len=16, max_windows=5)
    report = run(settings)
    assert [row.H_cycles for row in report.rows] == [1, 2, 3, 4]  # to twice the checkpoint's own
    assert report.windows == 5
    assert f"{report.rows[1].loss:.4f}" in report.render() and "own" in report.render()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cycles": (-1,)}, "--cycles"),
        ({"seq_len": 1}, "--seq_len"),
        ({"batch_size": 0}, "--batch_size"),
        ({"stride": 0}, "--stride: expected 1 to the 128 tokens of a window .--seq_len., got 0"),
        ({"stride": 129}, "--stride: .* got 129"),
        ({"max_windows": 0}, "--max_windows: expected at least 1, got 0"),
        ({"halt": "q_head", "halt_threshold": 1.5}, "--halt_threshold: expected 0"),
        ({"halt_threshold": 0.5}, "--halt_threshold: expected --halt"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(EvaluateSettings(checkpoint="x.pt", **wrong))


def test_windows_longer_than_the_positions(donor_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The ship crosses the river . " * 300)
    settings = EvaluateSettings(checkpoint=str(donor_folder), dataset_name=str(tmp_path / "t.txt"), seq_len=513)
    with pytest.raises(UserError, match="--seq_len: expected at most 512"):
        run(settings)


def test_a_donor_that_is_refused_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "final_logit_softcapping": 30.0}))
    with pytest.raises(UserError, match="soft-capping"):
        load_any(str(tmp_path))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        load_any(str(tmp_path / "nothing.pt"))
    with pytest.raises(UserError, match="no such"):
        load_any(str(tmp_path / "nothing"))


# --- Text, in windows that may overlap ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation file of some hundred tokens, with characters of more bytes than one."""
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("train", 3), ("validation", 4)):
        (folder / f"{name}.txt").write_text(
            "\n<|endoftext|>\n".join([" ".join(sentences(seed, 2)), "北方的船 🦞", *sentences(seed + 1, 1)])
        )
    return folder


def settings(text: Path, **changes: Any) -> EvaluateSettings:
    return EvaluateSettings(**({"checkpoint": "in memory", "dataset_name": str(text), "seq_len": 16, "device": "cpu"} | changes))


def stream(text: Path) -> tuple[list[int], list[str]]:
    """All ids as they are read, and the documents."""
    tokenizer, documents = make_tiny_tokenizer(), (text / "validation.txt").read_text().split("\n<|endoftext|>\n")
    return [i for document in documents for i in [*tokenizer(document)["input_ids"], 0]], documents


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_the_report_is_of_every_token_with_its_context(stride: int, model: RecursiveLLM, text: Path) -> None:
    report = evaluate(model, make_tiny_tokenizer(), settings(text, stride=stride, cycles=(2, 0)))
    ids, _ = stream(text)
    whole = torch.tensor(ids[: len(ids) // 16 * 16])
    starts = range(0, len(whole) - 15, stride)
    nats = {2: 0.0, 0: 0.0}
    with torch.no_grad():
        for start in starts:
            row = whole[start : start + 16]
            for H in nats:
                losses = F.cross_entropy(model(row[None], H_cycles=H).logits[0, :-1], row[1:], reduction="none")
                nats[H] += losses[0 if start == 0 else -min(stride, 15) :].sum().item()
    tokens = 15 * len(starts) if stride == 16 else starts[-1] + 15
    assert (report.windows, report.stride, report.scored_tokens) == (len(starts), stride, tokens)
    for row in report.rows:
        assert row.H_cycles is not None and row.loss == pytest.approx(nats[row.H_cycles] / tokens, abs=1e-5)
        assert row.bits_per_byte == pytest.approx(row.loss * tokens / math.log(2) / report.scored_bytes)
        assert row.standard_error is not None


def test_bytes_are_those_of_the_text(model: RecursiveLLM, text: Path) -> None:
    """Of all tokens but the first and the few at the end that fill no window."""
    report = evaluate(model, make_tiny_tokenizer(), settings(text, stride=1, cycles=(1,)))
    ids, documents = stream(text)
    written = sum(len(document.encode()) for document in documents)
    cut = [ids[0], *ids[len(ids) // 16 * 16 :]]
    assert report.scored_tokens == len(ids) - len(cut)
    assert report.scored_bytes == written - len(make_tiny_tokenizer().decode([i for i in cut if i != 0]))


def test_telemetry_is_of_every_cycle_up_to_the_deepest(model: RecursiveLLM, text: Path) -> None:
    deep = evaluate(model, make_tiny_tokenizer(), settings(text, cycles=(3,)))
    all_cycles = evaluate(model, make_tiny_tokenizer(), settings(text, cycles=(1, 2, 3), batch_size=2))
    for report in (deep, all_cycles):
        assert report.telemetry is not None and report.telemetry.H_cycles == 3
        assert report.telemetry.losses == pytest.approx([row.loss for row in all_cycles.rows], abs=1e-5)
        assert report.telemetry.loop_gain == pytest.approx(all_cycles.rows[0].loss - all_cycles.rows[2].loss, abs=1e-5)
    assert "1 -> 2" in deep.render() and "loop gain" in deep.render()


def test_without_cycles_there_is_nothing_to_tell(model: RecursiveLLM, text: Path) -> None:
    plain = evaluate(model, make_tiny_tokenizer(), settings(text, cycles=(0,)))
    donor = evaluate(tiny_model("llama"), make_tiny_tokenizer(), settings(text))
    for report in (plain, donor):
        assert report.telemetry is None and report.to_dict()["telemetry"] is None and "cycles do" not in report.render()
        assert report.rows[0].bits_per_byte is not None and f"{report.rows[0].bits_per_byte:.4f}" in report.render()


@pytest.mark.parametrize(("cycles", "most"), [((), 2), ((1, 3), 3)])
def test_halting_goes_no_deeper_than_asked(cycles: tuple[int, ...], most: int, model: RecursiveLLM, text: Path) -> None:
    report = evaluate(model, make_tiny_tokenizer(), settings(text, stride=8, cycles=cycles, halt="entropy", halt_threshold=1.0))
    assert report.telemetry is not None and report.telemetry.halting is not None
    halting, full = report.telemetry.halting, report.telemetry.losses[most - 1]
    assert (
        halting.H_cycles == most and list(halting.cycles) == list(range(1, most + 1)) and sum(halting.cycles.values()) == pytest.approx(1)
    )
    assert halting.extra_loss == pytest.approx(halting.loss - full)
    assert "halting by entropy, threshold 1" in report.render()


def test_a_threshold_that_never_halts_is_the_plain_run(model: RecursiveLLM, text: Path) -> None:
    report = evaluate(model, make_tiny_tokenizer(), settings(text, stride=8, halt="entropy", halt_threshold=0.0))
    assert report.telemetry is not None and report.telemetry.halting is not None
    assert report.telemetry.halting.extra_loss == pytest.approx(0, abs=1e-6) and report.telemetry.halting.cycles[2] == 1.0


def test_halting_that_cannot_be(model: RecursiveLLM, text: Path) -> None:
    with pytest.raises(UserError, match="--halt: expected a recursive model, got a LlamaForCausalLM"):
        evaluate(tiny_model("llama"), make_tiny_tokenizer(), settings(text, halt="kl"))
    with pytest.raises(UserError, match="--halt: expected a run of at least 1 cycle"):
        evaluate(model, make_tiny_tokenizer(), settings(text, cycles=(0,), halt="kl"))


def test_the_report_as_json(model: RecursiveLLM, text: Path) -> None:
    report = evaluate(model, make_tiny_tokenizer(), settings(text, stride=8, halt="kl"))
    read = json.loads(json.dumps(report.to_dict()))
    assert {"checkpoint", "dataset", "windows", "seq_len", "trained_cycles", "rows", "stride", "scored_tokens", "scored_bytes"} < set(read)
    assert read["rows"][0].keys() == {"H_cycles", "loss", "standard_error", "layer_applications", "bits_per_byte", "perplexity"}
    assert {"loop_gain", "corrected", "spoilt", "steps", "halting"} < read["telemetry"].keys()
    assert read["telemetry"]["halting"]["criterion"] == "kl"


# --- Several processes -------------------------------------------------------------------------------------------------------------------

LAUNCHES: dict[str, list[str]] = {
    "overlapping": ["--stride", "5", "--batch_size", "3", "--halt", "entropy", "--halt_threshold", "1.0"],
    "fewer batches than processes": ["--max_windows", "2", "--cycles", "0", "2"],
}


def command(folder: Path, name: str) -> list[str]:
    common = ["--checkpoint", str(folder / "m.pt"), "--dataset_name", str(folder / "text"), "--seq_len", "16", "--device", "cpu", "--json"]
    return ["evaluate", *common, *LAUNCHES[name]]


def work(folder: Path) -> None:
    """What each process prints goes to a file of its own."""
    with (folder / f"said_{os.environ['RANK']}").open("w") as said, redirect_stdout(said):
        for name in LAUNCHES:
            cli.main(command(folder, name))
    (folder / f"first_{distributed.get_rank()}").write_text(str(is_first()))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    distributed.destroy_process_group()
    sys.exit()


@pytest.mark.slow
def test_several_processes_find_what_one_finds(model: RecursiveLLM, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "m.pt", model, make_tiny_tokenizer())
    (tmp_path / "text").symlink_to(text)
    done = launch([__file__, tmp_path])
    assert done.returncode == 0, done.stdout
    theirs = [json.loads(line) for line in (tmp_path / "said_0").read_text().splitlines()]
    ours = []
    for name in LAUNCHES:
        cli.main(command(tmp_path, name))
        ours.append(json.loads(capsys.readouterr().out))
    assert ours[0]["windows"] % 3 and ours[1]["windows"] == 2
    assert theirs == ours  # to the last digit
    assert not (tmp_path / "said_1").read_text()
    assert is_first() and [(tmp_path / f"first_{rank}").read_text() for rank in (0, 1)] == ["True", "False"]

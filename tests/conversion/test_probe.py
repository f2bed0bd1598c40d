"""recursify probe: the cost of looping each block, against real conversions."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from transformers import AutoModelForCausalLM

from recursify.checkpoints.donor import open_donor
from recursify.cli import main as cli
from recursify.conversion import probe, probe_page
from recursify.conversion.layer_selection import candidates
from recursify.conversion.probe import LoopedBlocks
from recursify.conversion.probe_report import ProbedBlock, ProbeReport
from recursify.conversion.settings import LARGEST_GAIN, ConvertSettings, ProbeSettings
from recursify.data.calibration import calibration_windows
from recursify.errors import UserError
from recursify.network.configuration_recursive_llm import GAIN_SUM
from tests.support.tiny import FAMILIES, make_tiny_tokenizer, sentences, tiny_donor

LAYERS = 6


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=LAYERS)
    make_tiny_tokenizer(tmp_path / "donor")
    (tmp_path / "text.txt").write_text(" ".join(sentences(1, 60)))
    return tmp_path


def settings(desk: Path, **changes: Any) -> ProbeSettings:
    common: dict[str, Any] = {
        "checkpoint": str(desk / "donor"), "text": str(desk / "text.txt"), "seq_len": 32, "max_windows": 3, "device": "cpu",
        "lengths": (2, 3), "gains": (0.1, 0.4),
    }  # fmt: skip
    return ProbeSettings(**common | changes)


@pytest.mark.parametrize(("H_cycles", "L_cycles"), [(3, 1), (2, 0)])
def test_figures_are_what_evaluate_measures_of_a_conversion(
    H_cycles: int, L_cycles: int, desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the command that the report prints, with the gain added: at a few blocks, by `recursify convert` and `recursify evaluate`."""
    monkeypatch.chdir(desk)
    torch.manual_seed(7)  # the start states are drawn at random
    report = probe.run(settings(desk, H_cycles=H_cycles, L_cycles=L_cycles, gains=(0.1, 0.45)))
    assert [(block.first, block.length) for block in report.blocks] == [(n, 2) for n in range(5)] + [(n, 3) for n in range(4)]
    chosen, seen = [report.blocks[n] for n in (0, 2, 4, 6)], set()
    for block in chosen:
        for gain in report.gains:
            torch.manual_seed(7)
            cli.main([*shlex.split(report.command(block))[1:], "--gain", f"{gain}", "--output_path", "out.pt"])
            capsys.readouterr()
            measured = f"--seq_len 32 --max_windows 3 --cycles 0,{H_cycles} --device cpu --dtype float32 --json".split()
            cli.main(["evaluate", "--checkpoint", "out.pt", "--dataset_name", "text.txt", *measured])
            plain, looped = (row["loss"] for row in json.loads(capsys.readouterr().out)["text"]["rows"])
            assert report.loss == pytest.approx(plain, abs=1e-5)
            assert block.increase[gain] == pytest.approx(looped - plain, abs=2e-5)
            seen.add(round(block.increase[gain], 4))
    assert len(seen) == 2 * len(chosen)  # they differ


@pytest.mark.parametrize("family", FAMILIES)
def test_at_gain_0_every_block_is_the_donor_exactly(family: str, desk: Path) -> None:
    folder = desk / family
    tiny_donor(family, folder, num_hidden_layers=4)
    report = probe.run(settings(desk, checkpoint=str(folder), lengths=(1, 2, 4), gains=(0.0, 0.3), batch_size=2))
    donor = AutoModelForCausalLM.from_pretrained(folder)
    ids = calibration_windows(str(desk / "text.txt"), make_tiny_tokenizer(), 32, 3)
    with torch.no_grad():
        assert report.loss == pytest.approx(donor(ids, labels=ids).loss.item(), abs=1e-5)
    assert len(report.blocks) == 4 + 3 + 1
    assert all(block.increase[0.0] == 0.0 and abs(block.increase[0.3]) > 1e-5 for block in report.blocks)


def test_above_the_largest_gain_of_a_conversion_the_other_state_counts_less(desk: Path) -> None:
    """With gains A of a state's own and B of the other, A + B stays at the network's limit."""
    assert LARGEST_GAIN == GAIN_SUM
    blocks = LoopedBlocks(open_donor(str(desk / "donor")), 2, 1)
    [plan], ids = candidates("donor", LAYERS, LAYERS), torch.randint(0, 300, (1, 9))
    [(_, e)] = blocks.starts(ids, [plan])
    for gain, other in ((0.2, 0.2), (0.45, 0.45), (0.6, 0.3), (0.9, 0.0)):
        blocks.cycles(ids, plan, e, gain)
        for injection in (blocks.model.model.recursion.inject_L, blocks.model.model.recursion.inject_H):
            A, B = (each.detach() for each in injection.gains(torch.float32))
            torch.testing.assert_close(A, torch.full_like(A, gain), atol=1e-6, rtol=0)
            torch.testing.assert_close(B, torch.full_like(B, other), atol=1e-6, rtol=0)


def test_every_layer_before_the_loops_is_run_once(desk: Path) -> None:
    """And the inputs of the loops are the donor's hidden states."""
    donor = open_donor(str(desk / "donor"))
    blocks = LoopedBlocks(donor)
    ids, counts = torch.randint(0, 300, (2, 9)), [0] * LAYERS
    for number, layer in enumerate(blocks.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    plans = [plan for length in (1, 3) for plan in candidates(donor.name, LAYERS, length)]
    found = list(blocks.starts(ids, plans))
    assert counts == [1] * LAYERS
    assert sorted((plan.loop for plan, _ in found), key=lambda loop: (len(loop), loop)) == [plan.loop for plan in plans]
    plain = AutoModelForCausalLM.from_pretrained(desk / "donor")
    with torch.no_grad():
        states = plain(ids, output_hidden_states=True).hidden_states
    for plan, e in found:
        torch.testing.assert_close(e, states[plan.loop[0]], atol=1e-5, rtol=1e-5)


def test_auto_is_what_convert_chooses(desk: Path) -> None:
    text = desk / "text.txt"
    report = probe.run(settings(desk, lengths=(2,), seq_len=probe._PROBE_TOKENS, max_windows=probe._PROBE_WINDOWS))
    donor, said = open_donor(str(desk / "donor")), list[str]()
    asked = ConvertSettings(qwen_model=str(desk / "donor"), layer_selection="auto", calibration_file=str(text), L_layers=2)
    chosen = probe.probe(donor, candidates(donor.name, LAYERS, 2), asked, said.append)
    assert report.auto(2).first == chosen.loop[0]
    printed = [float(line.split()[-2]) for line in said[1:]]
    assert printed == pytest.approx([block.divergence for block in report.blocks], abs=6e-5)


def test_command_line(desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    (desk / "donor").rename(desk / "my donor")
    flags = ["--model", "my donor", "--text", "text.txt", "--lengths", "2,6", "--gains", "0.3", "--device", "cpu", "--seq_len", "16"]
    cli.main(["probe", *flags, "--report", "page.html"])
    text = capsys.readouterr().out
    tables, choices = text.split("Where to loop")
    assert tables.count("cheapest") == 2 and tables.count("auto") >= 2 and "gain 0.3" in tables and "0..5" in tables
    commands = [line.strip() for line in choices.splitlines() if line.strip().startswith("recursify convert")]
    cli.main(["probe", *flags, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 8 * 15 and (found["H_cycles"], found["L_cycles"]) == (3, 1)
    best = {choice["command"]: choice for each in found["best"] for choice in (each["cheapest"], each["auto"])}
    assert list(best) == commands and "--prelude_layers" not in commands[-1]
    page = (desk / "page.html").read_text()
    assert page.count("<title>layers ") == 2 * (5 + 1)  # for wide and for narrow screens
    for number, (command, choice) in enumerate(best.items()):
        cli.main([*shlex.split(command)[1:], "--output_path", f"out{number}.pt"])
        cli.main(["inspect", "--checkpoint", f"out{number}.pt", "--json"])
        plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
        assert (plan["loop"][0], plan["loop"][-1]) == (choice["first"], choice["last"])
        assert f"layers {choice['first']} to {choice['last']}" in page and escape(command) in page


def test_where_auto_and_the_loss_disagree_both_are_shown() -> None:
    blocks = (ProbedBlock(0, 1, {0.1: 0.25}, 0.1), ProbedBlock(1, 2, {0.1: 0.125}, 0.2))
    report = ProbeReport("d", "--qwen_model d --revision r", 3, 2.0, 10, 2, 0, (0.1,), blocks)
    kept = "recursify convert --qwen_model d --revision r --keep_donor"
    assert report.render().split("\n\n")[-2:] == [
        f"2 layers, 1..2, +0.1250, the cheapest:\n  {kept} --prelude_layers 1 --L_layers 2 --H_cycles 2 --L_cycles 0",
        f"2 layers, 0..1, +0.2500, the choice of auto:\n  {kept} --coda_layers 1 --L_layers 2 --H_cycles 2 --L_cycles 0",
    ]
    page = probe_page.render(report)
    assert "2 layers, 0 to 1, +0.2500 nats, the choice of auto:</p><pre>recursify convert" in page
    assert "layers 1 to 2 cost least, +0.1250 nats as a mean over the gains; auto chooses layers 0 to 1 (+0.2500)" in page
    assert page.count("stroke-dasharray: 3 2") == page.count("stroke-dasharray: none") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (7,)}, r"--lengths: expected at most 6, the layers of .*donor, got 7"),
        ({"lengths": (0,)}, "--lengths: expected numbers of layers of at least 1, got 0"),
        ({"gains": (0.91,)}, "--gains: expected numbers from 0 to 0.9, got 0.91"),
        ({"gains": ()}, "--gains: expected numbers from 0 to 0.9, got none"),
        ({"H_cycles": 0}, "--H_cycles: expected at least 1, got 0"),
        ({"L_cycles": -1}, "--L_cycles: expected at least 0, got -1"),
        ({"seq_len": 600}, r"--seq_len: expected at most 512, the positions that .*donor has, got 600"),
        ({"seq_len": 1}, "--seq_len: expected at least 2, got 1"),
        ({"max_windows": 0}, "--max_windows: expected at least 1, got 0"),
        ({"text": "none.txt"}, "--text: none.txt cannot be read"),
        ({"report": "no/such/page.html"}, "--report: expected a file in a folder that exists"),
    ],
)
def test_refused_by_name(desk: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe.run(settings(desk, **changes))

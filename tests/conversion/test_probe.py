"""recursify probe: the cost of looping each block, against real conversions."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify import convert
from recursify.checkpoints.donor import open_donor
from recursify.cli import main as cli
from recursify.conversion import probe, probe_page
from recursify.conversion.layer_selection import candidates
from recursify.conversion.probe import LoopedBlocks
from recursify.conversion.settings import ConvertSettings, ProbeSettings
from recursify.data.calibration import calibration_windows
from recursify.errors import UserError
from recursify.network.losses import token_losses
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


def test_figures_are_those_of_a_conversion(desk: Path) -> None:
    """At a gain, of the model that `recursify convert --keep_donor` makes there."""
    report = probe.run(settings(desk))
    assert [(block.first, block.length) for block in report.blocks] == [(n, 2) for n in range(5)] + [(n, 3) for n in range(4)]
    ids = calibration_windows(str(desk / "text.txt"), make_tiny_tokenizer(), 32, 3)
    seen = set()
    for block in report.blocks:
        for gain in (0.1, 0.4):
            place = {"prelude_layers": block.first} if block.first else {"coda_layers": LAYERS - block.length}
            model = convert(str(desk / "donor"), keep_donor=True, L_layers=block.length, H_cycles=2, L_cycles=0, gain=gain, **place)
            with torch.no_grad():
                model.model.recursion.H_init.zero_()
                model.model.recursion.L_init.zero_()
                plain, looped = (
                    token_losses(model.model(ids, H_cycles=H, use_cache=False).last_hidden_state, ids, model.lm_head).mean().item()
                    for H in (0, 2)
                )
            assert report.loss == pytest.approx(plain, abs=1e-5)
            assert block.increase[gain] == pytest.approx(looped - plain, abs=2e-5)
            seen.add(round(block.increase[gain], 3))
    assert len(seen) > 8  # they differ


@pytest.mark.parametrize("family", FAMILIES)
def test_at_gain_0_every_block_is_the_donor(family: str, desk: Path) -> None:
    folder = desk / family
    tiny_donor(family, folder, num_hidden_layers=4)
    donor = open_donor(str(folder))
    plans = [plan for length in (1, 2, 4) for plan in candidates(donor.name, 4, length)]
    blocks = LoopedBlocks(donor, plans, ConvertSettings(qwen_model=str(folder)))
    ids = torch.randint(0, 300, (2, 9))
    for plan in plans:
        same, other = blocks.looped(ids, plan, [0.0, 0.5])
        torch.testing.assert_close(same, blocks.plain(ids), atol=1e-5, rtol=1e-5)
        assert (other - same).abs().max() > 1e-3


def test_auto_is_what_convert_chooses(desk: Path) -> None:
    text = desk / "text.txt"
    report = probe.run(settings(desk, lengths=(2,), seq_len=probe._PROBE_TOKENS, max_windows=probe._PROBE_WINDOWS))
    donor = open_donor(str(desk / "donor"))
    asked = ConvertSettings(qwen_model=str(desk / "donor"), layer_selection="auto", calibration_file=str(text), L_layers=2)
    chosen = probe.probe(donor, candidates(donor.name, LAYERS, 2), asked, lambda _: None)
    assert report.auto(2).first == chosen.loop[0]


def test_command_line(desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    flags = ["--checkpoint", "donor", "--text", "text.txt", "--lengths", "2,6", "--gains", "0.3", "--device", "cpu", "--seq_len", "16"]
    cli.main(["probe", *flags, "--report", "page.html"])
    text = capsys.readouterr().out
    assert text.count("cheapest") == 2 and "gain 0.3" in text and "0..5" in text
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("recursify convert")]
    assert len(commands) == 2 and "--prelude_layers" not in commands[1]
    for number, command in enumerate(commands):
        cli.main([*shlex.split(command)[1:], "--output_path", f"out{number}.pt"])
    cli.main(["inspect", "--checkpoint", "out0.pt", "--json"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    page = (desk / "page.html").read_text()
    assert page.count("<rect") == 2 * (5 + 1) and f"layers {plan['loop'][0]} to {plan['loop'][-1]}" in page
    cli.main(["probe", *flags, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["best"][0]["cheapest"] == plan["loop"][0] and found["tokens"] == 8 * 15
    assert probe_page.render(probe.run(settings(desk))).count("<section") >= 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (7,)}, r"--lengths: expected at most 6, the layers of .*donor, got 7"),
        ({"lengths": (0,)}, "--lengths: expected numbers of layers of at least 1, got 0"),
        ({"gains": (1.5,)}, "--gains: expected numbers from 0 to 1, got 1.5"),
        ({"gains": ()}, "--gains: expected numbers from 0 to 1, got none"),
        ({"seq_len": 1}, "--seq_len: expected at least 2, got 1"),
        ({"max_windows": 0}, "--max_windows: expected at least 1, got 0"),
        ({"text": "none.txt"}, "--text: none.txt cannot be read"),
        ({"report": "no/such/page.html"}, "--report: expected a file in a folder that exists"),
    ],
)
def test_refused_by_name(desk: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked = settings(desk, **changes)
        asked.validate()
        probe.run(asked)

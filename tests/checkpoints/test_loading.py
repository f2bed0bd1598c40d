"""The one way to open a model by name: recursive or plain, a file, a folder or a hub id; and the commands that go through it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify import RecursiveLLM, convert
from recursify.checkpoints import checkpoint
from recursify.checkpoints.loading import is_recursive_checkpoint, load_model
from recursify.cli import main as cli
from recursify.errors import UserError
from recursify.network.plan import ConversionPlan
from tests.support.hub_stand_in import HubStandIn
from tests.support.tiny import make_tiny_tokenizer

PLAN = ConversionPlan("Qwen/Qwen2-0.5B", 24, tuple(range(11)), (11, 12), tuple(range(13, 24)), "middle")
IDS = torch.arange(1, 9).unsqueeze(0)


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    torch.manual_seed(0)
    model = convert(str(donor_folder), L_layers=2, keep_donor=True, H_cycles=2, L_cycles=1, gain=0.3)
    with torch.no_grad():
        model.model.recursion.H_init.normal_()
    return model


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of the same model."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("looped.pt", "looped"):
        checkpoint.save(folder / name, model, make_tiny_tokenizer(), PLAN, {"donor": "Qwen/Qwen2-0.5B"})
    return folder


@pytest.fixture
def on_hub(hub: HubStandIn, saved: Path) -> str:
    hub.add_model("someone/looped", saved / "looped")
    return "someone/looped"


@pytest.mark.parametrize("name", ["looped.pt", "looped"])
def test_recursive_by_path(name: str, saved: Path, model: Any) -> None:
    assert is_recursive_checkpoint(str(saved / name))
    found, tokenizer = load_model(saved / name)
    with torch.no_grad():
        assert isinstance(found, RecursiveLLM) and torch.equal(found(IDS).logits, model(IDS).logits)
    assert len(tokenizer) == len(make_tiny_tokenizer())


def test_recursive_by_hub_id(on_hub: str, hub: HubStandIn, model: Any) -> None:
    assert is_recursive_checkpoint(on_hub)
    found, _ = load_model(on_hub)
    with torch.no_grad():
        assert isinstance(found, RecursiveLLM) and torch.equal(found(IDS).logits, model(IDS).logits)
    whole = checkpoint.load(on_hub)
    assert whole.plan == PLAN and whole.notes == {"donor": "Qwen/Qwen2-0.5B"} and whole.tokenizer is not None
    read = [request.file or "" for request in hub.requests]
    assert any(file.endswith(".safetensors") for file in read) and not any(file.endswith(".py") for file in read)  # code stays there


def test_plain_by_path_and_by_hub_id(hub: HubStandIn, donor_folder: Path) -> None:
    assert not is_recursive_checkpoint(str(donor_folder)) and not is_recursive_checkpoint("Qwen/Qwen2-0.5B")
    here, there = (load_model(name)[0] for name in (donor_folder, "Qwen/Qwen2-0.5B"))
    with torch.no_grad():
        assert not isinstance(here, RecursiveLLM) and torch.equal(here(IDS).logits, there(IDS).logits)


def test_what_is_nowhere_is_refused(hub: HubStandIn, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nobody/nothing: no such folder, and the hub has no config.json for it"):
        load_model("nobody/nothing")
    with pytest.raises(
        UserError, match=r"nobody/nothing: no such checkpoint; expected a .pt file or a folder .* or a hub id; the hub does not"
    ):
        checkpoint.load("nobody/nothing")
    with pytest.raises(UserError, match=r"missing.pt: no such checkpoint; expected a .pt file or a folder that convert or train wrote"):
        load_model(tmp_path / "missing.pt")


def test_a_recursive_model_without_tokenizer_is_refused(tmp_path: Path, model: Any) -> None:
    checkpoint.save(tmp_path / "bare.pt", model, None)
    with pytest.raises(UserError, match=r"bare.pt: no tokenizer in .*bare_tokenizer; name one with --tokenizer_path"):
        load_model(tmp_path / "bare.pt")


FLAGS = ("--prompt", "The old lobster", "--max_new_tokens", "5", "--temperature", "0", "--device", "cpu")


def test_generate_reads_a_hub_id_and_a_plain_model(
    on_hub: str, saved: Path, donor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for name in (on_hub, str(saved / "looped.pt"), str(donor_folder)):
        cli.main(["generate", "--checkpoint", name, *FLAGS])
        said[name] = capsys.readouterr().out
    assert said[on_hub] == said[str(saved / "looped.pt")] != said[str(donor_folder)]
    assert all(text.startswith("The old lobster") and len(text) > len("The old lobster\n") for text in said.values())


def test_generate_refuses_depth_of_a_plain_model(donor_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "--checkpoint", str(donor_folder), *FLAGS, "--H_cycles", "3"])
    assert "--H_cycles: expected a recursive model, got a Qwen2ForCausalLM, which has no cycles" in capsys.readouterr().err


def test_inspect_and_evaluate_read_a_hub_id(on_hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", "--checkpoint", on_hub, "--json"])
    assert json.loads(capsys.readouterr().out)["plan"]["loop"] == [11, 12]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("The old lobster carries the bridge near the river . " * 9)
    flags = ["--dataset_name", str(tmp_path), "--seq_len", "16", "--cycles", "1", "--device", "cpu", "--json"]
    cli.main(["evaluate", "--checkpoint", on_hub, *flags])
    assert json.loads(capsys.readouterr().out)["rows"][0]["H_cycles"] == 1

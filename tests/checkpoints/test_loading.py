"""Open a model by name: recursive or plain; a file, a folder or a hub id, with revision and token; and every command that does so."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify import RecursiveLLM, convert
from recursify.checkpoints import checkpoint
from recursify.checkpoints.donor import open_donor
from recursify.checkpoints.loading import is_recursive_checkpoint, load_model
from recursify.checkpoints.repository import split_revision
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.cli import main as cli
from recursify.errors import UserError
from recursify.network.plan import ConversionPlan
from recursify.serving.running import load as load_service
from recursify.serving.settings import ServeSettings
from recursify.training import run as training_run
from tests.support.hub_stand_in import HubStandIn
from tests.support.tiny import make_tiny_tokenizer, tiny_donor

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
    assert any(file.endswith(".safetensors") for file in read) and not any(file.endswith(".py") for file in read)  # no code is downloaded


def test_plain_by_path_and_by_hub_id(hub: HubStandIn, donor_folder: Path) -> None:
    assert not is_recursive_checkpoint(str(donor_folder)) and not is_recursive_checkpoint("Qwen/Qwen2-0.5B")
    here, there = (load_model(name)[0] for name in (donor_folder, "Qwen/Qwen2-0.5B"))
    with torch.no_grad():
        assert not isinstance(here, RecursiveLLM) and torch.equal(here(IDS).logits, there(IDS).logits)


def test_missing_names_are_refused(hub: HubStandIn, tmp_path: Path) -> None:
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


# --- Revisions and tokens ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def revised(hub: HubStandIn, model: Any, saved: Path, tmp_path: Path) -> str:
    """On the hub: `main` has other weights than the branch `v1`."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.normal_()
    checkpoint.save(tmp_path / "main", other, make_tiny_tokenizer(), PLAN)
    hub.add_model("someone/revised", tmp_path / "main", v1=saved / "looped")
    return "someone/revised"


@torch.no_grad()
def test_recursive_model_at_a_revision(revised: str, hub: HubStandIn, model: Any) -> None:
    commit = hub.repos["models", revised].branches["v1"].commit()
    for revision in ("v1", commit):
        assert torch.equal(load_model(revised, revision=revision)[0](IDS).logits, model(IDS).logits)
        assert torch.equal(checkpoint.load(revised, revision=revision).model(IDS).logits, model(IDS).logits)
    assert not torch.equal(load_model(revised)[0](IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_plain_model_and_conversion_at_a_revision(hub: HubStandIn, donor_folder: Path, tmp_path: Path) -> None:
    tiny_donor("qwen2", tmp_path, num_hidden_layers=3)
    hub.add_model("someone/plain", tmp_path, v1=donor_folder)
    assert load_model("someone/plain")[0].config.num_hidden_layers == 3
    assert load_model("someone/plain", revision="v1")[0].config.num_hidden_layers == 24
    converted = convert("someone/plain", L_layers=2, keep_donor=True, revision="v1")
    commit = hub.repos["models", "someone/plain"].branches["v1"].commit()
    assert (converted.config.conversion["donor"], converted.config.conversion["revision"]) == ("someone/plain", commit)
    assert torch.equal(converted(IDS).logits, load_model(donor_folder)[0](IDS).logits)


def test_private_repository_needs_the_token(hub: HubStandIn, saved: Path, donor_folder: Path) -> None:
    hub.tokens["hf_secret"] = "someone"
    hub.add_model("someone/private", saved / "looped", private=True)
    hub.add_model("someone/private-donor", donor_folder, private=True)
    for refused in (load_model, checkpoint.load):
        with pytest.raises(UserError, match="someone/private"):
            refused("someone/private")
    with pytest.raises(UserError, match="someone/private-donor"):
        convert("someone/private-donor")
    assert load_model("someone/private", token="hf_secret")[0].config.H_cycles == 2
    assert checkpoint.load("someone/private", token="hf_secret").plan == PLAN
    assert load_model("someone/private-donor", token="hf_secret")[0].config.num_hidden_layers == 24
    assert convert("someone/private-donor", token="hf_secret").config.conversion["donor"] == "someone/private-donor"


def test_revision_of_a_path_is_refused(saved: Path, donor_folder: Path, tmp_path: Path) -> None:
    for path in (saved / "looped", saved / "looped.pt", donor_folder, tmp_path / "missing.pt"):
        with pytest.raises(UserError, match=rf"--revision: expected a hub id, got 'v1' for {path}, a path"):
            load_model(path, revision="v1")
    for refused in (convert, checkpoint.load, load_tokenizer):
        with pytest.raises(UserError, match="--revision: expected a hub id"):
            refused(str(donor_folder), revision="v1")


def test_unknown_revision_is_refused(revised: str) -> None:
    with pytest.raises(UserError, match=r"someone/revised: .*check the id, the revision and the network"):
        load_model(revised, revision="v9")


def test_split_revision(tmp_path: Path) -> None:
    assert split_revision("a/b") == ("a/b", None) and split_revision("a/b@v1") == ("a/b", "v1")
    (tmp_path / "x@v1").mkdir()
    assert split_revision(str(tmp_path / "x@v1")) == (str(tmp_path / "x@v1"), None)


# --- The commands -----------------------------------------------------------------------------------------------------------------------


FLAGS = ("--prompt", "The old lobster", "--max_new_tokens", "5", "--temperature", "0", "--device", "cpu")


def test_generate_reads_a_hub_id_and_a_plain_model(
    on_hub: str, saved: Path, donor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = {}
    for name in (on_hub, str(saved / "looped.pt"), str(donor_folder)):
        cli.main(["generate", "--checkpoint", name, *FLAGS])
        printed[name] = capsys.readouterr().out
    assert printed[on_hub] == printed[str(saved / "looped.pt")] != printed[str(donor_folder)]
    assert all(text.startswith("The old lobster") and len(text) > len("The old lobster\n") for text in printed.values())


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


def said_by(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    cli.main([*flags])
    return capsys.readouterr().out


def test_generate_at_a_revision(revised: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there, at_main = (
        said_by(capsys, "generate", "--checkpoint", *source, *FLAGS)
        for source in ((str(saved / "looped"),), (revised, "--revision", "v1"), (revised,))
    )
    assert there == here != at_main


def test_inspect_reads_a_plain_model(hub: HubStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said_by(capsys, "inspect", "--checkpoint", "Qwen/Qwen2-0.5B", "--json"))
    count = sum(parameter.numel() for parameter in load_model("Qwen/Qwen2-0.5B")[0].parameters())
    assert found["plan"] is None and found["layer_applications_per_token"] == 24 and found["parameters"]["total"] == count
    text = said_by(capsys, "inspect", "--checkpoint", "Qwen/Qwen2-0.5B")
    assert text.startswith("qwen2, a plain model: ") and "cost per token: 24 layer applications" in text


@pytest.mark.parametrize("kind", ["recursive", "plain"])
def test_chat_reads_a_hub_id(kind: str, on_hub: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The old lobster\n"))
    name = on_hub if kind == "recursive" else "Qwen/Qwen2-0.5B"
    assert said_by(capsys, "chat", "--checkpoint", name, "--max_new_tokens", "4", "--temperature", "0", "--device", "cpu")


@pytest.mark.parametrize("kind", ["recursive", "plain"])
def test_serve_reads_a_hub_id(kind: str, on_hub: str) -> None:
    name = on_hub if kind == "recursive" else "Qwen/Qwen2-0.5B"
    service = load_service(ServeSettings(checkpoint=name, device="cpu", cache_tokens=512))
    assert service.name == name and isinstance(service.model, RecursiveLLM) == (kind == "recursive")


def test_evaluate_and_compare_read_hub_ids(revised: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path := tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("The old lobster carries the bridge near the river . " * 9)
    flags = ["--dataset_name", str(tmp_path), "--seq_len", "16", "--device", "cpu", "--json"]
    names = [revised, f"{revised}@v1", "Qwen/Qwen2-0.5B"]
    found = json.loads(said_by(capsys, "compare", *names, "--cycles", "1", *flags))
    assert [each["path"] for each in found["models"]] == names
    at_main, at_v1 = (each["rows"][0]["loss"] for each in found["models"][:2])
    assert at_main != at_v1
    at_flag = json.loads(said_by(capsys, "evaluate", "--checkpoint", revised, "--revision", "v1", "--cycles", "1", *flags))
    assert at_flag["rows"][0]["loss"] == at_v1
    plain = json.loads(said_by(capsys, "evaluate", "--checkpoint", "Qwen/Qwen2-0.5B", *flags))
    assert plain["rows"][0]["loss"] == found["models"][2]["rows"][0]["loss"]


def test_export_inspect_and_train_at_a_revision(
    revised: str, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = ["--checkpoint", revised, "--revision", "v1"]
    cli.main(["export", "out", *source])
    assert torch.equal(checkpoint.load("out").model.model.norm.weight, model.model.norm.weight)
    capsys.readouterr()
    assert json.loads(said_by(capsys, "inspect", *source, "--json"))["plan"]["donor"] == "Qwen/Qwen2-0.5B"
    Path("train.txt").write_text("The old lobster carries the bridge near the river . " * 20)
    flags = "--dataset_name train.txt --seq_len 16 --batch_size 1 --max_steps 1 --lr 1e-9 --save_every 1 --device cpu --output_dir runs"
    cli.main(["train", *source, *flags.split()])
    assert torch.allclose(checkpoint.load("runs/checkpoint_step_1.pt").model.model.norm.weight, model.model.norm.weight, atol=1e-6)


def test_convert_at_a_revision(hub: HubStandIn, donor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_donor("qwen2", tmp_path / "main", num_hidden_layers=3)
    hub.add_model("someone/plain", tmp_path / "main", v1=donor_folder)
    out = str(tmp_path / "out.pt")
    said_by(capsys, "convert", "--qwen_model", "someone/plain", "--revision", "v1", "--output_path", out)
    found = checkpoint.load(out)
    commit = hub.repos["models", "someone/plain"].branches["v1"].commit()
    assert found.plan.donor_layers == 24 and found.notes == {"donor": "someone/plain", "revision": commit, "seq_len": 512}
    assert f"donor someone/plain (24 layers, revision {commit}), selection uniform" in said_by(capsys, "inspect", "--checkpoint", out)


def test_default_teacher_is_the_donor_at_its_revision(
    hub: HubStandIn, donor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the config.json of a model that was saved with plain `save_pretrained`."""
    tiny_donor("qwen2", tmp_path / "main", num_hidden_layers=3)
    hub.add_model("someone/plain", tmp_path / "main", v1=donor_folder)
    convert("someone/plain", L_layers=2, revision="v1").save_pretrained(tmp_path / "looped")
    make_tiny_tokenizer().save_pretrained(tmp_path / "looped")
    (tmp_path / "train.txt").write_text("The old lobster carries the bridge near the river . " * 20)
    opened: list[Any] = []
    monkeypatch.setattr(training_run, "open_donor", lambda name, **hub: opened.append((name, hub)) or open_donor(name, **hub))
    flags = f"--dataset_name {tmp_path / 'train.txt'} --seq_len 16 --batch_size 1 --max_steps 1 --device cpu --distill_weight 0.5 --dry_run"
    cli.main(["train", "--checkpoint", str(tmp_path / "looped"), *flags.split()])
    cli.main(["train", "--checkpoint", str(tmp_path / "looped"), *flags.split(), "--teacher", "someone/plain@v1"])
    commit = hub.repos["models", "someone/plain"].branches["v1"].commit()
    assert opened == [("someone/plain", {"revision": commit}), ("someone/plain", {"revision": "v1"})]

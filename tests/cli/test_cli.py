"""The command line itself: commands, flags, exit statuses, stdout and stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recursify.cli import main as cli
from recursify.conversion.settings import ConvertSettings
from recursify.errors import UserError
from recursify.evaluation.settings import EvaluateSettings
from recursify.inference.settings import GenerateSettings
from recursify.training.settings import TrainSettings


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `recursify ARGV`, in this process."""
    status = 0
    try:
        cli.main(argv)
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def converted(donor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "m.pt"
    cli.main(["convert", "--qwen_model", str(donor_folder), "--output_path", str(path)])
    return path


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert all(job in out for job in ("convert", "train", "generate", "evaluate", "inspect", "demo"))


@pytest.mark.parametrize("job", cli.JOBS)
def test_help_of_every_job(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, job, "--help")
    assert status == 0
    assert f"recursify {job}" in out


def test_unknown_job(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "konvert")
    assert (status, out) == (2, "")
    assert "konvert" in err and "convert" in err


def test_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "convert", "--H_cycle", "3")
    assert status == 2
    assert "H_cycle" in err


def test_bad_input_is_one_message_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = call(capsys, "inspect", "--checkpoint", str(tmp_path / "none.pt"))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "none.pt" in err


@pytest.mark.parametrize(
    "words",
    ["inspect --checkpoint X", "convert --qwen_model X", "export --checkpoint X --out out", "train --checkpoint a.pt --dataset_name X"],
)
def test_a_name_longer_than_the_system_takes(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, *words.replace("X", "x" * 5000).split())
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECURSIFY_DEBUG", "1")
    with pytest.raises(ValueError, match=r"none\.pt"):
        cli.main(["inspect", "--checkpoint", str(tmp_path / "none.pt")])


def test_convert_prints_what_the_quick_start_shows(donor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "qwen_recursive_init.pt"
    status, out, _ = call(capsys, "convert", "--qwen_model", str(donor_folder), "--output_path", str(path))
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("✓ Loaded Qwen model: hidden_size=32, num_layers=24, vocab_size=")
    assert lines[1] == "✓ Initialized recursive model"
    assert lines[2] == "✓ Copied embeddings"
    assert lines[3] == "✓ Copied 4 transformer layers from indices [0, 8, 16, 23]"
    assert lines[4].startswith("✓ Copied LM head")
    assert "max difference 0.0" in lines[5]
    assert lines[-2] == f"✓ Saved to {path}"
    assert (tmp_path / "qwen_recursive_init_tokenizer" / "tokenizer.json").is_file()


def test_convert_json_is_one_object_on_stdout(donor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("convert", "--qwen_model", str(donor_folder), "--keep_donor", "--output_path", str(tmp_path / "f"), "--json")
    status, out, err = call(capsys, *argv)
    result = json.loads(out)
    assert status == 0 and "✓ Saved" in err
    assert result["check"]["plain_difference"] == 0.0
    assert result["plan"]["loop"] == [10, 11, 12, 13]
    assert result["layer_applications_per_token"]["3"] == 68


def test_dry_run_writes_nothing(donor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "convert", "--qwen_model", str(donor_folder), "--dry_run", "--output_path", str(tmp_path / "x.pt"))
    assert status == 0 and "layer  23  ->  L_level 3" in out
    assert not any(tmp_path.iterdir())


def test_inspect(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = call(capsys, "inspect", "--checkpoint", str(converted))
    _, out, _ = call(capsys, "inspect", "--checkpoint", str(converted), "--json")
    result = json.loads(out)
    state = torch.load(converted, weights_only=True)["model_state_dict"]
    unique = {tensor.data_ptr(): tensor.numel() for tensor in state.values()}
    assert result["parameters"]["total"] == sum(unique.values())
    assert f"{sum(unique.values()):,}" in text
    assert result["donor_layer_applications_per_token"] == 24


def test_evaluate_both_forms_and_the_donor(converted: Path, donor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "t.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The ship number {i} carries the painter near the river. " * 6 for i in range(60)))
    common = ("--dataset_name", str(text), "--seq_len", "32", "--json")
    _, ours, _ = call(capsys, "evaluate", "--checkpoint", str(converted), "--cycles", "0", "1", "3", *common)
    _, theirs, _ = call(capsys, "evaluate", "--checkpoint", str(donor_folder), *common)
    rows = json.loads(ours)["rows"]
    assert [row["H_cycles"] for row in rows] == [0, 1, 3]
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], abs=1e-6)  # gains are 0
    assert json.loads(theirs)["rows"][0]["H_cycles"] is None
    assert json.loads(theirs)["rows"][0]["layer_applications"] == 24


def test_interrupted_training_exits_non_zero(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from recursify.training import run

    for interrupted, status in ((True, 130), (False, 0)):
        result = SimpleNamespace(fit=SimpleNamespace(interrupted=interrupted))
        monkeypatch.setattr(run, "train", lambda settings, result=result: result)
        assert call(capsys, "train", "--checkpoint", "m.pt")[0] == status


RECIPE = """
about: for a test
convert: {keep_donor: true, L_layers: 2, output_path: from_file.pt}
train:
  checkpoint: m.pt
  lr: 1e-5
  gain_lr: 1
  max_steps: 7
  enable_deep_supervision: true
  deep_supervision_schedule: early_decay
  cycle_choices: [1, 2]
  cycle_weights: [1, 2.5]
  eval_batch_size: null
evaluate:
cost: {tokens: 5}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_settings_come_from_a_recipe_with_their_types(recipe: Path) -> None:
    train = cli.parse("train", TrainSettings, ["--config", str(recipe)])
    assert type(train) is TrainSettings
    assert train == TrainSettings(
        checkpoint="m.pt", lr=1e-5, gain_lr=1.0, max_steps=7, enable_deep_supervision=True, deep_supervision_schedule="early_decay",
        cycle_choices=(1, 2), cycle_weights=(1.0, 2.5),
    )  # fmt: skip
    assert all(type(weight) is float for weight in (train.lr, train.gain_lr, *train.cycle_weights))


def test_command_line_overrides_the_recipe(recipe: Path) -> None:
    flags = ["--lr", "2e-5", f"--config={recipe}", "--no_enable_deep_supervision", "--cycle_choices", "3", "--checkpoint", "other.pt"]
    train = cli.parse("train", TrainSettings, flags)
    assert (train.lr, train.enable_deep_supervision, train.cycle_choices, train.checkpoint) == (2e-5, False, (3,), "other.pt")
    assert train.max_steps == 7


def test_required_flags_may_come_from_either(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parse("evaluate", EvaluateSettings, ["--config", str(recipe), "--checkpoint", "x.pt"]).checkpoint == "x.pt"
    status, _, err = call(capsys, "evaluate", "--config", str(recipe))
    assert status == 2 and "--checkpoint" in err


def test_scripts_of_the_guides_take_a_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_qwen_to_recursive.py", "--config", str(recipe), "--L_layers", "3"])
    assert cli.parse("convert", ConvertSettings) == ConvertSettings(keep_donor=True, L_layers=3, output_path="from_file.pt")


def test_help_shows_the_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain, _ = call(capsys, "convert", "--help")
    _, filled, _ = call(capsys, "convert", "--help", "--config", str(recipe))
    assert "--config" in plain and "qwen_recursive_init.pt" in plain and "from_file.pt" in filled
    assert "--config" not in call(capsys, "inspect", "--help")[1]


# Lists of lists: 2**30 words of text, in a kilobyte.
BOMB = "about: [&a0 [x, x]" + "".join(f", &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 31)) + "]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {batchsize: 4}", ["batchsize", "did you mean batch_size"]),
        ("trian: {}", ["trian", "did you mean train"]),
        ("convert: {}", ["no section 'train'", "convert"]),
        ("train: {batch_size: 4.5}", ["batch_size", "a whole number", "4.5"]),
        ("train: {batch_size: true}", ["batch_size", "a whole number", "True"]),
        ("train: {lr: fast}", ["lr", "a number", "fast"]),
        ("train: {lr: true}", ["lr", "a number", "True"]),
        ("train: {output_dir: 5}", ["output_dir", "in quotes", "5"]),
        ("train: {resume: 'yes'}", ["resume", "true or false", "yes"]),
        ("train: {backprop: half}", ["backprop", "full, cycle, last", "half"]),
        ("train: {cycle_choices: 3}", ["cycle_choices", "a list", "3"]),
        ("train: {cycle_choices: [1, two]}", ["cycle_choices", "a whole number", "two"]),
        ("train: {seq_len: null}", ["seq_len", "a whole number", "None"]),
        ("train: {config: x}", ["config", "unknown key"]),
        ("train: [1, 2]", ["under 'train'", "[1, 2]"]),
        ("train: {lr: 1, lr: 2}", ["'lr' is given twice"]),
        ("train: {lr: [", ["not valid YAML", "line 1"]),
        ("train: {lr: !!int x}", ["not valid YAML", "invalid literal"]),
        ("train: {lr: !!int ''}", ["not valid YAML"]),
        ("train: {lr: !!float x}", ["not valid YAML", "could not convert"]),
        ("train: {lr: !!timestamp x}", ["not valid YAML"]),
        ("train: {lr: !!bool x}", ["not valid YAML"]),
        ("train: {lr: 2020-13-45}", ["not valid YAML", "month"]),
        (f"train: {{lr: {'1' * 5000}}}", ["not valid YAML", "4300 digits"]),
        (f"train: {{lr: 0x{'f' * 5000}}}", ["lr", "a number"]),
        (f"train: {'[' * 5000}", ["not valid YAML", "nested too deeply"]),
        ("train: {lr: &a [*a]}", ["lr", "a number"]),
        ("train: &a [*a]", ["under 'train'"]),
        (BOMB + "train: {lr: *a30}", ["lr", "a number"]),
        (BOMB + "train: *a30", ["under 'train'"]),
        (BOMB + "train: {mix: *a30}", ["mix", "text"]),
        ("just text", ["a section for each job", "str"]),
        ("", ["a section for each job"]),
    ],
)
def test_a_bad_recipe_is_one_message(text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    status, out, err = call(capsys, "train", "--config", str(path), "--checkpoint", "m.pt")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert all(word in err for word in ("--config", str(path), *words)), err
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"none\.yaml.*cannot be read"):
        cli.parse("generate", GenerateSettings, ["--config", str(tmp_path / "none.yaml")])
    assert call(capsys, "generate", "--config")[0] == 2


def test_closed_pipe_is_not_an_error(converted: Path) -> None:
    argv = [sys.executable, "-m", "recursify", "inspect", "--checkpoint", str(converted)]
    piped = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.stdout is not None and piped.stderr is not None
    piped.stdout.close()
    assert b"Traceback" not in piped.stderr.read()
    piped.wait()

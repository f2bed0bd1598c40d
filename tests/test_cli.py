"""The command line itself: jobs, flags, exit statuses, and what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recursify import cli


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
    assert lines[-1] == f"✓ Saved to {path}"
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


def test_an_interrupted_training_is_no_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from recursify import training

    for interrupted, status in ((True, 130), (False, 0)):
        result = SimpleNamespace(fit=SimpleNamespace(interrupted=interrupted))
        monkeypatch.setattr(training, "train", lambda settings, result=result: result)
        assert call(capsys, "train", "--checkpoint", "m.pt")[0] == status


def test_output_into_a_closed_pipe_is_no_error(converted: Path) -> None:
    argv = [sys.executable, "-m", "recursify", "inspect", "--checkpoint", str(converted)]
    piped = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.stdout is not None and piped.stderr is not None
    piped.stdout.close()
    assert b"Traceback" not in piped.stderr.read()
    piped.wait()

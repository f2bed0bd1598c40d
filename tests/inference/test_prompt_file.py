"""Prompt files: parsed, completed as single prompts are, and resumed after an interruption."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recursify.checkpoints import checkpoint
from recursify.conversion.convert import convert
from recursify.errors import UserError
from recursify.inference import prompt_file
from recursify.inference.chat_prompt import Dialogue
from recursify.inference.generation import generate_text
from recursify.inference.prompt_file import Prompt, read_prompts
from recursify.inference.settings import GenerateSettings
from tests.support import tiny
from tests.support.tiny import make_tiny_tokenizer
from tests.support.tokenizers import with_template

TEXTS = ["The old lobster", "A", "  two words ", "quiet village songs", "龙虾和🦞", "The castle\\n follows", "one"]


@pytest.fixture(scope="module")
def model(donor_folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return convert(str(donor_folder), L_layers=2, H_cycles=2, L_cycles=1, gain=0.3)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("saved") / "model.pt")
    checkpoint.save(path, model, make_tiny_tokenizer())
    return path


@pytest.fixture
def settings(saved: str, tmp_path: Path) -> GenerateSettings:
    file = tmp_path / "many.txt"
    file.write_text("\n".join([*TEXTS[:3], "", "   ", *TEXTS[3:]]) + "\n", encoding="utf-8")
    return GenerateSettings(
        checkpoint=saved, prompt_file=str(file), temperature=1.0, seed=3, max_new_tokens=5, batch_size=2, device="cpu"
    )  # fmt: skip


def results(settings: GenerateSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in prompt_file.output_path(settings).read_text(encoding="utf-8").splitlines()]


# --- what is read


def test_text_file_lines_are_literal_prompts(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("\ufeffone \r\n\n  \n two\\n\u2028three\n".encode())
    assert read_prompts(str(file)) == [Prompt(0, "one "), Prompt(3, " two\\n\u2028three")]


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "two\\nlines", "id": 7}\n\n{"prompt": "龙虾"}', encoding="utf-8")
    assert read_prompts(str(file)) == [Prompt(0, "two\nlines"), Prompt(2, "龙虾")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "x.txt has no prompt; expected one per line"),
        ("x.txt", b"\n \n", "x.txt has no prompt"),
        ("x.txt", b"ab\xff", "x.txt: expected UTF-8 text, got the byte 0xff"),
        (
            "x.jsonl",
            b'{"prompt": "a"}\n{"text": "b"}',
            """line 2: expected a JSON object with a text "prompt" or with "messages", got '{"text": "b"}'""",
        ),
        ("x.jsonl", b'{"prompt": 3}', "line 1: expected a JSON object"),
        ("x.jsonl", b'{"prompt": ' + b"[" * 200_000, "line 1: expected a JSON object"),
        ("x.jsonl", b'{"prompt": "a", "id": ' + b"1" * 5000 + b"}", "line 1: expected a JSON object"),
        ("x.jsonl", b"nothing", "line 1: expected a JSON object"),
        ("x.jsonl", b"[1]", "line 1: expected a JSON object"),
    ],
)
def test_invalid_prompt_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(str(tmp_path / name))
    assert str(error.value).startswith("--prompt_file: ") and message in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .No such file or directory."):
        read_prompts(str(tmp_path / "missing.txt"))


# --- what is written


def test_prompt_file_results_equal_single_prompts(settings: GenerateSettings, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings.temperature = 0
    prompt_file.run(settings)
    found = results(settings)
    assert [entry["index"] for entry in found] == [0, 1, 2, 5, 6, 7, 8]
    assert [entry["prompt"] for entry in found] == TEXTS
    for entry in found:
        alone = generate_text(model, make_tiny_tokenizer(), entry["prompt"], settings.sampling)
        assert (entry["text"], entry["finish_reason"], entry["tokens"]) == (alone.text, alone.finish_reason, len(alone.token_ids))
        assert "cycles" not in entry
    printed = capsys.readouterr()
    assert printed.out == f"✓ 7 prompts continued, in {prompt_file.output_path(settings)}\n"
    assert "7/7" in printed.err  # the bar


def test_results_contain_exit_cycles(settings: GenerateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    prompt_file.run(replace(settings, halt="kl", temperature=0))
    assert all(len(entry["cycles"]) == entry["tokens"] for entry in results(settings))
    assert "halting: " in capsys.readouterr().err


def test_output_file(settings: GenerateSettings, tmp_path: Path) -> None:
    prompt_file.run(replace(settings, output_file=str(tmp_path / "elsewhere.jsonl")))
    assert len((tmp_path / "elsewhere.jsonl").read_text(encoding="utf-8").splitlines()) == 7
    assert not prompt_file.output_path(settings).exists()


def test_results_that_cannot_be_written_are_one_message(settings: GenerateSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"--output_file: .* could not be written \(No space left on device\); the results so far are kept"
        ):
            prompt_file.run(settings)
    prompt_file.run(settings)


def test_every_batch_has_its_own_seed(settings: GenerateSettings, tmp_path: Path) -> None:
    """The same prompt repeated: batches differ from each other, and from those of another seed."""
    (tmp_path / "same.txt").write_text("The old lobster\n" * 6)
    same = replace(settings, prompt_file=str(tmp_path / "same.txt"), max_new_tokens=8)
    prompt_file.run(same)
    texts = [entry["text"] for entry in results(same)]
    assert len({tuple(texts[first : first + 2]) for first in (0, 2, 4)}) == 3
    other = replace(same, seed=4, output_file=str(tmp_path / "other.jsonl"))
    prompt_file.run(other)
    assert [entry["text"] for entry in results(other)] != texts


def test_statistics_cover_all_batches(settings: GenerateSettings, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    halting = replace(settings, halt="entropy", halt_threshold=5.6, temperature=0)
    prompt_file.run(halting)
    cycles = [cycle for entry in results(halting) for cycle in entry["cycles"]]
    assert len(set(cycles)) > 1 and len(cycles) > 10
    assert f"halting: {sum(cycles) / len(cycles):.1f} of 2 cycles per token, " in capsys.readouterr().err


def test_budget_is_calibrated_before_generation(settings: GenerateSettings, tmp_path: Path) -> None:
    (tmp_path / "like.txt").write_text("The old lobster follows the river near the castle. " * 4)
    budgeted = replace(settings, halt="entropy", compute_budget=0.9, calibration_file=str(tmp_path / "like.txt"), temperature=0)
    prompt_file.run(budgeted)
    record = json.loads(prompt_file.output_path(budgeted).with_suffix(".run.json").read_text())
    assert record["halt_threshold"] is not None and record["halt"] == "entropy"


# --- resumed


class Breaks:
    """`generate_batch`, interrupted at its n-th call."""

    def __init__(self, call: int):
        self.left, self.batches = call, 0
        self.real = prompt_file.generate_batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        self.batches += 1
        return self.real(*args, **kwargs)


@pytest.fixture
def whole(settings: GenerateSettings, tmp_path: Path) -> bytes:
    """Results of an uninterrupted run."""
    elsewhere = replace(settings, output_file=str(tmp_path / "whole.jsonl"))
    prompt_file.run(elsewhere)
    return prompt_file.output_path(elsewhere).read_bytes()


def test_interrupted_run_resumes(
    settings: GenerateSettings, whole: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prompt_file, "generate_batch", Breaks(3))
    with pytest.raises(KeyboardInterrupt):
        prompt_file.run(settings)
    assert "Stopped: 4 of 7 prompts done" in capsys.readouterr().err
    assert len(results(settings)) == 4
    again = Breaks(100)
    monkeypatch.setattr(prompt_file, "generate_batch", again)
    prompt_file.run(settings)
    assert prompt_file.output_path(settings).read_bytes() == whole
    assert again.batches == 2


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
def test_truncated_output_file_is_completed(settings: GenerateSettings, whole: bytes, share: float) -> None:
    prompt_file.run(settings)
    path = prompt_file.output_path(settings)
    path.write_bytes(whole[: int(len(whole) * share)])
    prompt_file.run(settings)
    assert path.read_bytes() == whole


def test_complete_output_file_is_not_modified(settings: GenerateSettings, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_file.run(settings)
    again = Breaks(100)
    monkeypatch.setattr(prompt_file, "generate_batch", again)
    prompt_file.run(settings)
    assert again.batches == 0 and prompt_file.output_path(settings).read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, "was made with --temperature 1.0, and this run has --temperature 0.5"),
        ({"seed": None}, "was made with --seed 3, and this run has --seed None"),
        ({"batch_size": 3}, "was made with --batch_size 2"),
        ({"H_cycles": 1}, "was made with --H_cycles 2, and this run has --H_cycles 1"),
        ({"stop": ("x",)}, "was made with --stop []"),
    ],
)
def test_output_of_other_settings_is_refused(settings: GenerateSettings, change: dict[str, Any], message: str) -> None:
    prompt_file.run(settings)
    before = prompt_file.output_path(settings).read_bytes()
    with pytest.raises(UserError) as error:
        prompt_file.run(replace(settings, **change))
    assert message in str(error.value) and "name another --output_file, or delete it to start over" in str(error.value)
    assert prompt_file.output_path(settings).read_bytes() == before


def test_explicit_default_depth_counts_as_equal_settings(settings: GenerateSettings) -> None:
    prompt_file.run(settings)
    prompt_file.run(replace(settings, H_cycles=2))


def test_output_of_other_prompts_or_checkpoints_is_refused(settings: GenerateSettings, model: Any, tmp_path: Path) -> None:
    prompt_file.run(settings)
    other = str(tmp_path / "other.pt")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    checkpoint.save(other, model, make_tiny_tokenizer())
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1
    with pytest.raises(UserError, match="was made with another checkpoint"):
        prompt_file.run(replace(settings, checkpoint=other))
    Path(settings.prompt_file or "").write_text("Something else\n")
    with pytest.raises(UserError, match="was made with other prompts"):
        prompt_file.run(settings)


@pytest.mark.parametrize("record", [None, "", "[]", '{"format": "other"}'])
def test_foreign_output_file_is_not_touched(settings: GenerateSettings, record: str | None) -> None:
    path = prompt_file.output_path(settings)
    path.write_text("somebody's\n")
    if record is not None:
        path.with_suffix(".run.json").write_text(record)
    with pytest.raises(UserError, match=r"many\.out\.jsonl is there, but nothing in .*many\.out\.run\.json says how it was made"):
        prompt_file.run(settings)
    assert path.read_text() == "somebody's\n"


def test_invalid_result_line_is_reported(settings: GenerateSettings) -> None:
    prompt_file.run(settings)
    path = prompt_file.output_path(settings)
    lines = path.read_bytes().splitlines(keepends=True)
    for fault in (b"torn\n", b'{"index": 3}\n', b"[]\n", b'{"index": [1]}\n'):
        path.write_bytes(b"".join([lines[0], fault, *lines[2:]]))
        with pytest.raises(UserError, match=r"many\.out\.jsonl, line 2: expected a result of these prompts, got"):
            prompt_file.run(settings)


@pytest.mark.parametrize("fault", ["a" * 1000])
def test_all_prompts_are_checked_before_generation(settings: GenerateSettings, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "faulty.txt"
    file.write_text("\n".join(["good", *[fault] * 5]), encoding="utf-8")
    faulty = replace(settings, prompt_file=str(file))
    with pytest.raises(UserError) as error:
        prompt_file.run(faulty)
    text = str(error.value)
    assert f"--prompt_file: {file}, line 2: --max_new_tokens: the prompt has" in text and "line 4: " in text and "line 5" not in text
    assert text.endswith("(and 2 more)")
    file.write_text("\n".join([fault] * 3), encoding="utf-8")
    with pytest.raises(UserError) as error:
        prompt_file.run(faulty)
    assert "line 3: " in str(error.value) and "more)" not in str(error.value)
    file.write_text("a" * 60, encoding="utf-8")
    with pytest.raises(UserError, match="line 1: --max_new_tokens: the prompt has .* and 500 more"):
        prompt_file.run(replace(faulty, max_new_tokens=500))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faulty.txt", "many.txt"]


def test_a_folder_that_is_not_there(settings: GenerateSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output_file: .*nowhere is not a folder that exists"):
        prompt_file.run(replace(settings, output_file=str(tmp_path / "nowhere" / "x.jsonl")))


def test_messages_are_given_by_the_chat_template(tmp_path: Path) -> None:
    """As chat gives them, beside prompts of the same file; with --chat every prompt is a message."""
    tokenizer = with_template()
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"prompt": "hello"}) + "\n")
    model = tiny.tiny_model("qwen2", num_hidden_layers=2)
    settings = GenerateSettings(checkpoint="x", prompt_file=str(tmp_path / "p.jsonl"), max_new_tokens=4)
    prompts = prompt_file.read_prompts(str(tmp_path / "p.jsonl"))
    encoded, ends = prompt_file._encode_each(model, tokenizer, prompts, settings)
    assert encoded[0].ids == Dialogue(tokenizer).prompt(talk) and encoded[1].ids == tokenizer("hello").input_ids
    assert set(Dialogue(tokenizer).ends) < set(ends)
    asked, _ = prompt_file._encode_each(model, tokenizer, prompts[1:], replace(settings, chat=True, system="Be brief."))
    assert asked[1].ids == encoded[0].ids


@pytest.mark.parametrize("line", ['{"messages": []}', '{"messages": [{"role": "user"}]}', '{"messages": "a"}', '{"text": "a"}'])
def test_lines_that_hold_no_prompt(line: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(UserError, match=r'p.jsonl, line 1: expected a JSON object with a text "prompt" or with "messages", got'):
        prompt_file.read_prompts(str(tmp_path / "p.jsonl"))

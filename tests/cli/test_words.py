"""The words of a command line: what they are read as, and that everything wrong with them is one line with status 2."""

from __future__ import annotations

from typing import Any

import pytest

from recursify.cli import main as cli
from recursify.conversion.settings import ConvertSettings, InspectSettings, ProbeSettings
from recursify.evaluation.settings import CompareSettings, EvaluateSettings
from recursify.hub.export import ExportSettings
from recursify.inference.settings import ChatSettings, GenerateSettings
from recursify.serving.settings import ServeSettings
from recursify.training import EmbeddingSettings, HybridSettings, TrainSettings

SETTINGS: dict[str, Any] = {
    "convert": ConvertSettings, "train": TrainSettings, "train_trm": EmbeddingSettings, "train_trm_hybrid": HybridSettings,
    "generate": GenerateSettings, "chat": ChatSettings, "serve": ServeSettings, "evaluate": EvaluateSettings, "compare": CompareSettings,
    "probe": ProbeSettings, "inspect": InspectSettings, "export": ExportSettings,
}  # fmt: skip


def parse(line: str | list[str]) -> Any:
    job, *words = line.split() if isinstance(line, str) else line
    return cli.parse(job, SETTINGS[job], words)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("evaluate --checkpoint x --cycles 1 2", "cycles", (1, 2)),
        ("evaluate --checkpoint x --cycles 1,2", "cycles", (1, 2)),
        ("evaluate --checkpoint x --cycles=1,2", "cycles", (1, 2)),
        ("evaluate --checkpoint x --cycles=1 2", "cycles", (1, 2)),
        ("evaluate --checkpoint x --cycles 1, 2,,3,", "cycles", (1, 2, 3)),
        (["evaluate", "--checkpoint", "x", "--cycles", "1, 2 3"], "cycles", (1, 2, 3)),
        ("evaluate --checkpoint x --cycles 3 --cycles 1", "cycles", (1,)),
        ("evaluate --checkpoint x --tasks a,b c ,d,", "tasks", ("a", "b", "c", "d")),
        ("evaluate --checkpoint x --questions permutations:difficulty=4-32/4,count=200", "questions",
         ("permutations:difficulty=4-32/4,count=200",)),
        ("serve --checkpoint x --depths 5,0,5", "depths", (5, 0, 5)),
        ("serve --checkpoint x --cors_origins https://a,b", "cors_origins", ("https://a,b",)),
        ("train --checkpoint x --cycle_choices 1,2 --cycle_weights 0.5,1e1", "cycle_choices", (1, 2)),
        ("train --checkpoint x --cycle_choices 1,2 --cycle_weights 0.5,1e1", "cycle_weights", (0.5, 10.0)),
        ("train --checkpoint x --report_to tensorboard,wandb", "report_to", ("tensorboard", "wandb")),
        ("train --checkpoint x --report_to none", "report_to", ()),
        ("train --checkpoint x --mix a,b.txt=1 c=2", "mix", ("a,b.txt=1", "c=2")),
        ("generate --checkpoint x --stop a,b none", "stop", ("a,b", "none")),
        ("export out --checkpoint x --evaluation a,b.json c.json", "evaluation", ("a,b.json", "c.json")),
    ],
)  # fmt: skip
def test_several_values(line: str | list[str], field: str, value: tuple[Any, ...]) -> None:
    assert getattr(parse(line), field) == value


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("train --checkpoint x --batch-size 7", "batch_size", 7),
        ("train --checkpoint x --learning-rate=1e-3", "lr", 1e-3),
        ("train --checkpoint x --lr -1", "lr", -1.0),
        ("train --checkpoint x --halting_weight -inf", "halting_weight", float("-inf")),
        ("train --checkpoint x --max_steps None", "max_steps", None),
        ("train --checkpoint x --lr 1 --lr 2", "lr", 2.0),
        ("train --checkpoint x --bf16", "bf16", True),
        ("train --checkpoint x --no_bf16", "bf16", False),
        ("train --checkpoint x --compile --no-compile", "compile", False),
        ("generate --checkpoint x --static_cache", "static_cache", True),
        ("generate --checkpoint x --chat TRUE", "chat", True),
        (["generate", "--checkpoint", "x", "--prompt", "- a list"], "prompt", "- a list"),
        (["generate", "--checkpoint", "x", "--prompt", ""], "prompt", ""),
        ("generate --checkpoint x --prompt=-h", "prompt", "-h"),
        ("compare --json=True A B", "json", True),
        ("compare A B --json", "checkpoints", ("A", "B")),
        ("compare A --json B", "checkpoints", ("A", "B")),
        ("compare --json -- -A B", "checkpoints", ("-A", "B")),
        ("compare A B --cycles 1 3", "cycles", (1, 3)),
        ("export --checkpoint x --evaluation a.json b.json out", "out", "out"),
        ("export --checkpoint x --evaluation a.json b.json out", "evaluation", ("a.json", "b.json")),
        ("export --checkpoint x out --evaluation a.json b.json", "evaluation", ("a.json", "b.json")),
        ("export --checkpoint x --output_path out", "out", "out"),
        ("export --checkpoint x --check http://a --cycles 1 3", "cycles", (1, 3)),
        ("export --checkpoint x --cycles 1 3 out", "cycles", (1, 3)),
        ("export --checkpoint x --cycles 1,3 out", "out", "out"),
        ("convert --output_dir out", "output_path", "out"),
        ("generate --checkpoint x --dtype bf16", "dtype", "bfloat16"),
        ("serve --checkpoint x --dtype FP16", "dtype", "float16"),
        ("export out --checkpoint x --dtype fp32", "dtype", "float32"),
        ("compare A B --dtype Float32", "dtype", "float32"),
        ("train --checkpoint x --lr_scheduler_type Cosine", "lr_schedule", "cosine"),
    ],
)
def test_values(line: str | list[str], field: str, value: Any) -> None:
    assert getattr(parse(line), field) == value


NEAREST = "expected one of linear, cosine, wsd (nearest to"
WRONG: list[tuple[str, str]] = [
    ("train --checkpoint x --num_epoch 2", "--num_epoch: not a flag of train; did you mean --num_epochs?"),
    ("train --checkpoint x --learning-rat 2", "--learning-rat: not a flag of train; did you mean --learning_rate?"),
    ("train --checkpoint x -lr 2", "-lr: not a flag of train; did you mean --lr?"),
    ("generate --checkpoint x --zzz=1", "--zzz: not a flag of generate; recursify generate --help lists its flags"),
    ("train --checkpoint x --tune_lm_head", "--tune_lm_head: not a flag of train; instead: it is a flag of --approach hybrid"),
    ("train --checkpoint x --lr", "--lr: expected a number, got nothing"),
    ("train --config", "--config: expected text, got nothing"),
    ("train --approach", "--approach: expected one of full, hybrid, embedding, got nothing"),
    ("generate --checkpoint x --prompt --foo",
     "--prompt: expected text, got the flag --foo; a value with a dash in front is written --prompt=--foo"),
    ("evaluate --checkpoint x --cycles", "--cycles: expected a whole number, got nothing"),
    ("evaluate --checkpoint x --cycles --json",
     "--cycles: expected a whole number, got the flag --json; a value with a dash in front is written --cycles=--json"),
    ("evaluate --checkpoint x --split", "--split: expected one of validation, test, all, got nothing"),
    ("evaluate --checkpoint x --split val", "--split: expected one of validation, test, all, got 'val'"),
    ("evaluate --checkpoint x --cycles 1,b", "--cycles: expected a whole number, got 'b'"),
    ("convert --layer_selection best",
     "--layer_selection: expected one of uniform, first, last, middle, stride, auto, got 'best'"),
    ("export out --checkpoint x --dtype int8", "--dtype: expected one of float32, bfloat16, float16, got 'int8'"),
    ("train --checkpoint x --learning_rate fast", "--learning_rate: expected a number, got 'fast'"),
    ("train --checkpoint x --bf16 maybe", "--bf16: expected true or false, got 'maybe'"),
    ("generate --checkpoint x --chat model.pt", "--chat: takes no value, got 'model.pt'"),
    ("train --checkpoint x --lr_scheduler_type constant",
     f"--lr_scheduler_type: {NEAREST} constant: wsd, the same with decay_share 0 and warmup_steps 0), got 'constant'"),
    ("train --checkpoint x --lr_scheduler_type polynomial",
     f"--lr_scheduler_type: {NEAREST} polynomial: linear, which is a polynomial of power 1), got 'polynomial'"),
    ("evaluate --checkpoint x --split constant", "--split: expected one of validation, test, all, got 'constant'"),
    ("generate", "recursify generate: expected --checkpoint, got none; recursify generate --help says what to give"),
    ("export", "recursify export: expected --checkpoint, got none; recursify export --help says what to give"),
    ("export --checkpoint x",
     "OUT: expected the name of the folder to write; give one, such as recursify export OUT --checkpoint model.pt"),
    ("export --checkpoint x --evaluation out", "--evaluation: expected text, got nothing"),
    ("inspect model.pt", "recursify inspect: expected a flag, got 'model.pt'; did you mean --checkpoint model.pt?"),
    ("convert donor", "recursify convert: expected a flag, got 'donor'; did you mean --qwen_model donor?"),
    ("demo now", "recursify demo: expected a flag, got 'now'; recursify demo --help lists them"),
    ("generate --checkpoint x --prompt Once upon a time",
     "recursify generate: expected a flag after --prompt Once, got 'upon'; --prompt takes one value: put text of several words in quotes"),
    ("export a b --checkpoint x", "recursify export: expected OUT alone without a flag, got 'b'; recursify export --help lists the flags"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_what_is_wrong_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err) == (2, "", f"error: {message}\n")


def test_a_script_of_the_guides_calls_itself_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/train_qwen_recursive.py"])
    with pytest.raises(SystemExit):
        cli.train()
    wanted = "train_qwen_recursive.py: expected --checkpoint, got none; train_qwen_recursive.py --help says what to give"
    assert capsys.readouterr().err == f"error: {wanted}\n"


@pytest.mark.parametrize("line", ["train --help", "train --no_such -h", "train --help --no_such", "train --prompt --help"])
def test_help_comes_before_errors(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 0 and "usage: recursify train" in capsys.readouterr().out


def test_each_approach_has_the_help_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for line, flag in (("train --help", "--checkpoint"), ("train --approach hybrid --help", "--tune_lm_head")):
        with pytest.raises(SystemExit):
            cli.main(line.split())
        said = " ".join(capsys.readouterr().out.replace("│", "").split())
        assert flag in said and "recursify train --approach hybrid --help lists those of hybrid" in said

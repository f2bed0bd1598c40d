"""Flags of all commands: groups of the help, transformers' names, and one rule for types wherever a value comes from."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from recursify.checkpoints.settings import ModelSource
from recursify.cli import flags, main
from recursify.cli.names import model_field, other_names
from recursify.conversion.inspection import InspectSettings
from recursify.conversion.settings import ConvertSettings, ProbeSettings
from recursify.demo.run import DemoSettings
from recursify.errors import UserError
from recursify.evaluation.settings import CompareSettings, EvaluateSettings
from recursify.hub.export import ExportSettings
from recursify.inference.chat import ChatSettings
from recursify.inference.options import DecodingOptions, Sampling
from recursify.inference.settings import GenerateSettings
from recursify.serving import ServeSettings
from recursify.training import EmbeddingSettings, HybridSettings, TrainSettings
from recursify.utils.options import ALIASES, Options

COMMANDS: dict[str, Any] = {
    "convert": ConvertSettings, "train": TrainSettings, "train_trm": EmbeddingSettings, "train_trm_hybrid": HybridSettings,
    "generate": GenerateSettings, "chat": ChatSettings, "serve": ServeSettings, "evaluate": EvaluateSettings, "compare": CompareSettings,
    "probe": ProbeSettings, "inspect": InspectSettings, "export": ExportSettings, "demo": DemoSettings,
}  # fmt: skip
# The least that each needs, from Python and from the command line.
NEEDED: dict[str, dict[str, Any]] = {name: {"checkpoint": "x"} for name in ("train", "generate", "chat", "serve", "evaluate", "inspect")}
NEEDED |= {"probe": {"checkpoint": "x", "text": "y"}, "export": {"checkpoint": "x", "out": "out"}, "compare": {"checkpoints": ("x", "y")}}
WORDS = dict.fromkeys(NEEDED, "--checkpoint x") | {"probe": "--checkpoint x --text y", "export": "out --checkpoint x", "compare": "x y"}
EVERY = [(name, field.name) for name, settings in COMMANDS.items() for field in dataclasses.fields(settings)]


def parse(name: str, words: str = "", before: str | None = None) -> Any:
    return main.parse(name, COMMANDS[name], f"{WORDS.get(name, '') if before is None else before} {words}".split())


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main.parse(name, COMMANDS[name], ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line_equals_python_settings(name: str) -> None:
    assert parse(name) == COMMANDS[name](**NEEDED.get(name, {}))


ALIASED = [(name, field, other) for name in COMMANDS for field, others in other_names(COMMANDS[name]).items() for other in others]


@pytest.mark.parametrize(("name", "field", "other"), ALIASED)
def test_other_names_are_accepted_on_the_command_line_and_in_recipes(name: str, field: str, other: str, tmp_path: Path) -> None:
    hint = str(get_type_hints(COMMANDS[name])[field])
    fits = {"bool": "", "int": "5", "float": "0.5", "cosine": "cosine", "muon": "muon", "str": "y"}
    value = next(value for part, value in fits.items() if part in hint)
    before = WORDS.get(name, "").replace({"checkpoint": "--checkpoint x", "out": "out "}.get(field, "nothing"), "")
    ours, theirs = (parse(name, f"--{flag} {value}", before) for flag in (field, other))
    assert ours == theirs and getattr(ours, field) != getattr(COMMANDS[name](**NEEDED.get(name, {})), field)
    if name not in ("probe", "inspect", "demo"):
        (tmp_path / "r.yaml").write_text(f"{name}: {{{other}: {value or 'true'}}}")
        assert parse(name, f"--config {tmp_path / 'r.yaml'}", before) == ours


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"compare", "demo"}))
def test_the_model_has_the_same_names_in_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    field = model_field(COMMANDS[name])
    for other in ("model", "model_name_or_path"):
        before = {"export": "out", "probe": "--text x"}.get(name, "")
        assert getattr(parse(name, f"--{other} y", before), str(field)) == "y"
        assert f"--{other} STR" in help_of(name, capsys)


def test_the_name_in_the_api_is_not_the_model() -> None:
    served = parse("serve", "--model_name shown")
    assert (served.checkpoint, served.model_name) == ("x", "shown")


def test_every_alias_of_a_training_is_one_of_training_arguments() -> None:
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(ALIASES.values()) - known == {"max_length"}  # trl's
    assert {field for name, field, _ in ALIASED if name == "train"} == {*ALIASES, "checkpoint"}
    assert {field for name, field, _ in ALIASED if not name.startswith("train")} == {"checkpoint", "qwen_model", "out", "output_path"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_group_for_each_subject_and_every_flag_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, capsys)
    parts = re.split(r"^ (\S.*?) *\n -{10,} *\n", text, flags=re.MULTILINE)
    titles, groups = parts[1::2], parts[2::2]
    assert len(titles) == len(set(titles)) and all(len(title) < 50 and "(" not in title for title in titles)
    own = [field for field in dataclasses.fields(COMMANDS[name]) if field.name in vars(COMMANDS[name]).get("__annotations__", {})]
    assert "options" in titles and (f"{name} options" in titles) == any("Positional" not in str(field.type) for field in own)
    for field in dataclasses.fields(COMMANDS[name]):
        if "Positional" not in str(field.type):
            assert [bool(re.search(rf"^  --{field.name}(?=[ ,])", group, re.MULTILINE)) for group in groups].count(True) == 1
            assert all(f"--{other}" in text for other in other_names(COMMANDS[name]).get(field.name, ()))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_only_what_helps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No default of None or of a switch that is off, no brackets around what may be left out; the model first, the hardware last."""
    text = help_of(name, capsys)
    assert not re.search(r"\(default: (None|False|)\)|\[[A-Z|]+ \[|\{None|VALUE", text)
    titles = [title.removesuffix(" options") for title in re.findall(r"^ (\S.*?) *\n -{10,} *\n", text, flags=re.MULTILINE)]
    subjects = [title for title in titles if title not in ("options", "positional arguments")]
    own = [title for title in subjects if title == name]
    first = [title for title in subjects if title == "Model and tokenizer"]
    assert subjects[: len(first + own)] == first + own
    last = [title for title in ("Output", "Compute", "Hardware") if title in subjects]
    assert subjects[len(subjects) - len(last) :] == last


@pytest.mark.parametrize(("name", "field"), EVERY)
def test_every_field_says_what_it_does(name: str, field: str) -> None:
    owner = next(base for base in COMMANDS[name].__mro__ if field in vars(base).get("__annotations__", {}))
    assert re.match(r"[\w\".#-].{8,}[.\"]$", flags.help_of(owner)[field], re.DOTALL)


@pytest.mark.parametrize(("name", "field"), EVERY)
def test_a_value_of_another_type_is_refused_from_python(name: str, field: str) -> None:
    assert issubclass(COMMANDS[name], Options)
    with pytest.raises(UserError, match=rf"^--{field}: expected .*, got <object"):
        COMMANDS[name](**NEEDED.get(name, {}) | {field: object()})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 2.5}, "--batch_size: expected a whole number, got 2.5"),
        ({"enable_deep_supervision": "no"}, "--enable_deep_supervision: expected true or false, got 'no'"),
        ({"lr": "1e-3"}, "--lr: expected a number, got '1e-3'"),
        ({"cycle_choices": "1 2"}, "--cycle_choices: expected a list, got '1 2'"),
        ({"optimizer": "sgd"}, "--optimizer: expected one of adamw, muon, adamw_8bit, got 'sgd'"),
    ],
)
def test_wrong_types_from_python(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainSettings(checkpoint="x", **values)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(TrainSettings(checkpoint="x"), **values)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("batch_size", "2.5", "a whole number"),
        ("lr", "fast", "a number"),
        ("max_steps", "many", "a whole number"),
        ("gain_lr", "x", "a number"),
    ],
)
def test_command_line_and_recipe_errors_are_equal(flag: str, value: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--{flag}: expected {expected}, got '{value}'$"):
        parse("train", f"--{flag} {value}")
    (tmp_path / "recipe.yaml").write_text(f"train: {{{flag}: {value}}}", encoding="utf-8")
    with pytest.raises(UserError, match=f"train: {flag}: expected {expected}, got"):
        parse("train", f"--config {tmp_path / 'recipe.yaml'}")


def test_export_says_what_its_measurement_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Not what evaluate does with the same flags: questions, tasks, a text by default."""
    said = {name: " ".join(re.sub("[│╭╮╰╯─]", " ", help_of(name, capsys)).split()) for name in ("export", "evaluate", "compare")}
    assert "Measure the loss on this text, for the model card" in said["export"] and "Default: nothing is measured" in said["export"]
    assert not re.search("question|lm-eval|compare", said["export"])
    assert all("Default: wikitext" in said[name] and "model card" not in said[name] for name in ("evaluate", "compare"))


def test_compatible_values_are_converted() -> None:
    import numpy as np

    found = ModelSource(checkpoint=Path("some") / "model.pt")  # type: ignore[arg-type]
    assert found.checkpoint == "some/model.pt"
    sampling = Sampling(max_new_tokens=np.int64(5), temperature=1, stop=["a"])  # type: ignore[arg-type]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.stop) == (5, 1, ("a",)) and type(sampling.max_new_tokens) is int
    assert DecodingOptions(H_cycles=None).H_cycles is None


def test_flags_override_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {checkpoint: a.pt, lr: 1e-5, num_epochs: 7, cycle_choices: [1, 2]}", encoding="utf-8")
    found = main.parse("train", TrainSettings, ["--config", str(tmp_path / "recipe.yaml"), "--num_train_epochs", "2"])
    assert found == TrainSettings(checkpoint="a.pt", lr=1e-5, num_epochs=2, cycle_choices=(1, 2))

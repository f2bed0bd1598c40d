"""A tokenizer with more tokens than the model has rows is refused by every entry point, with one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from recursify import FitSettings, MeasureSettings, RecursiveTrainer, evaluate
from recursify.checkpoints import checkpoint
from recursify.checkpoints.loading import load_model
from recursify.checkpoints.tokenizer import load_tokenizer
from recursify.conversion import convert
from recursify.conversion.settings import ConvertSettings
from recursify.errors import UserError
from recursify.training import HybridSettings, train
from tests.support.tiny import VOCAB_SIZE, make_tiny_tokenizer, sentences, tiny_donor


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor with its own tokenizer, the same with a larger one, a checkpoint, and a text."""
    folder = tmp_path_factory.mktemp("vocabulary")
    larger = make_tiny_tokenizer()
    larger.add_tokens([f"<extra {i}>" for i in range(100)])
    for name in ("donor", "grown"):
        tiny_donor("qwen2", folder / name, num_hidden_layers=4)
    larger.save_pretrained(folder / "grown")
    larger.save_pretrained(folder / "larger")
    convert.run(ConvertSettings(qwen_model=str(folder / "donor"), output_path=str(folder / "m.pt"), L_layers=2), say=lambda _: None)
    (folder / "text.txt").write_text("\n".join(sentences(1, 40)))
    return folder


DOORS: dict[str, Callable[[Path], Any]] = {
    "convert": lambda at: convert.run(ConvertSettings(qwen_model=str(at / "grown"), output_path=str(at / "x.pt"), L_layers=2), print),
    "plain model": lambda at: load_model(str(at / "grown")),
    "recursive model": lambda at: load_model(str(at / "m.pt"), str(at / "larger")),
    "checkpoint": lambda at: checkpoint.load(at / "m.pt", tokenizer_path=str(at / "larger")),
    "approach": lambda at: train(HybridSettings(model_name=str(at / "grown"), dataset_name=str(at / "text.txt"), output_dir=str(at / "o"))),
    "evaluate": lambda at: evaluate(
        AutoModelForCausalLM.from_pretrained(at / "donor"), make_larger(), MeasureSettings(dataset_name=str(at / "text.txt"))
    ),
    "trainer": lambda at: RecursiveTrainer(
        model=checkpoint.load(at / "m.pt").model, args=FitSettings(output_dir=str(at / "o")), processing_class=make_larger(),
        train_dataset=[{"input_ids": [1, 2, 3]}],
    ),
}  # fmt: skip


def make_larger() -> Any:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(100)])
    return tokenizer


@pytest.mark.parametrize("door", DOORS)
def test_every_door(door: str, workdir: Path) -> None:
    most = max(make_larger().get_vocab().values())
    with pytest.raises(UserError, match=rf"the tokenizer has tokens up to id {most}, the model only {VOCAB_SIZE} rows.*resize_token_emb"):
        DOORS[door](workdir)


def test_a_much_smaller_tokenizer_is_pointed_out(workdir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        load_model(str(workdir / "m.pt"))
        assert "makes no sense" not in caplog.text
        make_small(workdir / "small")
        load_model(str(workdir / "m.pt"), str(workdir / "small"))
    assert "tokens, the model 384 rows" in caplog.text


def make_small(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(folder)


@pytest.mark.parametrize("field", [{"model_max_length": "long"}, {"model_max_length": [1]}, {"padding_side": 3}])
def test_a_tokenizer_that_cannot_be_used_is_refused_when_it_is_loaded(field: dict[str, Any], tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | field))
    with pytest.raises(UserError, match="its tokenizer cannot be loaded .*; name a folder that has one with --tokenizer_path"):
        load_tokenizer(str(tmp_path))

"""Fine-tuning on conversations from the command line's settings and from Python, to a model that answers and stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from recursify.checkpoints import checkpoint
from recursify.conversion import convert
from recursify.conversion.settings import ConvertSettings
from recursify.data.loading import DataSettings, load_blocks
from recursify.errors import UserError
from recursify.inference.chat_prompt import Dialogue
from recursify.training import FitSettings, RecursiveTrainer, TrainSettings, train
from tests.support.corpora import write_jsonl
from tests.support.runs import recursive
from tests.support.tiny import make_tiny_tokenizer, tiny_donor
from tests.support.tokenizers import with_template
from tests.support.trl_rows import say

ANSWERS = {"river": "The ship.", "castle": "The song.", "forest": "The bridge."}


def chats(count: int) -> list[dict[str, Any]]:
    """Each of two questions, whose answers depend on nothing but the question."""
    names = list(ANSWERS)
    asked = [(names[i % 3], names[(i // 3) % 3]) for i in range(count)]
    return [{"messages": say(f"the {a}?", ANSWERS[a], f"the {b}?", ANSWERS[b])} for a, b in asked]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best model of a run on 300 conversations."""
    folder = tmp_path_factory.mktemp("chats")
    tiny_donor("qwen2", folder / "donor", num_hidden_layers=2, initializer_range=0.05, hidden_size=64, intermediate_size=128)
    with_template().save_pretrained(folder / "donor")
    convert.run(
        ConvertSettings(qwen_model=str(folder / "donor"), output_path=str(folder / "m.pt"), L_layers=2, H_cycles=1, L_cycles=1),
        lambda _: None,
    )
    settings = TrainSettings(
        checkpoint=str(folder / "m.pt"), dataset_name=str(write_jsonl(folder / "chats.jsonl", chats(300))), seq_len=192, batch_size=4,
        max_steps=120, lr=5e-3, warmup_steps=5, start_gain=0.2, generate_every=0, device="cpu", output_dir=str(folder / "out"),
    )  # fmt: skip
    best = train(settings).best
    assert best is not None
    return best


def test_the_model_answers_and_stops(trained: Path) -> None:
    found = checkpoint.load(trained)
    tokenizer = checkpoint.require_tokenizer(found, trained)
    dialogue = Dialogue(tokenizer)
    for name, answer in ANSWERS.items():
        for before in ([], say("the river?", ANSWERS["river"])):
            ids = dialogue.prompt([*before, *say(f"the {name}?")])
            out = found.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=list(dialogue.ends))
            assert tokenizer.decode(out[0, len(ids) :]) == f"{answer}<|im_end|>"


def test_rows_from_python_are_those_of_the_file(tmp_path: Path) -> None:
    rows, tokenizer = chats(12), make_tiny_tokenizer()
    rows = [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in rows]
    settings = FitSettings(seq_len=64, device="cpu", output_dir=str(tmp_path), train_on="all")
    trainer = RecursiveTrainer(
        recursive(), settings, Dataset.from_list(rows), Dataset.from_list(rows[:2]), tokenizer, saver=None, console=False
    )
    (tmp_path / "valid.jsonl").write_text(json.dumps(rows[0]))
    write_jsonl(tmp_path / "train.jsonl", rows)
    blocks = load_blocks(DataSettings(dataset_name=str(tmp_path), train_on="all"), tokenizer, 64, 0)
    assert trainer.train_dataset is not None and trainer.train_dataset[:] == blocks.train[:]


def test_a_named_text_column_of_python_rows(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    settings = FitSettings(seq_len=8, device="cpu", output_dir=str(tmp_path), text_column="text")
    with pytest.raises(UserError, match="train_dataset: expected rows with input_ids, with text"):
        RecursiveTrainer(recursive(), settings, rows, None, make_tiny_tokenizer(), saver=None, console=False)

"""Question sets by name, and which tokens of their questions are trained on."""

from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from recursify.cli import main as cli
from recursify.data.loading import DataSettings, load_blocks, load_documents
from recursify.data.question_rows import label_tokens, question_rows
from recursify.data.question_sets import divide, is_questions, load_questions
from recursify.data.tasks import as_text, generate, prompt
from recursify.errors import UserError
from recursify.network.losses import IGNORED
from tests.support import tiny
from tests.support.hub_stand_in import HubStandIn

BABI = "1 Mary went to the kitchen.\n2 Where is Mary? \tkitchen\t1\n3 Mary went to the garden.\n4 Where is Mary? \tgarden\t3\n"
TOKENIZER = tiny.make_tiny_tokenizer()


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    path = tmp_path / "qa1.txt"
    path.write_text(BABI * 10)
    return path


def test_names() -> None:
    assert all(map(is_questions, ("permutations", "addition:count=3", "babi:qa1.txt", "gsm8k:openai/gsm8k/main/test.parquet")))
    assert not any(map(is_questions, ("wikitext", "gsm8k", "text.txt", "./permutations", "openai/gsm8k")))


@pytest.mark.parametrize(
    ("written", "difficulties"),
    [("3", [3]), ("2-5", [2, 3, 4, 5]), ("4-16/4", [4, 8, 12, 16]), ("4-10/4", [4, 8]), ("8+2-3", [2, 3, 8]), ("2+2", [2])],
)
def test_difficulties(written: str, difficulties: list[int]) -> None:
    items = load_questions(f"addition:difficulty={written},count=3", "test")
    assert [item.difficulty for item in items] == [difficulty for difficulty in difficulties for _ in range(3)]


def test_synthetic_sets_follow_their_options() -> None:
    assert load_questions("permutations:difficulty=6,count=4,seed=2,group=S5", "test") == generate(
        "permutations", 6, 4, 2, split="test", group="S5"
    )
    assert load_questions("pointers:difficulty=3,nodes=9,count=2", "train") == generate("pointers", 3, 2, 0, nodes=9)
    assert [item.difficulty for item in load_questions("addition", "test")] == [d for d in range(1, 9) for _ in range(500)]


def test_file_sets_keep_their_order(babi: Path) -> None:
    for split in ("train", "test"):
        assert [item.answer for item in load_questions(f"babi:{babi}", split)] == ["kitchen", "garden"] * 10


def test_a_file_of_a_data_set_on_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    record = {"question": "1 + 1?", "answer": "One and one.\n#### 2"}
    (tmp_path / "main" / "test.jsonl").write_text(json.dumps(record))
    hub.add_dataset("your/sums", tmp_path)
    (item,) = load_questions("gsm8k:your/sums/main/test.jsonl", "test")
    assert (item.question, item.answer) == ("1 + 1?", "2")
    with pytest.raises(UserError, match=r"no file your/sums/dev\.jsonl, and the hub has no dataset your/sums with a file dev\.jsonl"):
        load_questions("gsm8k:your/sums/dev.jsonl", "test")
    hub.down = True
    with pytest.raises(UserError, match=r"no file your/sums/x\.jsonl, and x\.jsonl of your/sums cannot be fetched from the hub: "):
        load_questions("gsm8k:your/sums/x.jsonl", "test")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "riddles",
            "no question set 'riddles'; there are permutations, pointers, addition, booleans, chains, facts, and as NAME:FILE gsm8k, svamp",
        ),
        ("babi", "babi is read from a file: a local one, babi:FILE, such as gsm8k:test.jsonl, or one of a dataset on the hub"),
        ("gsm8k:", "gsm8k is read from a file: a local one, gsm8k:FILE"),
        ("babi:nowhere.txt", "no file nowhere.txt; expected a file of babi"),
        ("addition:difficulty", "addition:difficulty: expected options such as difficulty=4-32,count=200, each once, found 'difficulty'"),
        ("addition:count=2,count=3", "each once, found 'count=3'"),
        ("addition:count=two", "addition:count=two: expected a whole number as count, found 'two'"),
        ("pointers:nodes=few", "pointers:nodes=few: expected a whole number as nodes, found 'few'"),
        ("addition:difficulty=hard", "expected as difficulty a number, a range such as 4-32, every fourth of it as 4-32/4, or several"),
        ("addition:difficulty=4/2", "found '4/2'"),
        ("addition:difficulty=4-8/0", "found '4-8/0'"),
        ("addition:difficulty=8-4", "found '8-4', which holds none"),
        ("addition:difficulty=0", "addition: expected a difficulty of at least 1, got 0"),
        ("addition:group=S3", "addition: unknown option 'group'; it has difficulty, count, seed"),
    ],
)
def test_refusals(name: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_questions(name, "test")
    assert message in str(refused.value)


def test_held_out_items(babi: Path) -> None:
    train, held = divide("addition:difficulty=1-4,count=25")
    assert (len(train), len(held)) == (95, 5)
    assert not set(train) & set(held) and {item.difficulty for item in train} == {1, 2, 3, 4}
    assert divide("addition:difficulty=1-4,count=25") == (train, held)
    items = load_questions(f"babi:{babi}", "train")
    assert divide(f"babi:{babi}") == (items[:-1], items[-1:])
    with pytest.raises(
        UserError, match=r"addition:difficulty=2,count=1: expected at least 2 questions, one of them to validate on, found 1"
    ):
        divide("addition:difficulty=2,count=1")


@pytest.mark.parametrize(("count", "share"), [(1, 1), (14, 1), (16, 2), (24, 2), (26, 3)])
def test_one_in_twenty_is_set_aside(count: int, share: int, tmp_path: Path) -> None:
    """The last questions of a file; of generated ones by a fixed seed."""
    name = f"addition:difficulty=3+5,count={count}"
    items = load_questions(name, "train")
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    assert divide(name) == (shuffled[:-share], shuffled[-share:])
    (tmp_path / "qa.txt").write_text(BABI * count)
    items = load_questions(f"babi:{tmp_path / 'qa.txt'}", "train")
    assert divide(f"babi:{tmp_path / 'qa.txt'}") == (items[:-share], items[-share:])


def test_default_task_options() -> None:
    assert load_questions("addition:difficulty=3", "train") == generate("addition", 3, 500, 0, split="train")
    assert load_questions("addition:difficulty=3,count=2", "test") == generate("addition", 3, 2, 0, split="test")
    assert load_questions("addition:difficulty=3,count=2", "train") != load_questions("addition:difficulty=3,count=2", "test")
    assert divide("addition:difficulty=3,count=4")[0][0] in load_questions("addition:difficulty=3,count=4", "train")


# Trained parameters


def ending(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, but it appends an end-of-text token to every text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tiny.END_OF_TEXT}", special_tokens=[(tiny.END_OF_TEXT, tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("name", ["addition", "permutations"])
def test_question_rows_do_not_duplicate_end_of_text(name: str) -> None:
    items = generate(name, 4, 3, 0)
    own = ending(tiny.make_tiny_tokenizer())
    assert own("x")["input_ids"][-1] == own.eos_token_id
    assert list(question_rows(items, own, 90)) == list(question_rows(items, TOKENIZER, 90))


def test_states_of_several_tokens_give_no_labels() -> None:
    item = generate("permutations", 5, 1, 0)[0]
    wide = replace(item, labels=(*item.labels[:-1], "nomadic zebra"))
    assert label_tokens(item, TOKENIZER) is not None and label_tokens(wide, TOKENIZER) is None


def test_state_token_has_a_leading_space_if_the_vocabulary_has_it() -> None:
    item = generate("permutations", 5, 1, 0)[0]
    ids = {letter: [TOKENIZER(written)["input_ids"] for written in (f" {letter}", letter)] for letter in string.ascii_letters}
    both = [letter for letter, (spaced, bare) in ids.items() if len(spaced) == len(bare) == 1]
    alone = [letter for letter, (spaced, bare) in ids.items() if len(spaced) == 2 and len(bare) == 1]
    assert both and alone
    labelled = label_tokens(replace(item, labels=(both[0], alone[0]) * 2 + (both[0],)), TOKENIZER)
    assert labelled is not None
    assert labelled[2] == [ids[both[0]][0][0], ids[alone[0]][1][0]] * 2 + [ids[both[0]][0][0]]


def test_rows_that_are_full_to_the_last_token() -> None:
    items = generate("addition", 2, 6, 0)
    lengths = [len(TOKENIZER(as_text(item))["input_ids"]) + 1 for item in items]
    rows = list(question_rows(items, TOKENIZER, lengths[0] + lengths[1]))
    assert len(documents(rows[:1])) == 2 and rows[0]["labels"][-1] == TOKENIZER.eos_token_id != IGNORED
    rows = list(question_rows(items, TOKENIZER, lengths[0] + lengths[1] + 1))
    assert rows[0]["input_ids"][-2:] == [TOKENIZER.eos_token_id] * 2 and rows[0]["labels"][-1] == IGNORED


def test_validation_questions_are_held_out_and_text_is_fully_scored(tmp_path: Path) -> None:
    name = "addition:difficulty=2,count=40"
    blocks = load_blocks(DataSettings(dataset_name=name), TOKENIZER, 32, 0)
    train, held = divide(name)
    for found, items in ((blocks.train, train), (blocks.validation, held)):
        assert list(found) == list(question_rows(items, TOKENIZER, 32))
    assert list(blocks.train) != list(blocks.validation)


def documents(rows: list[dict[str, list[int]]]) -> list[list[tuple[int, int]]]:
    """The questions in rows of ids and labels, one list of pairs each; what fills the rows is left out."""
    found: list[list[tuple[int, int]]] = [[]]
    for row in rows:
        for pair in zip(row["input_ids"], row["labels"], strict=True):
            found[-1].append(pair)
            if pair[0] == TOKENIZER.eos_token_id:
                found.append([])
    return [document for document in found if len(document) > 1]


@given(st.lists(st.tuples(st.sampled_from(["addition", "pointers", "booleans"]), st.integers(1, 3)), min_size=1, max_size=6))
def test_only_answers_are_scored(chosen: list[tuple[str, int]]) -> None:
    items = [generate(name, difficulty, 1, seed)[0] for seed, (name, difficulty) in enumerate(chosen)]
    rows = question_rows([item for item in items if not item.labels], TOKENIZER, 512)
    for item, document in zip([item for item in items if not item.labels], documents(list(rows)), strict=True):
        asked = TOKENIZER(prompt(item))["input_ids"]
        ids, labels = zip(*document, strict=True)
        assert list(ids) == [*TOKENIZER(as_text(item))["input_ids"], TOKENIZER.eos_token_id]
        assert labels[: len(asked)] == (IGNORED,) * len(asked)
        assert labels[len(asked) :] == ids[len(asked) :]
    assert all(len(row["input_ids"]) == len(row["labels"]) == 512 for row in rows)


def test_states_are_scored_where_they_are_determined() -> None:
    item = generate("permutations", 5, 1, 0)[0]
    document = documents(list(question_rows([item], TOKENIZER, 60)))[0]
    ids, labels = zip(*document, strict=True)
    labelled = label_tokens(item, TOKENIZER)
    assert labelled is not None
    asked, places, targets = labelled
    assert [TOKENIZER.decode(target).strip() for target in targets] == list(item.labels)
    assert list(ids[: len(asked)]) == asked == TOKENIZER(prompt(item))["input_ids"]
    assert [labels[place + 1] for place in places] == targets  # scored at the token of the letter itself
    assert [TOKENIZER.decode(ids[place]).strip() for place in places] == item.question.split()
    assert [label for label in labels if label != IGNORED][: len(targets)] == targets
    assert "".join(TOKENIZER.decode(labels[-3:])).strip().endswith(f"{item.answer}{tiny.END_OF_TEXT}")


def test_multi_token_states_are_not_scored() -> None:
    item = generate("permutations", 5, 1, 0, group="S5")[0]
    assert label_tokens(item, TOKENIZER) is None
    document = documents(list(question_rows([item], TOKENIZER, 60)))[0]
    assert TOKENIZER.decode([label for _, label in document if label != IGNORED]).strip() == f"{item.answer}{tiny.END_OF_TEXT}"
    assert label_tokens(generate("addition", 2, 1, 0)[0], TOKENIZER) is None


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(0, 30))
def test_rows_are_filled_in_order_and_as_far_as_questions_fit(digits: list[int], room: int) -> None:
    items = [generate("addition", difficulty, 1, seed)[0] for seed, difficulty in enumerate(digits)]
    whole = [[*TOKENIZER(as_text(item))["input_ids"], TOKENIZER.eos_token_id] for item in items]
    length = max(map(len, whole)) + room
    rows = list(question_rows(items, TOKENIZER, length))
    assert [[token for token, _ in document] for document in documents(rows)] == whole
    kept = [length - row["labels"][::-1].index(TOKENIZER.eos_token_id) for row in rows]  # up to the end of the last question
    assert all(row["input_ids"][end:] == [TOKENIZER.eos_token_id] * (length - end) for row, end in zip(rows, kept, strict=True))
    firsts = iter(whole[sum(len(documents([row])) for row in rows[:n])] for n in range(1, len(rows)))
    assert all(end + len(first) > length for end, first in zip(kept, firsts, strict=False))


def test_a_row_too_short_for_a_question() -> None:
    items = generate("permutations", 4, 2, 0) + generate("permutations", 9, 2, 0)
    longest = max(len(TOKENIZER(as_text(item))["input_ids"]) + 1 for item in items)
    with pytest.raises(UserError, match=f"--seq_len: expected at least {longest}, the tokens of the longest question, got 16"):
        question_rows(items, TOKENIZER, 16)
    assert len(question_rows(items, TOKENIZER, longest)) == 4


def test_questions_mixed_with_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(tiny.sentences(0, 200)))
    questions = DataSettings(dataset_name="permutations:difficulty=4,count=100", mix=(f"{tmp_path / 'text.txt'}=0.5",))
    blocks = load_blocks(questions, TOKENIZER, 64, 0)
    text = [row for row in blocks.train if row["labels"] == row["input_ids"]]
    assert len(text) == round((len(blocks.train) - len(text)) / 2) > 0
    assert blocks.validation.column_names == ["input_ids", "labels"]


def test_questions_are_no_text() -> None:
    with pytest.raises(UserError, match=r"--dataset_name permutations: expected text, got questions; .* ask --questions"):
        load_documents(DataSettings(dataset_name="permutations"))


def test_training_on_questions_from_the_command_line(donor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = tmp_path / "start.pt"
    cli.convert(["--qwen_model", str(donor_folder), "--H_cycles", "2", "--L_cycles", "1", "--L_layers", "2", "--output_path", str(start)])
    run = ["--checkpoint", str(start), "--max_steps", "2", "--seq_len", "48", "--generate_every", "0", "--output_dir", str(tmp_path)]
    cli.train([*run, "--dataset_name", "permutations:difficulty=4-6,count=40"])
    assert (tmp_path / "qwen_recursive_finetuned_best.pt").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.train([*run, "--dataset_name", "permutations", "--streaming"])
    assert "--streaming: question sets are small and not streamed; leave it out" in capsys.readouterr().err

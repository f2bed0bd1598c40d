"""Conversations: their forms in every kind of file, what is refused, what is trained on, and how they are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from recursify import RecursiveLLM
from recursify.data.conversation_blocks import OPEN_BLOCKS, pack
from recursify.data.conversation_rows import Encoder
from recursify.data.conversations import COLUMN
from recursify.data.documents import measured_documents
from recursify.data.loading import Blocks, DataSettings, load_blocks
from recursify.data.settings import TextSource
from recursify.network.configuration_recursive_llm import from_donor
from recursify.training.collate import Collate
from tests.support import tiny
from tests.support.corpora import load, says, write_jsonl
from tests.support.hub_stand_in import HubStandIn
from tests.support.tokenizers import with_template
from tests.support.trl_rows import MARKED, TALKS, say

IGNORED = -100
SEQ_LEN = 64
# Of Qwen3's kind: an answer that is not the last one loses its block of thought.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Of Phi3's kind: an end of text behind the whole, which is not there before an answer.
ENDING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
COUNTING = "{{ messages|length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def chats(count: int) -> list[dict[str, Any]]:
    return [{"messages": say(f"What is {i}?", f"The ship {i}.", "And then?", f"The song {i}.")} for i in range(count)]


FORMS: dict[str, list[dict[str, Any]]] = {
    "messages": chats(9),
    "prompt": [{"prompt": f"The ship {i} is", "completion": f" number {i}."} for i in range(9)],
    "talks": [{"prompt": say(f"Ship {i}?"), "completion": say("", f"Number {i}.")[1:]} for i in range(9)],
    "alpaca": [{"instruction": "Name it.", "input": f"Ship {i}" * (i % 2), "output": f"Number {i}."} for i in range(9)],
}  # fmt: skip


def loaded(name: object, tokenizer: Any, seq_len: int = SEQ_LEN, **settings: Any) -> Blocks:
    return load_blocks(DataSettings(dataset_name=str(name), **settings), tokenizer, seq_len, 7)


def rows_of(blocks: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every row in the blocks, which begin where positions do."""
    found = []
    for block in blocks:
        starts = [at for at, position in enumerate(block["position_ids"]) if position == 0]
        for first, last in zip(starts, [*starts[1:], len(block["input_ids"])], strict=True):
            found.append((list(block["input_ids"][first:last]), list(block["labels"][first:last])))
    return [row for row in found if any(label != IGNORED for label in row[1])]


def trained_text(tokenizer: Any, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORED])


def answers_of(blocks: Any, tokenizer: Any) -> list[str]:
    return sorted(trained_text(tokenizer, labels) for _, labels in rows_of(blocks))


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
    def test_every_form_in_every_format(self, form: str, suffix: str, tmp_path: Path) -> None:
        path, tokenizer = tmp_path / f"chats{suffix}", with_template()
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(FORMS[form]), path)
        elif suffix == ".json":
            path.write_text(json.dumps(FORMS[form], indent=1))
        else:
            write_jsonl(path, FORMS[form])
        blocks = loaded(path, tokenizer, 128)
        end = {"prompt": "<|endoftext|>", "messages": "<|im_end|>"}.get(form, "<|im_end|>\n")
        said = {"messages": "The ship {}.<|im_end|>The song {}.", "prompt": " number {}."}.get(form, "Number {}.")
        expected = sorted(said.replace("{}", str(i)) + end for i in range(9))
        assert sorted(answers_of(blocks.train, tokenizer) + answers_of(blocks.validation, tokenizer)) == expected

    def test_a_csv_file_of_prompts(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("prompt,completion,more\n" + "".join(f"p{i}, c{i},x\n" for i in range(3)))
        blocks, tokenizer = loaded(tmp_path / "a.csv", tiny.make_tiny_tokenizer()), tiny.make_tiny_tokenizer()
        both = answers_of(blocks.train, tokenizer) + answers_of(blocks.validation, tokenizer)
        assert sorted(both) == [f" c{i}<|endoftext|>" for i in range(3)]

    @pytest.mark.parametrize("form", FORMS)
    def test_a_data_set_of_the_hub(self, form: str, hub: HubStandIn, tmp_path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(FORMS[form]), tmp_path / "train-00000-of-00001.parquet")
        hub.add_dataset("some/chats", tmp_path)
        tokenizer = with_template()
        local = loaded(tmp_path / "train-00000-of-00001.parquet", tokenizer, 128)
        assert rows_of(loaded("some/chats", tokenizer, 128).train) == rows_of(local.train)

    def test_a_folder_with_a_validation_file(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", chats(3))
        write_jsonl(tmp_path / "valid.jsonl", chats(5)[3:])
        tokenizer = with_template()
        assert len(rows_of(loaded(tmp_path, tokenizer).validation)) == 2 and len(rows_of(loaded(tmp_path, tokenizer).train)) == 3
        (tmp_path / "zz.txt").write_text("text")
        with says("zz.txt: expected rows of messages", "got text", "--mix"):
            loaded(tmp_path, tokenizer)

    def test_a_named_column_of_text_wins(self, tmp_path: Path) -> None:
        rows = [{"instruction": f"i{i}", "output": f"o{i}", "text": f"text {i}"} for i in range(4)]
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        assert load(path).train.column_names == [COLUMN, "place"]
        named = load(path, text_column="text")
        assert sorted([*named.train["text"], *named.validation["text"]]) == [f"text {i}" for i in range(4)]

    def test_a_hub_column_of_text_wins(self, hub: HubStandIn, tmp_path: Path) -> None:
        pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "text": ["e", "f"]}), tmp_path / "train.parquet")
        hub.add_dataset("some/both", tmp_path)
        assert load("some/both").train.column_names == [COLUMN, "place"]
        assert load("some/both", text_column="text").train.column_names == ["text"]

    def test_what_measures_reads_text(self, tmp_path: Path, hub: HubStandIn) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", chats(4))
        for split in (None, "validation"):
            with says("a.jsonl, line 1 has no column 'text'", "conversations (messages)", "--text_column"):
                measured_documents(TextSource(dataset_name=str(path)), split)
        both = write_jsonl(tmp_path / "b.jsonl", [{**row, "text": "some text"} for row in chats(4)])
        assert measured_documents(TextSource(dataset_name=str(both)))[0].column_names == ["text"]

    def test_not_streamed(self, hub: HubStandIn, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "train.jsonl", chats(4))
        hub.add_dataset("some/chats", tmp_path)
        for name in (path, "some/chats"):
            with says("--streaming", str(name), "rows of messages", "leave --streaming out"):
                loaded(name, with_template(), streaming=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("messages", "said"),
        [
            ([], "expected messages in 'messages', each with role and content, got []"),
            ("Hi", "expected messages in 'messages', each with role and content, got \"Hi\""),
            (["Hi"], 'messages[0]: expected a message such as {"role": "user", "content": "..."}, got "Hi"'),
            ([{"content": "Hi"}], "messages[0]: expected as role one of system, developer, user, assistant, tool, got"),
            ([*say("Hi"), {"role": "bot", "content": "x"}], "messages[1]: expected as role one of"),
            ([{"role": "user"}], "messages[0]: expected some text as content"),
            ([{"role": "user", "content": " \n"}], "messages[0]: expected some text as content"),
            ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "messages[0]: expected text as content"),
        ],
    )
    def test_a_malformed_message(self, messages: Any, said: str, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [chats(1)[0], {"messages": messages}])
        with says("a.jsonl, line 2", said, "mend or remove the row"):
            load(path)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"prompt": "a", "completion": say("b")}, "both as text or both as lists of messages"),
            ({"prompt": [{"role": "user"}], "completion": say("b")}, "prompt[0]: expected some text as content"),
            ({"prompt": say("a"), "completion": []}, "expected messages in 'completion', each with role and content, got []"),
            ({"prompt": "a", "completion": "\ud83d"}, "half of a surrogate pair"),
            ({"prompt": "a", "completion": "b", "tools": "[{"}, "expected 'tools' as a list or its JSON"),
            ({"prompt": "a", "completion": "b", "tools": "[" * 200_000}, "expected 'tools' as a list or its JSON"),
            ({"prompt": "a", "completion": "b", "tools": 3}, "expected a list as 'tools', got 3"),
            ({"prompt": "a", "completion": "b", "chat_template_kwargs": []}, "expected a dict as 'chat_template_kwargs'"),
            (["a"], "expected an object with 'prompt' and 'completion', got list"),
        ],
    )
    def test_a_malformed_prompt_or_option(self, row: Any, said: str, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, row])
        with says("a.jsonl, line 2", said):
            load(path)

    def test_a_malformed_alpaca_row(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3}])
        with says("a.jsonl, line 2", "expected text as 'output', got 3"):
            load(path)

    def test_a_malformed_row_of_the_hub(self, hub: HubStandIn, tmp_path: Path) -> None:
        pq.write_table(pa.Table.from_pylist([*chats(2), {"messages": [{"role": "bot", "content": "x"}]}]), tmp_path / "train.parquet")
        hub.add_dataset("some/chats", tmp_path)
        with says("some/chats, row 2, messages[0]: expected as role one of"):
            load("some/chats")

    def test_rows_without_an_answer_are_left_out_and_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = [{"instruction": f"a{i}", "output": text} for i, text in enumerate(["x", "", None, " \n", "y"])]
        documents = load(write_jsonl(tmp_path / "a.jsonl", [*rows, {"instruction": "", "output": "z"}]))
        assert len(documents.train) + len(documents.validation) == 2
        assert "a.jsonl: 4 of 6 rows have no 'output' and are left out" in caplog.text

    def test_one_conversation(self, tmp_path: Path) -> None:
        with says("a.jsonl: expected at least 2 conversations"):
            load(write_jsonl(tmp_path / "a.jsonl", chats(1)))

    def test_no_chat_template(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", chats(2))
        with says("a.jsonl, line ", "messages need a chat template, and tokenizer", "has none", "--tokenizer_path"):
            loaded(path, tiny.make_tiny_tokenizer())

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            (COUNTING, "changes what is before an answer once that is there"),
            (ENDLESS, "ends an answer in no special token"),
            ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ],
    )
    def test_a_template_in_which_answers_cannot_be_told(self, template: str, said: str, tmp_path: Path) -> None:
        path, tokenizer = write_jsonl(tmp_path / "a.jsonl", chats(3)), with_template(template)
        with says("a.jsonl, line ", said):
            loaded(path, tokenizer)
        if "raise" not in template:
            assert len(rows_of(loaded(path, tokenizer, train_on="all").train)) == 2

    def test_nothing_to_train_on(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": say(f"Only asked {i}")} for i in range(3)])
        with says("a.jsonl: none of 2 conversations has a token to train on among its first 64", "--seq_len"):
            loaded(path, with_template())
        assert len(rows_of(loaded(path, with_template(), train_on="all").train)) == 2


class TestLabels:
    @pytest.mark.parametrize("template", [None, MARKED, REWRITING, ENDING], ids=["plain", "marked", "rewriting", "ending"])
    def test_every_answer_and_the_end_of_its_turn(self, template: str | None) -> None:
        tokenizer = with_template(template) if template else tiny.make_qwen_tokenizer()
        ids, labels = Encoder(tokenizer, "assistant")(chats(1)[0])
        thought = "<think></think>" if template == REWRITING else ""
        assert trained_text(tokenizer, labels) == f"The ship 0.<|im_end|>{thought}The song 0.<|im_end|>"
        assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))

    def test_special_tokens_are_not_doubled(self) -> None:
        tokenizer = with_template("{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
        tokenizer.bos_token = "<|im_start|>"
        begin = ("<|im_start|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[begin])
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        ids, _ = Encoder(tokenizer, "assistant")({"messages": say("a", "b")})
        assert tokenizer.decode(ids) == "<|im_start|>a<|im_end|>b<|im_end|>"

    def test_tools_and_template_options_reach_the_template(self) -> None:
        template = "{{ tools[0].name }} {{ mood }}" + MARKED
        tokenizer = with_template(template)
        row = {"messages": say("a", "b"), "tools": [{"name": "find"}], "chat_template_kwargs": {"mood": "calm"}}
        for train_on in ("assistant", "all"):
            assert tokenizer.decode(Encoder(tokenizer, train_on)(row)[0]).startswith("find calm<|im_start|>user")  # type: ignore[arg-type]

    def test_tools_may_be_json_and_null_fields_of_a_table_are_none(self, tmp_path: Path) -> None:
        call = {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f"}}]}
        rows = [{"messages": say("a", "b"), "tools": json.dumps([{"name": "find"}])}, {"messages": [*say("a"), call], "tools": None}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        documents = load(tmp_path / "a.parquet")
        found = [json.loads(row) for table in (documents.train, documents.validation) for row in table[COLUMN]]
        assert sorted(found, key=len) == [{"messages": [*say("a"), call]}, {"messages": say("a", "b"), "tools": [{"name": "find"}]}]

    def test_alpaca_through_a_template_equals_the_messages(self) -> None:
        encode = Encoder(with_template(), "assistant")
        asked = {"instruction": "Name it.", "input": "A ship", "output": "Yes."}
        assert encode(asked) == encode({"prompt": say("Name it.\n\nA ship"), "completion": say("", "Yes.")[1:]})
        assert encode({**asked, "input": ""}) == encode({"prompt": say("Name it."), "completion": say("", "Yes.")[1:]})

    def test_alpaca_without_a_template_is_stanfords_prompt(self) -> None:
        tokenizer = tiny.make_tiny_tokenizer()
        encode = Encoder(tokenizer, "assistant")
        ids, labels = encode({"instruction": "Name it.", "input": "A ship", "output": "Yes."})
        assert tokenizer.decode(ids) == (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nName it.\n\n### Input:\nA ship\n\n### Response:\nYes.<|endoftext|>"
        )
        assert trained_text(tokenizer, labels) == "Yes.<|endoftext|>"
        assert tokenizer.decode(encode({"instruction": "Name it.", "output": "Yes."})[0]) == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nName it.\n\n### Response:\nYes.<|endoftext|>"
        )

    def test_markers_that_leave_out_the_end_of_a_turn(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        open_ended = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\\n' }}")
        assert open_ended != MARKED
        path = write_jsonl(tmp_path / "a.jsonl", chats(3))
        loaded(path, with_template(MARKED))
        assert "leave out the token that ends a turn" not in caplog.text
        loaded(path, with_template(open_ended))
        assert "leave out the token that ends a turn" in caplog.text


class TestBlocks:
    def test_what_is_cut_and_lost_is_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = [*chats(6), {"messages": say("x" * 100, "lost")}, {"messages": say("y", "z" * 100)}]
        (tmp_path / "valid.jsonl").write_text(json.dumps(chats(1)[0]))
        path, tokenizer = write_jsonl(tmp_path / "train.jsonl", rows), with_template()
        blocks = loaded(path.parent, tokenizer, 72)
        encoded = [Encoder(tokenizer, "assistant")(row)[0] for row in rows]
        cut = sum(len(ids) > 72 for ids in encoded)
        assert f"{tmp_path}: {cut} of 8 conversations are longer than --seq_len 72 and were cut" in caplog.text
        assert f"{tmp_path}: 1 of 8 conversations have no token left to train on and were left out" in caplog.text
        assert sorted(ids for ids, _ in rows_of(blocks.train)) == sorted(ids[:72] for ids in [*encoded[:6], encoded[7]])
        caplog.clear()
        loaded(path.parent, tokenizer, 72)  # from the cache
        assert "were cut" in caplog.text and "were left out" in caplog.text

    def test_no_conversation_is_divided_and_blocks_are_filled_well(self) -> None:
        generator = torch.Generator().manual_seed(1)
        sizes = torch.randint(2, 60, (500,), generator=generator).tolist()
        rows = [{"input_ids": torch.full((size,), number).numpy(), "labels": torch.full((size,), number).numpy(), "first": 1}
                for number, size in enumerate(sizes)]  # fmt: skip
        blocks = list(pack(rows, 64, 7))
        found = sorted((ids[0], len(ids)) for ids, _ in rows_of(blocks) if len(set(ids)) == 1 and ids[0] != 7)
        assert found == sorted((number, size) for number, size in enumerate(sizes) if number != 7)
        assert {len(block[name]) for block in blocks for name in block} == {64}
        assert len(blocks) < 1.03 * sum(sizes) / 64 + OPEN_BLOCKS

    def test_an_end_of_turn_that_is_the_end_of_text_divides_no_conversation(self, tmp_path: Path) -> None:
        tokenizer = with_template()
        tokenizer.eos_token = "<|im_end|>"
        blocks = loaded(write_jsonl(tmp_path / "a.jsonl", chats(4)), tokenizer, 128)
        (batch,) = [Collate(tokenizer.eos_token_id)(list(blocks.train))]
        answers = [tokenizer.decode(ids) for ids, _ in rows_of(blocks.train)]
        assert all(answer.count("<|im_end|>") == 4 for answer in answers) and len(answers) == 3
        assert torch.equal(batch["position_ids"], torch.tensor(blocks.train["position_ids"]))

    def test_packed_conversations_equal_single_ones(self, tmp_path: Path) -> None:
        tokenizer = with_template()
        blocks = loaded(write_jsonl(tmp_path / "a.jsonl", chats(4)), tokenizer, 256)
        torch.manual_seed(0)
        shape = {"prelude_layers": 1, "L_layers": 1, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1, "gain_init": 0.3}
        model = RecursiveLLM(from_donor(tiny.tiny_config("qwen2", num_hidden_layers=3), [0, 1, 2], **shape)).eval()
        batch = Collate(None)(list(blocks.train))
        with torch.no_grad():
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
            first = 0
            for ids, _ in rows_of(blocks.train):
                alone = model(input_ids=torch.tensor([ids])).logits[0]
                torch.testing.assert_close(packed[first : first + len(ids)], alone, atol=1e-4, rtol=1e-4)
                first += len(ids)

    def test_mixed_with_text_and_questions(self, tmp_path: Path) -> None:
        tokenizer = with_template()
        text = tmp_path / "book.txt"
        text.write_text("\n<|endoftext|>\n".join(tiny.sentences(1, 120)))
        path = write_jsonl(tmp_path / "a.jsonl", chats(30))
        questions = "permutations:difficulty=2-3,count=20"
        for own, other in ((path, text), (text, path), (path, questions)):
            blocks = loaded(own, tokenizer, 128, mix=(f"{other}=0.5",))
            assert blocks.train.column_names == blocks.validation.column_names == ["input_ids", "labels", "position_ids"]
            alone = loaded(own, tokenizer, 128)
            assert len(blocks.train) == len(alone.train) + round(0.5 * len(alone.train))
            batch = Collate(None)(list(blocks.train))
            assert (batch["position_ids"][:, 1:] == 0).any(dim=1).all()
        plain = loaded(text, tokenizer, 128, mix=(f"{path}=0.5",)).train[0]
        assert plain["labels"] == plain["input_ids"]
        assert [at + 1 for at, token in enumerate(plain["input_ids"][:-1]) if token == tokenizer.eos_token_id] == [
            at for at, position in enumerate(plain["position_ids"]) if position == 0 and at
        ]

    def test_a_second_run_comes_from_the_cache(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", chats(4))
        first, again = (loaded(path, with_template()).train for _ in range(2))
        assert first.cache_files and first.cache_files == again.cache_files
        others = [loaded(path, with_template(), train_on="all").train, loaded(path, with_template(MARKED)).train]
        assert all(other.cache_files != first.cache_files for other in others)

    def test_prompts_of_messages_are_not_trained_on(self) -> None:
        tokenizer = with_template()
        _, labels = Encoder(tokenizer, "assistant")(TALKS[1])
        assert trained_text(tokenizer, labels) == "  Four\n<|im_end|>\n"

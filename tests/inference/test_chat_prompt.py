"""Conversations as prompts: the tokenizer's template, its end of a turn, and plain lines where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from recursify.errors import UserError
from recursify.inference.chat_prompt import Dialogue
from tests.support.tiny import make_qwen_tokenizer, make_tiny_tokenizer
from tests.support.tokenizers import with_template

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "龙虾🦞"}]  # fmt: skip


def test_the_template_of_the_tokenizer() -> None:
    tokenizer = with_template()
    dialogue = Dialogue(tokenizer)
    assert tokenizer.decode(dialogue.prompt(TALK)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n龙虾🦞<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dialogue.ends == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert dialogue.stop == () and dialogue.answer_text(" as it is\n") == " as it is\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0]['content'] }}",
    ],
)
def test_a_template_without_an_end_of_turn(template: str) -> None:
    assert Dialogue(with_template(template)).ends == ()


def test_a_conversation_that_the_template_refuses() -> None:
    dialogue = Dialogue(with_template("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UserError, match="the tokenizer's chat template refuses this conversation: roles must alternate"):
        dialogue.prompt(TALK)


def test_plain_format_without_a_chat_template() -> None:
    tokenizer = make_tiny_tokenizer()
    dialogue = Dialogue(tokenizer)
    assert tokenizer.decode(dialogue.prompt(TALK)) == "Be brief.\n\nUser: Hello\nAssistant: Yes?\nUser: 龙虾🦞\nAssistant:"
    assert (dialogue.ends, dialogue.stop, dialogue.answer_text(" Yes?\n")) == ((), ("\nUser:",), "Yes?")


@pytest.mark.parametrize("tokenizer", [make_tiny_tokenizer(), with_template()], ids=["plain", "template"])
def test_prompt_with_a_surrogate_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="expected UTF-8 text"):
        Dialogue(tokenizer).prompt([{"role": "user", "content": "a\udcff"}])


def test_a_tokenizer_of_qwen2s_kind(tmp_path: Path) -> None:
    """From a folder, with its special tokens and template, which adds a default system message."""
    make_qwen_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    dialogue = Dialogue(tokenizer)
    ids = dialogue.prompt(TALK)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(start) == len(TALK) + 1 and ids.count(end) == len(TALK)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert text.endswith("<|im_start|>user\n龙虾🦞<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(dialogue.prompt(TALK[1:2])).startswith("<|im_start|>system\nBe of help.<|im_end|>\n<|im_start|>user\nHello")
    assert dialogue.ends == (end,) != (tokenizer.eos_token_id,) and dialogue.stop == ()


@pytest.mark.parametrize("named", [{"tool_use": "{{ raise_exception('tools only') }}"}, {"default": ""}])
def test_named_templates(named: dict[str, str]) -> None:
    """The default one, or where there is none, the first that renders a plain conversation."""
    tokenizer = with_template()
    plain = tokenizer.chat_template
    wanted = Dialogue(tokenizer).prompt(TALK)
    tokenizer.chat_template = {**named, "default" if "default" in named else "chat": plain, "rag": "{{ documents[0].x }}"}
    assert Dialogue(tokenizer).prompt(TALK) == wanted
    tokenizer.chat_template = {"tool_use": "{{ raise_exception('tools only') }}"}
    assert not Dialogue(tokenizer).has_template

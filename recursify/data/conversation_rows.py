"""Conversations as token ids, with a label for what is trained on.

    encode = Encoder(tokenizer, train_on="assistant")
    ids, labels = encode(json.loads(row))    # labels: -100 but for the assistant's tokens, each with the end of its turn

As TRL's SFTTrainer prepares the same rows: messages through the tokenizer's chat template; a prompt and a completion that are text as
they are written, and an end-of-text token. A template's own `{% generation %}` markers say what the assistant writes. Where it has none,
an answer goes from the end of the prompt for it (the messages before, with `add_generation_prompt`) to the first end of turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..network.losses import IGNORED
from .chat_template import ends_of_turn, render, template_of

TrainOn = Literal["assistant", "all"]

# Of Stanford Alpaca, for tokenizers without a chat template.
_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
_ALPACA_INPUT = ", paired with an input that provides further context"

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ALL_INSTEAD = "train on all tokens (--train_on all), or name a tokenizer whose template has {% generation %} markers (--tokenizer_path)"


class Encoder:
    """Rows of conversations as ids and labels, for one tokenizer.

    Args:
        tokenizer: Fast, with an end-of-text token; messages need its chat template.
        train_on: Whether the labels are those of the answers, or of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn):
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {_name(tokenizer)}: conversations need a fast one, with tokenizer.json; see --tokenizer_path")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.template = template_of(tokenizer)
        self.has_markers = self.template is not None and _MARKER.search(self.template) is not None
        self.ends = ends_of_turn(tokenizer, self.template) if self.template is not None else ()

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of a row, of one length; labels are the ids, or -100 where nothing is trained.

        Raises:
            UserError: Messages that the template refuses, or in which the answers cannot be told.
        """
        if "instruction" in row and self.template is None:
            return self._text(_alpaca_prompt(row), row["output"])
        if isinstance(row.get("prompt"), str):
            return self._text(row["prompt"], row["completion"])
        options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        if "messages" in row:
            return self._messages(row["messages"], options)
        prompt, completion = (row["prompt"], row["completion"]) if "prompt" in row else _alpaca_messages(row)
        return self._completion(prompt, completion, options)

    def leaves_out_the_end(self) -> bool:
        """Whether the markers of the template leave the end of a turn untrained, so that a model does not learn to stop."""
        if not self.has_markers or not self.ends or self.train_on == "all":
            return False
        ids, labels = self._messages([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], {})
        return self.ends[0] in ids and self.ends[0] not in labels

    def _text(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        ids, spans = self._tokens(prompt + completion, add_special_tokens=True)
        if not ids or ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, int(self.tokenizer.eos_token_id)]
        return self._labelled(ids, [(_token_at(spans, len(prompt)), len(ids))])

    def _messages(self, messages: Sequence[Any], options: dict[str, Any]) -> tuple[list[int], list[int]]:
        if self.train_on == "all" or not self.has_markers:
            text = self._render(messages, options)
            ids, spans = self._tokens(text)
            return self._labelled(ids, [] if self.train_on == "all" else self._answers(messages, options, text, ids, spans))
        encoded = self._render(messages, options, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
        return ids, [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]

    def _completion(self, prompt: Sequence[Any], completion: Sequence[Any], options: dict[str, Any]) -> tuple[list[int], list[int]]:
        text = self._render([*prompt, *completion], options)
        ids, spans = self._tokens(text)
        if self.train_on == "all":
            return self._labelled(ids, [])
        begins = self._prompt_length(prompt, options, text)
        return self._labelled(ids, [(_token_at(spans, begins), len(ids))])

    def _answers(
        self, messages: Sequence[Any], options: dict[str, Any], text: str, ids: list[int], spans: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """First and last position, the latter excluded, of every answer with its end of turn."""
        if not self.ends:
            raise UserError(f"the chat template of tokenizer {_name(self.tokenizer)} ends an answer in no special token: {_ALL_INSTEAD}")
        found = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begins = _token_at(spans, self._prompt_length(messages[:number], options, text))
                found.append((begins, ids.index(self.ends[0], begins) + 1 if self.ends[0] in ids[begins:] else len(ids)))
        return found

    def _prompt_length(self, messages: Sequence[Any], options: dict[str, Any], text: str) -> int:
        """Characters of the prompt for the next answer, which the text of the whole conversation must begin with."""
        prompt = self._render(messages, options, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise UserError(
                f"the chat template of tokenizer {_name(self.tokenizer)} changes what is before an answer once that is there, so "
                f"that its beginning cannot be told: {_ALL_INSTEAD}"
            )
        return len(prompt)

    def _render(self, messages: Sequence[Any], options: dict[str, Any], **how: Any) -> Any:
        if self.template is None:
            raise UserError(f"messages need a chat template, and tokenizer {_name(self.tokenizer)} has none; see --tokenizer_path")
        return render(self.tokenizer, self.template, messages, **{"tokenize": False, **options, **how})

    def _tokens(self, text: str, add_special_tokens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their character spans; a template has written the special tokens itself."""
        found = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _labelled(self, ids: list[int], answers: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        if self.train_on == "all":
            return ids, list(ids)
        labels = [IGNORED] * len(ids)
        for begins, ends in answers:
            labels[begins:ends] = ids[begins:ends]
        return ids, labels


def _token_at(spans: list[tuple[int, int]], position: int) -> int:
    """The first token that goes beyond a character position. Tokens of spaces may be said to have no width."""
    return next((number for number, (_, end) in enumerate(spans) if end > position), len(spans))


def _alpaca_prompt(row: Mapping[str, Any]) -> str:
    given = row.get("input", "")
    head = _ALPACA.format(_ALPACA_INPUT if given else "") + f"### Instruction:\n{row['instruction']}\n\n"
    return head + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"


def _alpaca_messages(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    return [{"role": "user", "content": asked}], [{"role": "assistant", "content": row["output"]}]


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)

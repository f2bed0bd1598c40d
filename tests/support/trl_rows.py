"""Rows of every form as TRL's SFTTrainer prepares them, and the file of it that tests read where TRL is not installed.

PYTHONPATH=. python -m tests.support.trl_rows    # writes tests/data/trl_rows.json anew; needs trl
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.support.tiny import make_qwen_tokenizer, tiny_model
from tests.support.tokenizers import with_template

FILE = Path(__file__).parents[1] / "data" / "trl_rows.json"

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def say(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of a user and an assistant in turn."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(contents), contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


MESSAGES = [
    {"messages": say("The old river?", "The castle.")},
    {"messages": say("Name a ship.", "  if x:\n    the ship  ", "Another one", "龙虾🦞 é", system="Be brief.")},
    {"messages": say("\n\nThe forest", "\n\nThe quiet song\n\n")},
]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "ship"}}}
TOOLS = [
    {
        "messages": [
            *say("Where is the ship?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "find", "content": "near the river"},
            {"role": "assistant", "content": "Near the river."},
        ],
        "tools": [TOOL],
    }
]
TALKS = [
    {"prompt": say("The old river?"), "completion": say("", "The castle.")[1:]},
    {"prompt": say("One", "Two", "Three", system="Count."), "completion": say("", "  Four\n")[1:]},
]
TEXTS = [
    {"prompt": "The capital of the castle is", "completion": " the old village."},
    {"prompt": "The old river ", "completion": "follows the ship"},
    {"prompt": "", "completion": "   spaces   "},
    {"prompt": "nai", "completion": "ve 龙虾🦞"},
]

# Name -> chat template (qwen2.5: as TRL has it), rows, the loss, the longest row.
CASES: dict[str, tuple[str | None, list[dict[str, Any]], str, int | None]] = {
    "messages, markers": (MARKED, MESSAGES, "assistant", None),
    "messages, markers, all": (MARKED, MESSAGES, "all", None),
    "messages, markers, cut": (MARKED, MESSAGES, "assistant", 40),
    "messages, qwen2.5": ("qwen2.5", MESSAGES, "assistant", None),
    "tools, qwen2.5": ("qwen2.5", TOOLS, "assistant", None),
    "tools, qwen2.5, all": ("qwen2.5", TOOLS, "all", None),
    "prompt of messages, markers": (MARKED, TALKS, "assistant", None),
    "prompt of messages, qwen2.5": ("qwen2.5", TALKS, "assistant", None),
    "prompt of messages, all": ("qwen2.5", TALKS, "all", None),
    "prompt of text": (None, TEXTS, "assistant", None),
    "prompt of text, all": (None, TEXTS, "all", None),
    "prompt of text, cut": (None, TEXTS, "assistant", 12),
}


def tokenizer_for(template: str | None) -> Any:
    """A tokenizer with a chat template; text without one is tokenized by one of Qwen2's kind, which has NFC and byte tokens."""
    if template is not None:
        return with_template(template)
    tokenizer = make_qwen_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def by_trl(template: str | None, rows: list[dict[str, Any]], train_on: str, most: int | None) -> list[dict[str, list[int]]]:
    """The rows with `input_ids` and `labels`, as TRL's SFTTrainer makes them. Needs trl."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_for(template)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_length=most, report_to="none", use_cpu=True, bf16=False,
            assistant_only_loss="messages" in rows[0] and train_on == "assistant",
            completion_only_loss=False if train_on == "all" else None,
        )  # fmt: skip
        model = tiny_model("qwen2", num_hidden_layers=1, vocab_size=1024)
        trainer = SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        return [{name: list(row[name]) for name in ("input_ids", "labels")} for row in trainer.train_dataset]


def named_template(template: str | None) -> str | None:
    """TRL's copy of a published template."""
    if template != "qwen2.5":
        return template
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")


def main() -> None:
    import trl

    cases = {}
    for name, (template, rows, train_on, most) in CASES.items():
        template = named_template(template)
        found = by_trl(template, rows, train_on, most)
        cases[name] = {"template": template, "rows": rows, "train_on": train_on, "most": most, "trl": found}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    FILE.write_text(f'{{"trl": "{trl.__version__}", "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
